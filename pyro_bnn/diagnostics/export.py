# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Builds the groups of an ArviZ tree from a posterior, block by block of draws."""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
import xarray as xr
from pyro.infer import MCMC
from torch import Tensor

from pyro_bnn._version import __version__
from pyro_bnn.diagnostics.readings import read_sites
from pyro_bnn.diagnostics.scored import need
from pyro_bnn.infer.nuts import NUTSResult, recorded_run
from pyro_bnn.infer.predict.density import guide_log_prob
from pyro_bnn.infer.predict.draws import Draws, component_draws, posterior_draws
from pyro_bnn.infer.predict.pieces import Pieces
from pyro_bnn.infer.predict.runs import MAX_MEMORY, ModelRunner
from pyro_bnn.infer.predict.sites import site_dims, value_dims
from pyro_bnn.model.data import Batch, Path, as_batches, leaves
from pyro_bnn.model.handlers import (
    deterministic_names,
    is_deterministic,
    observed_names,
    sample_sites,
)
from pyro_bnn.model.plates import Rows
from pyro_bnn.nn.packed import packed_sites
from pyro_bnn.ops.options import require_count

#: Largest number of values per draw that a weight site may have to be exported when nothing else is.
MAX_WEIGHT_SIZE = 1000

_WEIGHT = re.compile(r"(^|\.)packed$|\.([a-z_]*_)?(weight|bias)(_[a-z0-9_]+)?$")

Groups = dict[str, xr.Dataset]


def chain_draws(
    posterior: Any, num_samples: int | None, num_chains: int = 1, batch: Batch = ((), {})
) -> tuple[Draws, tuple[int, int]]:
    """
    Draws of all chains, one after the other.

    :param posterior: see :func:`~pyro_bnn.diagnostics.to_datatree`.
    :param int num_samples: the number of draws in all chains together; 1000 for guides by default.
    :param int num_chains: chains in a mapping of draws.
    :param batch: arguments of the guide, for guides that need them.
    :return: draws by site, each of shape ``(chains * draws,) + site shape``, and ``(chains, draws)``.
    :raises ValueError: if the draws do not divide into the chains.
    """
    chains, size = shape = chain_shape(posterior, num_samples, num_chains)
    if hasattr(posterior, "get_samples"):
        grouped: Draws = posterior.get_samples(group_by_chain=True)
        held = next(iter(grouped.values())).shape[1]
        index = torch.linspace(0, held - 1, size, dtype=torch.float64).long()
        return {n: v[:, index].flatten(0, 1) for n, v in grouped.items()}, shape
    if isinstance(posterior, (list, tuple)):
        members = [posterior_draws(member, size, batch) for member in posterior]
        return {n: torch.cat([m[n] for m in members]) for n in members[0]}, shape
    if chains > 1 and not isinstance(posterior, Mapping):
        return {n: v.flatten(0, 1) for n, v in component_draws(posterior, size).items()}, shape
    return posterior_draws(posterior, chains * size, batch), shape


def chain_shape(posterior: Any, num_samples: int | None, num_chains: int = 1) -> tuple[int, int]:
    """
    :param posterior: see :func:`~pyro_bnn.diagnostics.to_datatree`.
    :param int num_samples: the number of draws in all chains together; by default all that there are, of guides 1000 or
        as many fewer as divide into the chains.
    :param int num_chains: chains in a mapping of draws.
    :return: the numbers of chains and of draws in each.
    :raises ValueError: if the draws do not divide into the chains, or there are fewer.
    """
    if hasattr(posterior, "get_samples"):
        chains, size = next(iter(posterior.get_samples(group_by_chain=True).values())).shape[:2]
        if num_samples is not None and num_samples > chains * size:
            raise ValueError(f"num_samples={num_samples}, but there are {chains * size} draws only.")
        return chains, size if num_samples is None else _per_chain(num_samples, chains, "chains of the run")
    if isinstance(posterior, Mapping):
        size = len(next(iter(posterior.values()))) if num_samples is None else num_samples
        if size % num_chains:
            raise ValueError(f"num_chains={num_chains} does not divide the number of draws, {size}.")
        return num_chains, size // num_chains
    chains, what = 1, "chain"
    if isinstance(posterior, (list, tuple)):
        chains, what = len(posterior), "guides, a chain each"
    elif getattr(posterior, "equal_weights", True):
        chains, what = getattr(posterior, "num_components", 1), "components of the guide, a chain each"
    return chains, max(1, 1000 // chains) if num_samples is None else _per_chain(num_samples, chains, what)


def _per_chain(num_samples: int, chains: int, what: str) -> int:
    """Draws of each of some chains, which are all of one length."""
    require_count("num_samples", num_samples)
    if num_samples % chains:
        few = num_samples - num_samples % chains
        numbers = " or ".join(str(n) for n in (few, few + chains) if n)
        raise ValueError(
            f"num_samples={num_samples} draws cannot be shared equally by the {chains} {what}: pass num_samples={numbers}."
        )
    return num_samples // chains


def draw_blocks(
    posterior: Any, num_samples: int | None, num_chains: int, batch: Batch, block_size: int | None
) -> Iterator[tuple[Draws, tuple[int, int]]]:
    """
    The draws of :func:`chain_draws` in blocks, of which a guide draws one at a time.

    :param posterior: see :func:`~pyro_bnn.diagnostics.to_datatree`.
    :param int num_samples: the number of draws in all chains together; 1000 for guides by default.
    :param int num_chains: chains in a mapping of draws.
    :param batch: arguments of the guide, for guides that need them.
    :param int block_size: draws of each chain in a block; ``None`` for all.
    :return: an iterator over draws by site and ``(chains, draws)``.
    """
    chains, size = chain_shape(posterior, num_samples, num_chains)
    if block_size is None or block_size >= size:
        yield chain_draws(posterior, num_samples, num_chains, batch)
        return
    given = isinstance(posterior, Mapping) or hasattr(posterior, "get_samples")
    held = chain_draws(posterior, num_samples, num_chains, batch)[0] if given else {}
    for start in range(0, size, block_size):
        length = min(block_size, size - start)
        if given:
            part = {n: v.unflatten(0, (chains, size))[:, start : start + length] for n, v in held.items()}
            yield {n: v.flatten(0, 1) for n, v in part.items()}, (chains, length)
        else:
            yield chain_draws(posterior, chains * length, num_chains, batch)


class Exporter:
    """
    Builds the groups of one tree.

    :ivar rest: the groups that do not grow with the blocks of draws, once :meth:`blocks` is exhausted.
    :ivar names: the sites in the posterior group.
    :ivar deterministic: the deterministic sites of the model, known where there are data.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior: Any,
        data: Any,
        *,
        batch_size: int | None = None,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        unpack: bool = True,
    ) -> None:
        if isinstance(data, Iterator):
            raise ValueError(
                "data is an iterator, which can be run through once only; pass tensors, a list or a loader."
            )
        self.model = model
        self.posterior = posterior
        self.data = None if data is None else as_batches(data)
        self.batch_size = batch_size
        self.coords = dict(coords or {})
        self.user_dims = {name: tuple(own) for name, own in (dims or {}).items()}
        self.packed = packed_sites(model) if unpack else {}
        self.site_dims: dict[str, tuple[str, ...]] = {}
        self.recorded: NUTSResult | None = recorded_run(posterior)
        self.shape = (1, 1)
        self.rest: Groups = {}
        self.names: list[str] = []
        self.deterministic: list[str] = []
        self.left_out: list[str] = []
        self.masks: dict[str, Tensor] = {}
        self.missing: list[str] = []
        self.rows: list[Rows] = []

    def first_batch(self) -> Batch:
        """The arguments that show the structure of the model; none without data."""
        return ((), {}) if self.data is None else self.data.first

    def bytes_per_draw(self, chains: int, num_chains: int, predictions: bool) -> int:
        """Bytes of one draw of each chain: of all latent sites, the pointwise likelihoods and the predictions."""
        with torch.random.fork_rng():
            batch = self.first_batch()
            draws, shape = chain_draws(self.posterior, chains, num_chains, batch)
            rows = math.prod(shape)
            total = sum(v.numel() * v.element_size() for v in draws.values()) / rows
            if self.data is None:
                return int(chains * total)
            pieces = Pieces(self.model, self.posterior, self.data, draws=draws, redraw=True)
            for batch in pieces:
                for name, site in pieces.runner.single(batch, 0).items():
                    if name not in draws:
                        value, fixed = site["value"], is_deterministic(site)
                        terms = 0 if fixed else math.prod(site["fn"].batch_shape)
                        total += (terms + (predictions or fixed) * value.numel()) * value.element_size()
        return int(chains * total)

    def blocks(
        self,
        num_samples: int | None,
        num_chains: int,
        block_size: int | None,
        *,
        var_names: Sequence[str] | None = None,
        weights: bool = False,
        thin: int = 1,
        predictions: bool = True,
        constant_data: Mapping[str, Any] | None = None,
        prior_samples: int = 0,
        vectorize: bool | None = None,
        max_memory: float = MAX_MEMORY,
    ) -> Iterator[Groups]:
        """The groups with draws in blocks of ``block_size`` draws of each chain; then sets :attr:`rest`."""
        if thin < 1:
            raise ValueError(f"thin must be at least 1, not {thin}.")
        batch, observed = self.first_batch(), None
        pieces: Pieces | None = None
        start, total = 0, chain_shape(self.posterior, num_samples, num_chains)
        lp: list[Tensor] = []
        log_q: list[Tensor | None] = []
        for draws, shape in draw_blocks(self.posterior, num_samples, num_chains, batch, block_size):
            named = self.unpacked(draws)
            if not self.names:
                if not draws:
                    raise ValueError("The posterior has no latent site, of which there could be draws.")
                self.inspect(draws, batch if self.data is not None else None)
                self.names = self.select(named, self.deterministic, var_names, weights)
                self.left_out = sorted({*named, *self.deterministic} - set(self.names))
                self.deterministic = [name for name in self.deterministic if name in self.names]
            self.shape = shape
            skip = -start % thin
            block: Groups = {}
            if self.data is not None:
                pieces = Pieces(
                    self.model, self.posterior, self.data, batch_size=self.batch_size, vectorize=vectorize,
                    max_memory=max_memory, draws=draws, redraw=True, runner=None if pieces is None else pieces.runner,
                )  # fmt: skip
                found, density, values = self.data_groups(pieces, predictions)
                self.names = [n for n in self.names if n not in self.deterministic or n in values]
                self.deterministic = [n for n in self.deterministic if n in values]
                named |= values
                lp.append(self.chained(density))
                whole = self.data.is_single or not pieces.local
                whole = whole and not self.missing  # the guide says nothing of those sites
                log_q.append(self.guide_density(draws, batch) if whole else None)
                block |= found
                if observed is not None and not observed.identical(block["observed_data"]):
                    raise ValueError(
                        "The observations came in another order the second time: export in blocks of draws needs "
                        "a loader that does not shuffle."
                    )
                observed = block.pop("observed_data")
            kept = {n: (self.chained(named[n])[:, skip::thin], self.site_dims[n]) for n in self.names}
            block = {"posterior": self.dataset(kept)} | block
            for name, group in block.items():
                if "draw" in group.dims:
                    first, step = (start + skip, thin) if name == "posterior" else (start, 1)
                    labels = first + step * np.arange(group.sizes["draw"])
                    block[name] = group.assign_coords(draw=labels)
            start += shape[1]
            yield block
        self.shape = total
        if observed is not None:
            assert pieces is not None
            if constant_data is None and self.data is not None and self.data.is_single:
                self.rows = pieces.runner.rows(batch)
            stats = (
                None if any(q is None for q in log_q) else torch.cat([q for q in log_q if q is not None], 1)
            )
            self.rest["sample_stats"] = self.sample_stats(torch.cat(lp, 1), stats)
            self.rest["observed_data"] = observed
            self.rest["constant_data"] = self.constants(constant_data, observed)
        if prior_samples:
            self.rest |= self.prior_groups(batch, prior_samples)
        if self.recorded is not None and self.recorded.warmup:
            warmup = self.unpacked(self.recorded.warmup)
            self.rest["warmup_posterior"] = self.dataset(
                {n: (warmup[n], self.site_dims[n]) for n in self.names if n in warmup}
            )
            self.rest["warmup_sample_stats"] = self.dataset(
                {n: (v, ()) for n, v in self.recorded.warmup_stats.items()}
            )

    def guide_density(self, draws: Draws, batch: Batch) -> Tensor | None:
        """The log density of the guide, ``(chains, draws)``; ``None`` where there is none."""
        posterior = self.posterior
        if isinstance(posterior, Mapping) or hasattr(posterior, "get_samples"):
            return None
        guides = posterior if isinstance(posterior, (list, tuple)) else [posterior]
        terms = [guide_log_prob(guide, draws, batch) for guide in guides]
        if any(term is None for term in terms):
            return None
        # independent fits are a mixture with equal weights
        stacked = torch.stack([term for term in terms if term is not None])
        return self.chained(torch.logsumexp(stacked, 0) - math.log(len(guides)))

    def inspect(self, draws: Draws, batch: Batch | None) -> None:
        """Finds the names of dims from the plates of the model."""
        sites: dict[str, Any] = {}
        if batch is not None:
            runner = ModelRunner(self.model, draws)
            runner.look(batch)
            sites = runner.structure.sites
        for name, value in draws.items():
            if name in sites:
                dims = site_dims(sites[name], len(sites[name]["fn"].batch_shape))
            else:
                dims = tuple(f"{name}_dim_{i}" for i in range(value.dim() - 1))
            self.site_dims[name] = dims
        for name, site in sites.items():
            dims = (
                value_dims(site) if is_deterministic(site) else site_dims(site, len(site["fn"].batch_shape))
            )
            self.site_dims.setdefault(name, dims)
        self.deterministic = deterministic_names(sites)
        for site, packed in self.packed.items():
            for part, shape in packed.layout.items():
                full = _part_name(site, part)
                self.site_dims[full] = tuple(f"{full}_dim_{i}" for i in range(len(shape)))
        names = set(self.site_dims)
        for name, dims in self.site_dims.items():
            # a variable may not share its name with a dim
            dims = tuple(f"{d}_dim" if d in names else d for d in dims)
            own = self.user_dims.get(name, dims)
            if len(own) != len(dims):
                raise ValueError(f"dims of {name!r}: {len(dims)} names expected, got {list(own)}.")
            self.site_dims[name] = own
        arguments = {} if batch is None else dict(_inputs(self.model, batch).values())
        unknown = sorted(set(self.user_dims) - names - set(arguments))
        if unknown:
            raise ValueError(
                f"dims: {unknown} are no sites and no arguments of the model; there are {sorted(names)}."
            )
        known = {d for dims in (*self.site_dims.values(), *self.user_dims.values()) for d in dims}
        known |= {f"{name}_dim_{i}" for name, value in arguments.items() for i in range(value.dim())}
        unknown = sorted(set(self.coords) - known - {"chain", "draw"})
        if unknown and batch is not None:
            raise ValueError(f"coords: no variable has the dims {unknown}; there are {sorted(known)}.")

    def unpacked(self, values: Mapping[str, Tensor]) -> Draws:
        """Splits flat sites into their named weights."""
        found: Draws = {}
        for name, value in values.items():
            if name in self.packed:
                parts = self.packed[name].unpack(value)
                found |= {_part_name(name, part): own for part, own in parts.items()}
            else:
                found[name] = value
        return found

    def chained(self, value: Tensor) -> Tensor:
        """Splits the first dimension, of all draws, into chains and draws."""
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
            if key in arrays:
                raise ValueError(
                    f"two sites are named {key!r} in a tree, where {name!r} is written with dots: rename one."
                )
            own = [dim.replace("/", ".") for dim in dims][: value.dim() - len(lead)]
            if taken := {"chain", "draw"} & {key, *own}:
                raise ValueError(
                    f"site {name!r}: {taken.pop()!r} is the name of a dimension of every tree: rename the site or plate of this name."
                )
            if len(own) < value.dim() - len(lead):
                raise ValueError(f"dims of {name!r}: {value.dim() - len(lead)} names expected, got {own}.")
            for i, dim in enumerate(own):
                size = value.shape[len(lead) + i]
                if sizes.setdefault(dim, size) != size:  # two plates of one name with different sizes
                    own[i] = f"{key}_dim_{i}"
                    sizes[own[i]] = size
            arrays[key] = (*lead, *own), value.detach().cpu().numpy()
        for dim, size in sizes.items():
            if dim in self.coords and len(self.coords[dim]) != size:
                raise ValueError(
                    f"coords of the dim {dim!r}: {len(self.coords[dim])} values for a size of {size}."
                )
        coords: dict[str, Any] = {d: self.coords.get(d, np.arange(n)) for d, n in sizes.items()}
        if sampled and arrays:
            first = next(iter(arrays.values()))[1]
            coords |= {"chain": np.arange(first.shape[0]), "draw": np.arange(first.shape[1])}
        used = {d for dims, _ in arrays.values() for d in dims}
        return xr.Dataset(arrays, coords={d: c for d, c in coords.items() if d in used})

    def data_groups(self, pieces: Pieces, predictions: bool) -> tuple[Groups, Tensor, Draws]:
        """
        Runs the model over the data: densities, predictions and observations, the log joint density, and the values of
        deterministic sites and of latents that were drawn batch by batch.
        """
        found = read_sites(pieces, self.deterministic, samples=predictions)
        sites, structure = found.sites, pieces.runner.structure
        names = set(self.site_dims)
        for name in sites.keys() - names:  # a site of some batches only, which the first does not show
            dims = site_dims(structure.sites[name], structure.ndims[name])
            self.site_dims[name] = tuple(f"{d}_dim" if d in names else d for d in dims)
        self.masks = {name: site.mask for name, site in sites.items() if site.mask is not None}
        self.missing = found.missing
        likelihoods: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
        for name, site in sites.items():
            value, dims = need(site.log_likelihood, "log_likelihood"), self.site_dims[name]
            if name in self.masks:  # what does not count has no likelihood
                kept = self.masks[name].reshape(value.shape[1:] + (-1,)).any(-1).flatten()
                if not kept.all():
                    value, dims = value.flatten(1)[:, kept], (f"{name}_kept",)
                    self.coords.setdefault(dims[0], kept.nonzero().squeeze(-1).numpy())
            likelihoods[name] = self.chained(value), dims
        groups = {
            "log_prior": self.dataset({n: (self.chained(v), ()) for n, v in found.log_prior.items()}),
            "log_likelihood": self.dataset(likelihoods),
            "posterior_predictive": self.dataset(
                {
                    n: (self.chained(s.samples), self.site_dims[n])
                    for n, s in sites.items()
                    if s.samples is not None
                }
            ),
            "observed_data": self.dataset(
                {n: (need(s.observed, "observed"), self.site_dims[n]) for n, s in sites.items()},
                sampled=False,
            ),
        }
        return groups, found.lp, found.values

    def sample_stats(self, lp: Tensor, log_q: Tensor | None) -> xr.Dataset:
        """Log joint density, density of the guide, importance weights, divergences."""
        posterior, recorded = self.posterior, self.recorded
        stats = {"lp": lp}
        if log_q is not None and bool(torch.isfinite(log_q).all()):
            log_weight = lp.cpu() - log_q.cpu()
            stats |= {"log_q": log_q, "log_weight": log_weight - torch.logsumexp(log_weight, (0, 1))}
        if recorded is not None:
            stats |= {n: v for n, v in recorded.sample_stats.items() if v.shape == self.shape}
        elif isinstance(posterior, MCMC):
            divergences = posterior.diagnostics().get("divergences", {})
            diverging = torch.zeros(posterior.num_chains, posterior.num_samples, dtype=torch.bool)
            for chain, indices in enumerate(divergences.values()):
                diverging[chain, indices] = True
            if diverging.shape == self.shape:
                stats["diverging"] = diverging
        return self.dataset({n: (v, ()) for n, v in stats.items()})

    def constants(self, given: Mapping[str, Any] | None, observed: xr.Dataset) -> xr.Dataset:
        """The inputs: given ones, or the tensors of a single batch that are not observations; and which observations count."""
        assert self.data is not None
        values: dict[str, Tensor] = {}
        rows: dict[str, tuple[int, str]] = {}
        if given is not None:
            values = {name: torch.as_tensor(np.asarray(value)) for name, value in given.items()}
        elif self.data.is_single:  # the inputs of a loader are not held in memory at once
            values, rows = self.inputs(observed)
        variables = {}
        for name, value in values.items():
            dims = [f"{name}_dim_{i}" for i in range(value.dim())]
            if name in rows:
                axis, plate = rows[name]
                dims[axis] = (
                    f"{plate}_dim" if plate in values else plate
                )  # a variable may not share its name with a dim
            variables[name] = value, self.user_dims.get(name, dims)
        for name, mask in self.masks.items():
            variables[f"{name}_mask"] = mask, self.site_dims[name]
        return self.dataset(variables, sampled=False)

    def inputs(self, observed: xr.Dataset) -> tuple[dict[str, Tensor], dict[str, tuple[int, str]]]:
        """The tensors of a single batch that are not observations by name, and where those with rows have them."""
        assert self.data is not None
        values, places = {}, {}
        for path, (name, leaf) in _inputs(self.model, self.data.first).items():
            if not any(np.array_equal(leaf.numpy(force=True), o.values) for o in observed.values()):
                values[name], places[path] = leaf, name
        rows = {
            places[path]: (dim, next(iter(found.plates)))
            for found in self.rows
            for path, dim in found.cuts.items()
            if len(found.plates) == 1 and path in places
        }
        return values, rows

    def prior_groups(self, batch: Batch, num_samples: int) -> Groups:
        """Draws from the model with its observations taken away."""
        args, kwargs = batch
        rows: list[dict[str, Tensor]] = []
        with poutine.block():
            observed = observed_names(poutine.trace(self.model).get_trace(*args, **kwargs))
            for _ in range(num_samples):
                trace = poutine.trace(poutine.uncondition(self.model)).get_trace(*args, **kwargs)
                rows.append(
                    {
                        # the distribution of a deterministic site has dimensions of plates that the value lacks
                        n: s["infer"]["obs"] if is_deterministic(s) else s["value"]
                        for n, s in sample_sites(trace).items()
                        if n in self.site_dims
                    }
                )
        stacked = self.unpacked({n: torch.stack([row[n] for row in rows])[None] for n in rows[0]})

        def pick(names: Sequence[str]) -> xr.Dataset:
            return self.dataset({n: (stacked[n], self.site_dims[n]) for n in names if n in stacked})

        return {"prior": pick(self.names), "prior_predictive": pick(observed)}

    @staticmethod
    def select(
        draws: Draws, deterministic: Sequence[str], var_names: Sequence[str] | None, weights: bool
    ) -> list[str]:
        """The latent and deterministic sites to export."""
        if var_names is not None:
            known = [*draws, *deterministic]
            unknown = sorted(set(var_names) - set(known))
            if unknown:
                raise ValueError(
                    f"var_names: {unknown} are not latent or deterministic sites; there are {sorted(known)}."
                )
            return list(var_names)
        if weights:
            return [*draws, *deterministic]
        return [n for n in (*draws, *deterministic) if not _WEIGHT.search(n)] or [
            n for n, v in draws.items() if v[0].numel() <= MAX_WEIGHT_SIZE
        ]


def _part_name(site: str, part: str) -> str:
    """The full name of a weight in the flat site ``[prefix.]packed``."""
    return site.removesuffix("packed") + part


def _inputs(model: Any, batch: Batch) -> dict[Path, tuple[str, Tensor]]:
    """The tensors among the arguments of a model with their names: of the parameter, and of the places in containers."""
    args, kwargs = batch
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    def name(path: Path) -> str:
        first = path[1]
        if path[0] == 0:
            first = positional[first] if first < len(positional) else f"argument_{first}"
        return ".".join(map(str, (first, *path[2:])))

    return {
        path: (name(path), leaf) for path, leaf in leaves((args, kwargs)).items() if isinstance(leaf, Tensor)
    }


def attributes(posterior: Any) -> dict[str, Any]:
    """
    :param posterior: see :func:`~pyro_bnn.diagnostics.to_datatree`.
    :return: the attributes of ArviZ's schema.
    """
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
