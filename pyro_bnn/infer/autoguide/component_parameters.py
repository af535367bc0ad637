# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The parameters of a mixture guide, and the distributions and draws they stand for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from typing_extensions import override

from pyro_bnn.infer.autoguide.components import LatentSite
from pyro_bnn.infer.autoguide.data_rows import RowSource, num_rows
from pyro_bnn.ops.notice import warn_user

_Guide: Any = AutoGuide

#: Start and length of a run of columns.
Span = tuple[int, int]


def spans_of(sites: Sequence[LatentSite], chosen: Sequence[LatentSite]) -> list[Span]:
    """Where the columns of some sites, in the same order, lie among those of all; neighbours are joined."""
    names = {site.name for site in chosen}
    spans: list[Span] = []
    start = 0
    for site in sites:
        if site.name in names:
            if spans and sum(spans[-1]) == start:
                spans[-1] = (spans[-1][0], spans[-1][1] + site.size)
            else:
                spans.append((start, site.size))
        start += site.size
    return spans


def columns(value: Tensor, spans: Sequence[Span]) -> Tensor:
    """Takes columns out of a tensor of shape ``(..., n)``: a view if they are one run."""
    if len(spans) == 1:
        start, length = spans[0]
        return value if length == value.shape[-1] else value.narrow(-1, start, length)
    return torch.cat([value.narrow(-1, *span) for span in spans], -1)


class ComponentParameters(_Guide):
    """
    The part of :class:`AutoMixture` that holds parameters: one row of ``loc``, ``scale`` and ``cov_factor`` per
    component, the sites side by side, and one tensor for each site that all components share.
    """

    #: whether hooks were ever registered, of which nothing public gives a list
    _has_hooks = False
    scale_constraint = constraints.softplus_positive
    # parameters, made by initialize
    loc: Any
    scale: Any
    cov_factor: Any
    # set by the constructor and by initialize
    num_components: int
    scale_mode: str
    rank: int
    noise: str
    init_scale: float
    init_loc_fn: Callable[[Any], Tensor]
    sites: list[LatentSite]
    _mixed: list[LatentSite]  # those with columns
    _num_scaled: int  # how many of them, the first, have scales
    _groups: list[tuple[bool, list[LatentSite], list[Span]]]  # drawn together: whether per example
    _row_sources: list[RowSource]
    _component: int | None = None  # the one that is drawn; all if None

    @override
    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._has_hooks = True
        return super().register_forward_hook(*args, **kwargs)

    @override
    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._has_hooks = True
        return super().register_forward_pre_hook(*args, **kwargs)

    def _arrange(self, sites: list[LatentSite]) -> None:
        """Gives the sites their columns: scaled sites first, so that scales align with the first columns of locations."""
        self.sites = sites
        mixed = (site for site in sites if site.kind not in ("point", "index"))
        self._mixed = sorted(mixed, key=lambda site: (site.family.unit is None, site.kind != "low_rank"))
        self._num_scaled = sum(site.family.unit is not None for site in self._mixed)
        groups: dict[tuple[bool, bool], list[LatentSite]] = {}
        for site in self._mixed[: self._num_scaled]:
            if site.kind != "low_rank":
                groups.setdefault((site.kind == "cauchy", self._is_per_example(site)), []).append(site)
        self._groups = [
            (rows, mine, spans_of(self._mixed, mine)) for (_, rows), mine in sorted(groups.items())
        ]

    def _is_per_example(self, site: LatentSite) -> bool:
        return self.noise == "per_example" and site.role == "factor"

    def _make_parameters(self, nodes: Mapping[str, Any]) -> None:
        self.points = PyroModule()
        for site in self.sites:
            if site.kind == "point":
                value = nodes[site.name]["value"].detach().clone()
                deep_setattr(self.points, site.name, PyroParam(value, site.support, site.event_dim))
        if not self._mixed:
            return
        K = self.num_components
        loc = torch.stack([self._start(nodes, k) for k in range(K)])
        self.loc = PyroParam(loc, constraints.real)
        sizes = self._scaled_sizes()
        if K > 1 and not sizes and bool((loc == loc[0]).all()):
            warn_user(
                f"all {K} components start at the same values and have no noise, so that they stay together: pass "
                "an init_loc_fn that differs between calls, such as init_component.",
            )
        if sizes:
            width = len(sizes) if self.scale_mode == "shared" else sum(sizes)
            scale = loc.new_full((K, width), self.init_scale)
            if self.scale_mode == "fixed":
                self.register_buffer("scale", scale)
            else:
                self.scale = PyroParam(scale, self.scale_constraint)
        low_rank = sum(site.size for site in self._low_rank_sites())
        if low_rank:
            factor = loc.new_empty(K, low_rank, self.rank).normal_()
            self.cov_factor = PyroParam(factor * self.init_scale / self.rank**0.5, constraints.real)

    def _start(self, nodes: Mapping[str, Any], k: int) -> Tensor:
        """The row of locations at which component k starts; the first one at the values of the prototype."""
        row = []
        for site in self._mixed:
            node = nodes[site.name]
            value = (node["value"] if k == 0 else self.init_loc_fn(node)).detach()
            if value.shape != site.shape:
                raise ValueError(
                    f"init_loc_fn returned shape {tuple(value.shape)} for site {site.name!r}; expected "
                    f"{tuple(site.shape)}."
                )
            raw = site.transform.inv(value)
            if not bool(torch.isfinite(raw).all()):
                raise ValueError(
                    f"the initial value of site {site.name!r} lies outside the support of its {site.kind} component: "
                    "pass another init_loc_fn."
                )
            row.append(raw.reshape(-1))
        return torch.cat(row)

    def _scaled_sizes(self) -> list[int]:
        return [site.size for site in self._mixed[: self._num_scaled]]

    def _blocks(self) -> Iterator[tuple[LatentSite, Tensor, Tensor | None]]:
        """Sites with their locations and scales, shape ``(K, *raw_shape)``, of one component alone if there is one."""
        if not self._mixed:
            return
        locs = self._present(self.loc).split([site.size for site in self._mixed], -1)
        num = self._num_scaled
        scales = self._present(self._full_scale()).split(self._scaled_sizes(), -1) if num else ()
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
        return self.scale.repeat_interleave(torch.tensor(self._scaled_sizes(), device=self.scale.device), -1)

    def _low_rank_sites(self) -> list[LatentSite]:
        return [site for site in self._mixed if site.kind == "low_rank"]

    def _low_rank(self) -> Any:
        """The joint Gaussian of the low-rank sites in unconstrained space, batch shape ``(K,)``, or ``None``."""
        total = sum(site.size for site in self._low_rank_sites())
        if not total:
            return None
        loc, scale = (self._present(rows).narrow(-1, 0, total) for rows in (self.loc, self._full_scale()))
        return dist.LowRankMultivariateNormal(loc, self._present(self.cov_factor), scale.square())

    def _split_low_rank(self, joint: Tensor) -> Iterator[tuple[LatentSite, Tensor]]:
        """The low-rank sites with their parts of draws of the joint Gaussian."""
        sites = self._low_rank_sites()
        for site, piece in zip(sites, joint.split([site.size for site in sites], -1), strict=True):
            yield site, piece.reshape(piece.shape[:-1] + site.raw_shape)

    def low_rank_scales(self) -> dict[str, Tensor]:
        """By low-rank site, the standard deviations in unconstrained space, shape ``(K, *raw_shape)``."""
        joint = self._low_rank()
        if joint is None:
            return {}
        return {site.name: rows for site, rows in self._split_low_rank(joint.variance.sqrt())}

    def point_values(self) -> Iterator[tuple[LatentSite, Tensor]]:
        """The sites that all components share, with their values."""
        for site in self.sites:
            if site.kind == "point":
                yield site, attrgetter(site.name)(self.points)

    def _layout(self, site: LatentSite, nesting: int | None, K: int) -> tuple[int, ...]:
        """
        The batch dimensions left of ``raw_shape``: components, then as many of size 1 as the plates of the model
        (``nesting``) that the site does not have itself; none for ``None``.
        """
        return () if nesting is None else (K, *(1,) * (nesting - len(site.shape) + site.event_dim))

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
        shape = (*self._layout(site, nesting, len(loc)), *site.raw_shape)
        return site.distribution(
            loc.view(shape), None if scale is None else scale.view(shape), site.event_dim
        )

    def draw(
        self,
        nesting: int | None,
        num_particles: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        mirrored: bool = False,
    ) -> dict[str, Tensor]:
        r"""
        Draws :math:`\mu + \sigma \epsilon` of every component for all sites but low-rank ones, in a few operations on long
        vectors in place of several per site.

        :param nesting: number of plate dimensions of the model, or ``None`` for one component without a dimension.
        :param int num_particles: draws per component.
        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :param bool mirrored: whether the noise of the second half of the particles is minus that of the first; the noise
            of a single one is minus what it would be.
        :return: by site, shape ``(*particles, K, 1, ..., 1, *site)`` with as many dimensions between as plates, the last
            one that of the examples for draws per example.
        """
        values: dict[str, Tensor] = {}
        if not self._mixed:
            return values
        particles = (num_particles,) if num_particles > 1 else ()
        all_loc = self._present(self.loc)
        all_scale = self._present(self._full_scale()) if self._groups else all_loc
        for per_example, sites, spans in self._groups:
            loc, scale = columns(all_loc, spans), columns(all_scale, spans)
            rows: tuple[int, ...] = ()
            if per_example:
                rows = (num_rows(self._row_sources if nesting else (), args, kwargs),)
                loc, scale = loc.unsqueeze(1), scale.unsqueeze(1)
            half = (num_particles // 2,) if mirrored and particles else particles
            noise = sites[0].family.noise(loc.new_empty((*half, len(loc), *rows, loc.shape[-1])))
            if mirrored:
                noise = torch.cat([noise, -noise]) if particles else -noise
            z = torch.addcmul(loc, noise, scale)
            for site, piece in zip(sites, z.split([site.size for site in sites], -1), strict=True):
                lead = self._layout(site, nesting, len(loc))
                lead = (*particles, *lead[: len(lead) - len(rows)], *rows) if lead else lead
                values[site.name] = site.transform(piece.view((*lead, *site.raw_shape)))
        masses = self._mixed[self._num_scaled :]
        pieces = all_loc.split([site.size for site in self._mixed], -1)[self._num_scaled :]
        for site, piece in zip(masses, pieces, strict=True):
            value = site.transform(piece.view((*self._layout(site, nesting, len(all_loc)), *site.raw_shape)))
            values[site.name] = value.expand((*particles, *value.shape)) if particles else value
        return values

    def num_draws(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """
        Draws of the noise per component and particle.

        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: the number of examples if every random site has noise per example, else one.
        """
        everywhere = self._groups and all(per_example for per_example, _, _ in self._groups)
        return num_rows(self._row_sources, args, kwargs) if everywhere else 1

    def component_distributions(self) -> dict[str, Any]:
        """
        The components of each site, without the sites that all components share.

        :return: a dictionary from site names to distributions of batch shape ``(K,)`` whose event shape is the
            whole shape of the site; low-rank sites have no distribution of their own and are left out.
        """
        return {
            site.name: site.distribution(loc, scale, len(site.shape))
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
                total = total - site.constrain(raw)[1].unsqueeze(-1)
                parts.append(raw.reshape(*raw.shape[: raw.dim() - len(site.raw_shape)], -1))
            total = total + low_rank.log_prob(torch.cat(parts, -1).unsqueeze(-2))
        for site, loc, scale in self._blocks():
            if scale is not None and site.kind != "low_rank":
                value = values[site.name]
                value = value.unsqueeze(value.dim() - len(site.shape))
                total = total + site.distribution(loc, scale, len(site.shape)).log_prob(value)
        return total
