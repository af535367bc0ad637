# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a prior is: a distribution, a dictionary by name, or a callable of name and shape."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

#: The three forms of a prior: a distribution (expanded to the shape of the parameter), a mapping from names
#: to distributions, or ``callable(name, shape) -> distribution | None``.
PriorLike = Distribution | Mapping[str, Any] | Callable[[str, torch.Size], Any]


class FanInNormal:
    r"""
    The default prior of full weights, :math:`w \sim N(0, g^2/\text{fan in})`, under which the variance of a
    layer's output does not depend on its width [1].

    Vectors (biases) get :math:`N(0, \text{bias scale}^2)`.

    :param float gain: the factor :math:`g`.
    :param float bias_scale: standard deviation of the biases.

    **References**

    [1] Neal, *Bayesian Learning for Neural Networks*, 1996, section 2.1.

    Example::

        >>> FanInNormal()("0.weight", torch.Size([5, 4])).base_dist.scale[0, 0].item()
        0.5
    """

    def __init__(self, gain: float = 1.0, bias_scale: float = 1.0) -> None:
        self.gain, self.bias_scale = float(gain), float(bias_scale)

    def __call__(self, name: str, shape: torch.Size, fan_in: int | None = None) -> Distribution:
        """
        :param str name: name of the parameter (not used).
        :param shape: shape of the parameter, outputs first.
        :param int fan_in: the number of inputs that enter one output; the product of all dimensions but the
            first one if omitted.
        :return: the prior, with all dimensions of ``shape`` as event dimensions.
        """
        if fan_in is None:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 0
        scale = self.gain / math.sqrt(fan_in) if fan_in and len(shape) > 1 else self.bias_scale
        zero = torch.zeros(())
        return dist.Normal(zero, zero + scale).expand(shape).to_event(len(shape))


def unwrap(fn: Any) -> Any:
    """A distribution without :class:`~torch.distributions.Independent`."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def fit_shape(prior: Any, name: str, shape: Iterable[int]) -> Any:
    """
    Expands a distribution to the shape of a parameter and declares all of its dimensions as event dimensions.

    :param prior: a distribution whose batch and event shapes broadcast to ``shape``.
    :param str name: name of the parameter, for the error message.
    :param shape: shape of the parameter.
    :return: a distribution with an empty batch shape and event shape ``shape``.
    :raises ValueError: if the shapes do not broadcast.
    """
    shape = torch.Size(shape)
    event_dim = len(prior.event_shape)
    batch_shape = shape[: len(shape) - event_dim]
    fits = event_dim <= len(shape) and prior.event_shape == shape[len(shape) - event_dim :]
    if fits:
        try:
            fits = torch.broadcast_shapes(prior.batch_shape, batch_shape) == batch_shape
        except RuntimeError:
            fits = False
    if not fits:
        raise ValueError(
            f"the prior of {name!r} has batch shape {tuple(prior.batch_shape)} and event shape "
            f"{tuple(prior.event_shape)}, which do not broadcast to the shape {tuple(shape)} of the parameter: "
            "pass a scalar distribution such as Normal(0., 1.), or one of exactly this shape."
        )
    if prior.batch_shape != batch_shape:
        prior = prior.expand(batch_shape)
    return prior.to_event(len(batch_shape)) if len(batch_shape) else prior


def resolve_prior(prior: PriorLike, name: str, shape: Iterable[int], **context: Any) -> Any:
    """
    Finds the prior of one parameter. This is the only place in which the three forms are told apart.

    :param prior: a distribution; a mapping whose keys are full names (``"0.weight"``) or last parts of names
        (``"weight"``), the full name winning; or a callable of the name and the shape.
    :param str name: full dotted name of the parameter.
    :param shape: its shape.
    :param context: what else is known of the parameter (``fan_in``), passed to :class:`FanInNormal`.
    :return: a distribution of event shape ``shape``; an object with a method ``make_prior`` (a hierarchical
        prior), unchanged; or ``None`` if the mapping has no such key or the callable returns ``None``, which
        means that the parameter stays what it is.
    :raises TypeError: if the prior has none of the three forms.

    Example::

        >>> import pyro.distributions as dist
        >>> resolve_prior({"weight": dist.Normal(0.0, 2.0)}, "0.weight", (3, 2)).event_shape
        torch.Size([3, 2])
        >>> resolve_prior({"weight": dist.Normal(0.0, 2.0)}, "0.bias", (3,)) is None
        True
    """
    shape = torch.Size(shape)
    if isinstance(prior, Mapping):
        key = matching_key(prior, name)
        return None if key is None else resolve_prior(prior[key], name, shape, **context)
    if prior is None:
        return None
    if isinstance(prior, FanInNormal):
        return prior(name, shape, fan_in=context.get("fan_in"))
    if isinstance(prior, Distribution):
        return fit_shape(prior, name, shape)
    if hasattr(prior, "make_prior"):
        return prior
    if callable(prior):
        return resolve_prior(_checked(prior(name, shape), name), name, shape, **context)
    raise TypeError(
        f"the prior of {name!r} is a {type(prior).__name__}; expected a distribution, a dictionary from names to "
        "distributions, or a callable(name, shape) that returns a distribution."
    )


def _checked(prior: Any, name: str) -> Any:
    if prior is None or isinstance(prior, Distribution) or hasattr(prior, "make_prior"):
        return prior
    raise TypeError(
        f"the callable prior returned a {type(prior).__name__} for {name!r}; expected a distribution, or None to "
        "leave the parameter as it is."
    )


def matching_key(prior: Mapping[str, Any], name: str) -> str | None:
    """The key of a mapping that speaks of a parameter: its full name, or else the last part of it."""
    if name in prior:
        return name
    last = name.rpartition(".")[2]
    return last if last in prior else None


def check_keys(prior: Any, names: Iterable[str], argument: str = "prior") -> None:
    """Refuses keys of a mapping that name no parameter, as a misspelt one would silently leave a parameter without its prior."""
    if not isinstance(prior, Mapping):
        return
    names = list(names)
    used = {matching_key(prior, name) for name in names}
    unused = sorted(set(prior) - used)
    if unused:
        raise ValueError(
            f"{argument} has keys {unused} that name no parameter; the parameters are {sorted(names)[:20]}: use a "
            "full name or its last part."
        )


def map_distribution(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a distribution with ``fn`` of every tensor, so that priors follow :meth:`torch.nn.Module.to` and the like."""
    if hasattr(value, "for_site"):
        if hasattr(value, "map"):
            value.map(fn)
        return value
    return _map(value, fn, {})


def _map(value: Any, fn: Callable[[Tensor], Tensor], done: dict[int, Any]) -> Any:
    """The copies made so far end the cycle of a transform and its inverse, which each keep the other."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_map(item, fn, done) for item in value)
    if isinstance(value, (Distribution, Transform)):
        if id(value) not in done:
            new = done[id(value)] = copy.copy(value)
            for key, item in vars(value).items():
                new.__dict__[key] = _map(item, fn, done)
        return done[id(value)]
    return value


def place_prior(prior: Any, layer: Any, name: str, shape: Iterable[int], like: Tensor) -> Any:
    """Makes a resolved prior that of one site of a layer: on the device and of the floating-point type of a parameter."""
    if hasattr(prior, "for_site"):
        return prior.for_site(layer, name, torch.Size(shape), like)
    return map_distribution(
        prior, lambda t: t.to(like.device, like.dtype if t.is_floating_point() else t.dtype)
    )
