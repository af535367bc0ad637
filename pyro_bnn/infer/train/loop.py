# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One training loop for any model, guide and bound."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from os import PathLike
from typing import Any, NoReturn

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_bnn.infer.initialize import initialize_guide
from pyro_bnn.infer.mixture.elbo import default_elbo
from pyro_bnn.infer.train.checkpoint import Checkpoint, as_checkpoint, resume, save_run
from pyro_bnn.infer.train.failures import (
    check_autocast,
    check_batch,
    check_draws,
    check_scale,
    explain,
    is_finite,
    note_step,
)
from pyro_bnn.infer.train.optimizer import make_optimizer, make_scheduler
from pyro_bnn.infer.train.progress import shows_bars
from pyro_bnn.infer.train.state import Callback, FitResult, FitState, NonFiniteLossError, deferred_interrupt
from pyro_bnn.infer.train.step import GradientStep, Tensors
from pyro_bnn.model.data import Batch, as_batches, coincidences
from pyro_bnn.model.local_latents import check_local_latents
from pyro_bnn.model.networks import named_networks, unchanged_buffers
from pyro_bnn.model.parameters import local_parameters, named_parameters
from pyro_bnn.ops.distributed import any_process, rank, share_random_state, world_size
from pyro_bnn.ops.notice import logger
from pyro_bnn.ops.options import require_count, require_number
from pyro_bnn.ops.randomness import (
    loader_generators,
    random_state,
    same_random_numbers,
    set_random_state,
)
from pyro_bnn.ops.stochastic_lbfgs import StochasticLBFGS

#: Seconds between two lines of the log where no bar is shown.
NOTE_EVERY = 30.0


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    num_epochs: int | None = None,
    num_steps: int | None = None,
    optim: Any = None,
    elbo: Any = None,
    scheduler: Any = None,
    clip_grad_norm: float | None = None,
    kl_scale: float | Callable[[int], float] | None = None,
    autocast: torch.dtype | None = None,
    callbacks: Callback | Iterable[Callback] = (),
    progress_bar: bool = True,
    checkpoint: Checkpoint | str | PathLike[str] | None = None,
) -> FitResult:
    r"""
    Fits a guide (and the parameters of the model) by stochastic optimisation of a bound.

    The loop runs ``elbo(model, guide)`` with one torch optimiser over all parameters. Pyro's validation is on
    for the first step and off afterwards. Parameters live in the modules (as under ``module_local_params``), so a
    run does not start from the values of an earlier model. The guide is initialised from the first batch, which
    must hold the observations; one that is initialised already continues from where it is.

    :param callable model: a Pyro model.
    :param callable guide: a guide: one of this project, a Pyro autoguide, or a function.
    :param data: one batch (a tensor, a tuple of positional arguments, a mapping of keyword arguments), used in
        full by every step, or an iterable of batches such as a :class:`~torch.utils.data.DataLoader`.
    :param int num_epochs: passes over the data.
    :param int num_steps: optimisation steps. Exactly one of the two must be given.
    :param optim: see :func:`~pyro_bnn.infer.train.optimizer.make_optimizer`; Adam with learning rate 0.005 by default.
        :class:`~pyro_bnn.infer.StochasticLBFGS` takes several iterations per step, on one draw of the noise.
    :param elbo: a Pyro bound; by default :class:`~pyro_bnn.infer.Mixture_ELBO` for mixtures and
        :class:`~pyro.infer.Trace_ELBO` for all other guides.
    :param scheduler: a function of the optimiser returning a torch scheduler, which takes one step after each
        step of the optimiser; e.g. ``lambda o: CosineAnnealingLR(o, num_steps)``. A scheduler with ``step(loss)``
        (:class:`~torch.optim.lr_scheduler.ReduceLROnPlateau`) is given the loss. A scheduler object will do if ``optim``
        is the optimiser that it holds.
    :param float clip_grad_norm: upper limit of the total gradient norm.
    :param kl_scale: a factor of the KL divergence, or a function of the number of steps taken, for annealing; it
        works with any bound. :class:`~pyro_bnn.infer.Mixture_ELBO` has its own, which also reports the parts.
    :param autocast: ``torch.bfloat16`` for matrix products, by :class:`torch.autocast`; parameters (float32) and
        densities keep their precision. The first step compares the loss with full precision. ``torch.float16`` is
        refused: its gradients underflow.
    :param callbacks: functions of a :class:`FitState`, called after each step; a true value stops the run. See
        :class:`~pyro_bnn.infer.EarlyStopping` and :class:`~pyro_bnn.infer.ConvergenceTest`.
    :param bool progress_bar: whether to show a bar with the loss, its parts where the bound reports them, and
        the rate; only terminals and notebooks show it. Elsewhere the logger ``pyro_bnn`` has a line every 30 seconds, at
        level ``INFO``.
    :param checkpoint: a :class:`~pyro_bnn.infer.Checkpoint`, or a path, which is saved every minute. If the file
        exists, the run continues from it, and takes the same steps that the run would have taken without the
        interruption, bit by bit on one device. This is logged once. Settings (learning rate, bound, prior, ...) that
        are not those of the interrupted run are said in a warning and count from then on, except those that a scheduler
        governs, which continues; another optimiser or scheduler is refused.
    :return: the losses, the number of steps, why the run stopped, and its time.
    :raises NonFiniteLossError: if the loss is NaN or infinite. The message names the step and the site, and
        the parameters are those of the last good state.
    :raises ValueError: if the data do not fit the model; see
        :func:`~pyro_bnn.infer.initialize.initialize_guide`.

    In several processes (``torchrun``, :mod:`torch.distributed` initialised) training is data-parallel: gradients are
    averaged over the processes, each of which passes its own part of the data. Running statistics (batch normalisation)
    are averaged after each step; the variances leave out how the processes' means differ.

    The first Ctrl-C ends the run after the current step with ``stop_reason="interrupted"`` and saves a checkpoint;
    the second raises. An error in a callback, the model or the loader raises with a note of the step; the parameters are
    those of that step, and the last checkpoint is as it was.

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
    require_count(*("num_epochs", num_epochs) if num_steps is None else ("num_steps", num_steps))
    if clip_grad_norm is not None:  # a negative norm turns gradients round
        require_number("clip_grad_norm", clip_grad_norm, above=0)
    if kl_scale is not None and not callable(kl_scale):
        require_number("kl_scale", kl_scale, least=0)
    run = Run(model, guide, data, default_elbo(guide) if elbo is None else elbo)
    step = run.prepare(optim, scheduler)
    step.clip_grad_norm, step.kl_scale, step.autocast = clip_grad_norm, kl_scale, autocast
    if isinstance(step.optimizer, StochasticLBFGS):
        if clip_grad_norm is not None:
            raise ValueError(
                "clip_grad_norm: StochasticLBFGS measures curvature by gradients, which clipping would falsify. Leave it out."
            )
        check_draws(guide, run.elbo, run.batches.first)
    run.callbacks = [callbacks] if callable(callbacks) else list(callbacks)
    run.checkpoint = as_checkpoint(checkpoint)
    run.num_epochs, run.num_steps = num_epochs, num_steps
    if run.checkpoint is not None:
        resume(run, run.checkpoint)
    return run.train(progress_bar)


class Run:
    """One run of :func:`fit`: where it is, and what it needs to go on."""

    descent: GradientStep
    callbacks: list[Callback]
    checkpoint: Checkpoint | None = None
    settings: dict[str, Any]
    num_epochs: int | None = None
    num_steps: int | None = None

    def __init__(self, model: Any, guide: Any, data: Any, elbo: Any) -> None:
        self.model, self.guide, self.elbo = model, guide, elbo
        self.step = self.epoch = self.batches_done = 0
        self.losses: list[float] = []
        self.elapsed = 0.0
        self.stop_reason = ""
        self.callbacks = []
        self.generators = loader_generators(data)
        self.batches = as_batches(data)
        self.sampler: Any = getattr(data, "sampler", None)
        self.resume_random: dict[str, Any] | None = None
        with same_random_numbers(
            self.generators
        ):  # looking at the first batch leaves the shuffling as it was
            first = self.batches.first
        with local_parameters(), unchanged_buffers() as called:
            initialize_guide(model, guide, first)
            parameters = named_parameters(model, guide, *first)
            check_local_latents(model, guide, self.first_batches)
        self.checked: set[Any] | None = {coincidences(first)}
        if not parameters:
            raise ValueError("fit: neither the model nor the guide has a trainable parameter.")
        self.tensors = Tensors(parameters, named_networks(model, guide, called))
        if world_size() > 1:
            check_scale(model, first)
            self.tensors.share()
            share_random_state()

    def prepare(self, optim: Any, scheduler: Any = None) -> GradientStep:
        """The step of the run, by an optimiser and perhaps a scheduler."""
        loss_fn, optimizer = self.elbo(self.model, self.guide), make_optimizer(optim, self.tensors.trained)
        self.descent = GradientStep(self.tensors, self.elbo, loss_fn, optimizer)
        self.descent.scheduler = make_scheduler(scheduler, optimizer)
        return self.descent

    def first_batches(self) -> list[Batch]:
        """The first batch, and the second one if there is one and it can be read again."""
        if self.batches.is_stream:
            return [self.batches.first]
        with same_random_numbers(self.generators):
            return list(islice(self.batches, 2))

    def result(self, stop_reason: str) -> FitResult:
        """What the run has come to."""
        return FitResult(torch.tensor(self.losses, dtype=torch.float64), self.step, stop_reason, self.elapsed)

    def state(self) -> FitState:
        """What callbacks see."""
        return FitState(
            self.step,
            self.epoch,
            self.losses[-1] if self.losses else math.nan,
            self.losses,
            self.model,
            self.guide,
            self.elbo,
            self.descent.loss_fn,
            self.descent.optimizer,
            self.tensors.parameters,
            self.descent.kl_scale,
        )

    # ------------------------------------------------------------------ loop

    def train(self, progress_bar: bool) -> FitResult:
        """Takes steps until something stops the run."""
        shown = progress_bar and rank() == 0 and shows_bars()
        bar = tqdm(
            total=self.num_steps,
            initial=self.step,
            disable=not shown,
            desc="fit",
            unit="step",
            dynamic_ncols=True,
        )
        with bar, self.surroundings() as interrupted:
            start, next_note = time.perf_counter() - self.elapsed, self.elapsed + NOTE_EVERY
            check_autocast(self.descent, self.step, self.batches.first, self.generators)
            self.stop_reason = self.limit_reached()
            for batch in self.stream():
                self.check(batch)
                self.take_step(batch)
                self.elapsed = time.perf_counter() - start
                if bar.update():  # it is drawn ten times a second at most
                    self.show(bar)
                if not shown and self.elapsed > next_note:
                    next_note = self.elapsed + NOTE_EVERY
                    logger.info("fit: step %d, epoch %d, loss %.6g", self.step, self.epoch, self.losses[-1])
                self.stop_reason = self.after_step(interrupted)
                if self.checkpoint is not None and (self.stop_reason or self.checkpoint.is_due(self.step)):
                    save_run(self, self.checkpoint)
                if self.stop_reason:
                    break
            for callback in self.callbacks:
                if hasattr(callback, "finish"):
                    callback.finish(self.state())
            self.show(bar)
        logger.info("fit: ended by %s after %d steps, %.3g s", self.stop_reason, self.step, self.elapsed)
        return self.result(self.stop_reason)

    @contextmanager
    def surroundings(self) -> Iterator[Callable[[], bool]]:
        """Parameters of this run alone, validation until it is switched off, Ctrl-C after a step, errors with a note."""
        with ExitStack() as stack:
            for context in (
                local_parameters(),
                note_step(lambda: self.step),
                warnings.catch_warnings(),
                pyro.validation_enabled(True),
            ):
                stack.enter_context(context)
            warnings.filterwarnings("ignore", "Encountered NaN")  # reported with the site
            yield stack.enter_context(deferred_interrupt())

    def stream(self) -> Iterator[Batch]:
        """The batches of all epochs, until something stops the run."""
        while not self.stop_reason:
            yield from self.pass_over_data()
            self.epoch += 1
            self.end_checks()  # every batch has been seen
            self.stop_reason = self.limit_reached()
            if self.stop_reason and self.checkpoint is not None:
                self.epoch_random, self.batches_done = random_state(self.generators), 0
                save_run(self, self.checkpoint)

    def pass_over_data(self) -> Iterator[Batch]:
        """One epoch; the first after a resumption skips the batches that the interrupted run has seen."""
        if self.checkpoint is not None and not self.batches.is_single:
            self.epoch_random = random_state(self.generators)
        if hasattr(self.sampler, "set_epoch"):  # DistributedSampler
            self.sampler.set_epoch(self.epoch)
        batches = iter(self.batches)
        if self.resume_random is not None:
            for _ in islice(batches, self.batches_done):
                pass
            set_random_state(self.resume_random, self.generators)
            self.resume_random = None
        else:
            self.batches_done = 0
        for batch in batches:
            self.batches_done += 1
            yield batch

    def limit_reached(self) -> str:
        """Which of the two limits has been reached, if one has."""
        if self.num_epochs is not None and self.epoch >= self.num_epochs:
            return "num_epochs"
        return "num_steps" if self.num_steps is not None and self.step >= self.num_steps else ""

    def after_step(self, interrupted: Callable[[], bool]) -> str:
        """Why the run stops after this step, if it does; every callback runs."""
        state = self.state()
        stopping = [callback for callback in self.callbacks if callback(state)]
        reason = getattr(stopping[0], "stop_reason", "callback") if stopping else ""
        if interrupted():
            reason = "interrupted"
        if any_process(bool(reason)):  # all processes stop at the same step
            reason = reason or "stopped by another process"
        return reason or ("num_steps" if self.step == self.num_steps else "")

    def show(self, bar: tqdm) -> None:
        """Draws the loss, and its parts where the bound reports them."""
        values = {"loss": self.losses[-1] if self.losses else "-", "epoch": self.epoch}
        values |= getattr(self.elbo, "parts", {})
        bar.set_postfix({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()})

    # ------------------------------------------------------------------ one step

    def check(self, batch: Batch) -> None:
        """Checks the observations of a batch whose tensors coincide in another way than those before."""
        if self.checked is not None and (form := coincidences(batch)) not in self.checked:
            self.checked.add(form)
            check_batch(self.model, batch)

    def end_checks(self) -> None:
        """Switches validation off, once all that can be seen has been."""
        if self.checked is not None:
            pyro.enable_validation(False)
            self.checked = None

    def take_step(self, batch: Batch) -> None:
        """Takes one step, or goes back to the last good state and raises."""
        rng_state = torch.get_rng_state()
        cause: Exception | None = None
        try:
            loss, value = self.descent.evaluate(batch, self.step)
        except (ValueError, RuntimeError) as error:
            if all(map(is_finite, self.tensors.trained)):
                check_batch(self.model, batch)  # says more of what is wrong with them
                raise
            value, cause = math.nan, error
        if not math.isfinite(value):
            self.give_up(batch, rng_state, value, cause)
        try:
            self.descent.descend(batch, self.step, loss, value)
        except FloatingPointError as error:
            bad = [
                n for n, p in self.tensors.parameters.items() if p.grad is not None and not is_finite(p.grad)
            ]
            reason = (
                f"fit: the loss is {value} at step {self.step + 1}, but its gradient is not finite, in {bad}: the slope of a root "
                "or norm at zero? The parameters are those before the step."
            )
            raise NonFiniteLossError(reason, self.result(reason)) from error
        self.step += 1
        self.losses.append(value)
        if self.batches.is_single:
            self.end_checks()

    def give_up(self, batch: Batch, rng_state: Tensor, value: float, cause: Exception | None) -> NoReturn:
        """Raises, with what is not finite in the draws of the last step."""
        torch.set_rng_state(rng_state)
        what = explain(self.model, self.guide, self.tensors.parameters, batch)
        reason = f"fit: the loss is {value} at step {self.step + 1}: {what}"
        self.tensors.go_back()
        raise NonFiniteLossError(reason, self.result(reason)) from cause
