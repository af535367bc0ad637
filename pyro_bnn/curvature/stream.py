# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A Pyro model's outputs as example-wise Jacobians, batch by batch, within a memory budget."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pyro_bnn.curvature.capture import Capture
from pyro_bnn.curvature.guard import CheckedJacobian, Suspects, checked_jacobian
from pyro_bnn.curvature.jacobian import Layouts
from pyro_bnn.model.coverage import Repeats
from pyro_bnn.model.data import Batch, as_batches, iter_batches, leaves
from pyro_bnn.model.derivatives import require_finite
from pyro_bnn.model.packed import PackedModel, SiteOutputs
from pyro_bnn.model.plates import Rows, close, dims_of, rows_of
from pyro_bnn.ops.fisher import score
from pyro_bnn.ops.jacobian import wide
from pyro_bnn.ops.memory import require_memory
from pyro_bnn.ops.notice import CurvatureWarning, logger, warn_user

#: What the likelihood's curvature is made of.
FisherKind = Literal["ggn", "mc_fisher", "empirical_fisher"]

#: Gives the outputs of a whole batch.
Whole = Callable[[], list[SiteOutputs]]

#: Floats that one chunk of a batch may keep (512 MiB in float32).
DEFAULT_BUDGET = 2**27
#: Floats of one tensor that the processor's caches hold.
_CACHED = 3 * 2**19
_FIRST_CHUNK = 64
#: How many rows are compared, and among how many at most, see :meth:`ExampleStream._apart`.
_FEW, _WINDOW = 17, 1024
_SMALLEST_CHUNK = 32
_LARGEST_CHUNK = 5000


@dataclass
class SiteExamples:
    """
    One observed site on one chunk of data.

    :ivar site: its outputs.
    :ivar jacobian: their Jacobian, example by example; with the gradient of the log likelihood if it was checked with that.
    :ivar value: the observations, or ``None`` without.
    """

    site: SiteOutputs
    jacobian: CheckedJacobian
    value: Tensor | None

    def arrange(self, x: Tensor) -> Tensor:
        """From shape ``(*sample, *site.shape, C)`` to ``(*sample, B, R, C)``: examples first, the elements of each next."""
        jac, shape = self.jacobian, self.site.outputs.shape[:-1]
        lead = x.dim() - len(shape) - 1
        if jac.dim >= 0:
            x = x.movedim(lead + jac.dim, lead)
        return x.reshape(x.shape[:lead] + (jac.B, -1, x.shape[-1])).to(jac.flat.dtype)

    def score(self) -> Tensor:
        """The gradient of the log likelihood in the outputs, shape ``(B, M)``."""
        assert self.value is not None
        return self.arrange(self.site.scores(self.value)).flatten(1)

    def cotangents(
        self,
        kind: FisherKind,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        differentiable: bool = False,
    ) -> Iterator[Tensor]:
        r"""
        Combinations of outputs :math:`c_{kn}` with :math:`\sum_k c_{kn} c_{kn}^\top = F_n`, or an estimate of it, in chunks
        of shape ``(K, B, M)``: of ``"ggn"`` (exact), ``"mc_fisher"`` (scores at observations drawn from the model) or
        ``"empirical_fisher"`` (the score at each observation: each element of the site's batch shape). The exact ones and
        those of data keep their graph if ``differentiable``.
        """
        if kind == "ggn":
            root = self.site.differentiable_root() if differentiable else self.site.root
            C, K = root.shape[-2:]
            root = self.arrange(root.mT.flatten(-2)).unflatten(-1, (K, C))  # (B, R, K, C)
            yield from self._one_by_one(root.permute(1, 2, 0, 3))
            return
        values = self._draws(num_samples, generator) if kind == "mc_fisher" else self._observed()
        weight = self.site.weight[..., None]
        with pyro.validation_enabled(False):
            scores = score(
                self.site.rule, self.site.base, self.site.names, values, create_graph=differentiable
            )
        scores = scores * weight.sqrt() / values.shape[0] ** 0.5
        scores = self.arrange(torch.where(weight > 0, scores, scores.new_zeros(())))  # (S, B, R, C)
        shape = self.site.outputs.shape[:-1]
        elements = shape[len(shape) - self.site.event_dim :].numel()
        observations = scores.unflatten(2, (-1, elements)).flatten(3)
        # scores of draws have mean zero, so that they may be summed within an example
        if observations.shape[2] == 1 or (kind == "mc_fisher" and self.jacobian.dim >= 0):
            yield scores.flatten(2)
        else:
            yield from self._one_by_one(observations.permute(2, 0, 1, 3))

    def _observed(self) -> Tensor:
        assert self.value is not None
        return self.value.expand(self.site.base.batch_shape + self.site.base.event_shape).unsqueeze(0)

    def _draws(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        device = generator.device if generator else None
        seed = torch.randint(2**62, (), generator=generator, device=device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(int(seed))
            return self.site.rule.sample(self.site.base, num_samples)

    def _one_by_one(self, values: Tensor) -> Iterator[Tensor]:
        """Cotangents that are confined to one element of an example each, from shape (R, K, B, C), a few R at a time."""
        R, K, B, C = values.shape
        for part in torch.arange(R, device=values.device).split(max(1, 2**24 // max(1, K * B * R * C))):
            cotangents = values.new_zeros(len(part), K, B, R, C)
            cotangents[part - part[0], :, :, part] = values[part]
            yield cotangents.reshape(-1, B, R * C)


class ExampleStream:
    """
    Runs a model over data and yields its example-wise Jacobians at the packed vector, shape ``(p,)``, in ``active`` entries, bool,
    shape ``(p,)``. Batches are split, where the model allows it, into chunks that keep at most ``budget`` floats.
    """

    def __init__(
        self,
        model: PackedModel,
        latent: Tensor,
        active: Tensor | None = None,
        *,
        budget: int = DEFAULT_BUDGET,
        differentiable: bool = False,
    ) -> None:
        self.model = model
        self.latent = latent.detach().clone().requires_grad_(True)
        self.active = active
        self.budget = budget
        self.differentiable = differentiable
        self._chunk: int | None = None
        self._layouts: dict[str, Layouts] = {}
        self._rows: Rows | None = None
        self._is_known = False
        self._named: set[str] = set()
        #: numbers per example in each of the tensors that the model's graph keeps
        self._kept: list[int] = []

    # ------------------------------------------------------------------ chunks

    def chunks(self, batch: Batch, whole: Whole | None = None) -> Iterator[Batch]:
        """The batch, split to the budget where the model treats its examples separately."""
        rows = self.rows(batch, whole=whole)
        if rows is None or rows.size <= _FIRST_CHUNK:
            yield batch
            return
        start = 0
        while start < rows.size:
            stop = min(start + (self._chunk or _FIRST_CHUNK), rows.size)
            yield rows.take((*batch, {}), slice(start, stop))[:2]
            start = stop

    def joined(self, name: str, parts: list[Tensor]) -> Tensor:
        """What the chunks of the batch that ran last gave for a site, in whose shape it leads, as one."""
        axis = (
            None if self._rows is None else self._rows.axes.get(name)
        )  # without rows it is the same in all chunks
        return parts[0] if axis is None else torch.cat(parts, axis)

    def rows(self, batch: Batch, more_than: int = _FIRST_CHUNK, whole: Whole | None = None) -> Rows | None:
        """
        Where the examples of a batch are, if the model treats them separately; found once for all batches of the stream, if
        one has ``more_than`` so many. ``whole`` gives the outputs of the whole batch, if they are needed anyway, which parts of
        it are then compared with.
        """
        here = leaves(batch)
        enough = any(rows_of(leaf, d) > more_than for leaf in here.values() for d in dims_of(leaf))
        if enough and not self._is_known:
            self._is_known = True
            found = self.model.rows(self.latent, batch, 1)
            if found and found[0].separate and self._apart(found[0], batch, whole):
                self._rows = found[0]
            logger.info(
                "curvature: batches are %s",
                "cut into chunks: a few rows in other company had the same outputs"
                if self._rows
                else "taken whole: no rows were found that the model treats separately",
            )
        if self._rows is None:
            return None
        sizes = {rows_of(here[path], dim) for path, dim in self._rows.cuts.items() if path in here}
        return replace(self._rows, size=sizes.pop()) if len(sizes) == 1 else None

    def _apart(self, rows: Rows, batch: Batch, whole: Whole | None) -> bool:
        """
        Whether rows have the same outputs in other company: a few of them, at random and in another order, against
        the same rows among many, or all where their outputs are at hand. Convolutions, recurrences and attention over the
        rows, statistics of a batch and tables of positions all fail.
        """
        generator = torch.Generator().manual_seed(0)
        near = min(rows.size, 2 * _FIRST_CHUNK) if whole is None else rows.size
        start = int(torch.randint(rows.size - near + 1, (), generator=generator))
        picks = torch.randperm(near, generator=generator)[:_FEW] + start
        with torch.random.fork_rng(devices=()):
            some = self._count_kept(rows.take((*batch, {}), picks)[:2], len(picks))
            affordable = self.budget // max(1, sum(self._kept))
            window = min(rows.size, max(near, min(_WINDOW, rows.size // 32, affordable)))
            start = min(start, rows.size - window)
            part = slice(start, start + window)
            many = (
                self.model.outputs(self.latent, rows.take((*batch, {}), part)[:2])
                if whole is None
                else whole()
            )
        for a, b in zip(many, some, strict=True):
            for x, y in ((a.outputs, b.outputs), (a.weight, b.weight)):
                x, axis = x.detach(), rows.axes.get(a.name)
                if axis is not None:
                    x = x.index_select(axis, (picks - start).to(x.device))
                if not close(x, y.detach()):
                    return False
        return True

    def _count_kept(self, part: Batch, size: int) -> list[SiteOutputs]:
        """The outputs of a few rows; how many numbers per row are in each tensor that their graph keeps is noted."""
        given = {leaf.data_ptr() for leaf in leaves(part).values() if isinstance(leaf, Tensor)}
        kept: list[int] = []

        def note(x: Tensor) -> Tensor:
            if size in x.shape and x.data_ptr() not in given:
                kept.append(x.numel() // size)
            return x.detach()  # to return the tensor itself would tie it to the graph for good

        try:
            with torch.enable_grad(), saved_tensors_hooks(note, lambda x: x):
                found = self.model.outputs(self.latent, part)
        except RuntimeError:  # a model that takes derivatives itself does without the estimate
            return self.model.outputs(self.latent, part)
        self._kept = kept
        return found

    def _choose_chunk(self, sites: list[SiteExamples]) -> None:
        """The size of further chunks, by what the first one kept."""
        jacobians = [s.jacobian for s in sites]
        floats = sum(jac.floats_per_example(max(1, jac.M)) for jac in jacobians) + sum(self._kept)
        largest = max([*self._kept, *(jac.largest_output() for jac in jacobians)], default=0)
        # many passes over few examples whose tensors stay in the cache beat few over many
        fast = max(_SMALLEST_CHUNK, min(_LARGEST_CHUNK, _CACHED // max(1, largest)))
        self._chunk = max(1, min(fast, self.budget // max(1, floats)))

    # ------------------------------------------------------------------ run

    def run(self, data: Any) -> Iterator[tuple[Trace, list[SiteExamples]]]:
        """
        For each chunk of data with observations its trace and those sites that depend on the latents; raises
        :exc:`ValueError` if the batches do not cover a plate of the model once.
        """
        batches = as_batches(data)
        coverage = self.model.coverage(batches)
        repeats = None if batches.is_single else self.model.repeats(self.latent, data)
        for batch in batches:
            for trace, sites in self.run_batch(batch, repeats, scored=True):
                coverage.add(trace)
                yield trace, sites
        coverage.check()

    def run_batch(
        self,
        batch: Batch,
        repeats: Repeats | None = None,
        *,
        scored: bool = False,
        whole: Whole | None = None,
    ) -> Iterator[tuple[Trace, list[SiteExamples]]]:
        """
        For each chunk of a batch its trace and those sites that depend on the latents. ``repeats`` tells which terms of the
        likelihood were counted with an earlier batch. If ``scored``, Jacobians are checked with the scores of the observations
        too, and so give the gradient of the log likelihood. For ``whole`` see :meth:`rows`.
        """
        for number, chunk in enumerate(self.chunks(batch, whole)):
            with Capture(self.latent, self.active, differentiable=self.differentiable) as capture:
                trace = self.model.trace(self.latent, chunk)
                if scored:
                    self.model.check_observations(trace)
                terms = self.model.likelihood_names(trace)
                if number and self._rows is not None:  # what has no rows counts with the first chunk
                    self.model.leave_out(trace, frozenset(terms) - self._rows.axes.keys())
                elif repeats is not None:
                    self.model.leave_out(trace, repeats.add(trace, terms, chunk))
                outputs = self.model.site_outputs(trace)
            sites = []
            for site in outputs:
                if site.outputs.shape[-1]:
                    node = trace.nodes[site.name]
                    value = node["value"] if node["is_observed"] else None
                    jacobian = self._jacobian(site, capture, value if scored else None)
                    sites.append(SiteExamples(site, jacobian, value))
            if self._chunk is None:
                self._choose_chunk(sites)
            yield trace, sites

    def _jacobian(self, site: SiteOutputs, capture: Capture, value: Tensor | None) -> CheckedJacobian:
        jacobian = checked_jacobian(
            capture,
            self.latent,
            site.outputs.to(wide(self.latent).dtype),
            self._layouts.get(site.name),
            score=None if value is None else lambda found: SiteExamples(site, found, value).score(),
            event_dim=site.event_dim,
            differentiable=self.differentiable,
        )
        if jacobian.B > 1:
            self._layouts[site.name] = jacobian.layouts
        if value is not None:
            require_finite(self.model, jacobian.gradient)
        for mistake in jacobian.mistakes:
            self._say(site.name, mistake)
        q, size = len(jacobian.generic), jacobian.flat.numel()
        if q:
            require_memory(
                (min(q, size) + q) * size * self.latent.element_size(),
                f"the Jacobian of site {site.name!r} in {q:,} latents that enter it in no way that "
                f"is recognised, for {jacobian.B:,} data points at once,",
                self.latent.device,
                "Pass smaller batches if the model treats data points separately, or restrict sites=.",
            )
        return jacobian

    def _say(self, site: str, mistake: Suspects) -> None:
        """Names, once, the latent sites whose uses the check found unlike what was seen, and what uses them."""
        where = self.model.space.slices
        new = [n for n, part in where.items() if n not in self._named and bool(mistake.entries[part].any())]
        if not new:
            return
        self._named.update(new)
        latents = ", ".join(map(repr, new))
        if mistake.nodes or not mistake.functions:
            through = ", ".join(mistake.nodes) or "a part"
            how = (
                f"depends on the latent sites {latents} through {through} of the autograd graph, which does not show in the "
                "calls of the model: a derivative of the network inside it, torch.jit, torch.compile, torch.vmap or a custom "
                "autograd function."
            )
        else:
            how = (
                f"depends on the latent sites {latents} through {', '.join(mistake.functions)} in another way than was seen: "
                "rows do not belong to one data point each, or change places from one part of the data to the next."
            )
        warn_user(
            f"observed site {site!r} {how} Their Jacobian is formed output by output instead: exact, but slower.",
            CurvatureWarning,
        )


@dataclass
class Subset:
    """
    Some of the examples.

    :ivar batches: arguments of the model that hold them.
    :ivar weight: how many examples of the data each of them stands for.
    """

    batches: list[Batch]
    weight: float

    def run(self, stream: ExampleStream) -> Iterator[tuple[Trace, list[SiteExamples]]]:
        """See :meth:`ExampleStream.run_batch`."""
        for batch in self.batches:
            yield from stream.run_batch(batch, scored=True)


def count_examples(stream: ExampleStream, data: Any) -> int | None:
    """How many examples batches hold, or ``None`` if the model does not treat them separately."""
    sizes = [rows and rows.size for rows in (stream.rows(batch, 0) for batch in iter_batches(data))]
    return None if None in sizes else sum(size for size in sizes if size)


def random_subset(
    stream: ExampleStream, data: Any, size: int, generator: torch.Generator | None = None
) -> Subset:
    """
    A uniform sample of the examples without replacement, or all of them if there are no more, by two passes over the data in
    which the model does not run; raises :exc:`ValueError` if the model does not treat examples separately.
    """
    total = count_examples(stream, data)
    if total is None:
        raise ValueError(
            "subset_size needs a model that treats its examples separately: parts of a batch must have the outputs that they "
            "have in the whole batch."
        )
    if total <= size:
        return Subset(list(iter_batches(data)), 1.0)
    found: list[Batch] = []
    chosen = torch.randperm(total, generator=generator)[:size].sort().values
    start = 0
    for batch in iter_batches(data):
        rows = stream.rows(batch, 0)
        assert rows is not None
        mine = chosen[(chosen >= start) & (chosen < start + rows.size)] - start
        if len(mine):
            found.append(rows.take((*batch, {}), mine)[:2])
        start += rows.size
    return Subset(found, total / size)
