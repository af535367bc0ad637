# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Microcanonical Langevin chains around the modes that a guide knows."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_bnn.infer.refine.stacking import stack
from pyro_bnn.infer.sample.adaptation import FEWEST_STEPS, MOST_COORDINATES, pooled, spread
from pyro_bnn.infer.sample.log_density import log_density
from pyro_bnn.infer.sample.microcanonical_run import Plan, Run, Units
from pyro_bnn.infer.sample.records import Records, Resumption
from pyro_bnn.infer.sample.result import ChainResult
from pyro_bnn.infer.sample.starts import Mode, Start, chain_starts, modes_of
from pyro_bnn.infer.sample.whitening import Gaussians, Scales, fingerprint, prior_units
from pyro_bnn.infer.train.checkpoint import Checkpoint, as_checkpoint
from pyro_bnn.model.data import Batch, Batches
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.described import first_of
from pyro_bnn.ops.notice import warn_user
from pyro_bnn.ops.options import require_choice, require_count, require_number

Whiten = Literal["prior", "guide", "diagonal"]
ModeWeights = Literal["equal", "evidence", "stacking"]

#: A larger share of refused steps, or of diverging transitions, of a chain is warned of.
_MOST_REFUSED = 0.01


def mclmc(
    model: Callable[..., Any],
    guide: Any,
    data: Any,
    *,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 1,
    adjusted: bool = False,
    start: Start = "mode",
    whiten: Whiten | None = "diagonal",
    weights: ModeWeights = "equal",
    step_size: float | None = None,
    momentum_length: float | None = None,
    per_mode: bool = False,
    collapse: str | Sequence[str] | None = None,
    energy_variance: float = 0.02,
    target_accept_prob: float = 0.8,
    thinning: int = 1,
    memory_limit: float | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    progress_bar: bool = True,
) -> ChainResult:
    r"""
    Microcanonical Langevin chains around the modes that a guide knows, all chains together: one batched gradient for each step.

    A chain has a position :math:`u` (all latents, unconstrained, packed into one vector of length p) and a direction :math:`n`,
    :math:`|n| = 1`, in coordinates :math:`z` whitened by :math:`u = R z`. With the gradient :math:`g = R^\top\nabla\log p(u, y)`,
    :math:`e = g/|g|`, a step of size h turns for h/2, moves for h and turns for h/2:

    .. math::
        \text{turn for } h:\quad & n \leftarrow \frac{e\,(1-s)(1+s+c(1-s)) + 2 s n}{|\cdot|},\quad
            s = e^{-h|g|/(p-1)},\ c = e^\top n, \\
        \text{move for } h:\quad & u \leftarrow u + h R n, \\
        \text{then}\quad & n \leftarrow \frac{n + \nu\epsilon}{|\cdot|},\quad \nu^2 = \frac{e^{2h/L} - 1}{p},\ \epsilon\sim N(0, I).

    Each turn changes the kinetic energy by :math:`(p-1)\log\bigl(\tfrac{1+c}2 e^{d} + \tfrac{1-c}2 e^{-d}\bigr)`,
    :math:`d = h|g|/(p-1)`; the energy error of a step is that and the change of :math:`-\log p`, zero in continuous time.

    **Unadjusted** chains (the default) take every step. Their bias is of the order :math:`h^2`, and the step size is found from it:
    the variance of the energy error per dimension is ``energy_variance``. They are much cheaper than exact ones for many latents.
    **Adjusted** chains are exact: from a new direction a path of N steps without refreshment, whose end is accepted with probability
    :math:`\min(1, e^{-\Delta})` for its energy error :math:`\Delta`; N is uniform up to :math:`2L/h` and the same for all chains.

    **Warm-up.** Step sizes follow the energy errors by stochastic approximation in :math:`\log h`, pooled over all chains. After a quarter and
    after half of the steps the scales of R are estimated (``whiten="diagonal"``): those of the prior times, for each site, the factor
    :math:`(E|x|^2/E|g|^2)^{1/4}` with its positions x from the prior's centre and gradients g in units of the prior. Then
    :math:`L = 3\,(E|z|^2)^{1/2}`, three times the radius, until the second half has shown an autocorrelation time of less than a tenth of it, and L
    becomes 0.4 of the way between two independent draws. With ``adjusted=True`` this is the first half of the warm-up; the mean length L of a
    path is then 1.5 times :math:`(\sum_i\operatorname{Var} z_i)^{1/2}` within chains, and the second half, of adjusted transitions, finds h by
    dual averaging.

    :param callable model: a Pyro model.
    :param guide: where chains start. A mixture guide (:class:`~pyro_bnn.infer.autoguide.AutoMixture`,
        :class:`~pyro_bnn.infer.autoguide.AutoLaplaceMixture`) has one mode for each component, any other guide one, a list has those of
        its items: guides (an ensemble), or values by site. With ``None`` each chain starts at a draw of the prior, and is a mode of its own.
    :param data: the full data, in one batch or in several, of which each step takes all.
    :param int num_samples: draws that are kept of each chain.
    :param int warmup_steps: steps of adaptation, and of the way from the start, of each chain.
    :param int num_chains: chains for each mode, which follow one another in the result.
    :param bool adjusted: whether chains are Metropolis-adjusted; ``num_samples`` then counts transitions, of several gradients each.
    :param str start: ``"mode"`` (of a Gaussian guide its median) or ``"draws"`` of each mode's approximation.
    :param whiten: R is diagonal, with the scales of the prior times factors of the sites that the warm-up finds (``"diagonal"``), or
        without them (``"prior"``); the square root of the covariance of the guide's Gaussian at each mode, in whatever structure it has
        (``"guide"``), for which :math:`L = \sqrt p` at first; or the identity (``None``). A mode's curvature is wrong elsewhere: it makes only
        short chains better.
    :param str weights: of the modes: ``"equal"``; ``"evidence"``, in proportion to the evidence that the guide has for each; or ``"stacking"``, by
        leave-one-out predictive densities of the data (:func:`~pyro_bnn.infer.stack`, which also weighs by held-out data, for
        ``run.reweighted``). A chain has the weight of its mode, divided by ``num_chains``.
    :param float step_size: h, in whitened units, for all chains; by default found in the warm-up.
    :param float momentum_length: L, in whitened units; by default found in the warm-up.
    :param bool per_mode: whether each mode has a step size and a momentum length of its own, as modes of very different widths need; by default
        all chains share them.
    :param collapse: sites that are integrated out in closed form (:func:`~pyro_bnn.infer.log_density`), in which the chains do not move: they are
        drawn given the others in the end. The weights of a last layer under Gaussian noise follow every move of the other layers; without them
        steps are several times as long.
    :param float energy_variance: the variance of the energy error of unadjusted steps per dimension: 0.02 explores, 0.0005 is accurate.
    :param float target_accept_prob: the mean acceptance probability of adjusted transitions.
    :param int thinning: steps, or adjusted transitions, from one draw that is kept to the next.
    :param float memory_limit: bytes that draws may take; by default what is free.
    :param checkpoint: a :class:`~pyro_bnn.infer.Checkpoint`, or a path, which is saved every minute. If the file exists, the run
        continues from it, and takes the steps that it would have taken without the interruption, bit by bit on one device.
    :param bool progress_bar: whether to show a bar, in terminals and notebooks.
    :return: chains in the order of the modes. Statistics of each draw: ``lp`` (:math:`\log p(u, y)` with the Jacobian of the
        constraints), ``energy_error`` of its last step, ``step_size``, ``momentum_length``, ``diverging`` (a step since the last draw was refused,
        since it was not finite or its energy error was beyond all bounds; the chain then left in a new direction), ``mode`` (its index); of
        adjusted chains ``path_length`` in place of the momentum length, ``acceptance_rate``, ``accepted``, ``n_steps``. ``info`` has the
        gradients of all chains together, the seconds, and by mode the energy variance reached and the effective sample size (of up to 100
        latents in which the chains move the median, chains of the mode added).
    :raises ValueError: for fewer than two latents, for starting points where the log density is not finite, for whitening or weights that the
        guide does not have, for ``whiten="guide"`` with ``collapse``, for sites that are not Gaussian given the others.
    :raises MemoryError: before the run, if the draws do not fit.
    :raises KeyboardInterrupt: if Ctrl-C comes before the first draw; later, it ends the run, and the draws so far are returned.

    A warning names chains of which more than one step in a hundred was refused, and those that did not move.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_bnn.infer.autoguide import AutoLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        >>> x, y = torch.eye(3), torch.tensor([1.0, -1.0, 0.5])
        >>> guide = AutoLaplace(model).initialize(x, y).polish((x, y))
        >>> run = mclmc(model, guide, (x, y), num_samples=200, num_chains=2, progress_bar=False)
        >>> run.samples["w"].shape, sorted(run.sample_stats)[:3]
        (torch.Size([2, 200, 3]), ['diverging', 'energy_error', 'lp'])

    **References**

    [1] Robnik, De Luca, Silverstein, Seljak, *Microcanonical Hamiltonian Monte Carlo*, JMLR 2023: dynamics, step size.

    [2] Robnik, Seljak, *Fluctuation without dissipation: microcanonical Langevin Monte Carlo*, 2023: refreshment, momentum length.

    [3] Sommer, Robnik, Nozadze, Seljak, Rügamer, *Microcanonical Langevin ensembles*, ICLR 2025: chains from ensembles of networks.

    [4] Robnik, Cohn-Gordon, Seljak, *Metropolis-adjusted microcanonical Hamiltonian Monte Carlo*, 2025: the adjustment.
    """
    _check_options(
        num_samples=num_samples, warmup_steps=warmup_steps, num_chains=num_chains, thinning=thinning,
        step_size=step_size, momentum_length=momentum_length, energy_variance=energy_variance,
        target_accept_prob=target_accept_prob,
    )  # fmt: skip
    require_choice("start", start, "mode", "draws")
    require_choice("weights", weights, "equal", "evidence", "stacking")
    if whiten is not None:
        require_choice("whiten", whiten, "prior", "guide", "diagonal")
    plan = Plan(
        num_samples, warmup_steps, thinning, adjusted, energy_variance, target_accept_prob, step_size,
        momentum_length, whiten, per_mode,
    )  # fmt: skip
    batch = Batches(data).first
    density = log_density(model, data, collapse=collapse)
    if density.size < 2:
        raise ValueError(
            f"mclmc: microcanonical dynamics needs at least two latents, found {density.size}"
            f"{' beside those that are integrated out: leave collapse out, or' if collapse is not None else ':'} use nuts."
        )
    space = density.packed.space
    modes = [] if guide is None else modes_of(guide, space, batch)
    whole = chain_starts(model, modes, space, batch, start, num_chains).to(density.dtype)
    points = density.restrict(whole)
    _require_finite(density, points)
    num_modes = len(modes) or num_chains
    shares = _evidence(modes) if weights == "evidence" else None
    units = _units(whiten, model, modes, density, batch, whole[:: len(points) // num_modes])
    records = Records(plan.warmup_draws + num_samples, points, memory_limit, space.dim)
    run = Run(plan, density, units, points, records)
    files = _files(checkpoint, plan, start, run)
    files.load(run)
    run.go(progress_bar, lambda: files.save(run), files.is_due)
    result = _result(run, shares)
    return result.reweighted(_stacked(model, data, result, num_modes)) if weights == "stacking" else result


def _check_options(**options: Any) -> None:
    """Refuses numbers that are none of their kind."""
    for name in ("num_samples", "num_chains", "thinning"):
        require_count(name, options[name])
    require_count("warmup_steps", options["warmup_steps"], least=0)
    require_number("energy_variance", options["energy_variance"], above=0)
    require_number("target_accept_prob", options["target_accept_prob"], above=0, below=1)
    given = {name: options[name] for name in ("step_size", "momentum_length") if options[name] is not None}
    for name, value in given.items():
        require_number(name, value, above=0)
    if options["warmup_steps"] < 3 and len(given) < 2:
        raise ValueError(
            f"warmup_steps={options['warmup_steps']} finds no step size and no momentum length: pass step_size and momentum_length, or more "
            "steps (some hundred)."
        )


@torch.no_grad()
def _require_finite(density: Any, points: Tensor) -> None:
    """Refuses starting points ``(C, p)`` at which the log density or its gradient is not finite."""
    values, gradients = density.value_and_gradient(points)
    for chain, sound in enumerate((values.isfinite() & gradients.isfinite().all(-1)).tolist()):
        if not sound:
            raise ValueError(
                f"mclmc: at the start of chain {chain} the log density is {float(values[chain]):.4g}"
                f"{'' if bool(gradients[chain].isfinite().all()) else ' and its gradient not finite'}: start elsewhere (start='mode', another "
                "guide), or check the model there."
            )


def _evidence(modes: Sequence[Mode]) -> Tensor:
    """The weights of the modes by their evidence, ``(K,)``."""
    if not modes:
        raise ValueError("weights='evidence' are those of a guide's modes, and guide is None.")
    with local_parameters(), torch.no_grad():
        return torch.stack([mode.log_evidence().double() for mode in modes]).softmax(0)


def _stacked(model: Callable[..., Any], data: Any, result: ChainResult, num_modes: int) -> Tensor:
    """The weights of the chains by what their modes predict together, ``(C,)``."""
    each = result.num_chains // num_modes
    posteriors = {
        f"mode {k}": {n: v[k * each : (k + 1) * each].flatten(0, 1) for n, v in result.samples.items()}
        for k in range(num_modes)
    }
    weights = stack(model, posteriors, data, method="loo").weights.double()
    return spread(weights / weights.sum(), result.num_chains) / each


def _units(
    whiten: str | None, model: Any, modes: Sequence[Mode], density: Any, batch: Batch, points: Tensor
) -> Units:
    """In what the chains of modes at points ``(K, p)`` of all latents are whitened."""
    sizes = torch.tensor([part.stop - part.start for part in density.space.slices.values()])
    site = torch.arange(len(sizes)).repeat_interleave(sizes).to(points.device)
    with local_parameters(), poutine.block(), torch.no_grad():
        centre, scale = map(density.restrict, prior_units(model, batch, density.packed.space, points))
        if whiten == "guide":
            if not modes:
                raise ValueError("whiten='guide': there is none. Use whiten='diagonal' or 'prior'.")
            if density.space is not density.packed.space:
                raise ValueError("whiten='guide' whitens all latents: use whiten='diagonal' with collapse.")
            return Units(Gaussians([mode.gaussian() for mode in modes]), centre, None, site)
    scale = torch.ones_like(scale) if whiten is None else scale
    return Units(Scales(scale), centre, scale, site)


def _files(
    checkpoint: Checkpoint | str | os.PathLike[str] | None, plan: Plan, start: str, run: Run
) -> Resumption:
    chains, point = run.chains, run.chains.position[0]
    settings = vars(plan) | {"start": start, "modes": run.num_modes, "chains": len(chains.position)}
    settings |= {"space": list(run.density.space.slices)}
    settings |= {"dtype": str(point.dtype), "guide": fingerprint(run.units.whitener, run.chains.position)}

    def density(at: Tensor) -> float:
        return float(run.density.value_and_gradient(at.unsqueeze(0))[0])

    return Resumption(
        "mclmc", as_checkpoint(checkpoint), settings, (point, float(chains.log_density[0])), density
    )


# ------------------------------------------------------------------ result


def _result(run: Run, shares: Tensor | None) -> ChainResult:
    """The chains, with what is to be said of them."""
    first, last = run.plan.warmup_draws, run.records.count
    if last <= first:
        raise KeyboardInterrupt(
            "mclmc was interrupted before the first draw; a checkpoint, if there is one, holds its state."
        )
    positions, stats = run.records.part(first, last)
    early, early_stats = run.records.part(0, first)
    unpack, complete = run.density.packed.space.unpack, run.density.complete
    each = len(positions) // run.num_modes
    mode = torch.arange(run.num_modes).repeat_interleave(each)
    stats = _typed(stats) | {"mode": mode.unsqueeze(-1).expand(-1, positions.shape[1]).contiguous()}
    _warn(positions, stats, mode)
    weights = None if shares is None else (spread(shares, len(positions)) / each).cpu()
    whole, log_prob = complete(positions)
    stats["lp"] = stats["lp"] + log_prob.cpu()
    if first:
        early, log_prob = complete(early)
        early_stats["lp"] = early_stats["lp"] + log_prob.cpu()
    early_samples = unpack(early) if first else {}
    return ChainResult(
        unpack(whole), stats, early_samples, _typed(early_stats), weights, _info(run, positions)
    )


def _typed(stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics with their types: whether something happened, how many, how much."""
    kinds = {"diverging": torch.bool, "accepted": torch.bool, "n_steps": torch.int64}
    return {
        name: value.nan_to_num(0).to(kinds[name]) if name in kinds else value for name, value in stats.items()
    }


def _info(run: Run, positions: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {
        "method": "adjusted MCLMC" if run.plan.adjusted else "MCLMC",
        "modes": run.num_modes,
        "gradients": run.gradients,
        "seconds": run.elapsed,
        "effective_sample_size": _numbers(_effective_sizes(positions, run.num_modes)),
    }
    sampled = run.step - run.plan.warmup_steps
    if not run.plan.adjusted:
        found["momentum_length"] = _numbers(run.length)
        found["energy_variance"] = _numbers(run.squares / (run.dim * sampled))
    if run.stopped_by != "num_samples":
        found["stopped_by"] = run.stopped_by
    return found


def _numbers(values: Tensor) -> Any:
    """Four digits of each number, or of the only one."""
    found = [float(f"{value:.4g}") for value in values.tolist()]
    return found[0] if len(found) == 1 else found


def _effective_sizes(positions: Tensor, num_modes: int) -> Tensor:
    """By mode ``(K,)``, the median over latents of the effective sample sizes of its chains together, each by itself."""
    chains, draws, dim = positions.shape
    if draws < FEWEST_STEPS:
        return positions.new_full((num_modes,), torch.nan)
    size = min(dim, MOST_COORDINATES)
    chosen = torch.arange(size, device=positions.device) * dim // size
    sizes = effective_sample_size(positions[:, :, chosen].double().unsqueeze(0), chain_dim=0, sample_dim=2)
    each = sizes.clamp(max=draws)
    return (pooled(each, num_modes) * (chains // num_modes)).nanmedian(-1).values


def _warn(positions: Tensor, stats: dict[str, Tensor], mode: Tensor) -> None:
    """Says which chains left the typical set, or stayed where they were."""
    share = stats["diverging"].double().mean(-1)
    stuck = (positions == positions[:, :1]).all(-1).all(-1).cpu()
    what = {"refused steps": share > _MOST_REFUSED, "no movement at all": stuck}
    for text, found in what.items():
        if positions.shape[1] > 1 and bool(found.any()):
            named = first_of(
                (f"chain {c} (mode {int(mode[c])})" for c in found.nonzero().flatten().tolist()), most=10
            )
            warn_user(
                f"mclmc: {named}: {text}. Their draws are not those of the posterior: take a smaller step_size or "
                "energy_variance, more warm-up, or leave them out by result.reweighted.",
                RuntimeWarning,
            )
