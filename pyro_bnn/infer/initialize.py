# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Checks a model and a guide against the first batch, and creates every parameter of the guide."""

from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.infer.data import Batch, check_finite
from pyro_bnn.infer.handlers import latent_names, observed_names, sample_sites
from pyro_bnn.infer.parameters import local_parameters

#: Attribute of a guide with the shapes of the batch that it was initialised on.
EXAMPLE = "_initialized_on"


def example_of(batch: Batch) -> dict[str, Any] | None:
    """
    The shapes, types and plain values of the arguments of a model, without the data.

    :param batch: ``(args, kwargs)``.
    :return: what :func:`~pyro_bnn.infer.save_guide` stores, or ``None`` if an argument is neither a tensor nor a plain value.
    """
    args, kwargs = batch
    described = [_describe_value(key, value) for key, value in [*enumerate(args), *kwargs.items()]]
    return {"arguments": described} if all(described) else None


def _describe_value(key: Any, value: Any) -> list[Any] | None:
    """``[key, kind, shape or value or items, type]``, or ``None`` for what a file does not hold."""
    if isinstance(value, Tensor):
        return [key, "tensor", list(value.shape), str(value.dtype).removeprefix("torch.")]
    if value is None or isinstance(value, (bool, int, float, str)):
        return [key, "value", value, ""]
    if type(value) in (list, tuple, dict):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        items = [_describe_value(k, v) for k, v in pairs]
        return [key, type(value).__name__, items, ""] if all(items) else None
    return None


def is_initialized(guide: Any) -> bool:
    """
    Tells whether a guide has created its parameters.

    :param guide: a guide; one without a ``prototype_trace`` attribute (a function) has no such state.
    :return: ``False`` if the guide still has to see a batch.
    """
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
    check_finite(batch)
    args, kwargs = batch
    with local_parameters(), poutine.block(), torch.no_grad():
        try:
            model_trace = poutine.trace(model).get_trace(*args, **kwargs)
        except Exception as error:
            error.add_note(f"The model was called with {describe(batch)}.")
            raise
        check_observations(model_trace, batch)
        if not is_initialized(guide):
            initialize = getattr(guide, "initialize", None)
            (guide if initialize is None else initialize)(*args, **kwargs)
        if isinstance(guide, torch.nn.Module) and not hasattr(guide, EXAMPLE):
            setattr(guide, EXAMPLE, example_of(batch))
        check_sites(model_trace, poutine.trace(guide).get_trace(*args, **kwargs), batch)


def describe(batch: Batch) -> str:
    """The arguments of a batch with their shapes, for error messages."""
    args, kwargs = batch
    named = [(f"argument {i}", a) for i, a in enumerate(args)] + list(kwargs.items())
    parts = [
        f"{name} of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{name} of type {type(value).__name__}"
        for name, value in named
    ]
    return ", ".join(parts) or "no arguments"


def check_observations(trace: Trace, batch: Batch) -> None:
    """
    Checks that a model observes something, and in the right shapes.

    :param trace: a trace of the model on ``batch``.
    :param batch: the arguments, for the message.
    :raises ValueError: naming the site, the shape found and the shape expected.
    """
    observed = observed_names(trace)
    factors = any(
        site["type"] == "sample" and type(site["fn"]).__name__ == "Unit" for site in trace.nodes.values()
    )
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
        found, expected = tuple(site["value"].shape), tuple(site["fn"].shape())
        try:
            fits = tuple(torch.broadcast_shapes(found, expected)) == expected
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"Site {name!r}: the observation has shape {found}, its distribution has shape {expected} "
                "(batch shape + event shape). Reshape one of them, e.g. by squeeze(-1); broadcasting them "
                "would compare every point with every other."
            )
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
        batch_shape = tuple(site["fn"].batch_shape)
        loose = [d for d in range(-len(batch_shape), 0) if batch_shape[d] != 1 and d not in plates]
        if loose:
            inside = [
                n
                for n in latent_names(trace)
                if {f.name for f in sample_sites(trace)[n]["cond_indep_stack"]} & set(plates.values())
            ]
            hint = (
                f" The latent sites {inside[:5]} are inside that plate; call the network before it."
                if inside
                else ""
            )
            raise ValueError(
                f"Site {name!r}: its distribution has batch shape {batch_shape}, but only the dims "
                f"{sorted(plates)} are in plates ({sorted(plates.values())}). Put every batch dim in a plate, or "
                f"declare it an event with .to_event.{hint}"
            )


def check_sites(model_trace: Trace, guide_trace: Trace, batch: Batch) -> None:
    """
    Checks that a guide covers the latent sites of a model and nothing else.

    Sites that are enumerated, and auxiliary sites of the guide, need no counterpart.

    :param model_trace: a trace of the model on ``batch``.
    :param guide_trace: a trace of the guide on ``batch``.
    :param batch: the arguments, for the message.
    :raises ValueError: naming the site.
    """
    guide_sites, model_sites = sample_sites(guide_trace), sample_sites(model_trace)
    guided = {n for n in latent_names(guide_trace) if not guide_sites[n]["infer"].get("is_auxiliary")}
    lost = guided & set(observed_names(model_trace))
    if lost:
        raise ValueError(
            f"The guide samples {sorted(lost)}, which the model observes: the guide was initialised without "
            "observations. Make a new guide and let it see a batch with observations first."
        )
    missing = [
        name
        for name in latent_names(model_trace)
        if name not in guided and not model_sites[name]["infer"].get("enumerate")
    ]
    if missing:
        raise ValueError(
            f"The model samples {missing}, for which the guide has no distribution. If one of them should be "
            f"an observation, pass it: the model was called with {describe(batch)}."
        )
    extra = sorted(guided - set(latent_names(model_trace)))
    if extra:
        raise ValueError(f"The guide samples {extra}, which the model does not have.")
