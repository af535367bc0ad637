# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Minibatch sampling: stochastic gradient Langevin and Hamiltonian dynamics for any Pyro model."""

import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyro_bnn.infer.sample.log_density import evaluator_of
from pyro_bnn.infer.sample.microcanonical import Whitener
from pyro_bnn.infer.sample.minibatch_run import ControlVariates, Estimate, Plan, Run
from pyro_bnn.infer.sample.minibatches import Estimator, Minibatches, Order, Stream
from pyro_bnn.infer.sample.records import Records, Resumption
from pyro_bnn.infer.sample.result import ChainResult
from pyro_bnn.infer.sample.starts import Mode, Start, chain_starts, modes_of, points_of
from pyro_bnn.infer.sample.steps import StepSchedule, as_schedule
from pyro_bnn.infer.sample.whitening import Gaussians, Scales, fingerprint, prior_scales
from pyro_bnn.infer.train.checkpoint import Checkpoint, as_checkpoint
from pyro_bnn.model.data import repeatable_batches
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.described import first_of
from pyro_bnn.ops.distributed import world_size
from pyro_bnn.ops.notice import warn_user
from pyro_bnn.ops.options import require_choice, require_count
from pyro_bnn.ops.randomness import loader_generators, same_random_numbers

SchemeName = Literal["baoa", "sghmc", "sgld"]


def sgmcmc(
    model: Callable[..., Any],
    guide: Any,
    data: Any,
    *,
    step_size: float | StepSchedule | Callable[[int], float],
    scheme: SchemeName = "baoa",
    friction: float = 1.0,
    batch_size: int | None = None,
    order: Order = "symmetric",
    control_variates: bool = False,
    whiten: Literal["guide", "prior"] | None = "guide",
    start: Start = "mode",
    num_samples: int = 500,
    warmup_steps: int = 500,
    thinning: int = 1,
    num_chains: int = 4,
    memory_limit: float | None = None,
    progress_bar: bool = True,
    checkpoint: Checkpoint | str | PathLike[str] | None = None,
) -> ChainResult:
    r"""
    Samples by gradients of minibatches. The draws are **biased**: nothing is accepted or rejected, and the noise of the
    gradients heats the chains.

    Langevin dynamics on the packed unconstrained latents u, with potential :math:`U = -\log p(u, D)`, momenta r, and a constant
    preconditioner :math:`M = R R^\top` from a guide:

    .. math::

        du = R\,r\,dt,\qquad dr = -R^\top\nabla U(u)\,dt - \gamma r\,dt + \sqrt{2\gamma}\,dW .

    M does not depend on u, so that no correction term is needed: in continuous time the posterior is stationary for every guide,
    which decides how fast it is reached and how large h may be. One step of size h and one gradient :math:`\hat g` of a batch are

    ============ ============================================================================================
    ``"sgld"``   :math:`u \leftarrow u - \tfrac{h^2}2 M\hat g(u) + h R\,\xi`; the step of Welling and Teh (2011) is
                 :math:`\epsilon = h^2`
    ``"sghmc"``  :math:`u \leftarrow u + h R\,r`, then :math:`r \leftarrow (1-\gamma h)\,r - h R^\top\hat g(u) + \sqrt{2\gamma h}\,\xi`
                 (Chen, Fox and Guestrin, 2014, with noise estimate 0: learning rate :math:`h^2`, momentum decay
                 :math:`\alpha=\gamma h`)
    ``"baoa"``   :math:`r \leftarrow r - h R^\top\hat g(u)`; half a drift :math:`u \leftarrow u + \tfrac h2 R\,r`;
                 :math:`r \leftarrow e^{-\gamma h} r + \sqrt{1-e^{-2\gamma h}}\,\xi`; half a drift. With all data these are the
                 positions of BAOAB (Leimkuhler and Matthews, 2013)
    ============ ============================================================================================

    **Bias.** For a Gaussian posterior whose whitened precision has the eigenvalue :math:`\lambda`, and gradients whose noise is
    independent from step to step with whitened variance V there, the stationary variance is :math:`1/\lambda` times

    ============ ============================================================================================
    ``"sgld"``   :math:`(1 + h^2V/4)\,/\,(1 - h^2\lambda/4)`
    ``"sghmc"``  :math:`(1 + hV/2\gamma)\,/\,(1 - h^2\lambda/(4-2\gamma h))`
    ``"baoa"``   :math:`1 + \tfrac{h^2V}4\coth(\gamma h/2)\,/\,(1 - h^2\lambda/4)`; exact for V = 0
    ============ ============================================================================================

    V falls with the batch size n as :math:`N^2/n`, by ``control_variates`` near the centre, and cancels to a higher order in h
    where batches come in symmetric sweeps. Two statistics of the draws tell of heat: ``kinetic_temperature`` (of "sghmc" and "baoa"),
    :math:`|r|^2/p`, 1 on average where nothing is heated; and ``drift_to_noise`` (of "sgld"), :math:`h^2|R^\top\hat g|^2/4p`, on average
    about the relative excess of the variances. A warning names chains that are far off. Compare results of h and h / 2 nevertheless:
    where the curvature away from the modes is much larger than there, as that of a noise scale, steps must be small for it.

    Each chain takes steps of its own noise, and all chains take the **same batch** in a step: one pass of the model serves them
    all. Errors of chains by the noise of gradients are therefore correlated, and R-hat sees only what the injected noise does.

    :param callable model: a Pyro model; terms outside the plate of the data count once, not with the weight of the batch.
    :param guide: where chains start, the centres of control variates, the preconditioner. A mixture guide has one mode for each
        component, any other guide one, a list has those of its items: guides (an ensemble), or values by site. With ``None`` each
        chain starts at a draw of the prior.
    :param data: one batch with all data, or an iterable of batches that covers them in every pass; see ``batch_size``.
    :param step_size: h, in whitened units (posterior standard deviations of the guide; with ``whiten=None`` those of the latents),
        or a schedule: :class:`~pyro_bnn.infer.PolynomialSteps`, :class:`~pyro_bnn.infer.CyclicalSteps`, a function of the number of
        the step. Explicit steps are unstable from :math:`2/\sqrt{\lambda}` on.
    :param str scheme: see above.
    :param float friction: :math:`\gamma`, in reciprocal whitened time; "sgld" has none.
    :param int batch_size: rows of a minibatch, cut from data that are one batch; by default every step takes all of it.
    :param str order: ``"symmetric"``, a pass through a random partition of the rows, then the same batches backward (Paulin et al.,
        2024); ``"forward"``, passes through random partitions; ``"independent"``, random rows anew in every step. The passes of
        a loader are taken as it gives them; those of symmetric sweeps are held in memory.
    :param bool control_variates: whether gradients are :math:`\nabla U(\hat u) + \hat g(u) - \hat g(\hat u)` around the guide's
        modes :math:`\hat u` (Baker et al., 2019): little noise near them, more than without far away. A step costs one more
        gradient per mode.
    :param str whiten: ``"guide"``, R from the covariance of the guide (full, block, Kronecker, low rank, diagonal); ``"prior"``, the
        scales of the prior; ``None``, the identity.
    :param str start: ``"mode"`` (of a Gaussian guide its median) or ``"draws"`` of each mode's approximation.
    :param int num_samples: draws per chain that are kept.
    :param int warmup_steps: steps before, whose draws are in ``warmup``.
    :param int thinning: steps from one draw to the next.
    :param int num_chains: chains for each mode; they follow one another in the result.
    :param float memory_limit: bytes that draws may take; by default what is free.
    :param bool progress_bar: whether to show a bar, in terminals and notebooks.
    :param checkpoint: a :class:`~pyro_bnn.infer.Checkpoint` or a path. If the file exists, the run goes on as it would have without the
        interruption, bit by bit on one device; ``num_samples`` may have grown, other settings, models and data are refused.
    :return: draws, and of each the ``step_size``, the ``cycle``, the ``log_density_estimate`` (by the batch of its step, where the
        step took its gradient: **not** the log density of the draw), and the ``kinetic_temperature`` or ``drift_to_noise``.
    :raises ValueError: for options that do not fit; if batches do not give the log density without bias, which is compared with
        all data at one point: rows interact, have latents of their own, or do not cover the plate.
    :raises ArithmeticError: if a chain leaves the finite numbers; names the chains, the step, the site, and what to do.
    :raises MemoryError: if the draws do not fit; raised before the first step.

    The first Ctrl-C ends the run after the current step, saves a checkpoint, and returns the draws until then.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_bnn.infer.autoguide import AutoLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.5), obs=y)
        >>> x = torch.linspace(-1, 1, 20)
        >>> guide = AutoLaplace(model).initialize(x, 2 * x).polish((x, 2 * x)).laplace_approximation((x, 2 * x))
        >>> run = sgmcmc(model, guide, (x, 2 * x), batch_size=5, step_size=0.3, num_samples=20, warmup_steps=10, progress_bar=False)
        >>> run.samples["w"].shape, sorted(run.sample_stats)
        (torch.Size([4, 20]), ['cycle', 'kinetic_temperature', 'log_density_estimate', 'step_size'])
    """
    plan = Plan(scheme, as_schedule(step_size), friction, num_samples, warmup_steps, thinning)
    require_count("num_chains", num_chains)
    _check_options(guide, control_variates, whiten, start)
    batches, generators = repeatable_batches(data), loader_generators(data)
    with same_random_numbers(generators):  # looking at the data leaves their shuffling as it was
        evaluator = evaluator_of(model, batches.first)
        minibatches = Minibatches(evaluator, batches, batch_size, order)
        modes = [] if guide is None else modes_of(guide, minibatches.packed.space, batches.first)
        points = chain_starts(model, modes, minibatches.packed.space, batches.first, start, num_chains)
        points = points.to(evaluator.anchors)
        probe = minibatches.prepare(points[0])
        estimate: Estimate = Estimator(evaluator, minibatches.once)
        if control_variates:
            centers = points_of(modes, "mode", 1)
            estimate = ControlVariates(estimate, centers, *minibatches.of_all_data(centers))
        whitener = _whitener(whiten, model, minibatches, modes, points[:: num_chains if modes else 1])
    checkpoint = as_checkpoint(checkpoint)
    stream = Stream(minibatches.one_pass, generators, keeps=checkpoint is not None and minibatches.number > 1)
    records = Records(plan.draws, points, memory_limit)
    run = Run(plan, estimate, minibatches.packed.space, whitener, points, stream, records)
    settings = plan.settings() | {
        "batch_size": batch_size,
        "order": order,
        "whiten": whiten,
        "start": start,
        "chains": len(points),
        "guide": fingerprint(whitener, points),
        "control_variates": f"{float(centers.norm()):.6g}" if control_variates else False,
    }
    files = Resumption("sgmcmc", checkpoint, settings, probe, minibatches.density)
    files.load(run)
    run.go(progress_bar, lambda: files.save(run), files.is_due)
    return _result(run, minibatches, max(len(modes), 1))


def _check_options(guide: Any, control_variates: bool, whiten: str | None, start: str) -> None:
    if whiten is not None:
        require_choice("whiten", whiten, "guide", "prior")
    require_choice("start", start, "mode", "draws")
    if guide is None and (control_variates or whiten == "guide"):
        raise ValueError(
            "sgmcmc: control_variates and whiten='guide' need a guide, and guide is None: pass one, or whiten='prior'."
        )
    if world_size() > 1:
        raise ValueError("sgmcmc samples in one process: run it without torch.distributed.")


@torch.no_grad()
def _whitener(
    whiten: str | None,
    model: Callable[..., Any],
    minibatches: Minibatches,
    modes: Sequence[Mode],
    centers: Tensor,
) -> Whitener:
    """The preconditioner of all chains, which start at or around points ``(K, p)``."""
    if whiten is None:
        return Scales(torch.ones_like(centers[0]))
    with local_parameters(), poutine.block():
        if whiten == "guide":
            return Gaussians([mode.gaussian() for mode in modes])
        return Scales(prior_scales(model, minibatches.batches.first, minibatches.packed.space, centers))


def _result(run: Run, minibatches: Minibatches, num_modes: int) -> ChainResult:
    """What has been kept, by site, with the facts of the run."""
    first, last = run.plan.warmup_draws, run.records.count
    if last <= first:
        raise KeyboardInterrupt(
            "sgmcmc was interrupted before the first draw; a checkpoint, if there is one, holds its state."
        )
    unpack = run.space.unpack
    (early, early_stats), (positions, stats) = run.records.part(0, first), run.records.part(first, last)
    info = {
        "method": f"SGMCMC ({run.plan.scheme})",
        "modes": num_modes,
        "batches_of_a_pass": minibatches.number,
        "minibatch_gradients": run.gradients,
        "gradients": run.gradients / minibatches.number,
        "steps": run.step,
        "seconds": run.elapsed,
    }
    if run.stopped_by != "num_samples":
        info["stopped_by"] = run.stopped_by
    samples = unpack(early) if first else {}
    _warn_of_heat(run.plan, stats, positions.shape[-1])
    return ChainResult(
        unpack(positions), _typed(stats), samples, _typed(early_stats) if first else {}, info=info
    )


def _typed(stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics with the numbers of cycles as integers."""
    return {name: value.long() if name == "cycle" else value for name, value in stats.items()}


def _warn_of_heat(plan: Plan, stats: dict[str, Tensor], dim: int) -> None:
    """Says which chains are much too hot, by more than the error of a mean over the draws."""
    step, draws = float(stats["step_size"].mean()), stats["step_size"].shape[1]
    rate = step**2 if plan.scheme == "sgld" else 2 * plan.friction * step
    # independent numbers in the mean, at a decay of exp(-rate)
    size = dim * draws * math.tanh(rate * plan.thinning / 2)
    name, limit = ("drift_to_noise", 0.5) if plan.scheme == "sgld" else ("kinetic_temperature", 1.5)
    found = stats[name].mean(-1)
    # the tail of a mean of squares of normal numbers (Laurent and Massart, 2000, lemma 1), one in a thousand for all chains together
    tail = (7 + math.log(len(found))) / size
    hot = (found > limit * (1 + 2 * math.sqrt(tail) + 2 * tail)).nonzero().flatten().tolist()
    if hot:
        worst = float(found.max())
        what = {
            "drift_to_noise": f"the squares of the drift are up to {worst:.3g} times those of the noise, far below 1 where steps are small",
            "kinetic_temperature": f"the kinetic temperature is up to {worst:.3g} in the mean of the draws, and 1 without bias",
        }[name]
        warn_user(
            f"sgmcmc: in {first_of([f'chain {c}' for c in hot], most=10)} {what}: the noise of the gradients, or steps too large for "
            "the curvature away from the modes, heat them, and their draws spread too far. Take a smaller step_size, larger batches, more "
            "friction, or control_variates for chains that stay near the modes."
        )
