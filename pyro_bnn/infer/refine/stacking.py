# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Weights of several posteriors that predict best together."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.infer.predict.draws import component_draws
from pyro_bnn.infer.predict.predictive import posterior_predictive, seeded_by
from pyro_bnn.infer.predict.weighted import WeightedChains
from pyro_bnn.model.data import as_batches
from pyro_bnn.ops.described import Described
from pyro_bnn.ops.notice import warn_user
from pyro_bnn.ops.options import require_choice, require_count, require_number
from pyro_bnn.ops.pareto import reliable_shape, smoothed


def stacking_weights(log_densities: Tensor, *, tolerance: float = 1e-8) -> Tensor:
    r"""
    The weights with which a mixture of K predictive densities scores best at N points,

    .. math:: \max_w \frac1N\sum_n \log\sum_k w_k p_k(y_n), \qquad w_k \ge 0,\ \sum_k w_k = 1.

    The problem is concave. It is solved by Newton's method on barriers :math:`\mu\sum_k\log w_k` with :math:`\mu\to0`, and the
    result is certified: with :math:`g_k = \frac1N\sum_n p_k(y_n)/\sum_j w_j p_j(y_n)`, Jensen's inequality bounds what any
    other weights can gain by :math:`\log\max_k g_k` (:func:`stacking_gap`). Where several weights are best, as for two equal
    columns, equal ones share.

    :param Tensor log_densities: :math:`\log p_k(y_n)` at points that posterior k has not seen (held-out data, leave-one-out), in
        nats, shape ``(K, N)``; minus infinity where a density is zero.
    :param float tolerance: the largest gap, in nats per point.
    :return: the weights, shape ``(K,)``.
    :raises ValueError: for another shape, for NaN or plus infinity, or for a point at which all densities are zero.
    :raises RuntimeError: if the gap stays above the tolerance.

    Example::

        >>> import pyro.distributions as dist
        >>> y = torch.tensor([-1.0, -1.0, -1.0, 1.0])
        >>> log_densities = torch.stack([dist.Normal(m, 0.1).log_prob(y) for m in (-1.0, 1.0)])
        >>> stacking_weights(log_densities)
        tensor([0.7500, 0.2500])

    **References**

    Yao, Vehtari, Simpson, Gelman, *Using stacking to average Bayesian predictive distributions*, Bayesian Analysis 2018, eq. 4.
    """
    require_number("tolerance", tolerance, above=0)
    log_densities = torch.as_tensor(log_densities)
    ratios = _ratios(log_densities)
    weights = _interior_point(ratios, tolerance)
    gap = math.log(float(_gradient(ratios, weights).max()))
    if not gap <= tolerance:
        raise RuntimeError(
            f"stacking_weights: the best weights are missed by at most {gap:.2g} nats per point, more than tolerance={tolerance:g}. "
            "Raise the tolerance, or leave out posteriors that are almost the same."
        )
    return weights.to(log_densities.dtype) if log_densities.is_floating_point() else weights


def stacking_gap(log_densities: Tensor, weights: Tensor) -> float:
    r"""
    What the best weights can gain on given ones, at most: :math:`\log\max_k g_k` of :func:`stacking_weights`.

    :param Tensor log_densities: shape ``(K, N)``, nats.
    :param Tensor weights: shape ``(K,)``; they sum to one.
    :return: nats per point; zero where the weights are the best ones.
    :raises ValueError: as :func:`stacking_weights`, and for weights that are none.

    Example::

        >>> log_densities = torch.tensor([[0.0, -1.0], [-1.0, 0.0]])
        >>> stacking_gap(log_densities, torch.tensor([0.5, 0.5]))
        0.0
    """
    ratios = _ratios(log_densities)
    weights = weights.double()
    if weights.shape != ratios.shape[:1] or bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-5:
        raise ValueError(
            f"weights must be {len(ratios)} numbers of at least 0 that sum to 1, one per row of log_densities, found {weights.tolist()}."
        )
    return max(0.0, math.log(float(_gradient(ratios, weights / weights.sum()).max())))


def _ratios(log_densities: Tensor) -> Tensor:
    """Densities ``(K, N)`` relative to the largest at each point."""
    values = torch.as_tensor(log_densities).detach().double()
    if values.dim() != 2 or 0 in values.shape:
        raise ValueError(
            f"log_densities has shape {tuple(values.shape)}, expected (K, N): one row per posterior, one column per point."
        )
    largest = values.amax(0)
    for name, wrong in (("NaN", values.isnan().any(0)), ("not finite", ~largest.isfinite())):
        if bool(wrong.any()):
            where = int(wrong.nonzero()[0])
            raise ValueError(
                f"log_densities: those of point {where} are {values[:, where].tolist()} ({name}), expected finite numbers, or minus "
                "infinity for some of the posteriors: look at the predictions there."
            )
    return (values - largest).exp()


def _gradient(ratios: Tensor, weights: Tensor) -> Tensor:
    """The derivative of the mean log density in each weight, shape ``(K,)``; weighted, they sum to one."""
    return (ratios / (weights @ ratios)).mean(-1)


def _interior_point(ratios: Tensor, tolerance: float) -> Tensor:
    """
    Minimises the sum of the weights less the mean log density on w > 0; at the optimum the weights sum to one by themselves.
    A primal-dual method: every direction decreases the barrier function, so that halving its step does.
    """
    size = len(ratios)
    w = torch.full((size,), 1 / size, dtype=ratios.dtype, device=ratios.device)
    z = torch.ones_like(w)  # multipliers of w > 0: w z = mu on the path

    def barrier(at: Tensor, mu: float) -> float:
        return float(at.sum() - (at @ ratios).log().mean() - mu * at.log().sum())

    for _ in range(200):
        if math.log(float(_gradient(ratios, w / w.sum()).max())) <= 0.1 * tolerance:
            break
        mu = 0.1 * float(w @ z) / size
        scaled = ratios / (w @ ratios)
        slope = 1 - scaled.mean(-1) - mu / w
        hessian = scaled @ scaled.mT / ratios.shape[1]
        step = torch.linalg.solve(hessian + torch.diag(z / w), -slope)
        change = (mu - z * step) / w - z
        length = min(1.0, _room(w, step))
        before, expected = barrier(w, mu), 1e-4 * float(slope @ step)
        while barrier(w + length * step, mu) > before + length * expected + 1e-14 * abs(before):
            length *= 0.5
            if length < 1e-12:
                break
        w, z = w + length * step, z + min(1.0, _room(z, change)) * change
    return w / w.sum()


def _room(values: Tensor, step: Tensor) -> float:
    """How far positive numbers can go along a step and stay positive: 0.99 of the way to the first zero."""
    shrinking = step < 0
    return 0.99 * float((-values[shrinking] / step[shrinking]).min()) if bool(shrinking.any()) else math.inf


@dataclass(repr=False)
class Stacking(Described):
    """
    What :func:`stack` returns; K posteriors, N observations.

    :param weights: the weight of each posterior, shape ``(K,)``.
    :param names: what they are called.
    :param log_densities: the log predictive density of every observation, nats, shape ``(K, N)``.
    :param gap: what other weights could gain, at most; nats per observation.
    :param k_hat: with ``method="loo"`` the shapes of the tails, shape ``(K, N)``.

    Example::

        >>> densities = torch.tensor([[0.0, -2.0], [-2.0, 0.0]])
        >>> found = Stacking(torch.tensor([0.5, 0.5]), ["left", "right"], densities, 0.0)
        >>> round(found.score, 4)
        -0.5662
    """

    weights: Tensor
    names: list[str]
    log_densities: Tensor
    gap: float
    k_hat: Tensor | None = None

    @property
    def score(self) -> float:
        """The mean log predictive density of the mixture, nats per observation."""
        return float((self.weights.log().unsqueeze(-1) + self.log_densities.double()).logsumexp(0).mean())

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        rows = {
            name: f"weight {float(w):.3f}, alone {float(row.mean()):.3f} nats per observation"
            for name, w, row in zip(self.names, self.weights, self.log_densities, strict=True)
        }
        size = self.log_densities.shape[1]
        title = f"stacking of {len(self.names)} posteriors: {self.score:.3f} nats per observation, of {size}"
        return title, rows | {"missed": f"at most {self.gap:.1g} nats per observation"}


@torch.no_grad()
def stack(
    model: Callable[..., Any],
    posteriors: Any,
    data: Any,
    *,
    method: Literal["held_out", "loo"] = "held_out",
    site: str | None = None,
    num_samples: int = 200,
    generator: torch.Generator | None = None,
) -> Stacking:
    r"""
    The weights with which several posteriors, modes or chains predict best together.

    Modes of a network are weighed here by what they predict, not by the volume of a Gaussian around them, as the evidence does.
    Held-out data need nothing else. ``"loo"`` takes the data that the posteriors were fitted to, and the leave-one-out density
    :math:`\log p(y_n \mid y_{-n}) \approx \log\sum_s w_{sn} p(y_n \mid z_s)` with Pareto-smoothed :math:`w_{sn} \propto 1/p(y_n \mid
    z_s)` [1, 2]. It takes the draws of every posterior for exact ones of the mode that it stands for: right for chains, and for a
    linearised Laplace approximation as far as it is the posterior of its linearised model. A warning says where k-hat is too large.

    :param callable model: a Pyro model.
    :param posteriors: a list of posteriors (guides, runs, draws by site), a mapping from names to them, a mixture guide, whose
        components they are, or a run of several chains, whose present weights do not enter.
    :param data: held-out observations, or for ``"loo"`` those of the fit, in any form.
    :param str method: ``"held_out"`` or ``"loo"``.
    :param str site: the observed site; needed if there are several.
    :param int num_samples: draws of every guide; of runs and draws all are taken.
    :param generator: source of random numbers; the global state then stays as it is.
    :return: weights and densities.
    :raises ValueError: for no posteriors, or if the data hold no observations.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(4)
        >>> modes = {"right": {"w": torch.full((10,), 1.0)}, "wrong": {"w": torch.full((10,), -1.0)}}
        >>> stack(model, modes, (x, torch.tensor([0.9, 1.1, 1.0, 1.0]))).weights.round(decimals=4)
        tensor([1., 0.])

    **References**

    [1] Yao, Vehtari, Simpson, Gelman, *Using stacking to average Bayesian predictive distributions*, Bayesian Analysis 2018.

    [2] Vehtari, Gelman, Gabry, *Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC*, Statistics and
    Computing 2017.
    """
    require_choice("method", method, "held_out", "loo")
    require_count("num_samples", num_samples)
    batches = as_batches(data)
    with seeded_by(generator):
        members = _members(posteriors, num_samples)
        values = [_log_likelihood(model, member, batches, site, num_samples) for member in members.values()]
    names = list(members)
    if method == "held_out":
        log_densities, shapes = torch.stack([v.logsumexp(0) - math.log(len(v)) for v in values]), None
    else:
        found = [leave_one_out(v) for v in values]
        log_densities, shapes = (torch.stack(part) for part in zip(*found, strict=True))
        limits = torch.tensor([reliable_shape(len(v)) for v in values], dtype=shapes.dtype).unsqueeze(-1)
        if bad := int((shapes > limits).sum()):
            warn_user(
                f"stack: k-hat is above {limits.min():.2f} for {bad} of {shapes.numel()} leave-one-out densities, up to {float(shapes.max()):.2f}: "
                "they are not to be relied on. Take held-out data, or more draws."
            )
    weights = stacking_weights(log_densities)
    return Stacking(weights, names, log_densities, stacking_gap(log_densities, weights), shapes)


def leave_one_out(log_likelihood: Tensor) -> tuple[Tensor, Tensor]:
    """
    Leave-one-out log predictive densities by Pareto-smoothed importance sampling.

    :param log_likelihood: of every observation under every draw, shape ``(S, N)``, nats.
    :return: log densities and the shapes of the tails, both ``(N,)``.
    """
    columns = [(column, *smoothed(-column)) for column in log_likelihood.double().mT]
    densities = torch.stack([(column + log_weights).logsumexp(0) for column, log_weights, _ in columns])
    return densities, torch.tensor([shape for *_, shape in columns], dtype=densities.dtype)


def _members(posteriors: Any, num_samples: int) -> dict[str, Any]:
    """The single posteriors by name."""
    if isinstance(posteriors, Mapping) and not any(hasattr(v, "shape") for v in posteriors.values()):
        found = {str(name): posterior for name, posterior in posteriors.items()}
    elif isinstance(posteriors, (list, tuple)):
        found = {f"posterior {k}": posterior for k, posterior in enumerate(posteriors)}
    elif hasattr(posteriors, "get_samples"):
        draws = _chains(posteriors)
        chains = range(len(next(iter(draws.values()))))
        found = {f"chain {k}": {name: value[k] for name, value in draws.items()} for k in chains}
    elif hasattr(posteriors, "components"):
        found = {f"component {k}": guide for k, guide in enumerate(posteriors.components)}
    elif getattr(posteriors, "num_components", 0):
        draws = component_draws(posteriors, num_samples)
        parts = range(posteriors.num_components)
        found = {f"component {k}": {name: value[k] for name, value in draws.items()} for k in parts}
    else:
        raise ValueError(
            f"stack needs several posteriors, a mixture guide or a run of several chains, found {type(posteriors).__name__}."
        )
    if not found:
        raise ValueError("stack: there are no posteriors.")
    return found


def _chains(run: Any) -> Mapping[str, Tensor]:
    """Draws by chain, of which the weights of chains say nothing: they are sought."""
    if not isinstance(run, WeightedChains):
        return dict(run.get_samples(group_by_chain=True))
    weights = run.draw_weights.unflatten(0, (run.num_chains, -1))
    if not bool((weights == weights[:, :1]).all()):
        raise ValueError(
            "stack weighs chains, but the draws of a chain have weights of their own: pass a list of posteriors."
        )
    return dict(run.samples)


def _log_likelihood(
    model: Callable[..., Any], posterior: Any, data: Any, site: str | None, num_samples: int
) -> Tensor:
    """The log likelihood of every observation under every draw, shape ``(S, N)``; those masked are left out."""
    given = isinstance(posterior, Mapping) or hasattr(posterior, "get_samples")
    sites = posterior_predictive(model, posterior, data, num_samples=None if given else num_samples)
    if site is None and len(sites) != 1:
        raise ValueError(f"stack: the model has the observed sites {list(sites)}: choose one by site=.")
    name = next(iter(sites)) if site is None else site
    if name not in sites or sites[name].log_likelihood is None:
        raise ValueError(f"stack: there is no observed site {name!r} with observations in the data.")
    found: Any = sites[name]
    values, mask = found.log_likelihood, found.mask
    kept = values[:, mask] if mask is not None and mask.shape == values.shape[1:] else values.flatten(1)
    if not kept.shape[1]:
        raise ValueError(f"stack: all observations of site {name!r} are masked.")
    return kept
