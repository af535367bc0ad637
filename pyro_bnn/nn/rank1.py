# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-1 layers: a shared weight and random vectors that scale its inputs and outputs."""

import math
import operator
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import linear
from typing_extensions import override

from pyro_bnn.nn.bayesian import broadcast_linear, linear_per_sample
from pyro_bnn.nn.priors import place_prior, resolve_prior
from pyro_bnn.nn.rank1_options import Rank1Options, check_rank1_keys, is_cauchy
from pyro_bnn.nn.sites import SiteModule, is_called, module_path


class Rank1Mixin(SiteModule):
    """
    Sites and arithmetic that rank-1 layers share; the torch layer is the other base class.

    A layer has one or several *groups*, a weight with its factors. A group is a suffix: the sites are
    ``"r" + suffix`` and ``"s" + suffix``.
    """

    #: number of dimensions right of the features in the activations
    _post = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = [field.name for field in fields(Rank1Options)]
        options = Rank1Options(**{key: kwargs.pop(key) for key in names if key in kwargs})
        super().__init__(*args, **kwargs)
        self._prepare()
        check_rank1_keys(options, self._site_keys())
        self._make_rank1(options)

    def _groups(self) -> dict[str, tuple[str, int, int]]:
        """Suffix -> (name of the weight, outputs, inputs)."""
        raise ValueError(f"{type(self).__name__} declares no groups.")

    def _biases(self) -> list[str]:
        """Names of the biases, which those of their sites are."""
        return ["bias"]

    def _site_keys(self) -> list[str]:
        """Names that priors may use."""
        keys = [f"{kind}{suffix}" for suffix in self._groups() for kind in "rs"]
        return [*keys, *self._biases(), *(weight for weight, _, _ in self._groups().values())]

    def _make_rank1(self, options: Rank1Options, prefix: str = "") -> None:
        self._form, self._mode, self._rank = options.resolved_form, options.apply, options.rank
        self._clips: dict[str, float | None] = {}
        for suffix, (name, out, in_) in self._groups().items():
            self._add_factors(suffix, name, {"r": out, "s": in_}, options, prefix)
            if options.weight_prior is not None and name not in self._redirects:
                self._place(name, options.weight_prior, "base", prefix)
        self._weights = {suffix: name for suffix, (name, _, _) in self._groups().items()}
        self._bias_names = self._biases()
        standard = dist.Normal(torch.zeros(()), torch.ones(()))
        bias_prior = standard if options.bias_prior is None else options.bias_prior
        for name in self._bias_names:
            if name in self._own_parameters():  # a tied one is read elsewhere
                self._place(name, bias_prior, "bias", prefix)

    def _add_factors(
        self, suffix: str, weight: str, sizes: dict[str, int], options: Rank1Options, prefix: str
    ) -> None:
        """The sites of the factors of one weight."""
        like = getattr(self, weight)
        for kind, size in sizes.items():
            name = kind + suffix
            shape = (options.rank, size) if self._form == "residual" else (size,)
            resolved = resolve_prior(options.factor_prior(), prefix + name, shape, kind=kind)
            if resolved is not None:
                self._add_site(
                    name, place_prior(resolved, self, name, shape, like), "factor", event_dim=len(shape)
                )
                self._clips[name] = options.clip or (10.0 if is_cauchy(resolved) else None)

    def _place(self, name: str, prior: Any, role: str, prefix: str) -> None:
        """Makes a parameter random, unless its prior says that it stays what it is."""
        value = getattr(self, name)
        resolved = resolve_prior(prior, prefix + name, value.shape)
        if resolved is None:
            return
        if name not in self._own_parameters():
            raise ValueError(
                f"{prefix + name!r} is computed from other parameters (a parametrization) and cannot "
                "have a weight_prior: leave it out by a dictionary of priors, or call "
                "torch.nn.utils.parametrize.remove_parametrizations."
            )
        placed = place_prior(resolved, self, name, value.shape, value)
        self._add_site(name, placed, role, event_dim=value.dim())

    @override
    def _read_from_outside(self, name: str) -> Any:
        """A weight with its factors, which is what a module that reads it means to compute with."""
        suffix = next((suffix for suffix, weight in self._weights.items() if weight == name), None)
        if suffix is None or not is_called(self) or self._is_folded() or self._form == "additive":
            return self.read(name)
        return self._scaled_weight(self.read(name), self._factor("r" + suffix), self._factor("s" + suffix))

    # ------------------------------------------------------------------ values in the present call

    @property
    def _factor_dim(self) -> int:
        """The number of dimensions of a factor."""
        return 2 if self._form == "residual" else 1

    @property
    def _weight_dim(self) -> int:
        return self._post + 2

    def _factor(self, name: str) -> Tensor | None:
        if name not in self._sites:
            return None
        value, clip = self._value(name), self._clips[name]
        return value if clip is None else value.clamp(-clip, clip)

    def _has_rows(self, value: Tensor | None, event_dim: int) -> bool:
        """Whether a folded call gives the value of a site per example."""
        with_samples = self._is_folded() and value is not None and value.dim() == event_dim + 2
        return bool(with_samples and value.shape[1] > 1)  # type: ignore[union-attr]

    def _plain(self, x: Tensor, *args: Any, **parameters: Any) -> Any:
        """The forward of the torch layer with some of its parameters replaced."""
        with self._replacing(parameters):
            return super().forward(x, *args)

    # ------------------------------------------------------------------ arithmetic of one-weight layers

    def forward(self, x: Tensor, *args: Any) -> Any:
        """
        :param x: inputs, as for the torch layer.
        :return: outputs, as for the torch layer; with sample dimensions in front if the sites have them.
        """
        self._check_input(x)
        if not self._is_folded():
            return self._map(x, *self._values_of_group(), *args)
        built = self._folding.built(self)
        if built is not None:
            return self._plain(x, *args, **built)
        if self._axis == 1 and x.dim() - self._post >= 3:
            # sequence-first activations: bring the batch to the front
            return self._folded(x.transpose(0, 1), *args).transpose(0, 1)
        return self._folded(x, *args)

    def _values_of_group(self, suffix: str = "", bias: str = "bias") -> tuple[Any, ...]:
        """Weight, bias and factors of one group, for :meth:`_map`."""
        value = self._value(bias) if bias in self._bias_names else None
        weight = self._value(self._weights[suffix])
        return weight, value, self._factor("r" + suffix), self._factor("s" + suffix)

    def _built(self) -> dict[str, Tensor | None]:
        """What makes the torch layer compute the same, with the samples, or one for all of them, in front."""
        weight, bias, r, s = self._values_of_group()
        weight = self._scaled_weight(weight, r, s)
        return {
            "weight": weight if weight.dim() > self._weight_dim else weight[None],
            "bias": bias if bias is None else bias.view(-1, bias.shape[-1]),
        }

    def _folded(self, x: Tensor, *args: Any) -> Any:
        folding = self._folding
        weight, bias, r, s = self._values_of_group()
        shared = folding.is_shared_input(self, x)
        examples = folding.batch_size * (1 if shared else folding.num_samples)
        if self._costs is None:
            built = {"materialise": 0.0, "scale": math.inf}.get(
                self._mode, 3.0 * weight.shape[-self._weight_dim :].numel()
            )
            built = math.inf if self._form == "additive" else built
            self._costs = built, self._activations(x) / examples
        if not shared:
            x = folding.whole(x) if x.dim() > self._post + 1 else x
            folding.check_rows(self, x.shape)
        elif self._scales_input(x, weight, r, s):
            # the first layer of a chain gets the inputs before they are repeated over the samples
            ones = (1,) * (x.dim() - 2 - self._post)
            x = (x * s.view(*s.shape[:2], *ones, -1, *(1,) * self._post)).flatten(0, 1)
            s = None
        else:
            x = folding.repeat(x)
        return self._map(x, weight, bias, r, s, *args)

    def _scales_input(self, x: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None) -> bool:
        """Whether the input factors of all samples multiply an input that has not been repeated."""
        if self._form != "multiplicative" or s is None or s.dim() == 1:
            return False
        return not self._materialises(x, weight, r, s, rows=self._folding.num_samples)

    def _map(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor | None, s: Tensor | None, *args: Any
    ) -> Tensor:
        """One weight with its factors and its bias, applied to activations with the batch in front."""
        if self._form == "additive":
            x = x if s is None else self._combine(x, s, operator.add)
            y = self._weighted(x, weight, None, None, *args)
            y = y if r is None else self._combine(y, r, operator.add)
        elif not self._has_rows(bias, 1) and self._materialises(x, weight, r, s):
            return self._per_sample(x, self._scaled_weight(weight, r, s), bias, *args)
        elif self._form == "residual":
            y = self._weighted(x, weight, None, None, *args)
            for r_j, s_j in self._pairs(r, s):
                y = y + self._weighted(x, weight, r_j, s_j, *args)
        elif r is not None and bias is not None:
            return self._affine(self._weighted(x, weight, None, s, *args), r, bias)
        else:
            y = self._weighted(x, weight, r, s, *args)
        return y if bias is None else self._combine(y, bias, operator.add)

    def _pairs(self, r: Tensor | None, s: Tensor | None) -> list[tuple[Tensor | None, Tensor | None]]:
        """The factors of the residual form, pair by pair; an absent one stands for ones."""
        if r is None and s is None:
            return []
        columns = [[None] * self._rank if f is None else list(f.unbind(-2)) for f in (r, s)]
        return list(zip(*columns, strict=True))

    def _affine(self, y: Tensor, r: Tensor, bias: Tensor) -> Tensor:
        """``y * r + bias`` in one pass over the activations."""
        tail = (1,) * self._post
        if not self._is_folded():
            return torch.addcmul(bias.view(*bias.shape, *tail), y, r.view(*r.shape, *tail))
        if r.dim() != 3 or self._has_rows(r, 1) or self._has_rows(bias, 1):
            return self._combine(self._combine(y, r), bias, operator.add)
        samples = r.shape[0]
        ones = (1,) * (y.dim() - 1 - self._post)
        parts = y.view(samples, -1, *y.shape[1:])
        shift, scale = (t.view(-1, *ones, t.shape[-1], *tail) for t in (bias, r))
        return torch.addcmul(shift, parts, scale).view(y.shape)

    def _weighted(self, x: Tensor, weight: Tensor, r: Tensor | None, s: Tensor | None, *args: Any) -> Tensor:
        """The torch layer without its bias, between two scalings of activations."""
        if s is not None:
            x = self._combine(x, s)
        if self._is_folded() and weight.dim() > self._weight_dim:
            y = self._per_sample(x, weight.squeeze(1), None, *args)
        else:
            y = self._shared(x, weight, *args)
        return y if r is None else self._combine(y, r)

    def _shared(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        """The torch layer with one weight; leading sample dimensions are flattened into its batch."""
        if weight.dim() > self._weight_dim:
            raise ValueError(
                f"{module_path(self) or type(self).__name__} has a weight of shape {tuple(weight.shape)} with sample "
                "dimensions: convert the network with rank1_, or call fold_ on it, so that samples are folded."
            )
        limit = self._post + 2
        if x.dim() <= limit:
            return self._plain(x, *args, weight=weight, bias=None)
        y = self._plain(x.flatten(0, x.dim() - limit), *args, weight=weight, bias=None)
        return y.unflatten(0, x.shape[: x.dim() - limit + 1])

    def _combine(self, x: Tensor, factor: Tensor, combine: Any = operator.mul) -> Tensor:
        if self._is_folded():
            return apply_factor(x, factor, self._post, combine)
        return combine(x, factor.view(*factor.shape, *(1,) * self._post))

    def _check_input(self, x: Tensor) -> None:
        """Layers may check the size of their input here."""

    def _materialises(self, x: Tensor, weight: Tensor, *factors: Tensor | None, rows: int = 1) -> bool:
        """Whether the weight of every sample is built."""
        if not self._is_folded():
            return False
        present = [f for f in factors if f is not None]
        if any(self._has_rows(f, self._factor_dim) for f in present):
            return False  # a weight per example would be as large as it is slow
        if weight.dim() > self._weight_dim:
            return True
        samples = self._folding.num_samples
        shared = all(f.dim() == self._factor_dim for f in present) and samples > 1
        if self._mode == "scale" or not present or shared:
            return False
        if self._mode == "materialise":
            return True
        # memory touched: the activations twice, against the sample's copy of the weight
        passes = rows if self._factor_dim == 1 else 2 * rows * present[0].shape[-2]
        return 3 * weight.numel() < passes * self._activations(x) // samples

    def _activations(self, x: Tensor) -> int:
        """The number of elements that enter and leave the layer."""
        return 2 * x.numel()

    def _row_factor(self, r: Tensor) -> Tensor:
        """Output factors, laid out over the first two dimensions of the weight."""
        return r.unsqueeze(-1)

    def _column_factor(self, s: Tensor) -> Tensor:
        """Input factors, laid out over the first two dimensions of the weight."""
        return s.unsqueeze(-2)

    def _scaled_weight(self, weight: Tensor, r: Tensor | None, s: Tensor | None) -> Tensor:
        """The weight of every sample, shape ``(F, *weight.shape)``."""
        if weight.dim() > self._weight_dim:
            weight = weight.squeeze(1)
        r, s = (f.squeeze(1) if f is not None and f.dim() > self._factor_dim else f for f in (r, s))
        if r is None and s is None:
            return weight
        rows = 1.0 if r is None else self._row_factor(r)
        outer: Any = rows if s is None else rows * self._column_factor(s)
        if self._form == "residual":
            outer = 1 + outer.sum(-3)
        return weight * outer[(..., *(None,) * self._post)]

    def _per_sample(self, x: Tensor, weights: Tensor, bias: Any, *args: Any) -> Tensor:
        """
        The torch layer with a weight per sample, shape ``(F, *weight.shape)``: one call per sample. The weight of a
        single sample may come without its first dimension.
        """
        if weights.dim() == self._weight_dim:
            return self._plain(x, *args, weight=weights, bias=bias)
        F = self._folding.num_samples
        biases = [None] * F if bias is None else bias.expand(F, 1, -1)[:, 0].unbind(0)
        parts = [
            self._plain(part, *args, weight=w, bias=b)
            for part, w, b in zip(x.chunk(F), weights.unbind(0), biases, strict=True)
        ]
        return parts[0] if F == 1 else torch.cat(parts)

    def extra_repr(self) -> str:
        """The constructor's arguments and the names of the random attributes."""
        # torch asks whether there is a bias, which is no place to draw one
        present = {
            n: n if n in self._sites or n in self._own_parameters() else None for n in self._bias_names
        }
        with self._replacing(present):
            return f"{super().extra_repr()}, sites={list(self._sites)}"


class Rank1LinearMixin(Rank1Mixin):
    """Rank-1 layers whose weights are matrices that multiply the last dimension of the activations."""

    @override
    def _shared(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        return broadcast_linear(x, weight)

    @override
    def _per_sample(self, x: Tensor, weights: Tensor, bias: Any, *args: Any) -> Tensor:
        return linear(x, weights, bias) if weights.dim() == 2 else linear_per_sample(x, weights, bias)


_Linear: Any = PyroModule[nn.Linear]


class Rank1Linear(Rank1LinearMixin, _Linear):
    r"""
    A linear layer with rank-1 random factors,

    .. math:: y = ((x \circ s) W^\top) \circ r + b = (W \circ r s^\top)\, x + b,

    equation (1) of [1]: :math:`r` scales the outputs, :math:`s` the inputs, and the bias is added after
    :math:`r`. Factors are the sample sites ``r`` (shape ``(out_features,)``) and ``s`` (``(in_features,)``);
    the bias is a sample site too, so that every component of a mixture has its own. The weight is a shared
    parameter unless ``weight_prior`` makes it a site. Factors of shape ``(*samples, 1, d)`` align with the batch
    dimensions of ``x`` from the right.

    :param int in_features: number of inputs.
    :param int out_features: number of outputs.
    :param bool bias: whether there is a bias.
    :param options: see :class:`Rank1Options`.

    **References**

    [1] Dusenberry et al., *Efficient and Scalable Bayesian Neural Nets with Rank-1 Factors*, ICML 2020.

    Example::

        >>> layer = Rank1Linear(3, 2, prior=dist.Normal(1.0, 0.05))
        >>> layer(torch.zeros(7, 3)).shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype, **options)

    takes_shared_input = True

    def _groups(self) -> dict[str, tuple[str, int, int]]:
        return {"": ("weight", self.out_features, self.in_features)}

    def _check_input(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"{module_path(self) or 'Rank1Linear'} takes inputs of shape (..., {self.in_features}), found "
                f"{tuple(x.shape)}."
            )

    def _activations(self, x: Tensor) -> int:
        return x.numel() // self.in_features * (self.in_features + self.out_features)


def apply_factor(x: Tensor, factor: Tensor, post: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """
    Combines activations ``(F * B, ..., d, *post)`` with factors ``(d,)``, ``(F, 1, d)`` or ``(F, B, d)`` in a folded call.

    :raises ValueError: if the rows of ``x`` are no multiple of the samples.
    """
    tail = (1,) * post
    if factor.dim() == 1:
        return combine(x, factor.view(-1, *tail))
    F, P, d = factor.shape
    rows = x.shape[0]
    if rows % (F * P):
        raise ValueError(
            f"activations of shape {tuple(x.shape)} have {rows} rows, which {F} samples times {P} examples do not "
            "divide: the network must keep the batch in the first dimension."
        )
    if P > 1 and rows > F * P:  # several rows per example, e.g. tokens flattened into the batch
        factor = factor.repeat_interleave(rows // (F * P), dim=1)
        P = factor.shape[1]
    middle = (1,) * (x.dim() - 2 - post)
    y = combine(x.reshape(F, rows // F, *x.shape[1:]), factor.view(F, P, *middle, d, *tail))
    return y.view(rows, *y.shape[2:])
