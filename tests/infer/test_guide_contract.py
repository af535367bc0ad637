# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The guides of this package under the contract of guides."""

from collections.abc import Callable
from typing import Any

import pyro
from pyro.infer import Predictive
from torch import Tensor

from pyro_bnn.infer.autoguide import AutoEmpirical, AutoHessianFreeLaplace, AutoLaplace, AutoMixture
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


class TestStoredDraws(GuideContract):
    has_density, trains = False, False

    def build(self, model: Callable[..., Any]) -> Any:
        return AutoEmpirical(model)

    def finish(self, guide: Any, x: Tensor, y: Tensor) -> Any:
        pyro.set_rng_seed(2)
        sites = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
        draws = Predictive(guide.model, num_samples=6, return_sites=sites)(x)
        return guide.set_draws(draws, num_chains=2, weights=[0.25, 0.75])
