# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One run of a training loop, seen through the hooks of its optimisers."""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.training.checks import (
    require_function,
    require_no_others,
    require_plain_gradients,
    require_unclipped,
    weight_decays,
)
from pyro_bnn.infer.hfl.training.weights import ModuleWeights, local

#: Iterate t of a run has weight t^7 or so in the average: the last eighth of the run makes most of it.
_POWER = 7


class TrainingRun:
    """
    What to run the training loop for; :class:`~pyro_bnn.infer.hfl.FirstOrder` yields them.

    :ivar int number: from 1.
    :ivar bool is_training: whether the weights move. In the other runs, one pass over the data each, steps leave the weights
        where they are, and only read the gradients.

    Example::

        >>> run = TrainingRun(1, None)
        >>> run.is_training, run.epochs(20)
        (False, 1)
    """

    is_training = False

    def __init__(self, number: int, weights: ModuleWeights | None) -> None:
        self.number = number
        self._weights: Any = weights
        self._steps: dict[int, int] = {}

    def epochs(self, number: int) -> int:
        """How many passes over the data to make: ``number`` where weights move, and else one."""
        return number if self.is_training else 1

    @property
    def steps(self) -> int:
        """Steps so far; of several optimisers, of the one with the most."""
        return max(self._steps.values(), default=0)

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """
        A hook before the step of an optimiser: gradients are there already, or the closure makes them. It is then replaced by
        one that ends with :meth:`_on_gradients`.
        """
        self._steps.setdefault(id(optimizer), 0)
        given = "closure" in kwargs
        closure = kwargs["closure"] if given else args[1] if len(args) > 1 else None
        if closure is None:
            self._on_gradients(optimizer)
            return None

        def watched() -> Any:
            loss = closure()
            self._on_gradients(optimizer)
            return self._value(loss)

        if given:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A hook after the step."""
        self._steps[id(optimizer)] += 1

    def _on_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        raise NotImplementedError

    def _value(self, loss: Any) -> Any:
        return loss

    def _index(self, optimizer: torch.optim.Optimizer) -> list[int]:
        """Which of the weights are an optimiser's, after a look at the first step."""
        if self._steps[id(optimizer)] == 0:
            require_function(self._weights.module)
            weight_decays(optimizer)
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        index = [i for i, p in enumerate(self._weights.parameters) if id(p) in own]
        require_no_others(optimizer, self._weights.parameters)
        require_plain_gradients(optimizer, [self._weights.parameters[i].grad for i in index])
        return index

    def _gradient(self, index: list[int], dtype: torch.dtype) -> Tensor:
        """Of the weights of an optimiser; zero elsewhere."""
        weights, own = self._weights, set(index)
        return weights.vector(
            [p.grad if i in own else None for i, p in enumerate(weights.parameters)], dtype=dtype
        )


class GradientRun(TrainingRun):
    """
    The gradient of the loss where the weights are: the mean over all steps.

    Before a step gradients are noted and set to ``None``, with which torch's optimisers leave weights and state alone.

    :param watch: whether to look for clipped gradients.
    """

    def __init__(self, number: int, weights: ModuleWeights, *, watch: bool = False) -> None:
        super().__init__(number, weights)
        self.at = weights.read()
        self.reached = [False] * len(weights.parameters)
        self._sum = torch.zeros_like(self.at, dtype=torch.float64)
        self._decay = [0.0] * len(weights.parameters)
        self._owner: list[int | None] = [None] * len(weights.parameters)
        self._watch = watch
        self._evaluations = 0
        self.squared_size: Tensor = torch.zeros((), dtype=torch.float64)
        self._first: dict[int, Tensor] = {}
        self._sizes: dict[int, list[Tensor]] = {}

    def _on_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        index, weights, key = self._index(optimizer), self._weights, id(optimizer)
        gradient = self._gradient(index, torch.float64)
        self._sum += gradient
        self._evaluations += 1
        if self._watch:
            first = self._first.setdefault(key, gradient)
            largest = gradient.abs().max() if len(gradient) else gradient.sum()  # a process may have nothing
            sizes = torch.stack([gradient @ gradient, gradient @ first, largest])
            self._sizes.setdefault(key, []).append(sizes)
        if self._steps[key] == 0:
            decays = weight_decays(optimizer)
            for i in index:
                self._owner[i], self._decay[i] = key, decays[id(weights.parameters[i])]
        for i in index:
            self.reached[i] |= weights.parameters[i].grad is not None
            weights.parameters[i].grad = None

    def finish(self, scale: float) -> Tensor:
        r"""
        The gradient, of shape ``(p,)``, in double precision.

        :raises ValueError: if steps moved weights, or were clipped, or some weights have no optimiser.
        """
        weights = self._weights
        if not self._steps:
            raise ValueError(
                "the optimisers took no step in this run: attach those of the loop, and run it for every run"
            )
        missing = [name for name, owner in zip(weights.names, self._owner, strict=True) if owner is None]
        if missing:
            raise ValueError(
                f"parameter {missing[0]!r} requires a gradient and is in no optimiser that was attached and took a step: attach "
                "all, or set requires_grad=False for what is fixed"
            )
        if self._evaluations != sum(self._steps.values()):
            raise ValueError(
                "an optimiser evaluates its closure several times in a step although gradients are None"
            )
        if not torch.equal(weights.read(), self.at):
            raise ValueError(
                "an optimiser moved weights whose gradients are None, or the loop sets weights itself, so that gradients at one "
                "point cannot be had: use one of torch.optim"
            )
        for key, rows in self._sizes.items():
            table = torch.stack(rows)
            squares = weights.total(table[:, :2])
            self.squared_size = self.squared_size + scale**2 * squares[:, 0].mean()
            if len(table) > 2:
                largest = table[:, 2] if not weights.is_sharded else squares[:, 0].sqrt()
                require_unclipped(squares[:, 0].sqrt(), largest, squares[:, 1], weights.dtype)
            del self._first[key]
        shares = [scale / self._steps[owner] for owner in self._owner if owner is not None]
        factors = torch.cat(
            [self._sum.new_full((n,), share) for n, share in zip(weights.sizes, shares, strict=True)]
        )
        decay = torch.cat(
            [self._sum.new_full((n,), w) for n, w in zip(weights.sizes, self._decay, strict=True)]
        )
        return factors * self._sum + scale * decay * self.at.double()

    def precisions(self, given: float | dict[str, float] | None, scale: float) -> list[float | None]:
        """
        The precision of the prior of each parameter; ``None`` where it is not known.

        :raises ValueError: for names that the module does not have, and precisions that are not positive.
        """
        names = self._weights.names
        known = dict.fromkeys(names, given) if not isinstance(given, dict) else given
        for name, value in known.items():
            if name not in names or not (value is None or (value > 0 and math.isfinite(value))):
                raise ValueError(
                    f"prior_precision {value} of {name!r}: expected positive numbers, for names of parameters that are trained"
                )
        decays = [scale * decay or None for decay in self._decay]
        return [known.get(name) or decay for name, decay in zip(names, decays, strict=True)]


class PulledRun(TrainingRun):
    r"""
    A run of the loss with a linear term, :math:`L(\theta) + b^\top(\theta - \hat\theta) + \frac\delta2|\theta - \hat\theta|^2`.

    :param scale: L over the loss of the loop.
    :param at: the point estimate, where the run starts, shape ``(p,)``.
    :param pull: b, shape ``(p,)``.
    :param start: where it goes on from after the first step, as an offset, shape ``(p,)``.
    :param twin: the run whose batches this one shall see, or ``None``.
    """

    is_training = True

    def __init__(
        self,
        number: int,
        weights: ModuleWeights,
        *,
        scale: float,
        at: Tensor,
        pull: Tensor,
        start: Tensor,
        proximal: float = 0.0,
        twin: "PulledRun | None" = None,
    ) -> None:
        super().__init__(number, weights)
        self.scale, self.at, self.pull, self.start, self.proximal = scale, at, pull, start, proximal
        self.average = torch.zeros_like(at)
        self.rates: list[float] = []
        self.first: dict[int, Tensor] = {}
        self._twin = twin
        self._evaluations = 0

    def _on_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        index, weights, order = self._index(optimizer), self._weights, self._order(optimizer)
        if order not in self.first:
            self.first[order] = self._gradient(index, weights.dtype)
            self._compare(order)
        self._evaluations += 1
        self.rates.extend(float(group["lr"]) for group in optimizer.param_groups)
        pull = self.pull
        if self.proximal:
            pull = pull + self.proximal * (weights.read() - self.at)
        weights.add_to_gradient(pull / self.scale, index)

    def _order(self, optimizer: torch.optim.Optimizer) -> int:
        return list(self._steps).index(id(optimizer))

    def _compare(self, order: int) -> None:
        """All runs start from the same weights, so that the first gradients are equal if the batches are."""
        if self._twin is None:
            return
        other = self._twin.first.get(order)
        if other is None:
            raise ValueError("a run uses more optimisers than the one before")
        both = self._weights.total(torch.stack([self.first[order] - other, other]).square().sum(-1))
        if float(both[0]) > 1e2 * torch.finfo(other.dtype).eps * float(both[1]):
            raise ValueError(
                f"the first gradients of two runs from the same weights differ by {float((both[0] / both[1]).sqrt()):.2g} of "
                "their size: the runs do not see the same batches, or the loss is random. Make the data loader, and generators "
                "of its own, anew within the loop"
            )

    def _value(self, loss: Any) -> Any:
        if loss is None:
            return None
        offset = self._weights.read() - self.at
        inner = self._weights.total(torch.stack([offset @ self.pull, offset @ offset]))
        return loss + float(inner[0] + 0.5 * self.proximal * inner[1]) / self.scale

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes the iterate, of which :meth:`finish` returns the average."""
        super().after_step(optimizer)
        weights, step = self._weights, self._steps[id(optimizer)]
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        index = [i for i, p in enumerate(weights.parameters) if id(p) in own]
        if step == 1 and self._evaluations == len(
            self._steps
        ):  # a line search would take the jump for a step
            for i in index:
                local(weights.parameters[i]).add_(weights.part(self.start, i))
        share = (_POWER + 1) / (step + _POWER)
        offset = weights.read() - self.at
        for i in index:
            here = slice(weights.starts[i], weights.starts[i] + weights.sizes[i])
            self.average[here] += share * (offset[here] - self.average[here])

    def finish(self) -> Tensor:
        """
        The averaged offset from the point estimate, shape ``(p,)``.

        :raises ValueError: if the run is not like its twin.
        """
        if not self._steps:
            raise ValueError(
                "the optimisers took no step in this run: attach those of the loop, and run it for every run"
            )
        twin = self._twin
        if twin is not None and list(twin._steps.values()) != list(self._steps.values()):
            raise ValueError(
                f"a run took {self.steps} steps and the one before {twin.steps}: runs that are compared take the same ones"
            )
        if twin is not None and twin.rates != self.rates and self._evaluations == twin._evaluations:
            raise ValueError(
                "learning rates differ between runs that are compared: make the scheduler anew within the loop"
            )
        return self.average
