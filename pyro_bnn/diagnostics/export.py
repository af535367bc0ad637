# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Builds the groups of an ArviZ tree from a posterior, block by block of draws."""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_bnn._version import __version__
from pyro_bnn.diagnostics.chains import Chains
from pyro_bnn.diagnostics.labels import Labels, Variables, numbered
from pyro_bnn.diagnostics.readings import SiteValues, read_sites
from pyro_bnn.infer.predict.draws import Draws
from pyro_bnn.infer.predict.pieces import Pieces
from pyro_bnn.infer.predict.runs import MAX_MEMORY, ModelRunner
from pyro_bnn.infer.predict.sites import site_dims, value_dims
from pyro_bnn.model.data import Batch, Path, as_batches, leaves
from pyro_bnn.model.handlers import deterministic_names, is_deterministic, observed_names, sample_sites
from pyro_bnn.nn.packed import packed_sites

if TYPE_CHECKING:
    import xarray as xr

#: Largest number of values per draw that a weight site may have to be exported when nothing else is.
MAX_WEIGHT_SIZE = 1000

_WEIGHT = re.compile(r"(^|\.)packed$|\.([a-z_]*_)?(weight|bias)(_[a-z0-9_]+)?$")

Groups = dict[str, "xr.Dataset"]


@dataclass
class Contents:
    """What a tree shall hold, and how the model is run; see :func:`~pyro_bnn.diagnostics.to_datatree`."""

    var_names: Sequence[str] | None = None
    weights: bool = False
    thin: int = 1
    prior_samples: int = 0
    predictions: bool = True
    constant_data: Mapping[str, Any] | None = None
    batch_size: int | None = None
    vectorize: bool | None = None
    max_memory: float = MAX_MEMORY
    unpack: bool = True
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def select(self, draws: Draws, deterministic: Sequence[str]) -> list[str]:
        """The latent and deterministic sites to export."""
        known = [*draws, *deterministic]
        if self.var_names is not None:
            unknown = sorted(set(self.var_names) - set(known))
            if unknown:
                raise ValueError(
                    f"var_names: {unknown} are not latent or deterministic sites; there are {sorted(known)}."
                )
            return list(self.var_names)
        few = [n for n in known if self.weights or not _WEIGHT.search(n)]
        return few or [n for n, v in draws.items() if v[0].numel() <= MAX_WEIGHT_SIZE]


@dataclass
class Block:
    """
    Some draws of every chain.

    :ivar draws: by site, one chain after the other.
    :ivar start: the number of the first.
    :ivar shape: the numbers of chains and of draws in each.
    """

    draws: Draws
    start: int
    shape: tuple[int, int]

    def chained(self, value: Tensor) -> Tensor:
        """Splits the first dimension, of all draws, into chains and draws."""
        return value.unflatten(0, self.shape)

    def chain_all(self, values: Mapping[str, Tensor]) -> Draws:
        """The same for several."""
        return {name: self.chained(value) for name, value in values.items()}


class Exporter:
    """
    Builds the groups of one tree.

    :param model: a Pyro model.
    :param posterior: see :func:`~pyro_bnn.diagnostics.to_datatree`.
    :param data: see :func:`~pyro_bnn.diagnostics.to_datatree`.
    :param contents: what the tree shall hold.
    :param num_samples: the number of draws in all chains together.
    :param num_chains: chains in a mapping of draws.
    :param labels: the names of dims.
    :ivar rest: the groups that do not grow with the blocks of draws, once :meth:`blocks` is exhausted.
    :ivar names: the sites in the posterior group.
    :ivar left_out: the other ones.
    :ivar missing: latent sites of the model of which there are no draws.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior: Any,
        data: Any,
        contents: Contents,
        num_samples: int | None = None,
        num_chains: int = 1,
        labels: Labels | None = None,
    ) -> None:
        if isinstance(data, Iterator):
            raise ValueError(
                "data is an iterator, which can be run through once only; pass tensors, a list or a loader."
            )
        if contents.thin < 1:
            raise ValueError(f"thin must be at least 1, not {contents.thin}.")
        self.model, self.contents = model, contents
        self.data = None if data is None else as_batches(data)
        #: The arguments that show the structure of the model; none without data.
        self.batch: Batch = ((), {}) if self.data is None else self.data.first
        self.chains = Chains(posterior, num_samples, num_chains, self.batch)
        self.labels = labels or Labels(None, None)
        self.packed = packed_sites(model) if contents.unpack else {}
        self.pieces: Pieces | None = None
        self.observed: xr.Dataset | None = None
        self.rest: Groups = {}
        self.names: list[str] = []
        self.deterministic: list[str] = []
        self.left_out: list[str] = []
        self.masks: dict[str, Tensor] = {}
        self.missing: list[str] = []

    def bytes_per_draw(self) -> int:
        """Bytes of one draw of each chain: of all latent sites, the pointwise likelihoods and the predictions."""
        chains = self.chains.shape[0]
        with torch.random.fork_rng():
            draws = self.chains.draws(length=1)
            total = sum(v.numel() * v.element_size() for v in draws.values()) / chains
            if self.data is None:
                return int(chains * total)
            pieces = Pieces(self.model, self.chains.posterior, self.data, draws=draws, redraw=True)
            for batch in pieces:
                for name, site in pieces.runner.single(batch, 0).items():
                    if name not in draws:
                        value, fixed = site["value"], is_deterministic(site)
                        terms = 0 if fixed else math.prod(site["fn"].batch_shape)
                        predicted = (self.contents.predictions or fixed) * value.numel()
                        total += (terms + predicted) * value.element_size()
        return int(chains * total)

    def blocks(self, block_size: int | None = None) -> Iterator[Groups]:
        """The groups with draws in blocks of ``block_size`` draws of each chain; then sets :attr:`rest`."""
        start, densities = 0, []
        for draws, shape in self.chains.blocks(block_size):
            block = Block(draws, start, shape)
            named = self.unpacked(draws)
            if not start:
                self.look(draws, named)
            groups: Groups = {}
            if self.data is not None:
                found = self.read(draws)
                named |= found.values
                densities.append((block.chained(found.lp), self.guide_density(block)))
                groups = self.data_groups(block, found)
            start += shape[1]
            yield {"posterior": self.posterior(block, named)} | groups
        self.rest = {} if self.data is None else self.data_rest()
        if stats := self.statistics(densities):
            self.rest["sample_stats"] = self.statistics_group(stats)
        if self.contents.prior_samples:
            self.rest |= self.prior_groups()
        warmup, stats = self.chains.warmup()
        if warmup:
            values = self.labels.of(self.unpacked(warmup), self.names)
            self.rest["warmup_posterior"] = self.labels.dataset(values)
            self.rest["warmup_sample_stats"] = self.labels.dataset({n: (v, ()) for n, v in stats.items()})

    def look(self, draws: Draws, named: Draws) -> None:
        """Names the dims of all sites by the plates of the model, and chooses the sites to export."""
        if not draws:
            raise ValueError("The posterior has no latent site, of which there could be draws.")
        sites: dict[str, Any] = {}
        if self.data is not None:
            runner = ModelRunner(self.model, draws)
            runner.look(self.batch)
            sites = runner.structure.sites
        dims = {name: numbered(name, value.dim() - 1) for name, value in draws.items()}
        for name, site in sites.items():
            latent = name in draws or not is_deterministic(site)
            dims[name] = site_dims(site, len(site["fn"].batch_shape)) if latent else value_dims(site)
        for name, packed in self.packed.items():
            for part, shape in packed.layout.items():
                full = _part_name(name, part)
                dims[full] = numbered(full, len(shape))
        self.labels.name_sites(dims)
        arguments = dict(_inputs(self.model, self.batch).values())
        self.labels.check(arguments, self.data is not None)
        deterministic = deterministic_names(sites)
        self.names = self.contents.select(named, deterministic)
        self.left_out = sorted({*named, *deterministic} - set(self.names))
        self.deterministic = [name for name in deterministic if name in self.names]

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

    def posterior(self, block: Block, values: Draws) -> "xr.Dataset":
        """Every ``thin``-th draw of the sites to export."""
        thin = self.contents.thin
        skip = -block.start % thin
        kept = {name: block.chained(values[name])[:, skip::thin] for name in self.names}
        return _numbered_draws(self.labels.dataset(self.labels.of(kept)), block.start + skip, thin)

    def guide_density(self, block: Block) -> Tensor | None:
        """The log density of the guide, ``(chains, draws)``; ``None`` where there is none."""
        assert self.data is not None
        assert self.pieces is not None
        # of other latents than those of the first batch, and of missing ones, the guide says nothing
        if self.missing or (self.pieces.local and not self.data.is_single):
            return None
        log_q = self.chains.log_prob(block.draws)
        return None if log_q is None else block.chained(log_q)

    def read(self, draws: Draws) -> SiteValues:
        """Runs the model over the data under some draws."""
        contents, posterior = self.contents, self.chains.posterior
        self.pieces = pieces = Pieces(
            self.model, posterior, self.data, batch_size=contents.batch_size, vectorize=contents.vectorize,
            max_memory=contents.max_memory, draws=draws, redraw=True,
            runner=None if self.pieces is None else self.pieces.runner,
        )  # fmt: skip
        found = read_sites(pieces, self.deterministic, samples=contents.predictions)
        structure = pieces.runner.structure
        # sites of some batches only, which the first does not show
        new = found.log_likelihood.keys() - self.labels.dims.keys()
        self.labels.name_sites({n: site_dims(structure.sites[n], structure.ndims[n]) for n in new})
        self.masks, self.missing = found.masks, found.missing
        self.names = [n for n in self.names if n not in self.deterministic or n in found.values]
        self.deterministic = [n for n in self.deterministic if n in found.values]
        return found

    def data_groups(self, block: Block, found: SiteValues) -> Groups:
        """Densities and predictions; the observations are compared with those of the blocks before."""
        labels = self.labels
        observed = labels.dataset(labels.of(found.observed), sampled=False)
        if self.observed is not None and not self.observed.identical(observed):
            raise ValueError(
                "The observations came in another order the second time: export in blocks of draws needs "
                "a loader that does not shuffle."
            )
        self.observed = observed
        likelihoods = dict(labels.of(block.chain_all(found.log_likelihood)))
        for name, mask in found.masks.items():  # what does not count has no likelihood
            value, _ = likelihoods[name]
            kept = mask.reshape(value.shape[2:] + (-1,)).any(-1).flatten()
            if not kept.all():
                dim = f"{name}_kept"
                likelihoods[name] = value.flatten(2)[..., kept], (dim,)
                labels.coords.setdefault(dim, kept.nonzero().squeeze(-1).numpy())
        parts: dict[str, Variables] = {
            "log_prior": {n: (v, ()) for n, v in block.chain_all(found.log_prior).items()},
            "log_likelihood": likelihoods,
            "posterior_predictive": labels.of(block.chain_all(found.samples)),
        }
        return {name: _numbered_draws(labels.dataset(part), block.start) for name, part in parts.items()}

    def data_rest(self) -> Groups:
        """Observations and inputs."""
        assert self.observed is not None
        return {"observed_data": self.observed, "constant_data": self.constants()}

    def statistics(self, densities: Sequence[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        """Of the draws of all blocks what a run recorded, and the densities that were computed."""
        stats = self.chains.statistics()
        if not densities:
            return stats
        stats["lp"] = lp = torch.cat([block for block, _ in densities], 1)
        known = [block for _, block in densities if block is not None]
        log_q = torch.cat(known, 1) if len(known) == len(densities) else None
        if log_q is not None and bool(torch.isfinite(log_q).all()):
            log_weight = lp.cpu() - log_q.cpu()
            stats |= {"log_q": log_q, "log_weight": log_weight - torch.logsumexp(log_weight, (0, 1))}
        return stats

    def statistics_group(self, stats: Mapping[str, Tensor]) -> "xr.Dataset":
        """The group of statistics, with the weights of chains by ``source``, to which ``source_chain`` of each draw refers."""
        group = self.labels.dataset({name: (value, ()) for name, value in stats.items()})
        weights = self.chains.weights
        return group if weights is None else group.assign(weights=("source", weights.numpy()))

    def constants(self) -> "xr.Dataset":
        """The inputs: given ones, or the tensors of a single batch that are not observations; and which observations count."""
        assert self.data is not None
        given, variables = self.contents.constant_data, {}
        if given is not None:
            values = {name: torch.as_tensor(np.asarray(value)) for name, value in given.items()}
            variables = {name: (value, numbered(name, value.dim())) for name, value in values.items()}
        elif self.data.is_single:  # the inputs of a loader are not held in memory at once
            variables = self.inputs()
        variables = {n: (value, self.labels.given.get(n, dims)) for n, (value, dims) in variables.items()}
        variables |= {f"{name}_mask": (mask, self.labels.dims[name]) for name, mask in self.masks.items()}
        return self.labels.dataset(variables, sampled=False)

    def inputs(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        """The tensors of a single batch that are not observations; their rows have the name of the plate."""
        assert self.observed is not None
        assert self.pieces is not None
        rows = {
            path: (dim, next(iter(found.plates)))
            for found in self.pieces.runner.rows(self.batch)
            for path, dim in found.cuts.items()
            if len(found.plates) == 1
        }
        observed = [variable.values for variable in self.observed.values()]
        values = {
            path: (name, leaf)
            for path, (name, leaf) in _inputs(self.model, self.batch).items()
            if not any(np.array_equal(leaf.numpy(force=True), other) for other in observed)
        }
        names, found = {name for name, _ in values.values()}, {}
        for path, (name, leaf) in values.items():
            dims = list(numbered(name, leaf.dim()))
            if path in rows:
                axis, plate = rows[path]
                # a variable may not share its name with a dim
                dims[axis] = f"{plate}_dim" if plate in names else plate
            found[name] = leaf, tuple(dims)
        return found

    def prior_groups(self) -> Groups:
        """Draws from the model with its observations taken away."""
        args, kwargs = self.batch
        rows: list[dict[str, Tensor]] = []
        with poutine.block():
            observed = observed_names(poutine.trace(self.model).get_trace(*args, **kwargs))
            for _ in range(self.contents.prior_samples):
                trace = poutine.trace(poutine.uncondition(self.model)).get_trace(*args, **kwargs)
                rows.append(
                    {
                        # the distribution of a deterministic site has dimensions of plates that the value lacks
                        n: s["infer"]["obs"] if is_deterministic(s) else s["value"]
                        for n, s in sample_sites(trace).items()
                        if n in self.labels.dims
                    }
                )
        stacked = self.unpacked({n: torch.stack([row[n] for row in rows])[None] for n in rows[0]})
        groups = {"prior": self.names, "prior_predictive": observed}
        return {group: self.labels.dataset(self.labels.of(stacked, names)) for group, names in groups.items()}

    def attributes(self) -> dict[str, Any]:
        """The attributes of ArviZ's schema, the sites that are left out, and the user's own attributes."""
        found = {
            "created_at": datetime.now(UTC).isoformat(),
            "creation_library": "pyro_bnn",
            "creation_library_version": __version__,
            "creation_library_language": "Python",
            "inference_library": "pyro",
            "inference_library_version": pyro.__version__,
            "posterior_class": self.chains.kind,
            "left_out": self.left_out or "",
        }
        return found | dict(self.contents.attrs)

    def described(self, groups: Groups) -> Groups:
        """Groups with their attributes; empty ones are left out."""
        common, sampled = self.attributes(), {"sample_dims": ["chain", "draw"]}
        return {
            name: group.assign_attrs(common | (sampled if "draw" in group.dims else {}))
            for name, group in groups.items()
            if group.data_vars
        }


def _numbered_draws(group: "xr.Dataset", start: int, step: int = 1) -> "xr.Dataset":
    if "draw" not in group.dims:
        return group
    return group.assign_coords(draw=start + step * np.arange(group.sizes["draw"]))


def _part_name(site: str, part: str) -> str:
    """The full name of a weight in the flat site ``[prefix.]packed``."""
    return site.removesuffix("packed") + part


def _inputs(model: Any, batch: Batch) -> dict[Path, tuple[str, Tensor]]:
    """The tensors among the arguments of a model with their names: of the parameter, and of the places in containers."""
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

    return {path: (name(path), leaf) for path, leaf in leaves(batch).items() if isinstance(leaf, Tensor)}
