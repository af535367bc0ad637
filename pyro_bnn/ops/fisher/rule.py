# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Fisher information of a likelihood with respect to its own parameters.

The generalised Gauss-Newton (GGN) matrix of a model with outputs :math:`\phi(\theta)` is
:math:`\sum_n J_n^\top F_n J_n`, with :math:`J_n = \partial\phi_n/\partial\theta` and :math:`F_n` the Fisher
information of the observation's distribution in the parameters :math:`\phi_n` (Martens, 2020, section 9).
A :class:`FisherRule` says which real-valued parameters a distribution has, what their Fisher information is,
and how to build the distribution again from parameters that have moved.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import Distribution
from typing_extensions import override

from pyro_bnn.ops.families import can_draw, draw, reparametrised, shares_density

_RULES: dict[type[Distribution], "FisherRule"] = {}
#: Rules that subclasses do not inherit.
_OWN_RULES: dict[type[Distribution], "FisherRule"] = {}


class FisherRule:
    """
    Parameters and Fisher information of one family of distributions.

    Subclass, implement the three methods, and register with :func:`register_fisher`. Parameters must be
    real-valued (take logarithms of positive ones), so that a linearisation cannot leave their domain.
    """

    def parameters(self, d: Distribution) -> dict[str, Tensor]:
        """
        The parameters of ``d``, differentiable in its arguments.

        :param d: a distribution of the family.
        :return: by name, tensors of shape ``d.batch_shape + (C_name,)``.
        """
        raise NotImplementedError

    def information(self, d: Distribution) -> Tensor:
        """
        The Fisher information in all the parameters, in the order of :meth:`parameters`.

        :param d: a distribution of the family.
        :return: a tensor of shape ``d.batch_shape + (C, C)`` with ``C`` the sum of the ``C_name``.
        """
        raise NotImplementedError

    def block(self, d: Distribution, names: Sequence[str]) -> Tensor:
        """
        The Fisher information in some of the parameters; override it where that is cheaper than the whole.

        :param d: a distribution of the family.
        :param names: names of parameters, in the order of :meth:`parameters`.
        :return: a tensor of shape ``d.batch_shape + (C, C)`` with ``C`` the sum of their sizes.
        """
        full = self.information(d)
        keep: list[int] = []
        start = 0
        for name, value in self.parameters(d).items():
            if name in names:
                keep += range(start, start + value.shape[-1])
            start += value.shape[-1]
        if len(keep) == full.shape[-1]:
            return full
        index = torch.tensor(keep, device=full.device, dtype=torch.long)
        return full.index_select(-1, index).index_select(-2, index)

    def root(self, d: Distribution, names: Sequence[str]) -> Tensor:
        r"""
        A factor :math:`R` of the Fisher information, :math:`F = R R^\top`.

        :param d: a distribution of the family.
        :param names: names of parameters, in the order of :meth:`parameters`.
        :return: a tensor of shape ``d.batch_shape + (C, K)``.
        """
        return matrix_square_root(self.block(d, names))

    def build(self, d: Distribution, parameters: Mapping[str, Tensor]) -> Distribution:
        """
        The distribution of ``d``'s family at other parameters.

        :param d: supplies everything that ``parameters`` does not hold.
        :param parameters: tensors of shape ``sample_shape + d.batch_shape + (C_name,)``.
        :return: a distribution of batch shape ``sample_shape + d.batch_shape``.
        """
        raise NotImplementedError

    def sample(self, d: Distribution, num_samples: int) -> Tensor:
        """
        :param d: a distribution of the family.
        :param num_samples: how many draws.
        :return: draws without a graph, shape ``(num_samples,) + d.batch_shape + d.event_shape``.
        """
        return d.sample(torch.Size((num_samples,)))


def register_fisher(
    *families: type[Distribution], subclasses: bool = True
) -> Callable[[type[FisherRule]], type[FisherRule]]:
    """
    Class decorator that registers a :class:`FisherRule` for families of distributions and their subclasses.

    :param families: distribution classes.
    :param bool subclasses: ``False`` for the classes themselves only.
    :return: the decorator.

    Example::

        >>> import torch.distributions as td
        >>> @register_fisher(td.Exponential)
        ... class ExponentialFisher(FisherRule):
        ...     def parameters(self, d):
        ...         return {"log_rate": d.rate.log().unsqueeze(-1)}
        ...
        ...     def information(self, d):
        ...         return torch.ones(d.batch_shape + (1, 1))
        ...
        ...     def build(self, d, parameters):
        ...         return td.Exponential(parameters["log_rate"].squeeze(-1).exp())
        >>> type(fisher_rule(td.Exponential(1.0))).__name__
        'ExponentialFisher'
    """

    def decorate(rule: type[FisherRule]) -> type[FisherRule]:
        add_rule(rule(), *families, subclasses=subclasses)
        return rule

    return decorate


def add_rule(rule: FisherRule, *families: type[Distribution], subclasses: bool = True) -> None:
    """Registers one rule for families of distributions; see :func:`register_fisher`."""
    for family in families:
        (_RULES if subclasses else _OWN_RULES)[family] = rule


def fisher_rule(d: Distribution) -> FisherRule:
    """
    The rule for a distribution: that of the first registered class in its method resolution order whose density it
    has, else the :class:`MonteCarloFisher` of its own arguments.

    :param d: a distribution (not wrapped in ``Independent`` or a mask).
    :return: its rule.
    :raises KeyError: if no class of ``d`` is registered and ``d`` cannot be rebuilt from its arguments; the message
        says what to do. So for one with a density of its own and draws of its parent.
    """
    if type(d) in _OWN_RULES:
        return _OWN_RULES[type(d)]
    for family in type(d).__mro__:
        if family in _RULES and shares_density(type(d), family):
            return _RULES[family]
    if not can_draw(d):
        raise KeyError(
            f"{type(d).__name__} has a log_prob of its own, but draws as the class that it extends: its Fisher information "
            "is not that of the parent, and cannot be estimated from draws. Use curvature='hessian', give the class "
            "a method sample of its own, or register a FisherRule with pyro_bnn.ops.fisher.register_fisher."
        )
    rule = MonteCarloFisher()
    try:
        with torch.no_grad():
            rule.build(d, rule.parameters(d)).log_prob(d.sample())
    except Exception as error:
        known = ", ".join(sorted(family.__name__ for family in _RULES))
        raise KeyError(
            f"No Fisher information is registered for {type(d).__name__} (known: {known}), and it cannot be rebuilt "
            f"from its arguments for a Monte-Carlo estimate ({type(error).__name__}: {error}). Use "
            "curvature='hessian', or register a FisherRule with pyro_bnn.ops.fisher.register_fisher."
        ) from error
    return rule


def matrix_square_root(matrix: Tensor) -> Tensor:
    """
    A square root of symmetric positive semi-definite matrices, which may be singular.

    :param matrix: shape ``(..., C, C)``.
    :return: ``R`` with ``R @ R.mT == matrix``, shape ``(..., C, C)``.
    """
    if matrix.shape[-1] == 1:
        return matrix.clamp(min=0).sqrt()
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def score(
    rule: FisherRule, d: Distribution, names: Sequence[str], value: Tensor, *, create_graph: bool = False
) -> Tensor:
    r"""
    The score :math:`\partial\log p(y\mid\phi)/\partial\phi`, elementwise over the batch.

    :param rule: the rule of ``d``.
    :param d: a distribution.
    :param names: parameters to differentiate in, in the order of :meth:`FisherRule.parameters`.
    :param value: observations, shape ``sample_shape + d.batch_shape + d.event_shape``.
    :param create_graph: whether the score can be differentiated again.
    :return: shape ``sample_shape + d.batch_shape + (C,)``.
    """
    sample_shape = value.shape[: value.dim() - len(d.batch_shape) - len(d.event_shape)]
    everything = rule.parameters(d)
    moved = {}
    with torch.enable_grad():
        for name in names:
            v = everything[name]
            v = v.expand(sample_shape + d.batch_shape + v.shape[-1:])
            moved[name] = v if create_graph and v.requires_grad else v.detach().requires_grad_(True)
        rebuilt = rule.build(d, moved)
        log_prob = rebuilt.log_prob(value).sum()
        scores = torch.autograd.grad(log_prob, list(moved.values()), create_graph=create_graph)
    return torch.cat(scores, -1)


#: Arguments that stand for the same thing as another one.
_ALTERNATIVES = {"logits": ("probs",), "scale_tril": ("covariance_matrix", "precision_matrix")}


class MonteCarloFisher(FisherRule):
    r"""
    Any distribution that can be rebuilt from its own tensor arguments, taken to unconstrained space:
    :math:`F \approx \frac1S \sum_s \nabla\log p(y_s)\nabla\log p(y_s)^\top` with :math:`y_s\sim p`.

    An unbiased approximation with relative error about :math:`\sqrt{2/S}`; the draws come from a fixed seed, so
    that the same distribution gives the same matrix.

    :param num_samples: the number S of draws.
    """

    def __init__(self, num_samples: int = 1024) -> None:
        self.num_samples = num_samples

    def _constraints(self, d: Distribution) -> dict[str, td.constraints.Constraint]:
        found = dict(d.arg_constraints)
        for chosen, others in _ALTERNATIVES.items():
            if chosen in found:
                found = {k: v for k, v in found.items() if k not in others}
        return {
            k: v for k, v in found.items() if isinstance(getattr(d, k, None), Tensor) and not v.is_discrete
        }

    @override
    def parameters(self, d: Distribution) -> dict[str, Tensor]:
        found = {}
        for name, constraint in self._constraints(d).items():
            value = td.biject_to(constraint).inv(getattr(d, name))
            event = value.dim() - len(d.batch_shape)
            if event < 0:
                value, event = value.expand(d.batch_shape), 0
            found[name] = value.flatten(len(d.batch_shape)) if event else value.unsqueeze(-1)
        return found

    @override
    def information(self, d: Distribution) -> Tensor:
        return self.block(d, list(self.parameters(d)))

    @override
    def block(self, d: Distribution, names: Sequence[str]) -> Tensor:
        create_graph = torch.is_grad_enabled()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            source = self.build(d, self.parameters(d))
            shape = torch.Size((self.num_samples,))
            value = draw(source, shape)
        scores = score(self, d, names, value, create_graph=create_graph)
        if create_graph and not reparametrised(source):
            # draws that do not move with the parameters count by their density ratio, 1 with a gradient
            log_prob = d.log_prob(value)
            scores = scores * (0.5 * (log_prob - log_prob.detach())).exp().unsqueeze(-1)
        return torch.einsum("s...i,s...j->...ij", scores, scores) / self.num_samples

    @override
    def sample(self, d: Distribution, num_samples: int) -> Tensor:
        with torch.no_grad():
            return draw(self.build(d, self.parameters(d)), torch.Size((num_samples,)))

    def complete(self, d: Distribution, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        :param d: a distribution of the family.
        :param parameters: some of its parameters, shapes ``sample_shape + d.batch_shape + (C_name,)``.
        :return: all of them; the others are those of ``d`` for every sample.
        """
        like = next(iter(parameters.values()), None)
        shape = d.batch_shape if like is None else like.shape[:-1]
        return {k: parameters.get(k, v.expand(shape + v.shape[-1:])) for k, v in self.parameters(d).items()}

    @override
    def build(self, d: Distribution, parameters: Mapping[str, Tensor]) -> Distribution:
        arguments = {}
        parameters = self.complete(d, parameters)
        for name, constraint in self._constraints(d).items():
            transform = td.biject_to(constraint)
            event = transform.inv(getattr(d, name)).shape[len(d.batch_shape) :]
            new = parameters[name]
            arguments[name] = transform(new.reshape(new.shape[:-1] + event) if event else new.squeeze(-1))
        derived = {"validate_args", *_ALTERNATIVES, *(k for others in _ALTERNATIVES.values() for k in others)}
        for name in (*d.arg_constraints, *inspect.signature(type(d)).parameters):
            if name not in arguments and name not in derived and hasattr(d, name):
                arguments[name] = getattr(d, name)
        return type(d)(**arguments)
