# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Hessian-free Laplace on a training run: first derivatives only, taken by the user's own loop.

Source: McInerney and Kallus (2024), for the perturbed runs; what their displacements and the gradients along them say together is
:class:`~pyro_bnn.infer.hfl.ritz.RayleighRitz`.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import Curvature, NotAMinimumError, check_option
from pyro_bnn.infer.hfl.result import HFLResult
from pyro_bnn.infer.hfl.ritz import RayleighRitz
from pyro_bnn.infer.hfl.training.functional import ModuleFunctional
from pyro_bnn.infer.hfl.training.result import result_of
from pyro_bnn.infer.hfl.training.run import GradientRun, PulledRun, TrainingRun
from pyro_bnn.infer.hfl.training.snapshot import Snapshot
from pyro_bnn.infer.hfl.training.weights import ModuleWeights
from pyro_bnn.ops.options import require_count

#: Which runs train: both sides of the point estimate, one side and a twin, or none.
Runs = Literal["central", "paired", "gradients"]
#: A generator of runs that returns something.
Stage = Generator[TrainingRun, None, Any]


class FirstOrder:
    r"""
    Laplace variances of functions of a network, by the training loop that trained it.

    Iterating yields runs. For each, the loop is to be run once, from the weights as they are then; hooks of the optimisers do the
    rest. Afterwards weights, buffers and optimisers are as they were, and :meth:`result` has the variances. With
    :math:`L = \text{scale}\cdot\text{loss}` the negative log joint density and :math:`\hat\theta` its minimum, where the weights are,

    .. math::

       \theta_j^\pm = \arg\min_\theta L(\theta) \mp \lambda_j g_j^\top\theta, \quad
       d_j = \frac{\theta_j^+ - \theta_j^-}{2\lambda_j}, \quad
       Pd = \frac{\nabla L(\hat\theta + hd) - \nabla L(\hat\theta - hd)}{2h} + O(h^2),

    and the variances are the best in the span of all d (:math:`g^\top D^\top(DPD^\top)^{-1}Dg`): lower bounds, whose error is the square
    of that of the displacements. Runs with ``run.is_training`` find :math:`\theta_j^\pm`; the others, one pass over the
    data each with weights that do not move, gradients.

    ===============  ==================================================================================
    ``method``       runs that train
    ===============  ==================================================================================
    ``"central"``    two for each functional, at :math:`\pm\lambda_j`
    ``"paired"``     one for each, and a twin at λ = 0 that sees the same batches
    ``"gradients"``  none: conjugate directions from passes alone
    ===============  ==================================================================================

    :param module: the network, as it is trained: plain, in ``DistributedDataParallel``, or after ``fully_shard``. Parameters that
        require no gradient are constants.
    :param functional: a function of the module that returns m numbers in a tensor of any shape, such as ``lambda net: net(x)``.
        It is called in evaluation mode; the processes of a group return the same.
    :param optimizers: those of the loop; or :meth:`attach` them, in a run.
    :param float scale: what the loss is to be multiplied by to be :math:`-\log p(\theta, D)`, on average over the steps of a
        pass: N where it is a mean over rows, with all of the prior over N added.
    :param str method: see the table.
    :param float epsilon: by how many posterior standard deviations weights move; default 1e-3 in float64 and 1e-2 in float32.
    :param int sweeps: at most how often directions of what is left over follow; each takes 2 m passes, or fewer.
    :param float tolerance: they end where two raise no variance by this share of it.
    :param str curvature: ``"ggn"`` says that the loss is convex in the weights that are trained, so that its Hessian is the GGN:
        a last layer, say. With it and ``prior_precision`` variances have upper bounds.
    :param prior_precision: of the weights' Gaussian prior, a number or one for each name of a parameter, in units of L;
        by default the weight decay of the optimisers times ``scale``, if it is positive.
    :param float proximal: δ of a term :math:`\frac\delta2|\theta-\hat\theta|^2` that is added to L; biases variances down.
    :param bool correct_gradient: subtract the gradient at the point estimate from that of L, so that runs stay.
    :raises ValueError: for weights in half precision, and options that are not positive.

    Example::

        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> x, y = torch.linspace(-1, 1, 20)[:, None], torch.linspace(-2, 2, 20)[:, None]
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, float((x * y).sum() / (x.square().sum() + 1)))  # the minimum
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=1 / 20)
        >>> def train(epochs):
        ...     for _ in range(epochs):
        ...         for a, b in DataLoader(TensorDataset(x, y), batch_size=5):
        ...             optimizer.zero_grad()
        ...             (0.5 * (net(a) - b).square().mean()).backward()  # noise of variance 1, prior N(0, 1)
        ...             optimizer.step()
        >>> from pyro_bnn.infer import hfl
        >>> runs = hfl.FirstOrder(net, lambda net: net(torch.ones(1, 1)), optimizer, scale=20)
        >>> for run in runs:
        ...     train(run.epochs(10))
        >>> bool((runs.result().variance * (1 + x.square().sum()) - 1).abs().max() < 1e-4)
        True
    """

    def __init__(
        self,
        module: torch.nn.Module,
        functional: Callable[[Any], Tensor],
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
        *,
        scale: float,
        method: Runs = "central",
        epsilon: float | None = None,
        sweeps: int = 4,
        tolerance: float = 0.01,
        curvature: Curvature = "hessian",
        prior_precision: float | dict[str, float] | None = None,
        proximal: float = 0.0,
        correct_gradient: bool = True,
    ) -> None:
        check_option("method", method, Runs)
        check_option("curvature", curvature, Curvature)
        require_count("sweeps", sweeps, least=0)
        self.weights = ModuleWeights(module)
        default = 1e-3 if self.weights.coarsest == torch.float64 else 1e-2
        self.epsilon = default if epsilon is None else epsilon
        for name, value in (("scale", scale), ("epsilon", self.epsilon), ("tolerance", tolerance)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive, not {value}")
        self.functional = ModuleFunctional(self.weights, functional)
        self.scale, self.method, self.sweeps, self.tolerance = float(scale), method, sweeps, tolerance
        if not (proximal >= 0 and math.isfinite(proximal)):
            raise ValueError(f"proximal must not be negative, and is {proximal}")
        self.curvature: Curvature = curvature
        self.prior_precision, self.proximal = prior_precision, proximal
        self.correct_gradient = correct_gradient
        self._optimizers: list[torch.optim.Optimizer] = []
        self._attached: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._handles: list[Any] = []
        self._run: TrainingRun | None = None
        self._snapshot: Snapshot | None = None
        self._number = 0
        self.passes = 0
        self.agreement: float | None = None
        self.precisions: list[float | None] = []
        self._result: HFLResult | None = None
        for optimizer in [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers:
            self.attach(optimizer)

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """
        Follows the steps of an optimiser, also of one that is made within a run.

        :return: the optimiser.
        """
        if optimizer in self._attached:
            return optimizer
        self._attached.add(optimizer)
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if self._run is None:
            self._optimizers.append(optimizer)
        elif self._snapshot is not None:
            self._snapshot.add(optimizer)
        return optimizer

    def __iter__(self) -> Iterator[TrainingRun]:
        self.restore()  # from runs that were left in the middle
        own = self._snapshot = Snapshot(self.weights, self._optimizers)
        self._result, self._number, self.passes = None, 0, 0
        try:
            yield from self._stages()
        finally:
            if self._snapshot is own:
                self.restore()

    def restore(self) -> None:
        """Puts everything back to where it was before the runs, as at their end; for loops that end in an error."""
        self._run = None
        if self._snapshot is not None:
            self._snapshot.restore(random_state=True)
            self._snapshot = None

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._attached.clear()

    def result(self) -> HFLResult:
        """
        The variances; rows of ``gradients``, ``displacements`` and ``factor`` are this process's part of them. Steps of
        runs that train are no part of the number of ``gradient_evaluations``.

        :raises RuntimeError: before all runs were made.
        """
        if self._result is None:
            raise RuntimeError(
                "there is no result yet: iterate over all runs first, as in 'for run in runs: train(...)'"
            )
        return self._result

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return None if self._run is None else self._run.before_step(optimizer, args, kwargs)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._run is not None:
            self._run.after_step(optimizer)

    def _stages(self) -> Iterator[TrainingRun]:
        """All runs, and the result."""
        ritz = RayleighRitz(self.functional.gradients(), self.weights.total)
        self.functional.require_no_steps(ritz.gradients, self._point)
        self._base: Tensor = yield from self._passes_at_the_point(ritz.gradients)
        rows = ritz.fresh(ritz.gradients)
        if len(rows):
            steps = yield from self._measure(ritz, rows)
            yield from self._compare(ritz, steps[0])
            self.functional.require_slopes(ritz.gradients, steps, self._point)
        if self.method != "gradients" and not ritz.has_settled(self.tolerance):
            yield from self._measure(ritz, ritz.fresh((yield from self._train(ritz))))
        for _ in range(self.sweeps):
            if ritz.has_settled(self.tolerance):
                break
            yield from self._measure(ritz, ritz.rest())
        self._result = yield from result_of(self, ritz, self._base, self._image)

    @property
    def _point(self) -> Tensor:
        assert self._snapshot is not None
        return self._snapshot.point

    def _loop(self, run: TrainingRun) -> Stage:
        """Lets the loop of the user run."""
        self._run = run
        yield run
        self._run = None

    def _begin(self, offset: Tensor | None = None, *, replay: bool = True) -> int:
        """Weights, buffers, optimisers and random numbers as at the start, and the number of the run."""
        assert self._snapshot is not None
        self._snapshot.restore(random_state=replay, offset=offset)
        self._number += 1
        return self._number

    def _gradient(self, offset: Tensor | None = None, *, replay: bool = True, watch: bool = False) -> Stage:
        """The gradient at the point estimate plus an offset, shape (p,), in double precision; and the run."""
        run = GradientRun(self._begin(offset, replay=replay), self.weights, watch=watch)
        self.passes += 1
        yield from self._loop(run)
        return run.finish(self.scale), run

    def _passes_at_the_point(self, G: Tensor) -> Stage:
        """The gradient there, twice, the second time with other random numbers, and what it says of the loss."""
        gradient, run = yield from self._gradient(watch=True)
        again, other = yield from self._gradient(replay=False)
        if not math.isfinite(float(self.weights.total(gradient.square().sum()))):
            raise ValueError("the gradient of the loss is not finite at the point estimate")
        if run.steps != other.steps:
            raise ValueError(
                f"two passes over the data took {run.steps} and {other.steps} steps: they are to take the same number"
            )
        difference = self.weights.total((gradient - again).square().sum())
        noise = math.sqrt(float(difference) / max(float(run.squared_size), 1e-300))
        if noise > 1e3 * torch.finfo(self.weights.coarsest).eps and not (
            yield from self._is_rounding(G, gradient, difference)
        ):
            raise ValueError(
                f"two passes over the data at the same weights have gradients that differ by {noise:.2g} of a step's: the loss is no "
                "function of the weights. Switch dropout and augmentation off, and let all batches have the same size, or their "
                "losses weights by size"
            )
        self.precisions = run.precisions(self.prior_precision, self.scale)
        parts = [self.weights.part(G.square().sum(0), i).sum() for i in range(len(self.weights.names))]
        moved = self.weights.total(torch.stack(parts)).tolist()
        for name, reached, part, precision in zip(
            self.weights.names, run.reached, moved, self.precisions, strict=True
        ):
            if not reached and part > 0 and not (precision or 0.0) + self.proximal > 0:
                raise ValueError(
                    f"the functional depends on parameter {name!r} and the loss does not: its variance is infinite"
                )
        return gradient

    def _is_rounding(self, G: Tensor, gradient: Tensor, difference: Tensor) -> Stage:
        """
        Whether a squared difference of gradients is none beside what a step changes: at the minimum a step of all data has a
        gradient of zero, and rows in another order round it otherwise.
        """
        direction = G.sum(0) if len(G) else torch.zeros_like(self._point)
        size = float(self.weights.total(direction.square().sum()))
        if not size > 0:
            return False
        moved, _ = yield from self._gradient(
            direction * (self.epsilon / math.sqrt(size * max(1.0, self.scale)))
        )
        change = self.weights.total((moved - gradient).square().sum())
        return float(difference) <= torch.finfo(self.weights.coarsest).eps * float(change)

    def _image(self, step: Tensor) -> Stage:
        """P times a step, shape (p,), by gradients on both sides of the point estimate."""
        plus, _ = yield from self._gradient(step)
        minus, _ = yield from self._gradient(-step)
        return (0.5 * (plus - minus)).to(step.dtype) + self.proximal * step

    def _compare(self, ritz: RayleighRitz, step: Tensor) -> Stage:
        """By how much the curvature along a step differs if a third of the step measures it: where gradients resolve it, little."""
        if not len(ritz.directions):
            raise ValueError(
                f"gradients along steps are antisymmetric by {ritz.noise:.2g} standard deviations, so that they are not those of one "
                "loss: they are clipped or normalised, or optimisers have other losses, batches or numbers of steps than others"
            )
        image = yield from self._image(step / 3)
        size = 3 * float(self.weights.total(step @ image))
        self.agreement = abs(size / float(ritz.total(step @ ritz.images.mT).square().sum()) - 1)

    def _measure(self, ritz: RayleighRitz, rows: Tensor) -> Stage:
        """Adds directions to the span; they are as long as it takes to move by ε standard deviations, and returned."""
        if not len(rows):
            return rows
        images = torch.empty_like(rows)
        first = ritz.quotient is None
        if first:
            ritz.quotient = max(1.0, self.scale)
        steps = ritz.steps(rows, self.epsilon)
        for j in range(len(steps)):
            moved = 1.0
            for _ in range(4):
                # a longer step than the loss is quadratic over says little
                steps[j] /= max(moved, 1e-2) if moved else 100.0
                images[j] = yield from self._image(steps[j])
                moved = math.sqrt(max(float(self.weights.total(steps[j] @ images[j])), 0.0)) / self.epsilon
                if 1 / 30 < moved < 30:
                    break
            if first and j == 0 and moved:
                ritz.quotient = (self.epsilon * moved) ** 2 / float(ritz.squares(steps[:1]))
                steps[1:] = ritz.steps(rows[1:], self.epsilon)
        ritz.add(steps, images)
        return steps

    def _train(self, ritz: RayleighRitz) -> Stage:
        """Displacements of the functionals by perturbed runs, which start from what is known already, shape (m, p)."""
        shifts = self.epsilon * ritz.variances.clamp(min=torch.finfo(ritz.gradients.dtype).tiny).rsqrt()
        correction = (
            self._base.to(ritz.gradients.dtype) if self.correct_gradient else torch.zeros_like(self._point)
        )
        twin: PulledRun | None = None

        def pulled(pull: Tensor, start: Tensor) -> Stage:
            nonlocal twin
            run = PulledRun(
                self._begin(), self.weights, scale=self.scale, at=self._point, pull=-pull - correction, start=start,
                proximal=self.proximal, twin=twin,
            )  # fmt: skip
            yield from self._loop(run)
            twin = twin or run
            return run.finish()

        zero = torch.zeros_like(self._point)
        other = (yield from pulled(zero, zero)) if self.method == "paired" else zero
        found = []
        for shift, g, d in zip(shifts, ritz.gradients, ritz.displacements, strict=True):
            plus = yield from pulled(shift * g, shift * d)
            if self.method == "central":
                other = yield from pulled(-shift * g, -shift * d)
            found.append((plus - other) / (2 * shift if self.method == "central" else shift))
        rows = torch.stack(found)
        if not bool(torch.isfinite(self.weights.total(rows.square().sum(-1))).all()):
            raise NotAMinimumError(
                "a perturbed run diverged: lower its learning rate; the point estimate may be no minimum"
            )
        return rows
