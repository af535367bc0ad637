# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""When to stop: callbacks of fit that watch the loss or data held out."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_bnn.infer.initialize import check_observations, run_model
from pyro_bnn.infer.mixture.elbo import Mixture_ELBO
from pyro_bnn.infer.predict.predictive import posterior_predictive
from pyro_bnn.infer.train.optimizer import ScaleLatents
from pyro_bnn.infer.train.state import FitState
from pyro_bnn.model.data import Batches
from pyro_bnn.model.evaluation import evaluation_mode


class ConvergenceTest:
    r"""
    Tells from the noise of the losses whether a run has converged, is still falling, or diverges.

    After every ``window`` steps the slope of the last ``window`` losses is tested by one-sided t tests on a line through 8
    batch means. The losses are whitened before, :math:`e_t = x_t - \hat\varphi x_{t-1}` with the
    lag-one correlation of two halves without their linear trends (corrected for its bias in short series), and the
    batches remove what correlation is left. Check j uses the level
    :math:`6 \alpha / (\pi^2 j^2)`, so that over a whole run of any length the chance to call a stationary loss
    falling, or to call it rising, is at most :math:`\alpha` each, up to the normality and independence of the batch
    means. They are independent enough if the noise forgets within a tenth of the window. Measured over 20 checks of 400
    losses at :math:`\alpha = 0.05` (``benchmarks/convergence_test.py``): 5 % and 4 % of runs with independent losses,
    6 % with an autoregression of coefficient 0.95 (a memory of 39 losses), 13 % with 0.98 (99 losses), and 10 % where half the
    variance is white noise on top of 0.95, which hides the memory from the whitening.

    As a callback of :func:`~pyro_bnn.infer.fit` it stops a run that is flat in ``patience`` checks in a row
    (``stop_reason="converged"``) or rising in as many (``"diverging"``).

    :param int window: losses per check.
    :param float alpha: the rate of false alarms.
    :param int patience: checks in a row that stop a run.

    Example::

        >>> test = ConvergenceTest(window=100)
        >>> noise = np.random.default_rng(0).normal(size=400)
        >>> test.status(noise), test.status(noise - 0.02 * np.arange(400)), test.status(noise[:50])
        ('converged', 'falling', 'unknown')
    """

    num_batches = 8

    def __init__(self, window: int = 1000, alpha: float = 0.05, patience: int = 2) -> None:
        if window < 2 * self.num_batches:
            raise ValueError(f"window must be at least {2 * self.num_batches}, not {window}.")
        self.window = window
        self.alpha = alpha
        self.patience = patience
        self.stop_reason = "converged"

    def check(self, losses: Sequence[float], number: int) -> str:
        """
        One check.

        :param losses: the losses of one window.
        :param int number: the number of this check, from 1.
        :return: ``"converged"`` (flat), ``"falling"`` or ``"diverging"``.
        """
        size = len(losses) // self.num_batches
        values = whiten(np.asarray(losses[-self.num_batches * size :], dtype=float))
        means = values.reshape(self.num_batches, size).mean(-1)
        if np.ptp(means) == 0:
            return "converged"
        from scipy.stats import linregress  # half a second that only a finished window pays

        level = 6 * self.alpha / (math.pi**2 * number**2)
        falling = linregress(np.arange(self.num_batches), means, alternative="less").pvalue
        if falling < level:
            return "falling"
        return "diverging" if 1 - falling < level else "converged"

    def status(self, losses: Any) -> str:
        """
        The state of a run by its last full window.

        :param losses: all losses of the run.
        :return: ``"converged"``, ``"falling"``, ``"diverging"``, or ``"unknown"`` before the first window.
        """
        number = len(losses) // self.window
        if number == 0:
            return "unknown"
        return self.check(losses[(number - 1) * self.window : number * self.window], number)

    def __call__(self, state: FitState) -> bool:
        """Whether to stop."""
        if state.step % self.window or state.step // self.window < self.patience:
            return False
        last = state.step // self.window
        found = {
            self.check(state.losses[(j - 1) * self.window : j * self.window], j)
            for j in range(last - self.patience + 1, last + 1)
        }
        self.stop_reason = next(iter(found))
        return found in ({"converged"}, {"diverging"})


def whiten(values: np.ndarray) -> np.ndarray:
    r"""
    Removes the autoregressive part of order one from the noise of a series.

    :param values: a series of even length n; its halves may have different means and linear trends.
    :return: :math:`x_t - \hat\varphi x_{t-1}`, shape ``(n,)``; the first entry repeats the second.

    **References**

    Andrews and Monahan, *An improved heteroskedasticity and autocorrelation consistent covariance matrix estimator*,
    Econometrica 1992 (whitening before averaging); Marriott and Pope, *Bias in the estimation of autocorrelations*,
    Biometrika 1954.

    Example::

        >>> whiten(np.array([1.0, 1.0, 1.0, 1.0])).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    halves = values.reshape(2, -1)
    size = halves.shape[1]
    time = np.arange(size) - (size - 1) / 2
    rest = halves - halves.mean(1, keepdims=True)
    if size > 2:
        rest = rest - (rest @ time / (time @ time))[:, None] * time
    total = float((rest**2).sum())
    if total == 0:
        return values
    correlation = float((rest[:, 1:] * rest[:, :-1]).sum()) / total
    # each half loses its mean and its trend
    correlation = min(max(correlation + (2 + 4 * correlation) / size, 0.0), 0.99)
    white = values[1:] - correlation * values[:-1]
    return np.concatenate([white[:1], white])


class EarlyStopping:
    """
    Stops a run when data held out no longer improve, and puts the best parameters back.

    :param data: data held out with their observations, in any form that :func:`~pyro_bnn.infer.fit` takes.
    :param str metric: ``"elbo"``, the loss on these data, or ``"nll"``, the negative log predictive density per point.
        Both use the same random numbers every time.
    :param int every: steps between two evaluations.
    :param int patience: evaluations without improvement that stop the run.
    :param int num_samples: posterior draws for ``"nll"``, and evaluations of the loss that are averaged for ``"elbo"``.
    :param bool restore: whether to put the best parameters back at the end of the run.

    A schedule of the KL's factor does not enter: the loss is that of the end of the schedule (its attribute ``final``, as
    :class:`~pyro_bnn.infer.LinearAnnealing` has it, or 1), as the values of different steps would not be comparable. The
    model is in evaluation mode. After the run ``history`` holds pairs of step and value.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoDelta
        >>> from pyro_bnn.infer import fit
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(z, 1.0), obs=y)
        >>> train, held_out = torch.full((5,), 3.0), torch.full((5,), 2.0)
        >>> stopping = EarlyStopping(held_out, every=10, patience=3)
        >>> guide = AutoDelta(model)
        >>> fit(model, guide, train, num_steps=1000, optim=0.05, callbacks=stopping, progress_bar=False).stop_reason
        'early stopping'
        >>> bool((guide.median()["z"] - 10 / 6).abs() < 0.3)  # not 15 / 6, the MAP on the training data
        True
    """

    stop_reason = "early stopping"

    def __init__(
        self,
        data: Any,
        *,
        metric: str = "elbo",
        every: int = 100,
        patience: int = 5,
        num_samples: int = 32,
        restore: bool = True,
    ) -> None:
        if metric not in ("elbo", "nll"):
            raise ValueError(f"metric must be 'elbo' or 'nll', not {metric!r}.")
        self.data = data
        self.metric = metric
        self.every = every
        self.patience = patience
        self.num_samples = num_samples
        self.restore = restore
        self.history: list[list[float]] = []
        self.best: dict[str, Tensor] = {}

    def evaluate(self, state: FitState) -> float:
        """The value of the metric now, with random numbers that do not depend on the step; smaller is better."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if self.metric == "elbo":
                return self.held_out_loss(state)
            found = posterior_predictive(state.model, state.guide, self.data, num_samples=self.num_samples)
            densities = [v for v in (site.log_likelihood for site in found.values()) if v is not None]
            return -sum(float((torch.logsumexp(v, 0) - math.log(len(v))).mean()) for v in densities)

    def held_out_loss(self, state: FitState) -> float:
        """The loss on the data held out, at the end of every schedule: the mean over ``num_samples`` evaluations."""
        elbo, total = state.elbo, 0.0
        own = elbo.kl_scale if isinstance(elbo, Mixture_ELBO) else None
        place = elbo.again() if isinstance(elbo, Mixture_ELBO) else nullcontext()
        try:
            if own is not None:
                elbo.kl_scale = final_scale(own)
            with place, evaluation_mode(state.model), ScaleLatents(final_scale(state.kl_scale)):
                for _ in range(self.num_samples):
                    # with gradients, which a model may take itself
                    total += sum(float(state.loss_fn(*a, **k).detach()) for a, k in Batches(self.data))
        finally:
            if own is not None:
                elbo.kl_scale = own
        return total / self.num_samples

    def __call__(self, state: FitState) -> bool:
        """Whether to stop."""
        if state.step % self.every:
            return False
        if not self.history:
            self.check_data(state)
        value = self.evaluate(state)
        value = value if math.isfinite(value) else math.inf
        if value < min((v for _, v in self.history), default=math.inf):
            self.best = {name: p.detach().clone() for name, p in state.parameters.items()}
        self.history.append([state.step, value])
        values = [v for _, v in self.history]
        return len(values) - 1 - values.index(min(values)) >= self.patience

    def check_data(self, state: FitState) -> None:
        """
        Checks that the data held out have their observations.

        :raises ValueError: naming the site that was drawn, or that has another shape.
        """
        for batch in Batches(self.data):
            # the first pass over the training data switches it off
            validation = pyro.validation_enabled(True)
            with poutine.block(), torch.random.fork_rng(), evaluation_mode(state.model), validation:
                trace = run_model(state.model, batch)
            try:
                check_observations(trace, batch)
            except ValueError as error:
                raise ValueError(f"EarlyStopping, data held out: {error}") from None

    def finish(self, state: FitState) -> None:
        """Puts the best parameters back, at the end of the run."""
        if self.restore and self.best:
            with torch.no_grad():
                for name, value in self.best.items():
                    state.parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue: the history and the best parameters."""
        return {"history": self.history, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what :meth:`state_dict` returned."""
        self.history, self.best = state["history"], state["best"]


def final_scale(schedule: Any) -> float:
    """
    The factor of the KL at the end of a schedule: a number itself, its attribute ``final``, or 1.

    Example::

        >>> from pyro_bnn.infer import LinearAnnealing
        >>> final_scale(0.1), final_scale(LinearAnnealing(10, final=0.5)), final_scale(lambda step: step / 10)
        (0.1, 0.5, 1.0)
    """
    if callable(schedule):
        return float(getattr(schedule, "final", 1.0))
    return 1.0 if schedule is None else float(schedule)
