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
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_bnn.infer.initialize import initialize_guide, run_model
from pyro_bnn.infer.mixture.elbo import default_elbo
from pyro_bnn.infer.mixture.runs import rehearsal
from pyro_bnn.infer.train.checkpoint import Checkpoint, loader_generators, random_state, set_random_state
from pyro_bnn.infer.train.optimizer import ScaleLatents, make_optimizer, make_scheduler
from pyro_bnn.infer.train.progress import shows_bars
from pyro_bnn.infer.train.resume import describe_run, names_of, resume
from pyro_bnn.infer.train.state import Callback, FitResult, FitState, NonFiniteLossError, deferred_interrupt
from pyro_bnn.model.data import Batch, as_batches, check_finite, coincidences
from pyro_bnn.model.handlers import sample_sites, subsample_scale
from pyro_bnn.model.local_latents import check_local_latents
from pyro_bnn.model.networks import named_networks, unchanged_buffers
from pyro_bnn.model.observations import check_run
from pyro_bnn.model.parameters import local_parameters, named_parameters
from pyro_bnn.ops.distributed import (
    all_reduce_mean,
    any_process,
    broadcast,
    rank,
    share_random_state,
    share_statistics,
    world_size,
)
from pyro_bnn.ops.options import require_count, require_number

#: Steps between two snapshots of the parameters in memory, the state to which a failed run goes back.
SNAPSHOT_EVERY = 50


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
        the rate; only terminals and notebooks show it.
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
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    run = _Run(model, guide, data, default_elbo(guide) if elbo is None else elbo, kl_scale, autocast)
    run.optimizer = make_optimizer(optim, run.tensors)
    run.scheduler = make_scheduler(scheduler, run.optimizer)
    run.clip_grad_norm = clip_grad_norm
    run.callbacks = [callbacks] if callable(callbacks) else list(callbacks)
    run.checkpoint = checkpoint
    return run.run(num_epochs, num_steps, progress_bar)


class _Run:
    """The state of one run of :func:`fit`."""

    optimizer: torch.optim.Optimizer
    scheduler: Any
    clip_grad_norm: float | None
    callbacks: list[Callback]
    checkpoint: Checkpoint | None
    settings: dict[str, Any]

    def __init__(
        self, model: Any, guide: Any, data: Any, elbo: Any, kl_scale: Any, autocast: torch.dtype | None
    ) -> None:
        self.model, self.guide, self.elbo = model, guide, elbo
        self.kl_scale, self.autocast = kl_scale, autocast
        self.step = self.epoch = self.batches_done = 0
        self.losses: list[float] = []
        self.elapsed = 0.0
        self.generators = loader_generators(data)
        self.batches = as_batches(data)
        self.shuffled = not self.batches.is_single  # a pass over one batch draws no random number
        self.resume_random: dict[str, Any] | None = None
        states = random_state(self.generators)
        first = self.batches.first
        set_random_state(states, self.generators)  # looking at the first batch leaves the shuffling as it was
        self.first = first
        with local_parameters(), unchanged_buffers() as called:
            initialize_guide(model, guide, first)
            self.parameters = named_parameters(model, guide, *first)
            check_local_latents(model, guide, self.first_batches)
        self.checked = {coincidences(first)}
        self.networks = named_networks(model, guide, called)
        if not self.parameters:
            raise ValueError("fit: neither the model nor the guide has a trainable parameter.")
        self.tensors = list(self.parameters.values())
        self.device = self.tensors[0].device
        self.loss_fn = elbo(model, guide)
        self.world = world_size()
        if self.world > 1:
            self.check_scale(first)
            broadcast([*self.tensors, *self.buffers().values()])
            share_random_state()
        self.sampler: Any = getattr(data, "sampler", None)
        self.snapshot = self.candidate = self.copy_parameters()

    def first_batches(self) -> list[Batch]:
        """The first batch, and the second one if there is one and it can be read again."""
        if self.batches.is_stream:
            return [self.first]
        states = random_state(self.generators)
        batches = list(islice(self.batches, 2))
        set_random_state(states, self.generators)
        return batches

    def check_scale(self, batch: Batch) -> None:
        """In several processes each sees a part of the data, which only a plate of the full size can tell."""
        args, kwargs = batch
        with poutine.block(), local_parameters(), torch.no_grad(), unchanged_buffers():
            sites = sample_sites(poutine.trace(self.model).get_trace(*args, **kwargs))
        for name, site in sites.items():
            if site["is_observed"] and site["cond_indep_stack"] and subsample_scale(site) == 1:
                raise ValueError(
                    f"fit in {world_size()} processes: site {name!r} is not in a plate of the full data. Write "
                    "pyro.plate('data', N, subsample_size=len(x)) with the size N of all data, of which every process "
                    "passes its own part."
                )

    # ------------------------------------------------------------------ state

    def copy_parameters(self) -> list[Tensor]:
        """Copies of the parameters and the running statistics."""
        return [t.detach().clone() for t in (*self.tensors, *self.statistics())]

    def result(self, stop_reason: str) -> FitResult:
        return FitResult(torch.tensor(self.losses, dtype=torch.float64), self.step, stop_reason, self.elapsed)

    def state(self) -> FitState:
        return FitState(
            self.step,
            self.epoch,
            self.losses[-1] if self.losses else math.nan,
            self.losses,
            self.model,
            self.guide,
            self.elbo,
            self.loss_fn,
            self.optimizer,
            self.parameters,
            self.kl_scale,
        )

    def buffers(self) -> dict[str, Tensor]:
        """What else the modules hold: persistent buffers, such as running statistics, and parameters that are not trained."""
        found = {}
        trained = {id(p) for p in self.tensors}
        for prefix, part in self.networks.items():
            for name, value in part.state_dict(keep_vars=True).items():
                full = f"{prefix}.{name}"
                is_own = prefix in ("model", "guide") or id(value) not in trained
                if isinstance(value, Tensor) and full not in self.parameters and is_own:
                    found[full] = value
        return found

    def statistics(self) -> list[Tensor]:
        """The buffers alone; a module may have put others in their place since the last step."""
        return [b for b in self.buffers().values() if not isinstance(b, torch.nn.Parameter)]

    def save(self) -> None:
        """Writes a checkpoint; of several processes the first one does."""
        assert self.checkpoint is not None
        if rank() > 0:
            return
        random = random_state(self.generators)
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "elapsed": self.elapsed,
            "tensors": {n: p.detach() for n, p in (self.parameters | self.buffers()).items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "elbo_step": getattr(self.elbo, "step", None),
            "callbacks": [c.state_dict() if hasattr(c, "state_dict") else None for c in self.callbacks],
            "callback_names": names_of(self.callbacks),
            "settings": self.settings,
            "random": random,
            "epoch_random": self.epoch_random if self.shuffled else random,
        }
        self.checkpoint.save(state, self.step)

    # ------------------------------------------------------------------ loop

    def pass_over_data(self) -> Iterator[Batch]:
        """One epoch; the first after a resumption skips the batches that the interrupted run has seen."""
        if self.checkpoint is not None and self.shuffled:
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

    def run(self, num_epochs: int | None, num_steps: int | None, progress_bar: bool) -> FitResult:
        if self.checkpoint is not None:
            self.settings = describe_run(self)
            resume(self)
        del self.first
        start = time.perf_counter() - self.elapsed
        bar = tqdm(
            total=num_steps,
            initial=self.step,
            disable=not (progress_bar and rank() == 0 and shows_bars()),
            desc="fit",
            unit="step",
            dynamic_ncols=True,
        )
        with ExitStack() as stack:
            stack.enter_context(bar)
            stack.enter_context(local_parameters())
            stack.enter_context(self.note_step())
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Encountered NaN")  # reported with the site below
            interrupted = stack.enter_context(deferred_interrupt())
            validation = stack.enter_context(ExitStack())
            validation.enter_context(pyro.validation_enabled(True))
            checked = False
            first, shown, stop_reason = True, 0.0, self.limit_reached(num_epochs, num_steps)
            while not stop_reason:
                for batch in self.pass_over_data():
                    if not checked and (form := coincidences(batch)) not in self.checked:
                        self.checked.add(form)
                        self.check_observations(batch)
                    if first and self.autocast is not None:
                        self.check_autocast(batch)
                    self.take_step(batch)
                    first = False
                    if not checked and self.batches.is_single:
                        validation.enter_context(pyro.validation_enabled(False))
                        checked = True
                    now = time.perf_counter()
                    self.elapsed = now - start
                    if now - shown > 0.2:
                        self.show(bar)
                        shown = now
                    stop_reason = self.run_callbacks()
                    if interrupted():
                        stop_reason = "interrupted"
                    if any_process(bool(stop_reason)):  # all processes stop at the same step
                        stop_reason = stop_reason or "stopped by another process"
                    if num_steps is not None and self.step >= num_steps:
                        stop_reason = stop_reason or "num_steps"
                    if self.checkpoint is not None and (stop_reason or self.checkpoint.is_due(self.step)):
                        self.save()
                    if stop_reason:
                        break
                else:
                    self.epoch += 1
                    if not checked:  # every batch has been
                        validation.enter_context(pyro.validation_enabled(False))
                        checked = True
                    stop_reason = self.limit_reached(num_epochs, num_steps)
                    if self.checkpoint is not None and stop_reason:
                        self.epoch_random, self.batches_done = random_state(self.generators), 0
                        self.save()
            for callback in self.callbacks:
                if hasattr(callback, "finish"):
                    callback.finish(self.state())
            self.show(bar)
        return self.result(stop_reason)

    @contextmanager
    def note_step(self) -> Iterator[None]:
        """Adds to an error of the model, the loader or a callback where the run was."""
        try:
            yield
        except NonFiniteLossError:
            raise
        except Exception as error:
            error.add_note(f"fit stopped after {self.step} steps; the parameters are those of that step.")
            raise

    def limit_reached(self, num_epochs: int | None, num_steps: int | None) -> str:
        if num_epochs is not None and self.epoch >= num_epochs:
            return "num_epochs"
        return "num_steps" if num_steps is not None and self.step >= num_steps else ""

    def run_callbacks(self) -> str:
        if not self.callbacks:
            return ""
        state = self.state()
        stopping = [callback for callback in self.callbacks if callback(state)]  # every callback runs
        return getattr(stopping[0], "stop_reason", "callback") if stopping else ""

    def show(self, bar: Any) -> None:
        """Updates the progress bar."""
        if bar.disable:
            return
        bar.n = self.step
        parts = {name: f"{value:.4g}" for name, value in getattr(self.elbo, "parts", {}).items()}
        loss = f"{self.losses[-1]:.4g}" if self.losses else "-"
        bar.set_postfix(loss=loss, epoch=self.epoch, **parts)

    # ------------------------------------------------------------------ one step

    def loss(self, batch: Batch) -> Tensor:
        args, kwargs = batch
        with ExitStack() as stack:
            if self.kl_scale is not None:
                scale = self.kl_scale(self.step) if callable(self.kl_scale) else self.kl_scale
                require_number(f"kl_scale at step {self.step}", scale, least=0)
                stack.enter_context(ScaleLatents(scale))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, dtype=self.autocast))
            return self.loss_fn(*args, **kwargs)

    def check_autocast(self, batch: Batch) -> None:
        """Compares the loss in low precision with the same draw in full precision."""
        if self.autocast == torch.float16:
            raise ValueError(
                "autocast=torch.float16: its gradients underflow without a scaled loss; use torch.bfloat16."
            )
        if not any(p.dtype == torch.float32 for p in self.tensors):
            raise ValueError(
                f"autocast={self.autocast}: no parameter is float32, and autocast leaves other types as they are. "
                "Convert model, guide and data by .float(), or leave autocast out."
            )
        state = random_state(self.generators)
        step = getattr(self.elbo, "step", None)
        with torch.no_grad(), unchanged_buffers():
            low = float(self.loss(batch))
            set_random_state(state, self.generators)
            low_precision, self.autocast = self.autocast, None
            full = float(self.loss(batch))
            self.autocast = low_precision
            set_random_state(state, self.generators)
        if step is not None:
            self.elbo.step = step
        if not abs(low - full) <= 0.02 * abs(full) + 1e-3:
            raise ValueError(
                f"autocast={low_precision}: the loss of the first batch is {low:.6g} in low and {full:.6g} in full "
                "precision. This model needs full precision; leave autocast out."
            )

    def check_observations(self, batch: Batch) -> None:
        """Runs the model alone, and raises if the observations of a batch do not fit it."""
        with local_parameters(), rehearsal(self.model), pyro.validation_enabled(True), torch.no_grad():
            check_run(sample_sites(run_model(self.model, batch)), batch)

    def take_step(self, batch: Batch) -> None:
        if self.step % SNAPSHOT_EVERY == 0:
            self.candidate = self.copy_parameters()
        rng_state = torch.get_rng_state()
        cause: Exception | None = None
        try:
            loss = self.loss(batch)
            shown = loss.detach()
            if self.world > 1:
                shown = shown.clone()
                all_reduce_mean([shown])
            value = float(shown)
        except (ValueError, RuntimeError) as error:
            if all(_finite(p) for p in self.tensors):
                self.check_observations(batch)  # says more of what is wrong with them
                raise
            value, cause = math.nan, error
        if not math.isfinite(value):
            reason = self.explain(batch, rng_state, value)
            with torch.no_grad():
                torch._foreach_copy_([*self.tensors, *self.statistics()], self.snapshot)
            raise NonFiniteLossError(reason, self.result(reason)) from cause
        self.snapshot = self.candidate
        for p in self.tensors:  # what zero_grad does, without the records for a profiler
            p.grad = None
        loss.backward()
        if self.world > 1:
            for p in self.tensors:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            all_reduce_mean([p.grad for p in self.tensors if p.grad is not None])
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.tensors, self.clip_grad_norm)
        self.optimizer.step()
        if self.world > 1:
            share_statistics(self.statistics())
        if self.scheduler is not None:
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*((value,) if plateau else ()))
        self.step += 1
        self.losses.append(value)

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
        bad_parameters = [n for n, p in self.parameters.items() if not _finite(p)]
        causes = [f"parameters {bad_parameters} are not finite"] if bad_parameters else []
        torch.set_rng_state(rng_state)
        sites: list[str] = []
        try:
            with poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
                guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
                replayed = poutine.replay(self.model, trace=guide_trace)
                for trace in (guide_trace, poutine.trace(replayed).get_trace(*args, **kwargs)):
                    trace.compute_log_prob()
                    sites += [
                        name
                        for name, site in sample_sites(trace).items()
                        if name not in sites and not (_finite(site["value"]) and _finite(site["log_prob"]))
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
