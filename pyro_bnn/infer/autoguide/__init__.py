# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Automatic guides."""

from pyro_bnn.infer.autoguide.hfl import AutoHessianFreeLaplace
from pyro_bnn.infer.autoguide.laplace import AutoLaplace
from pyro_bnn.infer.autoguide.linearized import LinearizedOutputs, MAPReport, UnconvergedMAPWarning

__all__ = [
    "AutoHessianFreeLaplace",
    "AutoLaplace",
    "LinearizedOutputs",
    "MAPReport",
    "UnconvergedMAPWarning",
]
