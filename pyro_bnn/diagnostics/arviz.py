# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Export of any posterior to ArviZ, for both of its generations."""

import importlib.metadata
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
import xarray as xr
from pyro.infer import MCMC
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn._version import __version__
from pyro_bnn.infer.data import Batch
from pyro_bnn.infer.density import guide_log_prob
from pyro_bnn.infer.draws import Draws, Posterior, component_draws, posterior_draws
from pyro_bnn.infer.handlers import observed_names, sample_sites, subsample_scale, unscaled_log_prob
from pyro_bnn.infer.nuts import NUTSResult
from pyro_bnn.infer.parameters import local_parameters
from pyro_bnn.infer.predictive import (
    evaluation_mode,
    posterior_predictive,
    site_dims,
    split_batch,
)
from pyro_bnn.infer.vectorize import ModelRunner, Reading, predicted_names

#: Largest number of values per draw that a weight site may have to be exported when nothing else is.
MAX_WEIGHT_SIZE = 1000

_WEIGHT = re.compile(r"\.([a-z_]*_)?(weight|bias)(_[a-z0-9_]+)?$")

Groups = dict[str, xr.Dataset]


@torch.no_grad()
def to_datatree(
    model: Callable[..., Any],
    posterior: Posterior | Sequence[Callable[..., Any]],
    data: Any = None,
    *,
    num_samples: int | None = None,
    num_chains: int = 1,
    var_names: Sequence[str] | None = None,
    weights: bool = False,
    thin: int = 1,
    prior_samples: int = 0,
    predictions: bool = True,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    vectorize: bool | None = None,
    max_memory: float = 2**24,
    attrs: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    r"""
    Exports a posterior as an :class:`xarray.DataTree` in ArviZ's schema, with dims ``(chain, draw)``.

    Independent fits are chains: the components of a mixture guide (one with ``num_components``), the
    guides of a list, or the chains of an MCMC run. A single guide is one chain of independent draws.

    Groups: ``posterior``, ``log_prior`` (per site, summed over the site), ``sample_stats`` (``lp``, the log
    joint density :math:`\log p(y, z)`; for guides with a density also ``log_q`` and ``log_weight``, the
    normalised log importance weights; ``diverging`` for MCMC, and for :func:`~pyro_bnn.infer.nuts` also ``energy``,
    ``tree_depth``, ``step_size`` and ``acceptance_rate``, with the warm-up in groups of its own) and, where ``data`` holds observations,
    ``log_likelihood`` (pointwise, nats, without the factor of subsampled plates), ``posterior_predictive``,
    ``observed_data`` and ``constant_data``. With ``prior_samples``, ``prior`` and ``prior_predictive``.

    :param callable model: a Pyro model.
    :param posterior: a guide, a sequence of guides (one chain each), an :class:`~pyro.infer.MCMC` run, or a
        mapping from latent sites to draws with the draws in the first dimension.
    :param data: one batch with observations, or an iterable of batches; ``None`` exports draws alone.
    :param int num_samples: the number of draws in all chains together; 1000 for guides by default.
    :param int num_chains: chains in a mapping of draws, which hold them one after the other.
    :param var_names: latent sites to export. By default the weights and biases of layers (sites such as
        ``fc1.weight``) are left out, unless there is nothing else.
    :param bool weights: exports weights and biases too.
    :param int thin: keeps every ``thin``-th draw in the ``posterior`` group alone.
    :param int prior_samples: the number of draws from the prior.
    :param bool predictions: whether to draw from the posterior predictive.
    :param coords: coordinates by dim.
    :param dims: names of the dims of a site (batch and event dims). By default plates name batch dims and
        ``<site>_dim_k`` the others.
    :param constant_data: variables of the group ``constant_data``; by default the tensors among the arguments
        of the model that are not observations.
    :param int batch_size: splits one batch of tensors into pieces of this many rows.
    :param vectorize: see :func:`~pyro_bnn.infer.posterior_predictive`.
    :param float max_memory: see :func:`~pyro_bnn.infer.posterior_predictive`.
    :param attrs: further attributes of the tree.
    :return: the tree; ``tree.to_netcdf(path)`` saves it.

    Example::

        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("obs", dist.Normal(slope * x, 0.1), obs=y)
        >>> x = torch.linspace(-1, 1, 5)
        >>> guide = AutoNormal(model)
        >>> _ = guide(x, x)
        >>> tree = to_datatree(model, guide, (x, x), num_samples=50)
        >>> tree["log_likelihood"]["obs"].dims, sorted(tree["sample_stats"].data_vars)
        (('chain', 'draw', 'data'), ['log_q', 'log_weight', 'lp'])
    """
    exporter = _Exporter(model, coords, dims)
    batch: Batch = ((), {})
    if data is not None:
        batch = next(iter(split_batch(data, batch_size)))
    with evaluation_mode(model), local_parameters():
        draws, shape = chain_draws(posterior, num_samples, num_chains, batch)
        exporter.inspect(draws, shape, batch if data is not None else None)
        groups: Groups = {}
        if data is not None:
            runner = ModelRunner(model, draws, vectorize=vectorize, max_memory=max_memory)
            groups = exporter.data_groups(runner, posterior, split_batch(data, batch_size), predictions)
            log_q = None
            if not isinstance(posterior, (Mapping, list, tuple)) and not hasattr(posterior, "get_samples"):
                log_q = guide_log_prob(posterior, draws, batch)
            groups["sample_stats"] = exporter.sample_stats(groups.pop("_lp"), log_q, posterior)
            groups["constant_data"] = exporter.constants(data, batch, constant_data, groups["observed_data"])
        if prior_samples:
            groups |= exporter.prior_groups(batch, prior_samples)
    names = exporter.select(draws, var_names, weights)
    chained = {name: exporter.chained(draws[name])[:, ::thin] for name in names}
    groups["posterior"] = exporter.dataset({n: (v, exporter.site_dims[n]) for n, v in chained.items()})
    if isinstance(posterior, NUTSResult) and posterior.warmup:
        groups["warmup_posterior"] = exporter.dataset(
            {n: (posterior.warmup[n], exporter.site_dims[n]) for n in names}
        )
        groups["warmup_sample_stats"] = exporter.dataset(
            {n: (v, ()) for n, v in posterior.warmup_stats.items()}
        )
    order = ["posterior", *(name for name in groups if name != "posterior")]
    tree = xr.DataTree.from_dict({name: groups[name] for name in order if groups[name].data_vars})
    common = _attributes(posterior) | {"left_out": sorted(set(draws) - set(names)) or ""} | dict(attrs or {})
    tree.attrs.update(common)
    for group in tree.children.values():
        group.attrs.update(common | {"sample_dims": ["chain", "draw"]} if "draw" in group.dims else common)
    return tree


def to_inference_data(model: Callable[..., Any], posterior: Any, data: Any = None, **kwargs: Any) -> Any:
    """
    Exports a posterior in the form that the installed ArviZ works with.

    :param callable model: a Pyro model.
    :param posterior: see :func:`to_datatree`.
    :param data: see :func:`to_datatree`.
    :param kwargs: see :func:`to_datatree`.
    :return: an :class:`arviz.InferenceData` under ArviZ 0.x, the :class:`xarray.DataTree` of
        :func:`to_datatree` under 1.x.
    """
    return datatree_to_inference_data(to_datatree(model, posterior, data, **kwargs))


def datatree_to_inference_data(tree: xr.DataTree) -> Any:
    """
    Converts a tree to the form that the installed ArviZ works with.

    :param tree: a tree made by :func:`to_datatree`.
    :return: an :class:`arviz.InferenceData` under ArviZ 0.x, the tree itself under 1.x.
    """
    # under 1.x ``arviz.InferenceData`` exists too, as another name of DataTree, so only the version tells
    if int(importlib.metadata.version("arviz").partition(".")[0]) >= 1:
        return tree
    import arviz

    groups: dict[str, Any] = {name: group.to_dataset() for name, group in tree.children.items()}
    return arviz.InferenceData(attrs=dict(tree.attrs), **groups)


def write_tree(tree: xr.DataTree, path: str | PathLike[str]) -> None:
    """
    Writes a tree to netCDF, or to Zarr (which needs the package) if the name ends in ``.zarr``, one group after the other and then drops it.

    Groups leave the tree as they are written, so that memory shrinks while the file grows.

    :param tree: a tree made by :func:`to_datatree`; it is empty afterwards.
    :param path: the file.
    """
    path = Path(path)
    zarr = path.suffix == ".zarr"
    root = xr.Dataset(attrs=tree.attrs)
    if zarr:
        root.to_zarr(path, mode="w")
    else:
        root.to_netcdf(path, mode="w")
    for name in list(tree.children):
        group = tree[name].to_dataset()
        del tree[name]
        if zarr:
            group.to_zarr(path, mode="a", group=name)
        else:
            group.to_netcdf(path, mode="a", group=name)
        del group


def chain_draws(
    posterior: Any, num_samples: int | None, num_chains: int = 1, batch: Batch = ((), {})
) -> tuple[Draws, tuple[int, int]]:
    """
    Draws of all chains, one after the other.

    :param posterior: see :func:`to_datatree`.
    :param int num_samples: the number of draws in all chains together; 1000 for guides by default.
    :param int num_chains: chains in a mapping of draws.
    :param batch: arguments of the guide, for guides that need them.
    :return: draws by site, each of shape ``(chains * draws,) + site shape``, and ``(chains, draws)``.
    :raises ValueError: if the draws do not divide into the chains.
    """
    if hasattr(posterior, "get_samples"):
        grouped: Draws = posterior.get_samples(group_by_chain=True)
        num_chains, size = next(iter(grouped.values())).shape[:2]
        keep = size if num_samples is None else min(size, max(1, num_samples // num_chains))
        index = torch.linspace(0, size - 1, keep, dtype=torch.float64).long()
        return {n: v[:, index].flatten(0, 1) for n, v in grouped.items()}, (num_chains, keep)
    if isinstance(posterior, Mapping):
        draws = posterior_draws(posterior, num_samples, batch)
        size = len(next(iter(draws.values())))
        if size % num_chains:
            raise ValueError(f"num_chains={num_chains} does not divide the number of draws, {size}.")
        return draws, (num_chains, size // num_chains)
    total = 1000 if num_samples is None else num_samples
    if isinstance(posterior, (list, tuple)):
        each = max(1, total // len(posterior))
        members = [posterior_draws(member, each, batch) for member in posterior]
        return {n: torch.cat([m[n] for m in members]) for n in members[0]}, (len(members), each)
    if getattr(posterior, "num_components", 1) > 1 and getattr(posterior, "equal_weights", True):
        each = max(1, total // posterior.num_components)
        parts = component_draws(posterior, each)
        return {n: v.flatten(0, 1) for n, v in parts.items()}, (posterior.num_components, each)
    return posterior_draws(posterior, total, batch), (1, total)


class _Exporter:
    """Builds the groups of one tree."""

    def __init__(
        self, model: Any, coords: Mapping[str, Any] | None, dims: Mapping[str, Sequence[str]] | None
    ) -> None:
        self.model = model
        self.coords = dict(coords or {})
        self.user_dims = dict(dims or {})
        self.site_dims: dict[str, tuple[str, ...]] = {}
        self.shape = (1, 1)

    def inspect(self, draws: Draws, shape: tuple[int, int], batch: Batch | None) -> None:
        """Finds the names of dims from the plates of the model."""
        self.shape = shape
        sites: dict[str, Any] = {}
        if batch is not None:
            trace = ModelRunner(self.model, draws).single(batch, 0)
            sites = sample_sites(trace)
        for name, value in draws.items():
            if name in sites:
                dims = site_dims(sites[name], len(sites[name]["fn"].batch_shape))
            else:
                dims = tuple(f"{name}_dim_{i}" for i in range(value.dim() - 1))
            self.site_dims[name] = dims
        for name, site in sites.items():
            self.site_dims.setdefault(name, site_dims(site, len(site["fn"].batch_shape)))
        names = set(self.site_dims)
        for name, dims in self.site_dims.items():
            # a variable may not share its name with a dim
            dims = tuple(f"{d}_dim" if d in names else d for d in dims)
            self.site_dims[name] = tuple(self.user_dims.get(name, dims))

    def chained(self, value: Tensor) -> Tensor:
        return value.reshape(*self.shape, *value.shape[1:])

    def dataset(
        self, variables: Mapping[str, tuple[Tensor, Sequence[str]]], sampled: bool = True
    ) -> xr.Dataset:
        """A dataset from tensors (with chain and draw first if ``sampled``) and the names of their dims."""
        lead = ("chain", "draw") if sampled else ()
        sizes: dict[str, int] = {}
        arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        for name, (value, dims) in variables.items():
            key = name.replace("/", ".")  # slashes are paths in a DataTree
            own = list(dims)[: value.dim() - len(lead)]
            if len(own) < value.dim() - len(lead):
                raise ValueError(f"dims of {name!r}: {value.dim() - len(lead)} names expected, got {own}.")
            for i, dim in enumerate(own):
                size = value.shape[len(lead) + i]
                if sizes.setdefault(dim, size) != size:  # two plates of one name with different sizes
                    own[i] = f"{key}_dim_{i}"
                    sizes[own[i]] = size
            arrays[key] = (*lead, *own), value.detach().cpu().numpy()
        coords: dict[str, Any] = {d: self.coords.get(d, np.arange(n)) for d, n in sizes.items()}
        if sampled and arrays:
            first = next(iter(arrays.values()))[1]
            coords |= {"chain": np.arange(first.shape[0]), "draw": np.arange(first.shape[1])}
        used = {d for dims, _ in arrays.values() for d in dims}
        return xr.Dataset(arrays, coords={d: c for d, c in coords.items() if d in used})

    def data_groups(
        self, runner: ModelRunner, posterior: Any, batches: Iterable[Batch], predictions: bool
    ) -> Groups:
        """Runs the model over the data: densities, predictions and observations."""
        linearized = hasattr(posterior, "observed_distributions")
        log_prior: dict[str, Tensor] = {}
        found: dict[str, list[tuple[Tensor, Tensor | None, Tensor]]] = {}
        lp_terms: dict[str, Tensor] = {}
        seen: dict[str, int] = {}
        full: dict[str, float] = {}
        for batch in batches:
            observed: dict[str, Tensor] = {}

            def read(trace: Trace, observed: dict[str, Tensor] = observed) -> dict[tuple[str, str], Reading]:
                readings: dict[tuple[str, str], Reading] = {}
                sites = sample_sites(trace)
                for name in runner.draws:
                    if name in sites:
                        site = sites[name]
                        readings["prior", name] = name, site["fn"].log_prob(site["value"]), 0
                for name in predicted_names(trace, runner.draws):
                    site = sites[name]
                    if site["is_observed"]:
                        observed[name] = site["value"]
                        full[name] = subsample_scale(site)
                        readings["likelihood", name] = name, unscaled_log_prob(site), 0
                        if predictions and not linearized:
                            value = site["fn"].sample()
                            readings["sample", name] = name, value, value.dim() - len(site["fn"].batch_shape)
                return readings

            readings = runner.run(batch, read)
            size = runner.num_draws
            log_prior = {n: v.reshape(size, -1).sum(-1) for (k, n), v in readings.items() if k == "prior"}
            guided = (
                posterior_predictive(self.model, posterior, batch[0] or batch[1], draws=runner.draws)
                if linearized
                else {}
            )
            for name, value in observed.items():
                likelihood: Tensor | None = readings["likelihood", name]
                assert likelihood is not None
                lp_terms[name] = lp_terms.get(name, 0) + likelihood.reshape(size, -1).sum(-1)
                seen[name] = seen.get(name, 0) + math.prod(value.shape[:1])
                full[name] = full[name] * math.prod(value.shape[:1])
                sample = readings.get(("sample", name))
                if name in guided:
                    likelihood, sample = guided[name].log_likelihood, guided[name].samples
                assert likelihood is not None
                found.setdefault(name, []).append((likelihood, sample, value))
        if not found:
            raise ValueError(
                "The model observes nothing in data; pass the observations too, e.g. data=(x, y) for model(x, y)."
            )
        # a subsampled plate stands for all of its N points, of which the data hold ``seen``
        lp = sum(log_prior.values()) + sum(lp_terms[n] * (full[n] / seen[n]) for n in found)
        likelihoods, samples, observations = {}, {}, {}
        for name, parts in found.items():
            dims = self.site_dims[name]
            axis = _differing_axis([part[2] for part in parts])
            value = torch.cat([part[2] for part in parts], axis) if parts[0][2].dim() else parts[0][2]
            observations[name] = value, dims
            terms = [part[0] for part in parts]
            joined = torch.cat(terms, axis + 1) if terms[0].dim() > axis + 1 else sum(terms)
            likelihoods[name] = self.chained(torch.as_tensor(joined)), dims
            drawn = [part[1] for part in parts if part[1] is not None]
            if drawn:
                samples[name] = (
                    self.chained(torch.cat(drawn, axis + 1) if drawn[0].dim() > 1 else drawn[0]),
                    dims,
                )
        return {
            "_lp": self.dataset({"lp": (self.chained(torch.as_tensor(lp)), ())}),
            "log_prior": self.dataset({n: (self.chained(v), ()) for n, v in log_prior.items()}),
            "log_likelihood": self.dataset(likelihoods),
            "posterior_predictive": self.dataset(samples),
            "observed_data": self.dataset(observations, sampled=False),
        }

    def sample_stats(self, lp: xr.Dataset, log_q: Tensor | None, posterior: Any) -> xr.Dataset:
        """Log joint density, density of the guide, importance weights, divergences."""
        stats = lp
        if log_q is not None and bool(torch.isfinite(log_q).all()):
            stats = stats.assign(log_q=(("chain", "draw"), self.chained(log_q).cpu().numpy()))
            log_weight = torch.as_tensor(lp["lp"].values) - self.chained(log_q).cpu()
            log_weight = log_weight - torch.logsumexp(log_weight, (0, 1))
            stats = stats.assign(log_weight=(("chain", "draw"), log_weight.numpy()))
        if isinstance(posterior, NUTSResult):
            recorded = {n: (("chain", "draw"), v.numpy()) for n, v in posterior.sample_stats.items()}
            if next(iter(recorded.values()))[1].shape == self.shape:
                stats = stats.assign(recorded)
        if isinstance(posterior, MCMC):
            divergences = posterior.diagnostics().get("divergences", {})
            diverging = np.zeros((posterior.num_chains, posterior.num_samples), dtype=bool)
            for chain, indices in enumerate(divergences.values()):
                diverging[chain, indices] = True
            if diverging.shape == self.shape:
                stats = stats.assign(diverging=(("chain", "draw"), diverging))
        return stats

    def constants(
        self, data: Any, batch: Batch, given: Mapping[str, Any] | None, observed: xr.Dataset
    ) -> xr.Dataset:
        """The inputs: given ones, or the tensors of a single batch that are not observations."""
        values: dict[str, Any] = dict(given or {})
        if given is None:
            args, kwargs = next(iter(split_batch(data, None)))
            if not _same_batch((args, kwargs), batch):
                return xr.Dataset()  # a loader: its inputs are not held in memory at once
            function = self.model.forward if isinstance(self.model, torch.nn.Module) else self.model
            try:
                values = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
            except (TypeError, ValueError):
                values = {f"argument_{i}": a for i, a in enumerate(args)} | kwargs
        variables = {}
        sizes = {int(size): str(dim) for dim, size in reversed(list(observed.sizes.items()))}
        for name, value in values.items():
            if not isinstance(value, Tensor):
                value = torch.as_tensor(np.asarray(value)) if given is not None else None
            if value is None or (
                given is None
                and any(np.array_equal(value.cpu().numpy(), o.values) for o in observed.values())
            ):
                continue
            dims = [
                sizes.get(n, f"{name}_dim_{i}") if i == 0 else f"{name}_dim_{i}"
                for i, n in enumerate(value.shape)
            ]
            variables[name] = value, self.user_dims.get(name, dims)
        return self.dataset(variables, sampled=False)

    def prior_groups(self, batch: Batch, num_samples: int) -> Groups:
        """Draws from the model with its observations taken away."""
        args, kwargs = batch
        rows: list[dict[str, Tensor]] = []
        with poutine.block():
            observed = observed_names(poutine.trace(self.model).get_trace(*args, **kwargs))
            for _ in range(num_samples):
                trace = poutine.trace(poutine.uncondition(self.model)).get_trace(*args, **kwargs)
                rows.append({n: s["value"] for n, s in sample_sites(trace).items() if n in self.site_dims})
        stacked = {n: torch.stack([row[n] for row in rows])[None] for n in rows[0]}

        def pick(wanted: bool) -> xr.Dataset:
            return self.dataset(
                {n: (v, self.site_dims[n]) for n, v in stacked.items() if (n in observed) == wanted}
            )

        return {"prior": pick(False), "prior_predictive": pick(True)}

    @staticmethod
    def select(draws: Draws, var_names: Sequence[str] | None, weights: bool) -> list[str]:
        """The latent sites to export."""
        if var_names is not None:
            unknown = sorted(set(var_names) - set(draws))
            if unknown:
                raise ValueError(f"var_names: {unknown} are not latent sites; there are {sorted(draws)}.")
            return list(var_names)
        if weights:
            return list(draws)
        return [n for n in draws if not _WEIGHT.search(n)] or [
            n for n, v in draws.items() if v[0].numel() <= MAX_WEIGHT_SIZE
        ]


def _differing_axis(values: list[Tensor]) -> int:
    """The dimension in which the batches of a loader differ in size; the first if they do not."""
    return next((i for i in range(values[0].dim()) if len({v.shape[i] for v in values}) > 1), 0)


def _same_batch(a: Batch, b: Batch) -> bool:
    shapes = [
        [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        for args, kwargs in (a, b)
    ]
    return shapes[0] == shapes[1]


def _attributes(posterior: Any) -> dict[str, Any]:
    kind = type(posterior[0] if isinstance(posterior, (list, tuple)) else posterior)
    return {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pyro_bnn",
        "creation_library_version": __version__,
        "creation_library_language": "Python",
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "posterior_class": kind.__name__,
    }
