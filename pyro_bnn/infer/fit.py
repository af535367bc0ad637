# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One training loop for any model, guide and bound."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from types import FrameType
from typing import Any, cast

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm.auto import tqdm

from pyro_bnn.infer.data import Batch, as_batch, check_finite, is_single_batch, iter_batches
from pyro_bnn.infer.initialize import initialize_guide
from pyro_bnn.infer.parameters import local_parameters, named_parameters

#: Steps between two snapshots of the parameters in memory, the state to which a failed run goes back.
SNAPSHOT_EVERY = 50


@dataclass
class FitResult:
    """
    What a run of :func:`fit` leaves behind.

    :param losses: the loss of every step (negative ELBO, summed over the data), shape ``(num_steps,)``.
    :param num_steps: the number of optimisation steps, those before a resumption included.
    :param stop_reason: ``"num_steps"``, ``"num_epochs"``, ``"callback"``, ``"interrupted"``, or the text of
        an error.
    :param wall_time: seconds, those before a resumption included.
    """

    losses: Tensor
    num_steps: int
    stop_reason: str
    wall_time: float


class NonFiniteLossError(ArithmeticError):
    """
    The loss became NaN or infinite; the parameters are back in their last good state.

    :param str message: names the step, the site or argument, and what to do.
    :param FitResult result: the run until then.
    """

    def __init__(self, message: str, result: FitResult) -> None:
        super().__init__(message)
        self.result = result


@dataclass
class FitState:
    """
    What a callback of :func:`fit` sees after each step.

    :param step: the number of steps taken.
    :param epoch: the number of the current pass over the data, from 0.
    :param loss: the loss of this step.
    :param losses: all losses so far.
    :param model: the model.
    :param guide: the guide.
    :param elbo: the bound.
    :param optimizer: the torch optimiser.
    """

    step: int
    epoch: int
    loss: float
    losses: list[float]
    model: Callable[..., Any]
    guide: Callable[..., Any]
    elbo: Any
    optimizer: torch.optim.Optimizer
    parameters: dict[str, Tensor] = field(repr=False)


#: Called after every step; a true return value stops the run.
Callback = Callable[[FitState], bool | None]


def make_optimizer(optim: Any, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """
    One torch optimiser over all parameters.

    :param optim: ``None`` (Adam with learning rate 0.005), a learning rate for Adam, a callable that takes the
        parameters and returns an optimiser (``functools.partial(torch.optim.AdamW, lr=1e-3)``), a
        :class:`pyro.optim.PyroOptim` with fixed arguments, or a :class:`torch.optim.Optimizer`.
    :param params: the parameters.
    :return: the optimiser.
    :raises ValueError: if an optimiser object leaves parameters out.

    Example::

        >>> make_optimizer(0.1, [torch.zeros(2, requires_grad=True)]).param_groups[0]["lr"]
        0.1
    """
    if optim is None:
        optim = 5e-3
    if isinstance(optim, (int, float)):
        # the fused kernel is one call for all parameters; it exists for floating-point tensors only
        fused = all(p.device.type in ("cpu", "cuda") for p in params) and all(
            p.is_floating_point() for p in params
        )
        return torch.optim.Adam(params, lr=float(optim), fused=fused or None)
    if isinstance(optim, torch.optim.Optimizer):
        held = {id(p) for group in optim.param_groups for p in group["params"]}
        left_out = sum(id(p) not in held for p in params)
        if left_out:
            raise ValueError(
                f"optim holds {len(held)} parameters and leaves out {left_out} of model and guide. Call "
                "guide.initialize on a batch before making the optimiser, or pass a callable such as "
                "functools.partial(torch.optim.Adam, lr=1e-3)."
            )
        return optim
    if isinstance(optim, PyroOptim):
        if callable(optim.pt_optim_args):
            raise ValueError("optim: a PyroOptim with per-parameter arguments has no single torch optimiser.")
        build: Any = optim.pt_optim_constructor
        return cast(torch.optim.Optimizer, build(params, **optim.pt_optim_args))
    if not callable(optim):
        raise TypeError(f"optim must be a number, a callable or an optimiser, not {type(optim).__name__}.")
    return cast(Callable[..., torch.optim.Optimizer], optim)(params)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """
    Turns the first Ctrl-C into a flag, so that a step is never cut in half; the second one interrupts.

    :return: a context manager that yields a function telling whether Ctrl-C was pressed.
    """
    pressed = False

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    old = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, old)


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    num_epochs: int | None = None,
    num_steps: int | None = None,
    optim: Any = None,
    elbo: Any = None,
    callbacks: Callback | Iterable[Callback] = (),
    progress_bar: bool = True,
) -> FitResult:
    r"""
    Fits a guide (and the parameters of the model) by stochastic optimisation of a bound.

    The loop runs ``elbo(model, guide)`` with one torch optimiser over all parameters. Pyro's validation is on
    for the first step and off afterwards. Parameters live in the modules (as under ``module_local_params``), so a run
    does not start from the values of an earlier model. The guide is initialised from the first batch, which
    must hold the observations; one that is initialised already continues from where it is.

    :param callable model: a Pyro model.
    :param callable guide: a guide: one of this project, a Pyro autoguide, or a function.
    :param data: one batch (a tensor, a tuple of positional arguments, a mapping of keyword arguments), used in
        full by every step, or an iterable of batches such as a :class:`~torch.utils.data.DataLoader`.
    :param int num_epochs: passes over the data.
    :param int num_steps: optimisation steps. Exactly one of the two must be given.
    :param optim: see :func:`make_optimizer`; Adam with learning rate 0.005 by default.
    :param elbo: a Pyro bound; :class:`~pyro.infer.Trace_ELBO` by default.
    :param callbacks: functions of a :class:`FitState`, called after each step; a true value stops the run.
    :param bool progress_bar: whether to show a bar with the loss and the rate.
    :return: the losses, the number of steps, why the run stopped, and its time.
    :raises NonFiniteLossError: if the loss is NaN or infinite. The message names the step and the site, and
        the parameters are those of the last good state.
    :raises ValueError: if the data do not fit the model; see
        :func:`~pyro_bnn.infer.initialize.initialize_guide`.

    The first Ctrl-C ends the run after the current step with ``stop_reason="interrupted"``; the second raises.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.linspace(-1, 1, 20)
        >>> guide = AutoNormal(model)
        >>> result = fit(model, guide, (x, 2 * x), num_steps=500, optim=0.05, progress_bar=False)
        >>> result.num_steps, result.stop_reason, bool((guide.median()["w"] - 2).abs() < 0.1)
        (500, 'num_steps', True)
    """
    if (num_epochs is None) == (num_steps is None):
        raise ValueError("fit: pass exactly one of num_epochs and num_steps.")
    limit = num_steps if num_steps is not None else num_epochs
    if limit is not None and limit < 1:
        raise ValueError(f"fit: num_epochs or num_steps must be at least 1, not {limit}.")
    callbacks = [callbacks] if callable(callbacks) else list(callbacks)
    return _Run(model, guide, data, optim, Trace_ELBO() if elbo is None else elbo).run(
        num_epochs, num_steps, callbacks, progress_bar
    )


class _Run:
    """The state of one run of :func:`fit`."""

    def __init__(self, model: Any, guide: Any, data: Any, optim: Any, elbo: Any) -> None:
        self.model, self.guide, self.elbo = model, guide, elbo
        self.step = self.epoch = 0
        self.losses: list[float] = []
        self.elapsed = 0.0
        first, self.epochs = _first_batch(data)
        with local_parameters():
            initialize_guide(model, guide, first)
            self.parameters = named_parameters(model, guide, *first)
        if not self.parameters:
            raise ValueError("fit: neither the model nor the guide has a trainable parameter.")
        self.tensors = list(self.parameters.values())
        self.optimizer = make_optimizer(optim, self.tensors)
        self.loss_fn = elbo(model, guide)
        self.snapshot = self.candidate = self.copy_parameters()

    def copy_parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.tensors]

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.tensors, self.snapshot)

    def result(self, stop_reason: str) -> FitResult:
        return FitResult(torch.tensor(self.losses, dtype=torch.float64), self.step, stop_reason, self.elapsed)

    def run(
        self, num_epochs: int | None, num_steps: int | None, callbacks: list[Callback], progress_bar: bool
    ) -> FitResult:
        start = time.perf_counter() - self.elapsed
        bar = tqdm(total=num_steps, disable=not progress_bar, desc="fit", unit="step", dynamic_ncols=True)
        with ExitStack() as stack:
            stack.enter_context(bar)
            stack.enter_context(local_parameters())
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Encountered NaN")  # reported with the site below
            interrupted = stack.enter_context(deferred_interrupt())
            validation = stack.enter_context(ExitStack())
            validation.enter_context(pyro.validation_enabled(True))
            shown = 0.0
            stop_reason = ""
            while not stop_reason:
                for batch in self.epochs():
                    loss = self.take_step(batch)
                    if self.step == 1:
                        validation.enter_context(pyro.validation_enabled(False))
                    now = time.perf_counter()
                    self.elapsed = now - start
                    if now - shown > 0.2:
                        bar.n = self.step
                        bar.set_postfix(loss=f"{loss:.4g}", epoch=self.epoch)
                        shown = now
                    state = FitState(
                        self.step, self.epoch, loss, self.losses, self.model, self.guide, self.elbo,
                        self.optimizer, self.parameters,
                    )  # fmt: skip
                    if sum(bool(callback(state)) for callback in callbacks):  # every callback runs
                        stop_reason = "callback"
                    elif interrupted():
                        stop_reason = "interrupted"
                    elif num_steps is not None and self.step >= num_steps:
                        stop_reason = "num_steps"
                    if stop_reason:
                        break
                else:
                    self.epoch += 1
                    if num_epochs is not None and self.epoch >= num_epochs:
                        stop_reason = "num_epochs"
            bar.n = self.step
            bar.set_postfix(loss=f"{self.losses[-1]:.4g}", epoch=self.epoch)
        return self.result(stop_reason)

    def take_step(self, batch: Batch) -> float:
        args, kwargs = batch
        if self.step % SNAPSHOT_EVERY == 0:
            self.candidate = self.copy_parameters()
        rng_state = torch.get_rng_state()
        cause: Exception | None = None
        try:
            loss = self.loss_fn(*args, **kwargs)
            value = float(loss.detach())
        except (ValueError, RuntimeError) as error:
            if all(bool(torch.isfinite(p).all()) for p in self.tensors):
                error.add_note(f"fit stopped at step {self.step + 1}.")
                raise
            value, cause = math.nan, error
        if not math.isfinite(value):
            reason = self.explain(batch, rng_state, value)
            self.restore()
            raise NonFiniteLossError(reason, self.result(reason)) from cause
        self.snapshot = self.candidate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.losses.append(value)
        return value

    def explain(self, batch: Batch, rng_state: Tensor, value: float) -> str:
        """Names what is not finite: an argument, parameters, or the sites whose density is not."""
        head = f"fit: the loss is {value} at step {self.step + 1}"
        tail = (
            "The parameters are back in their last good state. A smaller learning rate, gradient clipping or "
            "scaled inputs usually help."
        )
        try:
            check_finite(batch)
        except ValueError as error:
            return f"{head}: {error}"
        args, kwargs = batch
        bad_parameters = [n for n, p in self.parameters.items() if not bool(torch.isfinite(p).all())]
        causes = [f"parameters {bad_parameters} are not finite"] if bad_parameters else []
        torch.set_rng_state(rng_state)
        sites: list[str] = []
        try:
            with poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
                guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
                model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(
                    *args, **kwargs
                )
                for trace in (guide_trace, model_trace):
                    trace.compute_log_prob()
                    sites += [
                        name
                        for name, site in trace.nodes.items()
                        if site["type"] == "sample"
                        and name not in sites
                        and not (_finite(site["value"]) and _finite(site["log_prob"]))
                    ]
        except (ValueError, RuntimeError) as error:
            causes.append(f"running model and guide again fails with {error}")
        if sites:
            causes.append(f"site {sites[0]!r} has a value or log density that is not finite")
            if sites[1:]:
                causes.append(f"so have {sites[1:]}")
        return f"{head}: {'; '.join(causes) or 'no single site shows it'}. {tail}"


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def _first_batch(data: Any) -> tuple[Batch, Callable[[], Iterator[Batch]]]:
    """The first batch, and a function that starts a pass over the data (the first included)."""
    if is_single_batch(data):
        batch = as_batch(data)
        return batch, lambda: iter((batch,))
    if (
        iter(data) is data
    ):  # a stream that cannot be started again: give its first batch back to the first pass
        stream = iter_batches(data)
        head = [next(stream)]

        def one_pass() -> Iterator[Batch]:
            rest = chain(head[:], stream) if head else iter_batches(())
            head.clear()
            return rest

        return head[0], one_pass
    with torch.random.fork_rng(devices=[]):
        batch = next(iter_batches(data))
    return batch, lambda: iter_batches(data)
