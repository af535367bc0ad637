# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The modes of any guide: where chains start, what whitens them, how likely they are."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
import torch.distributions as td
from pyro import poutine
from torch import Tensor, nn
from typing_extensions import override

from pyro_bnn.infer.predict.draws import component_draws, posterior_draws
from pyro_bnn.infer.predict.weighted import WeightedChains
from pyro_bnn.infer.sample.whitening import component_gaussians, gaussian_of
from pyro_bnn.model.data import Batch
from pyro_bnn.model.flat import StartFlatSites
from pyro_bnn.model.handlers import base_distribution, run_model
from pyro_bnn.model.latent_space import LatentSpace
from pyro_bnn.model.parameters import local_parameters

#: At the modes, or at draws around them.
Start = Literal["mode", "draws"]


class Mode:
    """
    One mode, known by a guide. Guides of an ensemble have parameters of the same names: each speaks in a context of its own, where it
    neither finds those of another nor takes them over.

    :param guide: a guide with one mode.
    :param space: of the packed latents.
    :param batch: the data, which some guides need.
    """

    def __init__(self, guide: Any, space: LatentSpace, batch: Batch) -> None:
        self.guide, self.space, self.batch = guide, space, batch

    @local_parameters()
    def centre(self) -> Tensor:
        """The point in the middle, shape ``(p,)``."""
        guide, values = self.guide, None
        if hasattr(guide, "median") and not isinstance(guide, WeightedChains):
            with suppress(NotImplementedError):  # flows have none
                values = guide.median(*self.batch[0], **self.batch[1])
        if values is None:
            raise ValueError(
                f"start='mode': {type(guide).__name__} is no guide with one mode: it has no median, or one of many draws. "
                "Pass start='draws', or a guide such as AutoDelta, AutoLaplace or AutoMixture."
            )
        return self._packed(values)

    def draws(self, number: int) -> Tensor:
        """Draws, shape ``(number, p)``."""
        return self._packed(posterior_draws(self.guide, number, batch=self.batch))

    @local_parameters()
    def gaussian(self) -> Any:
        """The Gaussian around it; see :func:`gaussian_of`."""
        return gaussian_of(self.guide, self.space, self.batch)

    @local_parameters()
    def log_evidence(self) -> Tensor:
        """The logarithm of its mass, a scalar."""
        if not hasattr(self.guide, "log_evidence"):
            raise ValueError(
                f"weights='evidence': {type(self.guide).__name__} knows no evidence. Use weights='equal' or 'stacking', or an "
                "AutoLaplaceMixture around its modes."
            )
        found: Tensor = self.guide.log_evidence()
        return found

    def _packed(self, values: Mapping[str, Tensor]) -> Tensor:
        lacking = sorted(set(self.space.slices) - set(values))
        if lacking:
            raise ValueError(
                f"the guide {type(self.guide).__name__} has no value for the sites {lacking}, which the model samples."
            )
        return self.space.pack(values).detach()


class Point(Mode):
    """A mode known by values by site, shape of the sites."""

    @override
    def centre(self) -> Tensor:
        shapes = {n: v.shape for n, v in self.space.unpack(torch.zeros(self.space.dim)).items()}
        for name in shapes.keys() & self.guide.keys():
            value = self.guide[name]
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if found != shapes[name]:
                raise ValueError(
                    f"guide: the value of site {name!r} must be a tensor of shape {tuple(shapes[name])}, one point of a chain, found "
                    f"{found}. Several points are a list of such dictionaries."
                )
        return self._packed(self.guide)

    @override
    def draws(self, number: int) -> Tensor:
        return self.centre().expand(number, -1)


class Component(Mode):
    """A component of a mixture guide."""

    def __init__(self, guide: Any, space: LatentSpace, batch: Batch, index: int) -> None:
        super().__init__(guide, space, batch)
        self.index = index

    @override
    @local_parameters()
    def centre(self) -> Tensor:
        found = self.guide.component_distributions()
        shared = self.guide.sample_posterior(()) if set(found) != set(self.space.slices) else {}
        low_rank = self.guide.low_rank_scales()
        if low_rank:
            raise ValueError(
                f"start='mode': the low-rank components at site {next(iter(low_rank))!r} have no mode of their own here: pass "
                "start='draws'."
            )
        values = {n: _middle(found[n])[self.index] if n in found else shared[n] for n in self.space.slices}
        return self._packed(values)

    @override
    def draws(self, number: int) -> Tensor:
        found = component_draws(self.guide, number)
        return self._packed({name: value[self.index] for name, value in found.items()})

    @override
    @local_parameters()
    def gaussian(self) -> Any:
        return component_gaussians(self.guide, self.space)[self.index]


def _middle(fn: Any) -> Tensor:
    """The median of a point mass, or of a location family and its image under elementwise increasing maps."""
    base = base_distribution(fn)
    if not isinstance(base, td.TransformedDistribution):
        value: Tensor = base.loc if hasattr(base, "loc") else base.mean
        return value
    value = base_distribution(base.base_dist).loc
    for transform in base.transforms:
        value = transform(value)
    return value


def modes_of(guide: Any, space: LatentSpace, batch: Batch) -> list[Mode]:
    """
    The modes of a guide, of a sequence of guides or of values by site.

    :param guide: a guide; a mixture has one mode for each component. A sequence has those of its items.
    :param space: of the packed latents.
    :param batch: the data.
    """
    if isinstance(guide, (list, tuple, nn.ModuleList)) and not hasattr(guide, "median"):
        if not len(guide):
            raise ValueError(
                "guide: an empty list has no modes. With None chains start at draws of the prior."
            )
        return [mode for item in guide for mode in modes_of(item, space, batch)]
    if isinstance(guide, Mapping) and not isinstance(guide, nn.Module):
        return [Point(guide, space, batch)]
    if hasattr(guide, "component_distributions"):
        return [Component(guide, space, batch, k) for k in range(guide.num_components)]
    if hasattr(guide, "components"):  # a mixture of Laplace approximations
        return [Mode(part, space, batch) for part in guide.components]
    return [Mode(guide, space, batch)]


@torch.no_grad()
def prior_draws(model: Callable[..., Any], space: LatentSpace, batch: Batch, number: int) -> Tensor:
    """Draws of the prior, flat sites at zero, shape ``(number, p)``."""
    points = []
    with local_parameters(), poutine.block(), StartFlatSites():
        for _ in range(number):
            sites = run_model(model, batch)
            points.append(space.pack({name: sites[name]["value"] for name in space.slices}))
    return torch.stack(points)


def chain_starts(
    model: Callable[..., Any],
    modes: Sequence[Mode],
    space: LatentSpace,
    batch: Batch,
    start: Start,
    num_chains: int,
) -> Tensor:
    """Where so many chains for each mode start, shape ``(C, p)``; at draws of the prior where there is no mode."""
    return points_of(modes, start, num_chains) if modes else prior_draws(model, space, batch, num_chains)


@torch.no_grad()
def points_of(modes: Sequence[Mode], start: Start, num_chains: int) -> Tensor:
    """
    Where so many chains for each mode start, shape ``(C, p)``, those of a mode one after the other: at the modes, or at draws
    around them.
    """
    with poutine.block():
        if start == "mode":
            return torch.stack([mode.centre() for mode in modes]).repeat_interleave(num_chains, 0)
        return torch.cat([mode.draws(num_chains) for mode in modes])
