# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Automatic guides."""

from pyro_bnn.curvature.mode import UnconvergedMAPWarning
from pyro_bnn.infer.autoguide.captured import VarianceBounds
from pyro_bnn.infer.autoguide.empirical import AutoEmpirical
from pyro_bnn.infer.autoguide.hfl import AutoHessianFreeLaplace
from pyro_bnn.infer.autoguide.initialization import (
    dropout_scale,
    init_component,
    init_to_normal,
    init_to_random_sign,
)
from pyro_bnn.infer.autoguide.laplace import AutoLaplace
from pyro_bnn.infer.autoguide.laplace_mixture import AutoLaplaceMixture
from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.infer.autoguide.outputs import LinearizedOutputs
from pyro_bnn.infer.autoguide.point_estimate import MAPReport, PointEstimateWarning
from pyro_bnn.infer.autoguide.rescaled import AutoRescaled
from pyro_bnn.infer.autoguide.summary import GuideSummary

__all__ = [
    "AutoEmpirical",
    "AutoHessianFreeLaplace",
    "AutoLaplace",
    "AutoLaplaceMixture",
    "AutoMixture",
    "AutoRescaled",
    "GuideSummary",
    "LinearizedOutputs",
    "MAPReport",
    "PointEstimateWarning",
    "UnconvergedMAPWarning",
    "VarianceBounds",
    "dropout_scale",
    "init_component",
    "init_to_normal",
    "init_to_random_sign",
]
