# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One step of training: the loss of a batch, its gradients over all processes, the new parameters."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_bnn.infer.mixture.elbo import Mixture_ELBO
from pyro_bnn.infer.train.optimizer import ScaleLatents
from pyro_bnn.model.data import Batch
from pyro_bnn.model.networks import unchanged_buffers
from pyro_bnn.ops.distributed import all_reduce_mean, broadcast, share_statistics, world_size
from pyro_bnn.ops.options import require_number
from pyro_bnn.ops.randomness import random_numbers_from, random_state, same_random_numbers
from pyro_bnn.ops.stochastic_lbfgs import StochasticLBFGS

#: Steps between two snapshots of the parameters in memory, the state to which a failed run goes back.
SNAPSHOT_EVERY = 50


@dataclass
class Tensors:
    """
    What training changes: parameters by name, and the buffers of the networks that hold them.

    The state to which a failed run goes back is that before the last finite loss, or up to 50 steps earlier.
    """

    parameters: dict[str, Tensor]
    networks: dict[str, nn.Module]
    good: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.trained = list(self.parameters.values())
        self.device = self.trained[0].device
        self.restart()

    def held(self) -> dict[str, Tensor]:
        """What else the modules hold: persistent buffers (running statistics), and parameters that are not trained."""
        trained = {id(p) for p in self.trained}
        return {
            name: value
            for prefix, name, value in self._states()
            if name not in self.parameters and (prefix in ("model", "guide") or id(value) not in trained)
        }

    def _states(self) -> Iterator[tuple[str, str, Tensor]]:
        for prefix, part in self.networks.items():
            for name, value in part.state_dict(keep_vars=True).items():
                if isinstance(value, Tensor):
                    yield prefix, f"{prefix}.{name}", value

    def statistics(self) -> list[Tensor]:
        """The buffers alone; a module may have put others in their place since the last step."""
        return [b for b in self.held().values() if not isinstance(b, nn.Parameter)]

    def all(self) -> dict[str, Tensor]:
        """Everything by name."""
        return self.parameters | self.held()

    def copies(self) -> list[Tensor]:
        """Copies of the parameters and the running statistics."""
        return [t.detach().clone() for t in (*self.trained, *self.statistics())]

    def restart(self) -> None:
        """Takes the present state for a good one."""
        self.good = self.candidate = self.copies()

    def propose(self) -> None:
        """Takes the present state for a good one if the next loss is finite."""
        self.candidate = self.copies()

    def confirm(self) -> None:
        """Says that the loss at the proposed state is finite."""
        self.good = self.candidate

    @torch.no_grad()
    def go_back(self) -> None:
        """Restores the last good state."""
        for tensor, value in zip([*self.trained, *self.statistics()], self.good, strict=True):
            tensor.copy_(value)

    def share(self) -> None:
        """Gives all processes the tensors of the first one."""
        broadcast(list(self.all().values()))


@dataclass
class GradientStep:
    """
    A step of :func:`~pyro_bnn.infer.fit`: what is checked is what trains.

    :param elbo: the bound.
    :param loss_fn: the bound as a function of the arguments of the model.
    :ivar before: the random numbers and the running statistics before the loss of the present step.
    :ivar is_function: whether two evaluations under the same random numbers have been seen to agree.
    """

    tensors: Tensors
    elbo: Any
    loss_fn: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    clip_grad_norm: float | None = None
    kl_scale: float | Callable[[int], float] | None = None
    autocast: torch.dtype | None = None
    before: tuple[dict[str, Any], list[Tensor]] = field(init=False, repr=False)
    is_function: bool = False

    def loss(self, batch: Batch, number: int) -> Tensor:
        """The loss of a batch after ``number`` steps."""
        args, kwargs = batch
        with ExitStack() as stack:
            if self.kl_scale is not None:
                scale = self.kl_scale(number) if callable(self.kl_scale) else self.kl_scale
                require_number(f"kl_scale at step {number}", scale, least=0)
                stack.enter_context(ScaleLatents(scale))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.tensors.device.type, dtype=self.autocast))
            return self.loss_fn(*args, **kwargs)

    def rehearse(self, batch: Batch, number: int, generators: Sequence[torch.Generator]) -> float:
        """The loss of a batch; random numbers, statistics and the bound's own count of steps stay where they were."""
        count = getattr(self.elbo, "step", None)
        with same_random_numbers(generators), unchanged_buffers():
            value = float(self.loss(batch, number).detach())
        if count is not None:
            self.elbo.step = count
        return value

    def evaluate(self, batch: Batch, number: int) -> tuple[Tensor, float]:
        """The loss of a batch with its graph, and its mean over processes."""
        if number % SNAPSHOT_EVERY == 0:
            self.tensors.propose()
        if isinstance(self.optimizer, StochasticLBFGS):
            self.before = random_state(()), [s.detach().clone() for s in self.tensors.statistics()]
        loss = self.loss(batch, number)
        shown = loss.detach().clone() if world_size() > 1 else loss.detach()
        all_reduce_mean([shown])
        return loss, float(shown)

    def descend(self, batch: Batch, number: int, loss: Tensor, value: float) -> None:
        """Takes a step down the finite loss of a batch, whose mean over processes is ``value``."""
        self.tensors.confirm()
        self.backward(loss)
        if isinstance(self.optimizer, StochasticLBFGS):
            self.search(self.optimizer, batch, number, value)
        else:
            self.optimizer.step()
        if world_size() > 1:
            share_statistics(self.tensors.statistics())
        if self.scheduler is not None:
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*((value,) if plateau else ()))

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss, averaged over processes and clipped."""
        trained = self.tensors.trained
        for p in trained:  # what zero_grad does, without the records for a profiler
            p.grad = None
        loss.backward()
        if world_size() > 1:
            for p in trained:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            all_reduce_mean([p.grad for p in trained if p.grad is not None])
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(trained, self.clip_grad_norm)

    def search(self, optimizer: StochasticLBFGS, batch: Batch, number: int, value: float) -> None:
        """
        Takes several iterations on the loss of a batch for the random numbers and statistics of its first evaluation, which
        has been made and is the one that counts. Points without a value are too far.
        """
        failures: list[Exception] = []
        random, before = self.before

        after = [s.detach().clone() for s in self.tensors.statistics()]

        def again() -> float:
            place = self.elbo.again() if isinstance(self.elbo, Mixture_ELBO) else nullcontext()
            self.set_statistics(before)
            with place, random_numbers_from(random), pyro.validation_enabled(False):
                try:
                    loss = self.loss(batch, number)
                except (ValueError, RuntimeError) as failure:  # such as a matrix that is singular out there
                    failures.append(failure)
                    loss = torch.stack([0 * p.sum() for p in self.tensors.trained]).sum() + math.inf
                shown = loss.detach().clone()
                all_reduce_mean([shown])
                self.backward(loss)
            self.set_statistics(after)
            return float(shown)

        if not self.is_function:
            self.check_function(again(), value, failures)
        known = iter([value])
        start = [p.detach().clone() for p in self.tensors.trained]
        optimizer.step(lambda: next(known, None) or again())
        if failures and all(map(torch.equal, start, self.tensors.trained)):
            failures[-1].add_note(
                "StochasticLBFGS: at a trial point of its line search, where no point was better."
            )
            raise failures[-1]

    @torch.no_grad()
    def set_statistics(self, values: Sequence[Tensor]) -> None:
        """Gives the running statistics these values."""
        for held, value in zip(self.tensors.statistics(), values, strict=True):
            held.copy_(value)

    def check_function(self, second: float, first: float, failures: Sequence[Exception]) -> None:
        """Refuses a loss that differs between two evaluations with the same parameters and random numbers."""
        if failures:
            raise failures[0]
        tolerance = 1e3 * max(torch.finfo(p.dtype).eps for p in self.tensors.trained)
        if not abs(second - first) <= tolerance * max(abs(first), 1.0):
            raise ValueError(
                f"StochasticLBFGS: two evaluations of the loss with the same parameters and random numbers gave {first:.8g} and "
                f"{second:.8g}. It needs a function: does the model draw from a generator of its own, or change a state that no "
                "buffer holds? Use Adam."
            )
        self.is_function = True
