# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Refinement of a guide by the forward divergence, with what it is worth before and after."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.infer.predict.predictive import seeded_by
from pyro_bnn.infer.refine.families import Family, family_of
from pyro_bnn.infer.refine.importance import ImportanceWeights, log_prob, weigh
from pyro_bnn.infer.sample.log_density import LogDensity, log_density
from pyro_bnn.model.data import as_batches
from pyro_bnn.ops.described import Described, table_text
from pyro_bnn.ops.notice import logger, warn_user
from pyro_bnn.ops.options import require_count
from pyro_bnn.ops.pareto import reliable_shape, smoothed

#: Rounds without progress after which the search ends.
_PATIENCE = 3


class RefinementWarning(UserWarning):
    """
    A refinement that was not taken, because the guide had not become better.

    Example::

        >>> import warnings
        >>> warnings.filterwarnings("error", category=RefinementWarning)  # raises where a guide stays as it was
    """


@dataclass(repr=False)
class Quality(Described):
    r"""
    What a guide is worth, by fresh draws of it.

    :param k_hat: the shape of the tail of the importance ratios, see :func:`~pyro_bnn.infer.importance_weights`.
    :param effective_sample_size: the effective number of draws.
    :param num_samples: of so many.
    :param exponent: the power of the ratios under which enough draws are effective for a step of :func:`forward_kl`: 1 and more
        where the forward divergence itself is within reach; the inverse of the spread of the log ratios.
    :param elbo: the mean of the log ratios, nats.
    :param elbo_error: its standard error.
    """

    k_hat: float
    effective_sample_size: float
    num_samples: int
    exponent: float
    elbo: float
    elbo_error: float

    @classmethod
    def of(cls, found: ImportanceWeights, needed: float) -> "Quality":
        """What weighted draws say, if a step needs so many effective ones."""
        ratios, size = found.log_ratios, len(found.log_ratios)
        error = float(ratios.std()) / math.sqrt(size)
        return cls(
            found.k_hat,
            found.effective_sample_size,
            size,
            exponent_of(ratios, needed),
            float(ratios.mean()),
            error,
        )

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        return "quality of a guide", dict(zip(_COLUMNS, self.cells(), strict=True))

    def cells(self) -> list[str]:
        """Its numbers as text."""
        return [
            f"{self.k_hat:.2f}",
            f"{self.effective_sample_size:.1f} of {self.num_samples}",
            f"{self.exponent:.3g}",
            f"{self.elbo:.2f} +- {self.elbo_error:.2f}",
        ]


_COLUMNS = ("k-hat", "effective draws", "exponent", "ELBO")


@dataclass(repr=False)
class ForwardKLResult(Described):
    r"""
    What :func:`forward_kl` returns.

    :param guide: the refined guide, or the given one where the refined one was not better.
    :param improved: which of the two.
    :param reason: why, in words.
    :param before: the quality of the given guide.
    :param after: the quality of the refined one, taken or not.
    :param gain: :math:`\mathrm{KL}(p\|q) - \mathrm{KL}(p\|q')`, nats, by draws of both guides; minus infinity where the refined guide
        gives draws of the posterior no density.
    :param gain_error: its standard error.
    :param rounds: the quality at the start of every round, and at the end of the last.

    Example::

        >>> quality = Quality(0.4, 800.0, 1000, 1.8, -3.0, 0.1)
        >>> ForwardKLResult(None, True, "it gains", quality, quality, 0.5, 0.1, [quality]).improved
        True
    """

    guide: Any
    improved: bool
    reason: str
    before: Quality
    after: Quality
    gain: float
    gain_error: float
    rounds: list[Quality]

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        cells = [["before", *self.before.cells()], ["after", *self.after.cells()]]
        rows = dict.fromkeys(table_text(["", *_COLUMNS], cells), "")
        rows["gain"] = f"{self.gain:.3g} +- {self.gain_error:.2g} nats of forward divergence"
        rows["guide"] = (
            f"{type(self.guide).__name__}, {'refined' if self.improved else 'as it was'}: {self.reason}"
        )
        return f"refinement by the forward divergence, {max(0, len(self.rounds) - 1)} rounds", rows


@torch.no_grad()
def forward_kl(
    model: Callable[..., Any],
    guide: Any,
    data: Any,
    *,
    num_samples: int = 1000,
    num_rounds: int = 50,
    generator: torch.Generator | None = None,
) -> ForwardKLResult:
    r"""
    Moves a guide towards the minimum of the forward divergence :math:`\mathrm{KL}(p(z \mid y) \| q)`, by importance weights.

    Every round draws :math:`z_s \sim q`, weighs the draws by :math:`w \propto (p(y, z)/q(z))^\beta`, smoothed as in
    :func:`~pyro_bnn.infer.importance_weights`, and minimises

    .. math:: -\sum_s w_s \log q'(z_s)

    over :math:`q'` [1]. At :math:`\beta = 1` this is the forward divergence, whose minimum covers the posterior where the ELBO's
    hides in one part of it. Weights of a poor guide rest on a few draws, from which nothing can be learnt: :math:`\beta` is the largest
    power of at most 1 under which enough of them are effective, 20 per parameter and latent, at least a tenth and at most half of all. A
    step at small :math:`\beta` is, to first order, one of natural-gradient ascent of the ELBO; where :math:`\beta` stays small, as in
    large networks, the result is closer to that than to the forward divergence, and ``after.exponent`` says so.

    What becomes of a guide:

    - a Laplace approximation of dense precision: an :class:`~pyro.infer.autoguide.AutoMultivariateNormal`, in closed form;
    - one of diagonal precision: an :class:`~pyro.infer.autoguide.AutoDiagonalNormal`, in closed form;
    - all other Laplace approximations, and mixtures: an :class:`~pyro_bnn.infer.autoguide.AutoRescaled`, by gradients;
    - Pyro's ``AutoMultivariateNormal``, ``AutoDiagonalNormal`` and ``AutoNormal``: the same, in closed form;
    - any other with parameters and a density: the same, by gradients; so are those of which some parameters are frozen
      (``requires_grad``), which stay where they are.

    The closed form is moment matching. The gradients are those of L-BFGS on the draws of the round. A Laplace approximation is left as
    it is; other guides are refined in place, as by :func:`~pyro_bnn.infer.fit`.
    The search ends after three rounds at :math:`\beta = 1`, or three in which neither the exponent has grown nor the ELBO by more than
    its noise. Then fresh draws of both guides, weighted as draws of their even mixture, estimate what the divergence has gained. The
    refined guide is taken if that is reliable (k-hat) and two standard errors above zero, or four with a k-hat below 1 and an exponent that
    is not smaller by a tenth; where it is not reliable, if the exponent has grown by a twentieth and the ELBO has not fallen by two
    standard errors. Else the given guide comes back as it was, and a warning says why, unless both are as good.

    A refined Laplace approximation predicts by the model, not by the linearised one. In a network that is the comparison to make: a
    Laplace approximation may have a poor density and predict well, because the linearised model is what it is the posterior of.

    :param callable model: a Pyro model.
    :param guide: a fitted guide with a density of all latents, and parameters.
    :param data: the data with observations, in any form.
    :param int num_samples: draws per round; several times the number of latents for a dense covariance.
    :param int num_rounds: rounds at most. Each costs ``num_samples`` evaluations of the log density.
    :param generator: source of random numbers; the global state then stays as it is.
    :return: the guide, its quality before and after.
    :raises ValueError: if the guide has no density, no parameters, or holds latents fixed, or if too many of its draws are impossible
        under the model.
    :raises TypeError: if the guide is no module.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_bnn import AutoLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Bernoulli(logits=4 * w * x), obs=y)
        >>> x = torch.ones(2)
        >>> guide = AutoLaplace(model).initialize(x, x).polish((x, x)).laplace_approximation((x, x))
        >>> found = forward_kl(model, guide, (x, x), generator=torch.Generator().manual_seed(0))
        >>> found.improved, type(found.guide).__name__  # the posterior is skewed: its mean is not its mode
        (True, 'AutoMultivariateNormal')

    **References**

    [1] Jerfel, Wang, Wong-Fannjiang, Heller, Ma, Jordan, *Variational refinement for importance sampling using the forward
    Kullback-Leibler divergence*, UAI 2021.
    """
    require_count("num_samples", num_samples, 50)
    require_count("num_rounds", num_rounds)
    batches = as_batches(data)
    with seeded_by(generator):
        density = log_density(model, data)
    with seeded_by(generator):
        first = weigh(density, guide, batches, num_samples)
        family = family_of(guide, batches.first)
        start = family.state()
        needed = needed_draws(family, density.size, num_samples)
        _require_possible(first, needed)
        rounds = _search(density, family, batches, num_samples, num_rounds, needed)
        last = weigh(density, family.guide, batches, num_samples)
    before, after = (Quality.of(found, needed) for found in (first, last))
    gain = _gain(family, start, first, last)
    improved, reason = _judge(before, after, gain)
    if not improved:
        family.restore(start)
    taken = family.guide if improved else guide
    return ForwardKLResult(taken, improved, reason, before, after, gain.value, gain.error, rounds)


def exponent_of(log_ratios: Tensor, needed: float) -> float:
    """The power of importance ratios under which so many draws are effective, by bisection; at most 100."""

    def effective(power: float) -> float:
        return float(1 / (power * log_ratios).softmax(0).square().sum())

    low, high = 0.0, 100.0
    if effective(high) >= needed:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(middle) >= needed else (low, middle)
    return low


def needed_draws(family: Family, size: int, num_samples: int) -> float:
    """The effective draws that a step needs: 20 per parameter and latent, at least a tenth of all and at most half."""
    parameters = sum(parameter.numel() for parameter in family.parameters)
    return min(num_samples / 2, max(num_samples / 10, 20 * parameters / size))


def _require_possible(found: ImportanceWeights, needed: float) -> None:
    """No power makes impossible draws effective."""
    possible = int((found.log_ratios > -math.inf).sum())
    if possible < needed:
        raise ValueError(
            f"forward_kl: {possible} of {len(found.log_ratios)} draws of the guide are possible under the model, and a step needs {needed:.0f}: "
            "start from a guide that lies where the model has a density, or constrain the latents to where it has one."
        )


def _search(
    density: LogDensity, family: Family, data: Any, num_samples: int, num_rounds: int, needed: float
) -> list[Quality]:
    """
    Rounds until there is no progress, or a few with all of the ratios, each of which goes to the optimum; the family is left at
    the best.
    """
    rounds: list[Quality] = []
    best, state, since, whole = None, family.state(), 0, 0
    for _ in range(num_rounds + 1):  # the last one looks where the last step has led
        found = weigh(density, family.guide, data, num_samples)
        rounds.append(Quality.of(found, needed))
        since += 1
        whole += rounds[-1].exponent >= 1
        if rounds[-1].exponent >= 1 or best is None or _is_progress(best, rounds[-1]):
            best, state, since = rounds[-1], family.state(), 0
        if since >= _PATIENCE or whole > _PATIENCE or not rounds[-1].exponent or len(rounds) > num_rounds:
            break
        log_weights, _ = smoothed(min(1.0, rounds[-1].exponent) * found.log_ratios)
        family.update(found.draws, log_weights.exp())
    family.restore(state)
    return rounds


def _is_progress(before: Quality, after: Quality) -> bool:
    """Whether the exponent has grown, or, where the forward divergence is out of reach, the ELBO by more than its noise."""
    noise = math.hypot(before.elbo_error, after.elbo_error)
    return after.exponent > 1.02 * before.exponent or (
        before.exponent < 1 and after.elbo > before.elbo + 2 * noise
    )


@dataclass
class _Gain:
    """What the forward divergence gains, its standard error, and the shape of the tail of the weights."""

    value: float
    error: float
    k_hat: float


def _gain(family: Family, start: list[Tensor], first: ImportanceWeights, last: ImportanceWeights) -> _Gain:
    """
    The mean of log q' - log q under the posterior, by draws of the family at its start and now, with the weights of their even
    mixture.
    """

    def densities() -> list[Tensor]:
        return [log_prob(family.guide, found.draws, family.batch).double() for found in (first, last)]

    end, at_end = family.state(), densities()
    family.restore(start)
    at_start = densities()
    family.restore(end)
    log_p = torch.cat([first.log_ratios + at_start[0], last.log_ratios + at_end[1]])
    q, q_new = torch.cat(at_start), torch.cat(at_end)
    # densities in unconstrained and constrained space differ by the same in both
    log_weights, k_hat = smoothed(log_p - torch.logaddexp(q, q_new))
    weights = log_weights.exp()
    change = torch.where(weights > 0, q_new - q, 0.0)
    gain = float(weights @ change)
    error = float((weights.square() @ (change - gain).square()).sqrt()) if math.isfinite(gain) else math.inf
    return _Gain(gain, error, k_hat)


def _judge(before: Quality, after: Quality, gain: _Gain) -> tuple[bool, str]:
    """Whether the refined guide is better, and why."""
    limit = reliable_shape(2 * before.num_samples)
    reliable = gain.k_hat <= limit
    clear = gain.k_hat < 1 and gain.value > 4 * gain.error and after.exponent > 0.9 * before.exponent
    if reliable or clear:
        improved = gain.value > 2 * gain.error + 1e-6
        reason = f"the forward divergence gains {gain.value:.3g} +- {gain.error:.2g} nats"
    else:
        rise, noise = after.elbo - before.elbo, math.hypot(after.elbo_error, before.elbo_error)
        improved = after.exponent > 1.05 * before.exponent and rise > -2 * noise
        reason = (
            f"the gain of forward divergence cannot be estimated (k-hat {gain.k_hat:.2f} > {limit:.2f}); the exponent goes from "
            f"{before.exponent:.3g} to {after.exponent:.3g}, the ELBO gains {rise:.3g} +- {noise:.2g} nats"
        )
    if improved:
        logger.info("forward_kl: %s", reason)
    elif reliable and abs(gain.value) <= 2 * gain.error + 1e-6:
        reason = f"it is as good: {reason}"
    else:
        warn_user(f"forward_kl: the guide is as it was: {reason}.", RefinementWarning)
    return improved, reason
