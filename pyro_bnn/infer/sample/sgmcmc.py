# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Minibatch sampling: stochastic gradient Langevin and Hamiltonian dynamics for any Pyro model."""

from collections.abc import Callable
from os import PathLike
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyro_bnn.infer.autoguide.laplace_mixture import AutoLaplaceMixture
from pyro_bnn.infer.initialize import run_model
from pyro_bnn.infer.predict.draws import component_draws, posterior_draws
from pyro_bnn.infer.sample.log_density import evaluator_of
from pyro_bnn.infer.sample.microcanonical import Whitener
from pyro_bnn.infer.sample.minibatch_run import ControlVariates, Estimate, Plan, Records, Resumption, Run
from pyro_bnn.infer.sample.minibatches import Estimator, Minibatches, Order, Stream
from pyro_bnn.infer.sample.result import ChainResult
from pyro_bnn.infer.sample.steps import StepSchedule, as_schedule
from pyro_bnn.infer.sample.whitening import Gaussians, Scales, gaussian_of, prior_scales
from pyro_bnn.infer.train.checkpoint import Checkpoint
from pyro_bnn.infer.train.randomness import loader_generators, same_random_numbers
from pyro_bnn.infer.train.settings import describe_sites
from pyro_bnn.model.data import Batch, repeatable_batches
from pyro_bnn.model.packed import PackedModel
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.distributed import world_size
from pyro_bnn.ops.options import require_choice, require_count

SchemeName = Literal["baoa", "sghmc", "sgld"]


def sgmcmc(
    model: Callable[..., Any],
    guide: Any,
    data: Any,
    *,
    scheme: SchemeName = "baoa",
    step_size: float | StepSchedule | Callable[[int], float] = 0.1,
    friction: float = 1.0,
    batch_size: int | None = None,
    order: Order = "symmetric",
    control_variates: bool = False,
    whiten: Literal["guide", "prior"] | None = "guide",
    start: Literal["mode", "draw"] = "mode",
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
    where batches come in symmetric sweeps. ``sample_stats["kinetic_temperature"]`` (of "sghmc" and "baoa") is 1 on average where
    nothing is heated. Compare results of h and h / 2.

    Each chain takes steps of its own noise, and all chains take the **same batch** in a step: one pass of the model serves them
    all. Errors of chains by the noise of gradients are therefore correlated, and R-hat sees only what the injected noise does.

    :param callable model: a Pyro model; terms outside the plate of the data count once, not with the weight of the batch.
    :param guide: a fitted guide: where chains start, the centre of control variates, the preconditioner. ``None`` starts at draws
        from the prior.
    :param data: one batch with all data, or an iterable of batches that covers them in every pass; see ``batch_size``.
    :param str scheme: see above.
    :param step_size: h, in whitened units (posterior standard deviations of the guide; with ``whiten=None`` those of the latents),
        or a schedule: :class:`~pyro_bnn.infer.PolynomialSteps`, :class:`~pyro_bnn.infer.CyclicalSteps`, a function of the number of
        the step. Explicit steps are unstable from :math:`2/\sqrt{\lambda}` on.
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
    :param str start: ``"mode"`` or ``"draw"`` of the guide.
    :param int num_samples: draws per chain that are kept.
    :param int warmup_steps: steps before, whose draws are in ``warmup``.
    :param int thinning: steps from one draw to the next.
    :param int num_chains: C; the chains of a guide's modes one after the other, equally many.
    :param float memory_limit: bytes that draws may take; by default what is free.
    :param bool progress_bar: whether to show a bar, in terminals and notebooks.
    :param checkpoint: a :class:`~pyro_bnn.infer.Checkpoint` or a path. If the file exists, the run goes on as it would have without the
        interruption, bit by bit on one device; ``num_samples`` may have grown, other settings, models and data are refused.
    :return: draws, and of each the ``step_size``, the ``cycle``, the ``log_density_estimate`` (by the batch of its step, where the
        step took its gradient: **not** the log density of the draw), and the ``kinetic_temperature`` :math:`|r|^2/p`.
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
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    batches, generators = repeatable_batches(data), loader_generators(data)
    with same_random_numbers(generators):
        evaluator = evaluator_of(model, batches.first)
        packed = evaluator.joint.packed
        minibatches = Minibatches(evaluator, batches, batch_size, order)
        modes = _modes(packed, guide, batches.first)
        if num_chains % len(modes):
            raise ValueError(
                f"num_chains={num_chains} is no multiple of the {len(modes)} modes of the guide."
            )
        probe = minibatches.prepare(modes[0])
        estimate: Estimate = Estimator(evaluator, minibatches.once)
        if control_variates:
            estimate = ControlVariates(estimate, modes, *minibatches.of_all_data(modes))
        whitener = _whitener(packed, guide, batches.first, modes, num_chains, whiten)
        settings = plan.settings() | {
            "batch_size": batch_size,
            "order": order,
            "control_variates": control_variates,
            "whiten": whiten,
            "num_chains": num_chains,
            "start": start,
            "guide": _fingerprint(modes, whitener, num_chains),
            **describe_sites(model, batches.first),
        }
    points = _points(packed, guide, batches.first, modes, num_chains, start)
    stream = Stream(minibatches.one_pass, generators, keeps=checkpoint is not None and minibatches.number > 1)
    run = Run(plan, estimate, packed.space, whitener, points, stream, Records(plan, points, memory_limit))
    files = Resumption(checkpoint, settings, probe, minibatches.density)
    files.load(run)
    run.go(progress_bar, files)
    return _result(run, minibatches)


def _check_options(guide: Any, control_variates: bool, whiten: str | None, start: str) -> None:
    if whiten is not None:
        require_choice("whiten", whiten, "guide", "prior")
    require_choice("start", start, "mode", "draw")
    if guide is None and (control_variates or whiten == "guide"):
        raise ValueError(
            "sgmcmc: control_variates and whiten='guide' need a guide, and guide is None: pass one, or whiten='prior'."
        )
    if world_size() > 1:
        raise ValueError("sgmcmc samples in one process: run it without torch.distributed.")


def _modes(packed: PackedModel, guide: Any, batch: Batch) -> Tensor:
    """The modes of a guide, or a draw of the prior, as packed vectors ``(K, p)``."""
    with local_parameters(), torch.no_grad(), poutine.block():
        if guide is None:
            sites = run_model(packed.model, batch).nodes
            return packed.space.pack({n: sites[n]["value"] for n in packed.space.slices}).detach()[None]
        if isinstance(guide, AutoLaplaceMixture):
            return torch.stack([part.loc.detach() for part in guide.components])
        return packed.space.pack(guide.median(*batch[0], **batch[1])).detach()[None]


def _points(
    packed: PackedModel, guide: Any, batch: Batch, modes: Tensor, num_chains: int, start: str
) -> Tensor:
    """Where chains start, ``(C, p)``."""
    each = num_chains // len(modes)
    if guide is None:
        return torch.cat([_modes(packed, None, batch) for _ in range(num_chains)])
    if start == "mode":
        return modes.repeat_interleave(each, 0)
    if len(modes) > 1:
        return packed.space.pack(
            {n: v.flatten(0, 1) for n, v in component_draws(guide, each).items()}
        ).detach()
    return packed.space.pack(posterior_draws(guide, num_chains, batch=batch)).detach()


def _whitener(
    packed: PackedModel, guide: Any, batch: Batch, modes: Tensor, num_chains: int, whiten: str | None
) -> Whitener:
    """The preconditioner of all chains."""
    if whiten is None:
        return Scales(torch.ones_like(modes[0]))
    if whiten == "prior":
        scales = prior_scales(packed.model, batch, packed.space, modes)
        return Scales(scales.repeat_interleave(num_chains // len(modes), 0))
    parts = guide.components if isinstance(guide, AutoLaplaceMixture) else [guide]
    return Gaussians([gaussian_of(part, packed.space, batch) for part in parts])


def _fingerprint(modes: Tensor, whitener: Whitener, num_chains: int) -> str:
    """A few digits by which two guides are told apart."""
    rows = torch.linspace(-1, 1, modes.shape[1], dtype=modes.dtype, device=modes.device).expand(
        num_chains, -1
    )
    return f"modes {float(modes.norm()):.6g}, scales {float(whitener.forward(rows).norm()):.6g}"


def _result(run: Run, minibatches: Minibatches) -> ChainResult:
    """What has been kept, by site, with the facts of the run."""
    plan, records = run.plan, run.records
    split, count = min(plan.warmup_draws, records.count), records.count
    warmup, draws = (
        run.space.unpack(records.positions[part].transpose(0, 1))
        for part in (slice(split), slice(split, count))
    )
    stats = {name: value[:count].T for name, value in records.stats.items()}
    info = {
        "method": f"SGMCMC ({plan.scheme})",
        "minibatch gradients": run.gradients,
        "gradients": round(run.gradients / minibatches.number, 1),
        "batch": "all data" if minibatches.number == 1 else f"1 of {minibatches.number} of a pass",
        "steps": run.step,
        "seconds": run.elapsed,
        "stopped by": run.stopped_by,
    }
    return ChainResult(
        draws,
        {name: value[:, split:] for name, value in stats.items()},
        warmup if split else {},
        {name: value[:, :split] for name, value in stats.items()} if split else {},
        info=info,
    )
