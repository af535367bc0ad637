# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Automatic guides."""

from pyro_bnn.infer.autoguide.hfl import AutoHessianFreeLaplace
from pyro_bnn.infer.autoguide.laplace import AutoLaplace
from pyro_bnn.infer.autoguide.linearized import LinearizedOutputs, MAPReport, UnconvergedMAPWarning
from pyro_bnn.infer.autoguide.mixture import AutoMixture, init_component

__all__ = [
    "AutoHessianFreeLaplace",
    "AutoLaplace",
    "AutoMixture",
    "LinearizedOutputs",
    "MAPReport",
    "UnconvergedMAPWarning",
    "init_component",
]
