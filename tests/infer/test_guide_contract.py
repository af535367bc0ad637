# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The guides of this package under the contract of guides."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoMixture
from tests.contracts.guide import GuideContract


class TestMixture(GuideContract):
    def build(self, model: Callable[..., Any]) -> Any:
        return AutoMixture(model, 2)


class TestEnsemble(GuideContract):
    has_density = False

    def build(self, model: Callable[..., Any]) -> Any:
        return AutoMixture(model, 2, "delta")


class TestLaplace(GuideContract):
    def build(self, model: Callable[..., Any]) -> Any:
        return AutoLaplace(model)

    def finish(self, guide: Any, x: Tensor, y: Tensor) -> Any:
        return guide.polish((x, y)).laplace_approximation((x, y))


class TestHessianFreeLaplace(GuideContract):
    has_density = False

    def build(self, model: Callable[..., Any]) -> Any:
        return AutoHessianFreeLaplace(model, curvature="ggn")

    def finish(self, guide: Any, x: Tensor, y: Tensor) -> Any:
        return guide.polish((x, y)).laplace_approximation((x, y), targets=(x,))
