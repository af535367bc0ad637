# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
A Pyro model as a function of its packed latent vector: what every curvature method is built on.

For a packed unconstrained vector :math:`u` and data :math:`D`,

.. math::

    L(u) = -\log p(D\mid\theta(u)) - \log p(\theta(u)) - \log|\det\partial\theta/\partial u|,

a sum over data points (not a mean). The likelihood is the sum over observed sites and factors, without the
factor N/B of subsampled plates, so that batches add up; the rest is the prior.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_bnn.model.coverage import Coverage, Repeats, is_likelihood, unobserved
from pyro_bnn.model.data import Batch, Batches, as_batches, leaves, map_tensors
from pyro_bnn.model.derivatives import Probe, check_derivatives
from pyro_bnn.model.handlers import (
    RowsMessenger,
    Site,
    SubstituteMessenger,
    is_factor,
    latent_names,
    observed_names,
    sample_sites,
    subsample_scale,
    unscaled_log_prob,
)
from pyro_bnn.model.latent_space import LatentSpace
from pyro_bnn.model.local_latents import local_names
from pyro_bnn.model.observations import check_run, validated_names
from pyro_bnn.model.outputs import SiteOutputs, depends_on, site_outputs
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.plates import Rows, Sites, close, dims_of, find_rows, plates_of, rows_of
from pyro_bnn.model.reach import require_reach
from pyro_bnn.ops.distributed import rank
from pyro_bnn.ops.jacobian import wide


class _Latents(SubstituteMessenger):
    """Gives latent sites their values, if they have the shapes for which these were made."""

    def __init__(self, values: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
        super().__init__(values)
        self.shapes = shapes

    def _pyro_sample(self, msg: Site) -> None:
        shape = self.shapes.get(msg["name"])
        if shape is not None and msg["fn"].shape() != shape:
            raise ValueError(
                f"latent site {msg['name']!r} has shape {tuple(msg['fn'].shape())} on these data, and {tuple(shape)} on those for "
                "which the guide was made. A latent with one value per row belongs to these rows: pass all of them in one batch; "
                "for other rows take draws of the other sites, posterior_predictive(model, draws, data)."
            )
        super()._pyro_sample(msg)


class PackedModel:
    """
    A view of a Pyro model as a function of its packed, unconstrained latent vector.

    In all methods ``latent`` is a packed vector, shape ``(p,)``; ``batch`` the arguments ``(args, kwargs)`` of the model;
    ``data`` one batch or an iterable of batches, with observations; ``trace`` what :meth:`trace` returned.

    :param callable model: a Pyro model.
    :param Trace prototype: a trace of the model with its observations; it fixes the latent sites, their
        order and shapes, and which sites are observed.
    :param modules: modules that the model calls; they are in evaluation mode while it runs here, so that dropout is
        off and batch normalisation uses, and keeps, its running statistics.
    """

    def __init__(
        self, model: Callable[..., Any], prototype: Trace, modules: Sequence[torch.nn.Module] = ()
    ) -> None:
        self.model = model
        self.modules = list(modules)
        self.space = LatentSpace(prototype)
        #: how much of each plate earlier data covered, while more are added to them
        self._covered_before: dict[str, int] | None = None
        self.last_coverage: Coverage | None = None
        self.observed = observed_names(prototype)
        #: observed sites whose support the user has not switched off; runs here do not validate
        self.validated = validated_names(prototype.nodes, self.observed)
        self._latents = latent_names(prototype)
        nodes: dict[str, Site] = prototype.nodes
        self._shapes = {name: nodes[name]["fn"].shape() for name in self._latents}
        self._latent_of: WeakKeyDictionary[Trace, Tensor] = WeakKeyDictionary()
        #: where rows were found, by the places and numbers of dimensions of the arguments
        self._rows: dict[Any, Rows] = {}
        #: terms of the likelihood that were counted with another trace
        self._counted: WeakKeyDictionary[Trace, frozenset[str]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Pickles carry no live traces."""
        return {k: value for k, value in self.__dict__.items() if k not in ("_latent_of", "_counted")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._latent_of, self._counted = WeakKeyDictionary(), WeakKeyDictionary()

    def trace(self, latent: Tensor, batch: Batch, frozen: Mapping[str, Any] | None = None) -> Trace:
        """
        Runs the model at given latents, and given values of further sites such as subsample indices, with the parameters of
        its own modules. Validation is off, so that the run can be differentiated many times.
        """
        trace = self.run({**self.space.unpack(latent), **(frozen or {})}, batch)
        self._latent_of[trace] = latent
        return trace

    def run(self, values: Mapping[str, Any], batch: Batch) -> Trace:
        """The same as :meth:`trace`, given the values of sites."""
        # tensors made in inference mode cannot take part in a graph
        args, kwargs = map_tensors(batch, lambda x: x.clone() if x.is_inference() else x)
        training = [module for module in self.modules if module.training]
        for module in training:
            module.training = False
        try:
            # the only attention that can be differentiated twice
            with local_parameters(), pyro.validation_enabled(False), sdpa_kernel(SDPBackend.MATH):
                model = RowsMessenger(more=True)(_Latents(values, self._shapes)(self.model))
                return poutine.trace(model).get_trace(*args, **kwargs)
        finally:
            for module in training:
                module.training = True

    def traces(self, latent: Tensor, data: Any) -> Iterator[Trace]:
        """
        Runs the model batch by batch. Terms of the likelihood outside the plate of the data that are the same in every
        batch count with the first one only.

        :raises ValueError: if the batches do not cover a plate of the model once.
        """
        batches = as_batches(data)
        coverage = self.coverage(batches)
        repeats = None if batches.is_single else self.repeats(latent, batches)
        for batch in batches:
            trace = self.trace(latent, batch)
            coverage.add(trace)
            if repeats is not None:
                self.leave_out(trace, repeats.add(trace, self.likelihood_names(trace), batch))
            yield trace
        coverage.check()

    def coverage(self, batches: Batches) -> Coverage:
        """Checks that batches are all of the data, and that all of them have the same prior."""
        latents = () if batches.is_single else self._latents
        self.last_coverage = Coverage(self.observed, latents, self._covered_before)
        return self.last_coverage

    @contextmanager
    def continuing(self, covered: dict[str, int] | None) -> Iterator[None]:
        """Adds data to earlier ones, which covered so much of each plate; ``None`` for data that are all there is."""
        self._covered_before = covered
        try:
            yield
        finally:
            self._covered_before = None

    def leave_out(self, trace: Trace, names: frozenset[str]) -> None:
        """Sites of the likelihood of a trace do not count, because they count with another trace."""
        self._counted[trace] = names

    def left_out(self, trace: Trace) -> frozenset[str]:
        """The sites of the likelihood that do not count with a trace."""
        return self._counted.get(trace, frozenset())

    def counted(self, trace: Trace) -> list[str]:
        """The observed sites that count with a trace, with or without observations: some may be there in some batches only."""
        left_out = self.left_out(trace)
        names = dict.fromkeys([*(n for n in self.observed if n in trace.nodes), *observed_names(trace)])
        return [name for name in names if name not in left_out]

    def repeats(self, latent: Tensor, data: Any) -> Repeats:
        """Tells which terms of the likelihood a batch repeats."""
        other, batches = moved_from(latent), as_batches(data)
        return Repeats(lambda: self.rows(latent, batches.first), lambda batch: self.trace(other, batch))

    def likelihood_names(self, trace: Trace) -> list[str]:
        """The names of observed sites and factors."""
        return [name for name, site in trace.nodes.items() if is_likelihood(site)]

    @torch.enable_grad()
    def rows(self, latent: Tensor, batch: Batch, number: int | None = None) -> list[Rows]:
        """So many findings of :func:`~pyro_bnn.model.plates.find_rows`; by default one per plate."""
        here = leaves(batch)
        form = tuple((path, len(dims_of(leaf))) for path, leaf in here.items())
        known = self._rows.get(form)
        if known is not None and number == 1:  # the same arguments, perhaps with another number of rows
            sizes = {rows_of(here[path], dim) for path, dim in known.cuts.items()}
            if len(sizes) == 1:
                return [replace(known, size=sizes.pop())]

        def run(tree: Any) -> Sites:
            return sample_sites(self.trace(latent.detach(), tree[:2]))

        with torch.random.fork_rng(devices=()):
            found = list(islice(find_rows(run, (*batch, {})), number))
        if found and found[0].separate:
            self._rows[form] = found[0]
        return found

    def log_likelihood(self, trace: Trace, *, require_finite: bool = True) -> Tensor:
        """
        The log density of observed sites and factors in a trace, without the scale of subsampled plates; a scalar.

        :param require_finite: whether to raise where the density is not finite; the trial points of an optimiser may be
            far out. Whether the observations fit is for :meth:`check_observations` to say, once per trace.
        :raises ValueError: if an observed site of the prototype has no observation in this trace.
        """
        self._require_observed(trace)
        total: Tensor | float = 0.0
        left_out = self.left_out(trace)
        for name in self.likelihood_names(trace):
            if name in left_out:
                continue
            site: Site = trace.nodes[name]
            scale = site["scale"] / subsample_scale(site)
            term = (wide(unscaled_log_prob(site)) * scale).sum(dtype=torch.float64)  # of many terms
            if require_finite and not torch.isfinite(term.detach()):
                raise ValueError(
                    f"the log likelihood of site {name!r} is {term.item()}: check its data for NaN and for "
                    "values outside the support of its distribution."
                )
            total = total + term
        return torch.as_tensor(total)

    def log_prior(self, latent: Tensor, trace: Trace) -> Tensor:
        r"""
        The log density of the latent sites in unconstrained space,
        :math:`\log p(\theta(u)) + \log|\det\partial\theta/\partial u|`, a scalar.

        :raises ValueError: if a latent site lies in a subsampled plate.
        """
        return self.space.log_abs_det_jacobian(latent).double() + self.latent_log_prob(trace)

    def latent_log_prob(self, trace: Trace) -> Tensor:
        """The log density of the values of the latent sites in a trace, a scalar; raises as :meth:`log_prior`."""
        total: Tensor | float = 0.0
        for name in self._latents:
            site = trace.nodes[name]
            if subsample_scale(site) != 1.0:
                raise ValueError(
                    f"latent site {name!r} lies in a subsampled plate: its values for the other elements of the "
                    "plate are not part of the packed vector. Use the full plate."
                )
            total = total + (wide(unscaled_log_prob(site)) * site["scale"]).sum(dtype=torch.float64)
        return torch.as_tensor(total)

    def losses(self, latent: Tensor, data: Any, *, require_finite: bool = False) -> Iterator[Tensor]:
        """
        The terms of :math:`L(u)`: one negative log likelihood per batch, the first with the negative log prior.

        :param require_finite: whether to check the observations, and see :meth:`log_likelihood`.
        """
        for i, trace in enumerate(self.traces(latent, data)):
            if require_finite:
                self.check_observations(trace)
            with pyro.validation_enabled(False):  # trial points may not be finite
                loss = -self.log_likelihood(trace, require_finite=require_finite)
                if i == 0 and rank() == 0:  # the processes of a data-parallel run share one prior
                    loss = loss - self.log_prior(latent, trace)
            yield loss

    def outputs(self, latent: Tensor, batch: Batch, *, keep: bool = True) -> list[SiteOutputs]:
        """
        The distribution parameters of the observed sites, as differentiable functions of the latents, which require a
        gradient; observations are not needed. Unless ``keep``, only their values are wanted, and activations are not kept.

        :raises KeyError: if the distribution of a site has no registered Fisher information.
        """
        if not keep:
            try:
                with saved_tensors_hooks(lambda x: x.new_empty(0), lambda x: x):
                    return self.outputs(latent, batch)
            except RuntimeError:  # a model that takes derivatives itself
                pass
        return self.site_outputs(self.trace(latent, batch))

    def site_outputs(self, trace: Trace) -> list[SiteOutputs]:
        """The same as :meth:`outputs`, from a trace that exists already."""
        latent = self._latent_of[trace]
        return [site_outputs(name, trace.nodes[name], latent) for name in self.counted(trace)]

    @torch.enable_grad()  # some models take derivatives themselves
    def require_function(
        self, latent: Tensor, data: Any, *, hessian: bool = False, derivatives: bool = True
    ) -> Batch:
        """
        Raises if two runs of the model at the same latents differ, or if the likelihood's gradient does not reach them;
        warns, unless ``derivatives`` are of no interest, where they, with ``hessian`` also the second ones, are not those of
        the function. Up to 64 examples of the first batch are used, and returned, where the model treats them separately, all
        of them where it does not.

        :raises ValueError: if the log likelihoods differ by more than rounding errors.
        """
        batches = as_batches(data)
        batch = batches.first
        self._check_local_latents(latent, batches)
        found = self.rows(latent, batch, 1)
        if found and found[0].separate:
            batch = found[0].take((*batch, {}), slice(0, 64))[:2]
        probe = Probe(self, latent, batch, hessian=hessian)
        other = self.log_likelihood(self.trace(latent, batch), require_finite=False)
        first, second = probe.log_likelihood, float(other.detach())
        if abs(first - second) > 1e3 * torch.finfo(latent.dtype).eps * abs(first):
            raise ValueError(
                f"the model is not a function of its latents: two runs gave log likelihoods {first:.6g} and {second:.6g}. "
                "Sites that poutine.block hides are drawn anew in every run: condition them on values first, as in "
                "poutine.block(poutine.condition(model, data={'sigma': value}), hide=['sigma']). Random subsampling and "
                "random layers do the same."
            )
        require_reach(probe)
        if derivatives:
            check_derivatives(probe)
        return batch

    def _check_local_latents(self, latent: Tensor, batches: Batches) -> None:
        """A latent with a value per row of a batch would have those of other rows in the next."""
        if batches.is_single or batches.is_stream:
            return
        nodes = self.trace(latent.detach(), batches.first).nodes
        inside = [name for name in self._latents if name in nodes and plates_of(nodes[name])]
        first, *others = islice(batches, 2) if inside else (batches.first,)
        for name in local_names(self.model, first, others[0], inside) if others else ():
            raise ValueError(
                f"latent site {name!r} has a value per row of a batch, and the vector of latents holds those of one batch: "
                "pass all the data in one batch."
            )

    def check_factors(self, trace: Trace) -> None:
        """
        Raises if a :func:`pyro.factor` depends on the latents; it has no Fisher information.

        :raises ValueError: naming the site.
        """
        factors = [name for name in self.likelihood_names(trace) if is_factor(trace.nodes[name])]
        if not factors:
            return
        latent = self._latent_of[trace]
        moved = self.trace(moved_from(latent), batch_of(trace)).nodes
        for name in factors:
            term = unscaled_log_prob(trace.nodes[name])
            if (
                depends_on(term, latent)
                or name not in moved
                or not close(term, unscaled_log_prob(moved[name]))
            ):
                raise ValueError(
                    f"site {name!r} is a pyro.factor of latent sites, which has no Fisher information: use curvature='hessian'."
                )

    def check_observations(self, trace: Trace) -> None:
        """
        Checks the observations of a trace.

        :raises ValueError: naming the site whose observations are missing or do not fit its distribution.
        """
        self._require_observed(trace)
        check_run(sample_sites(trace), batch_of(trace), self.validated)

    @torch.enable_grad()  # some models take derivatives themselves
    def check_data(self, latent: Tensor, data: Any) -> None:
        """Checks the observations of all batches by a run of each, for computations that start with trial points."""
        for batch in as_batches(data):
            self.check_observations(self.trace(latent.detach(), batch))

    def _require_observed(self, trace: Trace) -> None:
        for name in self.observed:
            if name in trace.nodes and not trace.nodes[name]["is_observed"]:
                raise unobserved(name)
        if self.observed and not self.likelihood_names(trace):
            raise unobserved(self.observed[0])


def batch_of(trace: Trace) -> Batch:
    """The arguments of the model in a trace."""
    given = trace.nodes["_INPUT"]
    return given["args"], given["kwargs"]


def moved_from(latent: Tensor) -> Tensor:
    """Another packed vector, always the same, that differs in every entry."""
    latent = latent.detach()
    generator = torch.Generator(device=latent.device).manual_seed(0)
    noise = torch.randn(latent.shape, dtype=latent.dtype, device=latent.device, generator=generator)
    return latent + (0.3 + 0.3 * latent.abs()) * noise
