# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Rank-1 layers: a shared weight and random vectors that scale its inputs and outputs."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bnn.nn.bayesian import broadcast_linear
from pyro_bnn.nn.folding import apply_factor
from pyro_bnn.nn.priors import PriorLike, check_keys, place_prior, resolve_prior, unwrap
from pyro_bnn.nn.sites import SiteModule

FORMS = ("multiplicative", "residual", "additive")


@dataclass(frozen=True)
class Rank1Options:
    r"""
    What all rank-1 layers have in common.

    :param prior: prior of the factors in one of the three forms of
        :func:`~pyro_bnn.nn.priors.resolve_prior`, with the names ``"r"`` and ``"s"`` (recurrent and attention layers
        have several of each); a factor that a dictionary leaves out is absent. By default :math:`N(1, 0.1^2)`, and
        :math:`N(0, 0.3^2)` for the residual and :math:`N(0, 0.1^2)` for the additive form. ``dist.Cauchy(1., 0.1)``
        is the paper's other choice.
    :param weight_prior: prior of the shared weight; ``None`` keeps it a parameter (to be regularised by weight
        decay), a prior makes it a site, which mixtures estimate by MAP.
    :param bias_prior: prior of the bias, :math:`N(0, 1)` by default. An empty dictionary keeps the bias a parameter
        that all components share.
    :param int rank: :math:`R`; more than 1 implies the residual form.
    :param str form: ``"multiplicative"`` :math:`W \circ r s^\top`; ``"residual"``
        :math:`W \circ (1 + \sum_{j=1}^R r_j s_j^\top)`; ``"additive"`` :math:`W (x + s) + r`.
    :param float clip: factors are clipped to this distance from zero before they are applied (the divergence uses
        the unclipped draw); by default 10 for Cauchy priors [1] and none else (``math.inf`` for none at all). Cauchy
        components under another prior want a clip too.
    :param str apply: ``"scale"`` multiplies activations by the factors, ``"materialise"`` builds the weight of every
        sample, ``"auto"`` takes what touches less memory.
    """

    prior: Any = None
    weight_prior: Any = None
    bias_prior: Any = None
    rank: int = 1
    form: str | None = None
    clip: float | None = None
    apply: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, found {self.rank!r}.")
        if self.form not in (None, *FORMS):
            raise ValueError(f"form must be one of {list(FORMS)}, found {self.form!r}.")
        if self.rank > 1 and self.form not in (None, "residual"):
            raise ValueError(f"rank={self.rank} needs form='residual', found {self.form!r}.")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, found {self.clip!r}.")
        if self.apply not in ("auto", "scale", "materialise"):
            raise ValueError(f"apply must be 'auto', 'scale' or 'materialise', found {self.apply!r}.")

    @property
    def resolved_form(self) -> str:
        """The form that the rank implies."""
        return self.form or ("residual" if self.rank > 1 else "multiplicative")

    def factor_prior(self) -> Any:
        """The prior of the factors, or its default."""
        if self.prior is not None:
            return self.prior
        loc, scale = {"multiplicative": (1.0, 0.1), "residual": (0.0, 0.3), "additive": (0.0, 0.1)}[
            self.resolved_form
        ]
        return dist.Normal(torch.tensor(loc), torch.tensor(scale))


class Rank1Mixin(SiteModule):
    """
    Sites and arithmetic that rank-1 layers share; the torch layer is the other base class.

    A layer has one or several *groups*, a weight with its factors. A group is a suffix: the sites are
    ``"r" + suffix`` and ``"s" + suffix``.
    """

    #: number of dimensions right of the features in the activations
    _post = 0
    #: whether the first layer of a chain may repeat its input over the samples itself
    takes_shared_input = False

    def _groups(self) -> dict[str, tuple[str, int, int]]:
        """Suffix -> (name of the weight, outputs, inputs)."""
        raise ValueError(f"{type(self).__name__} declares no groups.")

    def _biases(self) -> dict[str, str]:
        """Name of a bias parameter -> name of its site."""
        return {"bias": "bias"}

    def _site_keys(self) -> list[str]:
        """Names that priors may use."""
        keys = [f"{kind}{suffix}" for suffix in self._groups() for kind in "rs"]
        return [*keys, *self._biases().values(), *(weight for weight, _, _ in self._groups().values())]

    def _make_rank1(self, options: Rank1Options, prefix: str = "") -> None:
        self.__dict__["_form"] = form = options.resolved_form
        self.__dict__["_mode"] = options.apply
        self.__dict__["_rank"] = options.rank
        self.__dict__["_clips"] = {}
        self.__dict__.setdefault("_sites", {})
        factors = options.factor_prior()
        bias_prior = (
            dist.Normal(torch.zeros(()), torch.ones(())) if options.bias_prior is None else options.bias_prior
        )
        for suffix, (weight_name, out, in_) in self._groups().items():
            weight = getattr(self, weight_name)
            for kind, size in (("r", out), ("s", in_)):
                name = kind + suffix
                shape = (options.rank, size) if form == "residual" else (size,)
                resolved = resolve_prior(factors, prefix + name, shape, kind=kind)
                if resolved is not None:
                    placed = place_prior(resolved, self, name, shape, weight)
                    self._add_site(name, placed, "factor", event_dim=len(shape))
                    self._clips[name] = options.clip or (10.0 if is_cauchy(resolved) else None)
            if options.weight_prior is not None and weight_name not in self._redirected():
                resolved = resolve_prior(options.weight_prior, prefix + weight_name, weight.shape)
                if resolved is not None:
                    if weight_name not in self._parameters:
                        raise ValueError(
                            f"{prefix + weight_name!r} is computed from other parameters (a parametrization) and cannot "
                            "have a weight_prior: leave it out by a dictionary of priors, or call "
                            "torch.nn.utils.parametrize.remove_parametrizations."
                        )
                    placed = place_prior(resolved, self, weight_name, weight.shape, weight)
                    self._add_site(weight_name, placed, "base", event_dim=weight.dim())
        # by weight that factors multiply, the suffix of its group
        self.__dict__["_weights"] = {name: suffix for suffix, (name, _, _) in self._groups().items()}
        for name, _ in self._biases().items():
            bias = self._parameters.get(name)  # a tied one is read elsewhere
            if bias is not None:
                resolved = resolve_prior(bias_prior, prefix + name, bias.shape)
                if resolved is not None:
                    placed = place_prior(resolved, self, name, bias.shape, bias)
                    self._add_site(name, placed, "bias", event_dim=bias.dim())

    def _read_from_outside(self, name: str) -> Any:
        """A weight with its factors, which is what a module that reads it means to compute with."""
        suffix = self._weights.get(name)
        called = self.__dict__["_pyro_context"].active and not self._is_folded()
        if suffix is None or not called or self._form == "additive":
            return self.read(name)
        return self._scaled_weight(self.read(name), self._factor("r" + suffix), self._factor("s" + suffix))

    # ------------------------------------------------------------------ values in the present call

    def _factor(self, name: str) -> Tensor | None:
        if name not in self._sites:
            return None
        value = self._folding.value(self, name) if self._is_folded() else self.read(name)
        clip = self._clips[name]
        return value if clip is None else value.clamp(-clip, clip)

    def _parameter(self, name: str) -> Any:
        """A weight or bias: a parameter, or the value of its site."""
        random = name in self._sites or name in self._redirected()
        return self._folding.value(self, name) if self._is_folded() and random else self.read(name)

    def _plain(self, x: Tensor, *args: Any, **parameters: Any) -> Any:
        """The forward of the torch layer with some of its parameters replaced."""
        with self._overriding(parameters):
            return super().forward(x, *args)

    @contextmanager
    def _overriding(self, parameters: dict[str, Any]) -> Iterator[None]:
        old = self.__dict__.get("_overrides")
        self.__dict__["_overrides"] = parameters
        try:
            yield
        finally:
            self.__dict__["_overrides"] = old

    # ------------------------------------------------------------------ arithmetic of one-weight layers

    def forward(self, x: Tensor, *args: Any) -> Any:
        """
        :param x: inputs, as for the torch layer.
        :return: outputs, as for the torch layer; with sample dimensions in front if the sites have them.
        """
        self._check_input(x)
        if self._is_folded() and self._axis == 1 and x.dim() - self._post >= 3:
            # sequence-first activations: bring the batch to the front
            return self._forward(x.transpose(0, 1), *args).transpose(0, 1)
        return self._forward(x, *args)

    def _forward(self, x: Tensor, *args: Any) -> Any:
        weight, bias = self._parameter("weight"), self._parameter("bias")
        r, s = self._factor("r"), self._factor("s")
        form = self._form
        shared = self._is_folded() and self._folding.is_shared_input(self, x)
        if self._is_folded():
            examples = self._folding.batch_size * (1 if shared else self._folding.num_samples)
            built = 0 if self._mode == "materialise" else 3 * weight.shape[-self._weight_dim :].numel()
            self.__dict__["_costs"] = built, self._activations(x) / examples
        if shared:
            # the first layer of a chain gets the inputs before they are repeated over the samples
            materialises = self._materialises(x, weight, r, s, rows=self._folding.num_samples)
            if form == "multiplicative" and s is not None and s.dim() > 1 and not materialises:
                x = (
                    x * s.view(*s.shape[:2], *(1,) * (x.dim() - 2 - self._post), -1, *(1,) * self._post)
                ).flatten(0, 1)
                s = None
            else:
                x = self._folding.repeat(x)
        elif self._is_folded():
            x = self._folding.whole(x) if x.dim() > self._post + 1 else x
            self._folding.check_rows(self, x.shape)
        return self._map(x, weight, bias, r, s, *args)

    def _map(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor | None, s: Tensor | None, *args: Any
    ) -> Tensor:
        """One weight with its factors and its bias, applied to activations with the batch in front."""
        form = self._form
        if form == "additive":
            x = x if s is None else self._combine(x, s, operator.add)
            y = self._weighted(x, weight, None, None, *args)
            y = y if r is None else self._combine(y, r, operator.add)
        elif not self._has_rows(bias, 1) and self._materialises(x, weight, r, s):
            return self._per_sample(x, self._scaled_weight(weight, r, s), bias, *args)
        elif form == "residual":
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

    def plain_parameters(self) -> dict[str, Tensor | None] | None:
        """
        What makes the torch layer compute what this layer computes for a sample of a folded call.

        :return: its parameters with the samples, or one for all of them, in the first dimension; ``None`` if there are
            none: in the additive form, for noise per example and with ``apply="scale"``.
        """
        factors = 2 if self._form == "residual" else 1
        if self._form == "additive" or self._mode == "scale" or "" not in self._groups():
            return None
        weight, bias = self._parameter("weight"), self._parameter("bias")
        r, s = self._factor("r"), self._factor("s")
        if any(self._has_rows(f, factors) for f in (r, s)) or self._has_rows(bias, 1):
            return None
        weight = self._scaled_weight(weight, r, s)
        return {
            "weight": weight if weight.dim() > self._weight_dim else weight[None],
            "bias": bias if bias is None else bias.view(-1, bias.shape[-1]),
        }

    def _has_rows(self, value: Tensor | None, event_dim: int) -> bool:
        """Whether a folded call gives the value of a site per example."""
        return (
            self._is_folded()
            and value is not None
            and value.dim() == event_dim + 2
            and bool(value.shape[1] > 1)
        )

    def _affine(self, y: Tensor, r: Tensor, bias: Tensor) -> Tensor:
        """``y * r + bias`` in one pass over the activations."""
        if not self._is_folded():
            tail = (1,) * self._post
            return torch.addcmul(bias.view(*bias.shape, *tail), y, r.view(*r.shape, *tail))
        if r.dim() != 3 or r.shape[1] > 1 or (bias.dim() == 3 and bias.shape[1] > 1):
            return self._combine(self._combine(y, r), bias, operator.add)
        samples, rows = r.shape[0], y.shape[0]
        ones = (1,) * (y.dim() - 2 - self._post)
        tail = (1,) * self._post
        out = torch.addcmul(
            bias.view(-1, 1, *ones, bias.shape[-1], *tail),
            y.view(samples, rows // samples, *y.shape[1:]),
            r.view(samples, 1, *ones, r.shape[-1], *tail),
        )
        return out.view(y.shape)

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
                f"{self._pyro_name or type(self).__name__} has a weight of shape {tuple(weight.shape)} with sample "
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

    @property
    def _weight_dim(self) -> int:
        return self._post + 2

    def _materialises(self, x: Tensor, weight: Tensor, *factors: Tensor | None, rows: int = 1) -> bool:
        if not self._is_folded():
            return False
        present = [f for f in factors if f is not None]
        event_dim = 2 if self._form == "residual" else 1
        if any(self._has_rows(f, event_dim) for f in present):
            return False  # a weight per example would be as large as it is slow
        if weight.dim() > self._weight_dim:
            return True
        alone = self._folding.num_samples == 1
        if self._mode == "scale" or not present or (all(f.dim() == event_dim for f in present) and not alone):
            return False
        if self._mode == "materialise":
            return True
        # memory touched: the activations twice, against the sample's copy of the weight
        passes = rows if event_dim == 1 else 2 * rows * present[0].shape[-2]
        return 3 * weight.numel() < passes * self._activations(x) // self._folding.num_samples

    def _activations(self, x: Tensor) -> int:
        return 2 * x.numel()

    def _row_factor(self, r: Tensor) -> Tensor:
        """Output factors, laid out over the first two dimensions of the weight."""
        return r.unsqueeze(-1)

    def _column_factor(self, s: Tensor) -> Tensor:
        """Input factors, laid out over the first two dimensions of the weight."""
        return s.unsqueeze(-2)

    def _scaled_weight(self, weight: Tensor, r: Tensor | None, s: Tensor | None) -> Tensor:
        """The weight of every sample, shape ``(F, *weight.shape)``."""
        event_dim = 2 if self._form == "residual" else 1
        if weight.dim() > self._weight_dim:
            weight = weight.squeeze(1)
        rows = None if r is None else self._row_factor(r.squeeze(1) if r.dim() > event_dim else r)
        columns = None if s is None else self._column_factor(s.squeeze(1) if s.dim() > event_dim else s)
        if rows is None or columns is None:
            outer = rows if columns is None else columns
            if outer is None:
                return weight
        else:
            outer = rows * columns
        if event_dim == 2:
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
        present = {
            name: 1 if name in self._site_names() or self._parameters.get(name) is not None else None
            for name in self._biases()
        }
        with self._overriding(present):
            return f"{super().extra_repr()}, sites={self._site_names()}"


class Rank1LinearMixin(Rank1Mixin):
    """Rank-1 layers whose weights are matrices that multiply the last dimension of the activations."""

    def _shared(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        return broadcast_linear(x, weight)

    def _per_sample(self, x: Tensor, weights: Tensor, bias: Any, *args: Any) -> Tensor:
        if weights.dim() == 2:
            return nn.functional.linear(x, weights, bias)
        F = self._folding.num_samples
        rows = x.reshape(F, -1, x.shape[-1])
        if bias is None:
            y = torch.bmm(rows, weights.mT)
        else:
            y = torch.baddbmm(bias.expand(F, 1, -1), rows, weights.mT)
        return y.view(*x.shape[:-1], y.shape[-1])


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
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        finish_layer(self, options)

    takes_shared_input = True

    def _groups(self) -> dict[str, tuple[str, int, int]]:
        return {"": ("weight", self.out_features, self.in_features)}

    def _check_input(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self._pyro_name or 'Rank1Linear'} takes inputs of shape (..., {self.in_features}), found "
                f"{tuple(x.shape)}."
            )

    def _activations(self, x: Tensor) -> int:
        return x.numel() // self.in_features * (self.in_features + self.out_features)


def is_cauchy(prior: Any) -> bool:
    """
    Tells whether a prior has Cauchy tails.

    :param prior: a distribution or hierarchical prior.
    :return: ``True`` for Cauchy and half-Cauchy distributions.
    """
    if getattr(prior, "family", None) == "cauchy":
        return True
    return isinstance(unwrap(prior), (torch.distributions.Cauchy, torch.distributions.HalfCauchy))


def finish_layer(layer: Any, options: dict[str, Any]) -> None:
    """
    The end of the constructor of a rank-1 layer.

    :param layer: the layer, a torch layer until now.
    :param options: arguments of :class:`Rank1Options`.
    """
    made = Rank1Options(**options)
    check_rank1_keys(made, layer._site_keys())
    layer._make_rank1(made)


def check_rank1_keys(options: Rank1Options, names: list[str]) -> None:
    """
    Checks the keys of the three priors of the options.

    :param options: the options.
    :param names: full names of the sites there are.
    """
    last = {name: name.rpartition(".")[2] for name in names}
    check_keys(options.prior, [n for n in names if last[n][0] in "rs"], "prior")
    check_keys(options.weight_prior, [n for n in names if "weight" in last[n]], "weight_prior")
    check_keys(options.bias_prior, [n for n in names if "bias" in last[n]], "bias_prior")


__all__ = ["PriorLike", "Rank1Linear", "Rank1Mixin", "Rank1Options"]
