# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""L-BFGS for losses with noise: several iterations on one draw of it, and a memory that outlives the draws."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_bnn.ops.options import require_count, require_number

#: Sufficient decrease and curvature of the weak Wolfe conditions.
_DECREASE, _CURVATURE = 1e-4, 0.9
#: Evaluations of one line search, and the least cosine between a step and its change of gradient that is remembered.
_TRIALS, _COSINE = 20, 1e-10


class StochasticLBFGS(Optimizer):
    r"""
    L-BFGS for losses that are averages over random draws: of latent variables, of minibatches, of both.

    A step takes ``max_iter`` iterations on the loss of **one** draw of the noise, a function like any other, with a line
    search for the weak Wolfe conditions; the next step draws anew. Pairs of curvature compare gradients of the same draw
    only [1], and stay in memory over all draws, so that the steps together learn the curvature of the expectation.

    The parameters adapt to the draw of the last step, scales above all, so that a draw must be an average over many:
    noise per example with pairs, ``AutoMixture(model, noise="per_example")`` and ``Mixture_ELBO(num_particles=2,
    antithetic=True)``, or a hundred particles where the noise is shared. :func:`~pyro_bnn.infer.fit` refuses fewer than
    50 independent draws per component.

    :func:`~pyro_bnn.infer.fit` evaluates every loss of a step with the same random numbers. In a loop of one's own the
    closure must do so::

        def closure():
            optimizer.zero_grad()
            torch.manual_seed(step)
            loss = elbo(model, guide)(*data)
            loss.backward()
            return loss

    **When**: whole data or large batches, up to some ten thousand parameters, losses whose curvature differs by orders of
    magnitude between directions (small noise), float64. **Not** for minibatches much smaller than the number of parameters,
    nor for dropout. It keeps ``2 history_size`` vectors.

    :param params: parameters, one group.
    :param float lr: the first length that the line search tries, in quasi-Newton steps.
    :param int max_iter: iterations per step.
    :param int history_size: pairs in memory.
    :raises ValueError: for several groups, and for parameters of several types.

    **References**

    [1] Berahas, Nocedal and Takáč, *A multi-batch L-BFGS method for machine learning*, NeurIPS 2016; Schraudolph, Yu and
    Günter, *A stochastic quasi-Newton method for online convex optimization*, AISTATS 2007 (the same for step and
    batch).

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_bnn.infer import Mixture_ELBO, fit
        >>> from pyro_bnn.infer.autoguide import AutoMixture
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("obs", dist.Normal(z, torch.tensor([1.0, 1e-3])).to_event(1), obs=y)
        >>> guide = AutoMixture(model, 1)
        >>> elbo, y = Mixture_ELBO(num_particles=100, antithetic=True), torch.tensor([3.0, -2.0])
        >>> run = fit(model, guide, y, num_steps=30, optim=StochasticLBFGS, elbo=elbo, progress_bar=False)
        >>> [round(v, 2) for v in guide.median()["z"].tolist()]
        [1.5, -2.0]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1.0,
        *,
        max_iter: int = 10,
        history_size: int = 100,
    ) -> None:
        require_number("lr", lr, above=0)
        require_count("max_iter", max_iter)
        require_count("history_size", history_size)
        super().__init__(params, {"lr": lr, "max_iter": max_iter, "history_size": history_size})
        self.state[self._params[0]] |= {"steps": [], "changes": []}

    @property
    def _params(self) -> list[Tensor]:
        found: list[Tensor] = self.param_groups[0]["params"]
        return found

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """
        Takes the one group of parameters.

        :raises ValueError: for a second one, and for parameters of several or of complex types.
        """
        if self.param_groups:
            raise ValueError(
                "StochasticLBFGS: found 2 groups of parameters; pass one, since all share the curvature."
            )
        super().add_param_group(param_group)
        kinds = {p.dtype for p in self._params}
        if len(kinds) > 1 or any(kind.is_complex for kind in kinds):
            raise ValueError(
                f"StochasticLBFGS: the parameters have the types {sorted(map(str, kinds))}; it needs one real type, since all "
                "are one vector. Convert model and guide by .float() or .double()."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """
        Takes ``max_iter`` iterations, fewer where none improves the loss any more.

        :param closure: evaluates the loss of one draw of the noise and its gradients, and returns the loss.
        :return: the loss before the step.
        """
        if closure is None:
            raise ValueError(
                "StochasticLBFGS.step needs a closure that evaluates the loss, see its documentation."
            )
        evaluate = torch.enable_grad()(lambda: torch.as_tensor(closure()).detach())
        settings, memory = self.param_groups[0], self.state[self._params[0]]
        first = evaluate()
        start = point = self._point()
        value, gradient = float(first), self._gradient()
        if not (math.isfinite(value) and gradient.isfinite().all()):
            raise FloatingPointError(
                f"StochasticLBFGS: the loss is {value}, and it or its gradient is not finite."
            )
        try:
            for _ in range(settings["max_iter"]):
                found = self._search(evaluate, point, value, gradient)
                if found is None and memory["steps"]:  # the memory may be what misleads
                    self._forget()
                    found = self._search(evaluate, point, value, gradient)
                if found is None:
                    break
                new_point, value, new_gradient = found
                step, change = new_point - point, new_gradient - gradient
                if step.dot(change) > _COSINE * step.norm() * change.norm():
                    memory["steps"].append(step)
                    memory["changes"].append(change)
                while len(memory["steps"]) > settings["history_size"]:
                    del memory["steps"][0], memory["changes"][0]
                point, gradient = new_point, new_gradient
        except BaseException:
            self._put(start)
            raise
        self._put(point)  # not where the last trial was
        return first

    def _forget(self) -> None:
        """Empties the memory."""
        memory = self.state[self._params[0]]
        memory["steps"].clear()
        memory["changes"].clear()

    def _search(
        self, evaluate: Callable[[], Any], point: Tensor, value: float, gradient: Tensor
    ) -> tuple[Tensor, float, Tensor] | None:
        """
        A point, its value and gradient that meet the weak Wolfe conditions along the quasi-Newton direction, by bisection;
        the last that was better if none does; nothing if none is better, or none can be seen to be under a direction of the
        memory, whose length is known.
        """
        direction = self._direction(gradient)
        slope = float(gradient.dot(direction))
        known = bool(self.state[self._params[0]]["steps"])
        if not slope < 0 or (known and -slope <= torch.finfo(point.dtype).eps * abs(value)):
            return None
        length, low, high, best = self.param_groups[0]["lr"], 0.0, math.inf, None
        for _ in range(_TRIALS):
            trial = point + length * direction
            self._put(trial)
            found = float(evaluate())
            here = self._gradient()
            decreases = math.isfinite(found) and found <= value + _DECREASE * length * slope
            if not (decreases and found < value and here.isfinite().all()):
                high = length
            else:
                best = trial, found, here
                if float(here.dot(direction)) >= _CURVATURE * slope:
                    break
                low = length
            length = 0.5 * (low + high) if math.isfinite(high) else 2 * length
        return best

    def _direction(self, gradient: Tensor) -> Tensor:
        """Minus the image of a gradient under the inverse curvature in memory, by the two loops of L-BFGS."""
        memory = self.state[self._params[0]]
        pairs = list(zip(memory["steps"], memory["changes"], strict=True))
        direction = -gradient
        if not pairs:  # a first step that changes the parameters by one in all
            return self._trained(direction / direction.abs().sum().clamp(min=1.0))
        weights = []
        for step, change in reversed(pairs):
            weight = step.dot(direction) / step.dot(change)
            direction.sub_(weight * change)
            weights.append(weight)
        step, change = pairs[-1]
        direction.mul_(step.dot(change) / change.dot(change))
        for (step, change), weight in zip(pairs, reversed(weights), strict=True):
            direction.add_((weight - change.dot(direction) / step.dot(change)) * step)
        return self._trained(direction)

    def _trained(self, direction: Tensor) -> Tensor:
        """A direction that leaves parameters as they are that were frozen meanwhile."""
        for p, part in zip(self._params, self._parts(direction), strict=True):
            if not p.requires_grad:
                part.zero_()
        return direction

    def _parts(self, vector: Tensor) -> tuple[Tensor, ...]:
        return vector.split([p.numel() for p in self._params])

    def _point(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self._params])

    def _gradient(self) -> Tensor:
        found = (
            torch.zeros_like(p) if p.grad is None or not p.requires_grad else p.grad for p in self._params
        )
        return torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in found])

    def _put(self, point: Tensor) -> None:
        for p, part in zip(self._params, self._parts(point), strict=True):
            p.copy_(part.view_as(p))
