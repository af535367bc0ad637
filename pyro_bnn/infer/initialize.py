# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Checks a model and a guide against the first batch, and creates every parameter of the guide."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bnn.model.arguments import arguments_of, explain_arrays, is_container, signature_of
from pyro_bnn.model.data import Arguments, Batch, check_finite, map_tensors
from pyro_bnn.model.flat import StartFlatSites, is_flat
from pyro_bnn.model.handlers import Site, is_factor, latent_names, observed_names, sample_sites
from pyro_bnn.model.latent_space import bijection
from pyro_bnn.model.observations import check_labels, check_shape, check_values
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.prototype import detach_prototypes
from pyro_bnn.model.reach import check_reached

#: Attribute of a guide with the shapes of the batch that it was initialised on.
EXAMPLE = "_initialized_on"


def example_of(batch: Batch) -> dict[str, Any] | None:
    """
    The shapes, types and plain values of the arguments of a model, without the data, as
    :func:`~pyro_bnn.infer.save_guide` stores them; ``None`` if one is neither a tensor nor a plain value.
    """
    described = [_describe_value(key, value) for key, value in _arguments(batch)]
    return {"arguments": described} if all(described) else None


def _arguments(batch: Batch) -> list[tuple[int | str, Any]]:
    args, kwargs = batch
    return [*enumerate(args), *kwargs.items()]


def _describe_value(key: Any, value: Any) -> list[Any] | None:
    """``[key, kind, shape or value or items, type]``, or ``None`` for what a file does not hold."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if is_integer and value.numel():
            # lengths, indices and labels: zero may be none that the model takes
            return [key, "integers", [list(value.shape), int(value.min())], dtype]
        return [key, "tensor", list(value.shape), dtype]
    if value is None or isinstance(value, (bool, int, float, str)):
        return [key, "value", value, ""]
    if type(value) in (list, tuple, dict):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        items = [_describe_value(k, v) for k, v in pairs]
        return [key, type(value).__name__, items, ""] if all(items) else None
    return None


def is_initialized(guide: Any) -> bool:
    """Whether a guide has created its parameters; one without a ``prototype_trace`` (a function) has no such state."""
    if hasattr(guide, "prototype_trace") and guide.prototype_trace is None:
        return False
    parts = guide if isinstance(guide, torch.nn.ModuleList) else ()
    return all(is_initialized(part) for part in parts)


def initialize_guide(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> None:
    """
    Creates every parameter of a guide from one batch **with observations**, after checking the batch.

    Calls ``guide.initialize(*args, **kwargs)`` where there is one and runs the guide once otherwise, so that
    ``state_dict``, ``.to(device)`` and optimisers work before the first step. A guide that is initialised
    already keeps its parameters.

    :param callable model: a Pyro model.
    :param callable guide: its guide, or a plain guide function.
    :param batch: ``(args, kwargs)`` of the model.
    :raises ValueError: if the data are not finite, if no site is observed or a site has lost its observation,
        if an observation does not have the shape of its distribution, or if model and guide do not have the
        same latent sites; the message names the site.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("obs", dist.Normal(w * x, 1.0), obs=y)
        >>> guide = AutoNormal(model)
        >>> initialize_guide(model, guide, ((torch.ones(3), torch.ones(3)), {}))
        >>> sorted(guide.state_dict())
        ['locs.w_unconstrained', 'scales.w_unconstrained']
    """
    args, kwargs = batch
    leaves = _Leaves() if hasattr(guide, "prototype_trace") else None
    with local_parameters(), poutine.block(), torch.enable_grad():
        model_trace = run_model(model, batch, leaves)
        check_observations(model_trace, batch)
        to_point_estimates(guide)
        if not is_initialized(guide):
            check_latents(model_trace, guide)
            start: Any = getattr(guide, "initialize", guide)
            try:
                start(*args, **kwargs)
            except NotImplementedError as error:
                if flat := [n for n, site in sample_sites(model_trace).items() if is_flat(site)]:
                    error.add_note(
                        f"The priors of {flat} are flat, and {type(guide).__name__} draws from priors to start: pass it "
                        "init_loc_fn=pyro_bnn.model.flat.init_flat(init_to_median)."
                    )
                raise
            detach_prototypes(guide)
        if isinstance(guide, torch.nn.Module) and not hasattr(guide, EXAMPLE):
            setattr(guide, EXAMPLE, example_of(batch))
        check_sites(model_trace, poutine.trace(guide).get_trace(*args, **kwargs), batch)
        if leaves is not None and not leaves.others:
            check_reached(model_trace, leaves.found)


class _Leaves(Messenger):
    """Makes the value of every latent site the start of a graph: ``found`` by name, or ``others`` without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}
        self.others: list[str] = []

    def _pyro_post_sample(self, msg: Site) -> None:
        if msg["is_observed"] or not isinstance(msg["value"], Tensor) or site_is_subsample(msg):
            return
        if not msg["value"].is_floating_point():
            self.others.append(msg["name"])
            return
        self.found[msg["name"]] = msg["value"].detach().clone().requires_grad_(True)
        msg["value"] = self.found[msg["name"]].clone()  # a copy may be changed in place


def run_model(model: Callable[..., Any], batch: Batch, *handlers: Messenger | None) -> Trace:
    """
    The trace of one run of a model under further handlers, with gradients enabled, which some models need for themselves;
    flat priors start at zero in unconstrained space.
    """
    check_finite(batch)
    args, kwargs = map_tensors(batch, lambda x: x.clone() if x.is_inference() else x)
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), StartFlatSites(), *handlers):
            if context is not None:
                stack.enter_context(context)
        try:
            return poutine.trace(model).get_trace(*args, **kwargs)
        except Exception as error:
            explain_failure(error, batch)
            raise


def explain_failure(error: Exception, batch: Batch) -> None:
    """Adds the arguments to an error of a model, or raises another in its place where one is empty or a numpy array."""
    for name, value in _named(batch):
        if isinstance(value, Tensor) and not value.numel():
            raise ValueError(
                f"{name} of the model is empty (shape {tuple(value.shape)}): pass at least one data point. "
                f"({type(error).__name__}: {error})"
            ) from error
    explain_arrays(error, Arguments(*batch))
    note = f"The model was called with {describe(batch)}."
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def to_point_estimates(guide: Any) -> None:
    """Turns Gaussians around a point estimate into point estimates again, so that training can go on."""
    for part in guide if isinstance(guide, torch.nn.ModuleList) else (guide,):
        reset: Any = getattr(part, "to_point_estimate", None)
        if reset is not None:
            reset()


def check_latents(trace: Trace, guide: Any, *, continuous: bool = False) -> None:
    """Checks that a model has latent sites that a guide, perhaps of ``continuous`` ones only, can cover."""
    latents = latent_names(trace)
    name = type(guide).__name__
    if not latents and hasattr(guide, "prototype_trace"):
        raise ValueError(
            f"{name}: the model samples no latent site. Give its parameters priors: convert a network with bayesian_(net) "
            "or rank1_(net) of pyro_bnn.nn, which make its weights sample sites, or write pyro.sample statements."
        )
    discrete = [n for n in latents if continuous and sample_sites(trace)[n]["fn"].support.is_discrete]
    if discrete:
        families = ", ".join(f"{n!r} ({type(sample_sites(trace)[n]['fn']).__name__})" for n in discrete)
        raise ValueError(
            f"{name} is a Gaussian over continuous latent sites, but {families} is discrete. Sum over it in the model: "
            "observe a mixture (pyro.distributions.MixtureSameFamily, MaskedMixture) in its place. To fit the other sites "
            "without a Laplace approximation, mark it infer={'enumerate': 'parallel'}, hide it from the guide with "
            "poutine.block(model, hide=[...]), and use TraceEnum_ELBO."
        )
    for n in latents if continuous else ():
        bijection(n, sample_sites(trace)[n])


def initialize_with(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """
    Sets a guide up with the arguments of its model. One container that the model does not run on is data in the form that
    it has everywhere else: its first batch holds the arguments.
    """
    signature = signature_of(guide.model)
    if set(kwargs) == {"data"} and not args and signature is not None and "data" not in signature.parameters:
        args, kwargs = (kwargs["data"],), {}
    if len(args) == 1 and not kwargs and isinstance(args[0], Arguments):
        args, kwargs = args[0]
    try:
        guide._setup_prototype(*args, **kwargs)
    except Exception as error:
        guide.prototype_trace = None
        if len(args) != 1 or kwargs or not is_container(args[0]):
            raise
        try:
            first, named = arguments_of(args[0])
            guide._setup_prototype(*first, **named)
        except Exception as other:
            guide.prototype_trace = None
            error.add_note(
                f"As data, whose first batch holds the arguments of the model, it fails too: {type(other).__name__}: {other}"
            )
            raise error from None


def _named(batch: Batch) -> list[tuple[str, Any]]:
    return [(f"argument {k}" if isinstance(k, int) else k, value) for k, value in _arguments(batch)]


def describe(batch: Batch) -> str:
    """The arguments of a batch with their shapes, for error messages."""
    parts = []
    for name, value in _named(batch):
        is_tensor = isinstance(value, Tensor)
        what = f"shape {tuple(value.shape)}" if is_tensor else f"type {type(value).__name__}"
        parts.append(f"{name} of {what}")
    return ", ".join(parts) or "no arguments"


def check_observations(trace: Trace, batch: Batch) -> None:
    """Checks that a model observes something, in the right shapes and within the support."""
    observed = observed_names(trace)
    factors = any(is_factor(site) for site in sample_sites(trace).values())
    if not observed and not factors:
        latents = latent_names(trace)
        last = (
            f"site {latents[-1]!r}, the last that it samples, was drawn" if latents else "it samples nothing"
        )
        raise ValueError(
            f"The model has no observed site: {last}. It was called with {describe(batch)}; "
            "pass the observations too, e.g. data=(x, y) for model(x, y)."
        )
    for name in observed:
        site = sample_sites(trace)[name]
        check_shape(name, site)
        check_labels(name, site)
        _check_plates(name, trace)
    check_values(sample_sites(trace), batch)


def _check_plates(name: str, trace: Trace) -> None:
    """Checks that the batch dimensions of an observed site are those of plates."""
    sites = sample_sites(trace)
    plates = {frame.dim: frame.name for frame in sites[name]["cond_indep_stack"] if frame.vectorized}
    batch_shape = tuple(sites[name]["fn"].batch_shape)
    if all(size == 1 or d in plates for d, size in enumerate(batch_shape, -len(batch_shape))):
        return
    frames = {n: {f.name for f in sites[n]["cond_indep_stack"]} for n in latent_names(trace)}
    inside = [n for n, names in frames.items() if names & set(plates.values())]
    hint = (
        f" The latent sites {inside[:5]} are inside that plate; call the network before it." if inside else ""
    )
    raise ValueError(
        f"Site {name!r}: its distribution has batch shape {batch_shape}, but only the dims "
        f"{sorted(plates)} are in plates ({sorted(plates.values())}). Put every batch dim in a plate, or "
        f"declare it an event with .to_event.{hint}"
    )


def check_sites(model_trace: Trace, guide_trace: Trace, batch: Batch) -> None:
    """
    Checks that a guide covers the latent sites of a model and nothing else; sites that are enumerated, and auxiliary sites
    of the guide, need no counterpart.
    """
    guide_sites, model_sites = sample_sites(guide_trace), sample_sites(model_trace)
    guided = {n for n in latent_names(guide_trace) if not guide_sites[n]["infer"].get("is_auxiliary")}
    lost = guided & set(observed_names(model_trace))
    if lost:
        raise ValueError(
            f"The guide samples {sorted(lost)}, which the model observes: the guide was initialised without "
            "observations. Make a new guide and let it see a batch with observations first."
        )
    latents = latent_names(model_trace)
    missing = [n for n in latents if n not in guided and not model_sites[n]["infer"].get("enumerate")]
    if missing:
        raise ValueError(
            f"The model samples {missing}, for which the guide has no distribution. If one of them should be "
            f"an observation, pass it: the model was called with {describe(batch)}."
        )
    extra = sorted(guided - set(latents))
    if extra:
        raise ValueError(f"The guide samples {extra}, which the model does not have.")
