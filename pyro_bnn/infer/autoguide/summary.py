# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a guide holds, site by site."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.ops.described import Described, as_html, as_text, first_of, span_of, table_html, table_text

Facts = dict[str, str]
Rows = dict[str, dict[str, Any]]

#: Sites that a representation shows at most; printing shows all.
_MOST_SITES = 40


@dataclass(repr=False)
class GuideSummary(Described):
    """
    A guide in words and numbers: facts about all of it, and a table with one row per latent site.

    Standard deviations and locations are those in unconstrained space, where guides are Gaussians; of the elements of a site
    the median standard deviation and the root mean square location are shown.

    :ivar str title: what the guide is.
    :ivar facts: by name, in words: structure, convergence of the point estimate, evidence.
    :ivar sites: by site, the columns of the table: ``shape``, ``latents`` and what the guide has for a site, such as
        ``location`` and ``sd``.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoLaplace
        >>> guide = AutoLaplace(model).initialize(x, x).polish((x, x)).laplace_approximation((x, x))
        >>> list(guide.summary().sites)
        ['w']
    """

    title: str
    facts: dict[str, str]
    sites: dict[str, dict[str, Any]]

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        return self.title, self.facts

    def _table(self, most: int | None = None) -> tuple[list[str], list[list[str]]]:
        columns = list(dict.fromkeys(name for row in self.sites.values() for name in row))
        rows = list(self.sites.items())[:most]
        return ["site", *columns], [
            [name, *(_cell(row.get(column)) for column in columns)] for name, row in rows
        ]

    def _text(self, most: int | None) -> str:
        lines = [as_text(self.title, self.facts, most=None)]
        if self.sites:
            lines += table_text(*self._table(most))
        if most is not None and len(self.sites) > most:
            lines.append(f"... {len(self.sites) - most} more sites: print() shows them")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self._text(_MOST_SITES)

    def __str__(self) -> str:
        return self._text(None)

    @override
    def _repr_html_(self) -> str:
        return str(as_html(self.title, self.facts)) + (table_html(*self._table()) if self.sites else "")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )


def _rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def _median(value: Tensor) -> float | None:
    return float(value.double().median()) if value.numel() else None


def _title(guide: Any, options: Sequence[str]) -> str:
    chosen = ", ".join(
        f"{name}={getattr(guide, name)!r}" for name in options if getattr(guide, name) is not None
    )
    return f"{type(guide).__name__}: {chosen}" if chosen else type(guide).__name__


def _packed_sites(guide: Any) -> dict[str, tuple[slice, dict[str, Any]]]:
    """By site of the packed vector, its entries and its shape and size."""
    space = guide.packed.space
    shapes = {name: value.shape for name, value in space.unpack(torch.zeros(space.dim)).items()}
    return {
        name: (where, {"shape": tuple(shapes[name]), "latents": where.stop - where.start})
        for name, where in space.slices.items()
    }


@torch.no_grad()
def summarize(guide: Any, options: Sequence[str]) -> GuideSummary:
    """The summary of a guide of this package; ``options`` are what its title names."""
    if guide.prototype_trace is None:
        return GuideSummary(
            _title(guide, options), {"state": "not initialised: call guide.initialize(*args)"}, {}
        )
    if hasattr(guide, "component_distributions"):
        facts, sites = _of_mixture(guide)
    elif hasattr(guide, "draw_weights"):
        facts, sites = _of_draws(guide)
    else:
        facts, sites = (_of_modes if hasattr(guide, "components") else _of_linearized)(guide)
    return GuideSummary(_title(guide, options), facts, sites)


def outline(guide: Any, options: Sequence[str]) -> str:
    """What a guide is, without a computation, as a table for notebooks."""
    rows = {name: repr(getattr(guide, name)) for name in options if getattr(guide, name) is not None}
    if guide.prototype_trace is None:
        return as_html(type(guide).__name__, rows | {"state": "not initialised"})
    sizes = [site["value"].numel() for _, site in guide.prototype_trace.iter_stochastic_nodes()]
    rows["latents"] = f"{sum(sizes):,} in {len(sizes)} sites"
    if hasattr(guide, "is_fitted"):
        rows["state"] = "Gaussian" if guide.is_fitted else "point estimate"
    return as_html(type(guide).__name__, rows | {"more": "guide.summary()"})


def _prior_scale(guide: Any) -> Tensor | None:
    """Standard deviations of the prior's Gaussian approximation, shape ``(p,)``, where a guide knows them."""
    if not guide.is_fitted or not hasattr(guide, "part_store"):
        return None
    precision = torch.full_like(guide.loc, torch.nan)
    for part in guide.part_store.get():
        precision[part.index] = (part.prior if part.prior.dim() == 1 else part.prior.diagonal()).to(precision)
    return (precision * (1.0 if guide.tau is None else guide.tau)).rsqrt()


def _of_linearized(guide: Any) -> tuple[Facts, Rows]:
    """Of a point estimate, or the Gaussian around it."""
    prior = _prior_scale(guide)
    loc = guide.loc.detach()
    sd = guide.posterior.variance.clamp(min=0).sqrt() if guide.is_fitted else None
    active = getattr(guide, "active", None)
    sites = {}
    for name, (where, row) in _packed_sites(guide).items():
        row["location"] = _rms(loc[where])
        random = slice(None) if active is None else active[where]
        if active is not None:
            row["random"] = int(active[where].sum())
        if sd is not None:
            row["sd"] = _median(sd[where][random])
        if sd is not None and prior is not None:
            row["sd / prior sd"] = _median((sd[where] / prior[where])[random])
        sites[name] = row
    state = "a Gaussian" if guide.is_fitted else "a point estimate: call guide.laplace_approximation(data)"
    found = {
        "state": state,
        "latents": f"{len(loc):,}",
        "observed sites": ", ".join(guide.packed.observed) or "none",
    }
    report = guide.map_report
    if report is not None:
        found["Newton decrement"] = f"{report.newton_decrement:.3g} posterior standard deviations"
        found |= {"smallest curvature": f"{report.smallest_curvature:.3g}"} if guide.is_fitted else {}
    if guide.is_fitted and hasattr(guide, "part_store"):  # others need the data again
        found["log evidence"] = f"{float(guide.log_evidence()):.6g} nats"
        if guide.tau is not None:
            found["multiplier of the prior precision"] = span_of(guide.tau)
    if getattr(guide, "gradients", None) is not None:
        found["targets"] = f"{len(guide.gradients)} outputs, at which the covariance is exact"
        found |= guide.facts()
    return found, sites


def _of_modes(guide: Any) -> tuple[Facts, Rows]:
    """Of a mixture of Laplace approximations: spreads within and between its modes."""
    first = guide.components[0]
    modes = torch.stack([part.loc.detach() for part in guide.components])
    sites = {}
    for name, (where, row) in _packed_sites(first).items():
        row["location"] = _rms(modes[:, where])
        row["sd between modes"] = _between(modes[:, where])
        if guide.is_fitted:
            spread = torch.stack([part.posterior.variance[where] for part in guide.components])
            row["sd within"] = _median(spread.clamp(min=0).sqrt())
        sites[name] = row
    facts = {
        "structure": first.structure,
        "curvature": first.curvature,
        "latents": f"{modes.shape[1]:,} per mode",
    }
    facts["observed sites"] = ", ".join(guide.packed.observed) or "none"
    if guide.is_fitted:
        facts["weights"] = ", ".join(f"{w:.3g}" for w in guide.log_weights.exp().tolist())
        facts["log evidence"] = f"{float(guide.log_evidence()):.6g} nats"
    else:
        facts["state"] = "point estimates: call guide.laplace_approximation(data)"
    return facts, sites


def _between(rows: Tensor) -> float:
    """The root mean square distance of components from their mean, shape (K, ...)."""
    return _rms(rows - rows.mean(0))


def _of_mixture(guide: Any) -> tuple[Facts, Rows]:
    """Of a mixture whose components are drawn together."""
    low_rank = guide.low_rank_scales()
    parts = {site.name: (loc, low_rank.get(site.name, scale)) for site, loc, scale in guide._blocks()}
    points = {site.name: site.transform.inv(value) for site, value in guide.point_values()}
    sites = {}
    for site in guide.sites:
        row: dict[str, Any] = {"shape": tuple(site.shape), "latents": site.size, "family": site.kind}
        if site.name in parts:
            loc, scale = parts[site.name]
            row["location"], row["sd between"] = _rms(loc), _between(loc)
            row["sd within"] = None if scale is None else _median(scale)
        elif site.name in points:
            row["location"] = _rms(points[site.name])
        sites[site.name] = row
    total = sum(p.numel() for p in guide.parameters())
    facts = {"latents": f"{sum(site.size for site in guide.sites):,} in {len(guide.sites)} sites"}
    facts |= {"parameters": f"{total:,}", "scales": guide.scale_mode, "noise": guide.noise}
    return facts, sites


def _of_draws(guide: Any) -> tuple[Facts, Rows]:
    """Of stored draws: weighted moments of the values of the sites."""
    weights = guide.draw_weights.unflatten(0, (guide.num_chains, -1))
    of_chains = weights.sum(1)
    sites = {}
    for name, value in guide.samples.items():
        row: dict[str, Any] = {"shape": tuple(value.shape[2:]), "latents": value[0, 0].numel()}
        within, between, mean = _spreads(value, weights.to(value.device))
        row["location"], row["sd"] = _rms(mean), _median((within + between).sqrt())
        row["sd between chains"] = _median(between.sqrt()) if guide.num_chains > 1 else None
        sites[name] = row
    facts = {"latents": f"{sum(row['latents'] for row in sites.values()):,}"}
    shares = first_of([f"{w:.3g}" for w in of_chains.tolist()], most=10)
    facts["weights"] = "equal" if guide.equal_weights else f"of the chains {shares}"
    facts["density"] = "none: neither bounds nor importance weights"
    if guide.num_chains > 1:
        facts["convergence"] = "diagnostics.mixing(model, guide, data) compares what the chains predict"
    return facts, sites


def _spreads(value: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variances within chains and between their means, and the mean: of values ``(C, S) + shape`` with weights ``(C, S)``."""
    rows: Any = [chain.reshape(len(chain), -1).double() for chain in value]
    shares = weights.sum(1)
    parts = [w / share if share > 0 else w for w, share in zip(weights, shares, strict=True)]
    means = torch.stack([w @ row for w, row in zip(parts, rows, strict=True)])
    within = torch.stack([w @ (row - m).square() for w, row, m in zip(parts, rows, means, strict=True)])
    mean = shares @ means
    return shares @ within, shares @ (means - mean).square(), mean
