# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Distributions of targets given the outputs of a network, and what targets they take."""

from collections.abc import Callable
from typing import Any, Literal

import pyro.distributions as dist
from torch import Tensor

#: A name of the table of :class:`~pyro_bnn.supervised.SupervisedModel`, or a callable from outputs to a distribution.
Likelihood = (
    Literal["regression", "heteroscedastic", "classification", "binary", "poisson"] | Callable[[Any], Any]
)


def outputs_of(f: Any, likelihood: Any) -> Tensor:
    """The outputs of a network as one tensor."""
    f = getattr(f, "logits", f)
    if isinstance(f, Tensor):
        return f
    raise TypeError(
        f"the network returns a {type(f).__name__}, and likelihood={likelihood!r} takes a tensor, or a result with an attribute "
        "'logits': pass a callable of what the network returns as likelihood, or wrap the network."
    )


def _elements(f: Tensor, model: Any, num_rows: int | None, what: str) -> Tensor:
    """Outputs with one element per element of a target: a last dimension of 1 goes where targets are numbers."""
    k = model.event_dim
    if k:
        return f
    if f.dim() > 1 and f.shape[-1] == 1:
        return f.squeeze(-1)
    if f.dim() and num_rows in (None, f.shape[-1]) and not (f.dim() > 1 and f.shape[-2] == num_rows != 1):
        return f
    more = " For classes use likelihood='classification'." if model.likelihood == "binary" else ""
    raise ValueError(
        f"likelihood={model.likelihood!r}: the network returns {what} of shape {tuple(f.shape)} for {num_rows} rows; for one number "
        f"per row (N,) or (N, 1) is expected. For vectors of targets pass event_dim=1, for images event_dim=3.{more}"
    )


def _regression(f: Tensor, model: Any, num_rows: int | None) -> Any:
    loc = _elements(f, model, num_rows, "outputs")
    noise = model.noise
    if model.settings["noise"] == "fixed":
        _require_event(noise, loc, model.event_dim)
    return dist.Normal(loc, noise).to_event(model.event_dim)


def _require_event(noise: Tensor, loc: Tensor, event_dim: int) -> None:
    """Raises for a standard deviation that is not one for all targets, or one for each element of a target."""
    event = loc.shape[loc.dim() - event_dim :]
    fits = noise.dim() <= event_dim and all(
        n in (1, e) for n, e in zip(reversed(noise.shape), reversed(event), strict=False)
    )
    if not fits:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, expected a number or what broadcasts to the shape {tuple(event)} of one target. "
            "Rows with a noise of their own: likelihood='heteroscedastic', or a callable."
        )


def _heteroscedastic(f: Tensor, model: Any, num_rows: int | None) -> Any:
    if f.dim() < 2 or f.shape[-1] % 2:
        raise ValueError(
            "likelihood='heteroscedastic': a network for D targets returns D means and D logarithms of standard deviations, "
            f"shape (N, 2 D); found {tuple(f.shape)}."
        )
    mean, log_scale = (_elements(part, model, num_rows, "means") for part in f.chunk(2, -1))
    return dist.Normal(mean, log_scale.exp()).to_event(model.event_dim)


def _classification(f: Tensor, model: Any, num_rows: int | None) -> Any:
    if model.class_dim == 1:
        f = f.movedim(-1 - model.event_dim, -1)
    if f.dim() < 2 or f.shape[-1] < 2:
        raise ValueError(
            f"likelihood='classification': the network returns shape {tuple(f.shape)}, expected (N, C) with a logit for each of "
            "C > 1 classes. For a single logit use likelihood='binary'."
        )
    return dist.Categorical(logits=f).to_event(model.event_dim)


def _binary(f: Tensor, model: Any, num_rows: int | None) -> Any:
    return dist.Bernoulli(logits=_elements(f, model, num_rows, "logits")).to_event(model.event_dim)


def _poisson(f: Tensor, model: Any, num_rows: int | None) -> Any:
    return dist.Poisson(_elements(f, model, num_rows, "log rates").exp()).to_event(model.event_dim)


LIKELIHOODS: dict[str, Callable[[Tensor, Any, int | None], Any]] = {
    "regression": _regression,
    "heteroscedastic": _heteroscedastic,
    "classification": _classification,
    "binary": _binary,
    "poisson": _poisson,
}


def targets(y: Any, d: Any, likelihood: Any) -> Tensor:
    """Targets in the shape and type of their distribution; raises, naming the likelihood, where that would be a guess."""
    if not isinstance(y, Tensor):
        raise TypeError(f"the targets are a {type(y).__name__}, expected a tensor: pass torch.as_tensor(y)")
    event, n = d.event_shape, d.batch_shape[-1]
    if not event and y.shape == (n, 1):
        y = y.squeeze(-1)
    expected = (n, *event)
    if tuple(y.shape) != expected:
        raise ValueError(_other_shape(y, expected, likelihood))
    if likelihood != "classification":
        return y if callable(likelihood) else y.to(d.mean.dtype)
    if y.is_floating_point() or y.is_complex():
        raise ValueError(
            f"likelihood='classification': the labels are of type {y.dtype}; expected integers from 0 to C - 1: pass y.long()."
        )
    return y.long()


def _other_shape(y: Tensor, expected: tuple[int, ...], likelihood: Any) -> str:
    hint = "Reshape the targets, or pass event_dim= (the number of dimensions of one target)."
    if likelihood == "classification" and y.dim() == len(expected) + 1:
        hint = "Labels are the numbers of classes, not one-hot vectors: pass y.argmax(-1)."
    return f"the targets have shape {tuple(y.shape)}, expected {expected}, one per row of the outputs. {hint}"
