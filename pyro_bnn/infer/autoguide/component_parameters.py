# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The parameters of a mixture guide, and the distributions they stand for."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_bnn.infer.autoguide.components import LatentSite, component_distribution, constrain

_Guide: Any = AutoGuide


class ComponentParameters(_Guide):
    """
    The part of :class:`AutoMixture` that holds parameters: one row of ``loc``, ``scale`` and ``cov_factor`` per
    component, the sites side by side, and one tensor for each site that all components share.
    """

    scale_constraint = constraints.softplus_positive
    # parameters, made by initialize
    loc: Any
    scale: Any
    cov_factor: Any
    # set by the constructor and by initialize
    num_components: int
    scale_mode: str
    rank: int
    init_scale: float
    init_loc_fn: Callable[[Any], Tensor]
    sites: list[LatentSite]
    _mixed: list[LatentSite]
    _num_scaled: int
    _component: int | None = None  # the one that is drawn; all if None

    def _make_parameters(self, nodes: Mapping[str, Any]) -> None:
        rows = []
        for k in range(self.num_components):
            row = []
            for site in self._mixed:
                node = nodes[site.name]
                value = node["value"] if k == 0 else self.init_loc_fn(node)
                row.append(self._unconstrain(site, value.detach()).reshape(-1))
            rows.append(torch.cat(row) if row else torch.zeros(0))
        if self._mixed:
            self.loc = PyroParam(torch.stack(rows), constraints.real)
        sizes = [site.size for site in self._mixed[: self._num_scaled]]
        if self._mixed and len(rows) > 1 and not sizes and all(torch.equal(row, rows[0]) for row in rows):
            warnings.warn(
                f"all {len(rows)} components start at the same values and have no noise, so that they stay together: pass "
                "an init_loc_fn that differs between calls, such as init_component.",
                stacklevel=2,
            )
        if sizes:
            width = len(sizes) if self.scale_mode == "shared" else sum(sizes)
            scale = torch.full((self.num_components, width), self.init_scale, dtype=rows[0].dtype).to(
                rows[0].device
            )
            if self.scale_mode == "fixed":
                self.register_buffer("scale", scale)
            else:
                self.scale = PyroParam(scale, self.scale_constraint)
        low_rank = sum(site.size for site in self._mixed if site.kind == "low_rank")
        if low_rank:
            factor = rows[0].new_empty(self.num_components, low_rank, self.rank).normal_()
            self.cov_factor = PyroParam(factor * self.init_scale / self.rank**0.5, constraints.real)
        self.points = PyroModule()
        for site in self.sites:
            if site.kind == "point":
                value = nodes[site.name]["value"].detach().clone()
                deep_setattr(self.points, site.name, PyroParam(value, site.support, site.event_dim))

    def _unconstrain(self, site: LatentSite, value: Tensor) -> Tensor:
        if value.shape != site.shape:
            raise ValueError(
                f"init_loc_fn returned shape {tuple(value.shape)} for site {site.name!r}; expected {tuple(site.shape)}."
            )
        raw = site.transform.inv(value)
        if not bool(torch.isfinite(raw).all()):
            raise ValueError(
                f"the initial value of site {site.name!r} lies outside the support of its {site.kind} component: "
                "pass another init_loc_fn."
            )
        return raw

    def _blocks(self) -> Iterator[tuple[LatentSite, Tensor, Tensor | None]]:
        """Sites with their locations and scales, shape ``(K, *raw_shape)``, of one component alone if there is one."""
        if not self._mixed:
            return
        sizes = [site.size for site in self._mixed]
        locs = self._present(self.loc).split(sizes, -1)
        num = self._num_scaled
        scale: Any = self._present(self._full_scale()) if num else None
        scales = scale.split(sizes[:num], -1) if num else ()
        for i, site in enumerate(self._mixed):
            shape = (len(locs[i]), *site.raw_shape)
            yield site, locs[i].view(shape), scales[i].view(shape) if i < num else None

    def _present(self, rows: Tensor) -> Tensor:
        """The rows of the components that are drawn: all, or one."""
        return rows if self._component is None else rows.narrow(0, self._component, 1)

    def _full_scale(self) -> Tensor:
        """The scales of all scaled columns."""
        if self.scale_mode != "shared":
            return self.scale
        sizes = [site.size for site in self._mixed[: self._num_scaled]]
        return self.scale.repeat_interleave(torch.tensor(sizes, device=self.scale.device), -1)

    def _low_rank(self) -> Any:
        """The joint Gaussian of the low-rank sites in unconstrained space, batch shape ``(K,)``, or ``None``."""
        total = sum(site.size for site in self._mixed if site.kind == "low_rank")
        if not total:
            return None
        loc, scale = [], []
        for site, mean, spread in self._blocks():
            if site.kind == "low_rank":
                assert spread is not None
                loc.append(mean.reshape(len(mean), -1))
                scale.append(spread.reshape(len(spread), -1))
        return dist.LowRankMultivariateNormal(
            torch.cat(loc, -1), self._present(self.cov_factor), torch.cat(scale, -1).square()
        )

    def _low_rank_sites(self) -> list[LatentSite]:
        return [site for site in self._mixed if site.kind == "low_rank"]

    def point_distributions(self) -> Iterator[tuple[LatentSite, Any]]:
        """
        :return: the sites that all components share, with their point masses.
        """
        for site in self.sites:
            if site.kind == "point":
                yield site, dist.Delta(attrgetter(site.name)(self.points), event_dim=site.event_dim)

    def site_distribution(
        self, site: LatentSite, loc: Tensor, scale: Tensor | None, nesting: int | None
    ) -> Any:
        """
        The components of one site, in the layout of :meth:`draw`.

        :param site: the site.
        :param loc: shape ``(K, *raw_shape)``.
        :param scale: the same, or ``None``.
        :param nesting: number of plate dimensions of the model, or ``None`` for one component without a dimension.
        :return: a distribution.
        """
        if nesting is None:
            shape = site.raw_shape
        else:  # the model's own plates fill the dimensions right of the components
            ones = (1,) * (nesting - len(site.shape) + site.event_dim)
            shape = torch.Size((len(loc), *ones, *site.raw_shape))
        spread = None if scale is None else scale.view(shape)
        return component_distribution(site, loc.view(shape), spread, site.event_dim)

    def component_distributions(self) -> dict[str, Any]:
        """
        The components of each site, without the sites that all components share.

        :return: a dictionary from site names to distributions of batch shape ``(K,)`` whose event shape is the
            whole shape of the site; low-rank sites have no distribution of their own and are left out.
        """
        return {
            site.name: component_distribution(site, loc, scale, len(site.shape))
            for site, loc, scale in self._blocks()
            if site.kind != "low_rank"
        }

    def component_log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """
        Log densities of the components over all sites with a density; point masses are left out.

        :param values: values of the sites, shape ``(*lead, *site_shape)``.
        :return: shape ``(*lead, K)``.
        """
        total: Any = 0.0
        low_rank = self._low_rank()
        if low_rank is not None:
            parts = []
            for site in self._low_rank_sites():
                raw = site.transform.inv(values[site.name])
                total = total - constrain(site, raw)[1].unsqueeze(-1)
                parts.append(raw.reshape(*raw.shape[: raw.dim() - len(site.raw_shape)], -1))
            total = total + low_rank.log_prob(torch.cat(parts, -1).unsqueeze(-2))
        for site, loc, scale in self._blocks():
            if scale is not None and site.kind != "low_rank":
                value = values[site.name]
                value = value.unsqueeze(value.dim() - len(site.shape))
                total = total + component_distribution(site, loc, scale, len(site.shape)).log_prob(value)
        return total
