# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Draws of a guide, weighted so that they are draws of the posterior."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.infer.autoguide.empirical import AutoEmpirical
from pyro_bnn.infer.autoguide.linearized import LinearizedGuide
from pyro_bnn.infer.predict.density import guide_log_prob
from pyro_bnn.infer.predict.draws import Draws, posterior_draws
from pyro_bnn.infer.predict.predictive import seeded_by
from pyro_bnn.infer.predict.weighted import systematic_index
from pyro_bnn.infer.sample.log_density import LogDensity, log_density
from pyro_bnn.model.data import Arguments, Batch, as_batches
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import is_factor, unwrap
from pyro_bnn.model.packed import PackedModel
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.described import Described, first_of, shape_of
from pyro_bnn.ops.notice import warn_user
from pyro_bnn.ops.options import require_choice, require_count
from pyro_bnn.ops.pareto import reliable_shape, smoothed

Space = Literal["latents", "functions"]

#: Draws whose densities are computed in one pass.
CHAINS = 200


class ImportanceWarning(UserWarning):
    """
    Importance weights in which a few draws decide: their estimates are not to be relied on.

    Example::

        >>> import warnings
        >>> warnings.filterwarnings("error", category=ImportanceWarning)  # raises where weights are not reliable
    """


@dataclass(repr=False)
class ImportanceWeights(Described):
    r"""
    Weighted draws of a guide, see :func:`importance_weights`.

    :param draws: by latent site, shape ``(S,) + site shape``.
    :param log_ratios: :math:`\log p(y, z_s) - \log q(z_s)`, nats, shape ``(S,)``.
    :param log_weights: the smoothed weights, which sum to one, shape ``(S,)``.
    :param k_hat: the shape of the tail of the ratios.
    :param space: ``"latents"`` or ``"functions"``.
    :param model: the model.

    Example::

        >>> ratios = torch.tensor([0.0, 0.0, 0.0, 0.0]).log_softmax(0)
        >>> found = ImportanceWeights({"w": torch.arange(4.0)}, ratios, ratios, 0.1, "latents", lambda: None)
        >>> found.mean(found.draws["w"]), found.effective_sample_size, found.resample(2)["w"]
        (tensor(1.5000), 4.0, tensor([1., 3.]))
    """

    draws: Draws
    log_ratios: Tensor
    log_weights: Tensor
    k_hat: float
    space: Space
    model: Callable[..., Any] = field(repr=False)

    @property
    def weights(self) -> Tensor:
        """The smoothed weights, which sum to one, shape ``(S,)``."""
        return self.log_weights.exp()

    @property
    def effective_sample_size(self) -> float:
        r""":math:`1/\sum_s w_s^2`: so many draws of the posterior are worth as much, where :math:`\hat k` is small."""
        return float(1 / self.weights.square().sum())

    @property
    def is_reliable(self) -> bool:
        """Whether the tail is light enough for so many draws, see :func:`importance_weights`."""
        return self.k_hat <= reliable_shape(len(self.log_weights))

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        size = len(self.log_weights)
        verdict = "reliable" if self.is_reliable else "not reliable"
        rows = {
            "k-hat": f"{self.k_hat:.2f}: {verdict} (at most {reliable_shape(size):.2f} for {size} draws)",
            "effective draws": f"{self.effective_sample_size:.1f} of {size}",
            "sites": first_of(f"{name} ({shape_of(value[0])})" for name, value in self.draws.items()),
        }
        target = "the posterior" if self.space == "latents" else "the posterior of the linearised model"
        return f"importance weights for {target}", rows

    def mean(self, values: Tensor) -> Tensor:
        """
        The weighted mean of something that was computed of every draw.

        :param values: shape ``(S, ...)``; conditions and whole numbers count as real ones. Those of draws of weight zero do not enter,
            even where they are not finite.
        :return: shape ``(...)``.
        :raises ValueError: if there is not one value per draw.
        """
        if values.shape[:1] != self.log_weights.shape:
            raise ValueError(
                f"values has shape {tuple(values.shape)}, expected (S, ...) with S = {len(self.log_weights)}, the number of draws."
            )
        weights = self.weights.to(values.device)
        if not (values.is_floating_point() or values.is_complex()):
            values = values.to(weights)
        kept = weights > 0
        return torch.tensordot(weights[kept].to(values), values[kept], 1)

    def resample(self, num_samples: int) -> Draws:
        """
        Draws of equal weight that stand for these: a draw of weight w comes :math:`nw` times, rounded up or down.

        They go where draws go, ``posterior_predictive(model, guide, data, draws=found.resample(200))``; with a Laplace guide,
        predictions are those of its linearised model, which is what ``space="functions"`` needs.

        :param int num_samples: the number of draws n.
        :return: by latent site, shape ``(n,) + site shape``.
        """
        require_count("num_samples", num_samples)
        index = systematic_index(self.weights.cpu(), num_samples)
        return {name: value[index.to(value.device)] for name, value in self.draws.items()}

    def guide(self) -> AutoEmpirical:
        """
        The weighted draws as a guide, for everything that takes one.

        :return: the guide.
        :raises ValueError: in function space: a guide of draws predicts by the model, not by the linearised one.
        """
        if self.space == "functions":
            raise ValueError(
                "these are draws for the linearised model of a guide, and a guide of draws predicts by the model itself: predict with "
                "posterior_predictive(model, guide, data, draws=found.resample(n)) and the guide that they come from."
            )
        return AutoEmpirical(self.model, self.draws, weights=self.weights)


@torch.no_grad()
def importance_weights(
    model: Callable[..., Any],
    guide: Any,
    data: Any,
    *,
    num_samples: int = 1000,
    space: Space = "latents",
    generator: torch.Generator | None = None,
) -> ImportanceWeights:
    r"""
    Draws of any guide with a density, and Pareto-smoothed weights that make them draws of the posterior.

    In the space of the latents draw :math:`z_s \sim q` has the ratio :math:`r_s = p(y, z_s)/q(z_s)`. Expectations under the
    weights :math:`w_s \propto r_s` converge to those of the posterior, as fast as the tail of the ratios allows: the weights are
    smoothed by a generalised Pareto distribution fitted to the largest ones, whose shape :math:`\hat k` says how many moments
    they have. Above :math:`\min(1 - 1/\log_{10} S, 0.7)` a warning says that they are not to be relied on [1]. In a network
    they are, in practice, never reliable in this space: the logarithm of the ratio is a sum of errors in all p directions.

    **Function space.** A guide that predicts by its linearised model [2] replaces the parameters of the observations by
    :math:`f(u) = \phi(\hat u) + J (u - \hat u)`. The posterior of *that* model,
    :math:`\tilde p(u \mid y) \propto p(u) \prod_n p(y_n \mid f_n(u))`, has the exact likelihood and the exact prior, and the guide
    approximates it by a Gaussian. The ratio is :math:`\tilde p(y, u)/q(u)`. With a Gaussian prior and the full
    Gauss-Newton matrix, :math:`q(u) \propto p(u) \exp\sum_n (r_n^\top\delta_n - \tfrac12 \delta_n^\top F_n \delta_n)` with :math:`\delta_n =
    f_n(u) - f_n(\hat u)` and score r, F Fisher information at :math:`f(\hat u)` (at a mode), so that prior and everything that the
    data do not see cancel:

    .. math:: \log r(u) = \sum_n \log p(y_n \mid f_n) - r_n^\top \delta_n + \tfrac12 \delta_n^\top F_n\delta_n + \mathrm{const}.

    The ratio depends on u through the function at the training inputs alone. Function values at any other inputs are, given
    those, the same Gaussian under both, so that this is the ratio :math:`\tilde p(f \mid y)/q(f)` of the densities of the function at
    training inputs and any others *together*: weights of functions, whose number of directions is what the data say beyond a
    quadratic, not p. For other structures and priors the same ratio :math:`\tilde p(y, u)/q(u)` corrects their errors too.

    Its limits: the target is the posterior of the linearised model, not of the network; no weights can tell how good the
    linearisation is. For Gaussian observations of known variance and the full structure they are all the same, because the
    guide is that posterior. Predictions need the guide: ``posterior_predictive(model, guide, data, draws=found.resample(n))``.
    A mixture is linearised around each mode: weigh ``guide.components`` one by one.

    :param callable model: a Pyro model.
    :param guide: a guide with a density (no point masses, no auxiliary variables), or a list of guides, each with the same share
        of the draws. Latents that a guide holds fixed stay where they are: the target is the posterior given them.
    :param data: the data with observations, in any form.
    :param int num_samples: the number of draws S.
    :param str space: ``"latents"``, or ``"functions"`` for a guide with a linearised model.
    :param generator: source of random numbers; the global state then stays as it is.
    :return: draws, weights and :math:`\hat k`.
    :raises ValueError: if the guide has no density or lacks a latent site, if all draws are impossible, and in function space if
        it has no linearised model of its own, or the model has a :func:`pyro.factor`.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_bnn import AutoLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Bernoulli(logits=w * x), obs=y)
        >>> x, y = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.0])
        >>> guide = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
        >>> found = importance_weights(model, guide, (x, y), generator=torch.Generator().manual_seed(0))
        >>> found.is_reliable, found.resample(10)["w"].shape
        (True, torch.Size([10]))

    **References**

    [1] Vehtari, Simpson, Gelman, Yao, Gabry, *Pareto smoothed importance sampling*, JMLR 2024.

    [2] Immer, Korzepa, Bauer, *Improving predictions of Bayesian neural nets via local linearization*, AISTATS 2021.
    """
    require_count("num_samples", num_samples)
    require_choice("space", space, "latents", "functions")
    with seeded_by(generator):
        density = log_density(model, data)
    with seeded_by(generator):  # whatever was drawn before
        found = weigh(density, guide, data, num_samples, space)
    if not found.is_reliable:
        warn_user(
            f"importance_weights: k-hat is {found.k_hat:.2f}, above {reliable_shape(num_samples):.2f} for {num_samples} draws: "
            f"{found.effective_sample_size:.1f} of them count, and they do not stand for the posterior. Refine the guide first (forward_kl), weigh "
            "functions (space='functions') where it is linearised, or start chains from it (nuts).",
            ImportanceWarning,
        )
    return found


@torch.no_grad()
def weigh(
    density: LogDensity, guide: Any, data: Any, num_samples: int, space: Space = "latents"
) -> ImportanceWeights:
    """The same for a log density, without a word on whether the weights are reliable."""
    batches = as_batches(data)
    with evaluation_mode(density.packed.model), local_parameters():
        draws = _draws(guide, num_samples, batches.first)
        _require_sites(draws, density.space.slices)
        latent = density.space.pack(draws)
        log_q = log_prob(guide, draws, batches.first) + density.space.log_abs_det_jacobian(latent)
        if space == "functions":
            ratios = _linearised_joint(density, guide, draws, batches) - log_q
        else:
            ratios = torch.cat([density(part) for part in latent.split(CHAINS)]) - log_q
    ratios = ratios.double()
    if not bool(ratios.max().isfinite()):  # NaN is its own maximum
        raise ValueError(
            f"importance_weights: the log ratios lie between {float(ratios.min())} and {float(ratios.max())}, expected finite numbers (or "
            "minus infinity for impossible draws, but not for all): look at the densities of model and guide at its draws."
        )
    log_weights, k_hat = smoothed(ratios)
    return ImportanceWeights(draws, ratios, log_weights, k_hat, space, density.packed.model)


def _require_sites(draws: Draws, sites: Collection[str]) -> None:
    """The draws are those of the model's latents, and of nothing else: a ratio needs densities of the same thing."""
    if missing := [name for name in sites if name not in draws]:
        raise ValueError(
            f"importance_weights: the guide has no draws of the sites {missing}, which the model samples."
        )
    if extra := [name for name in draws if name not in sites]:
        raise ValueError(
            f"importance_weights: the guide draws the sites {extra}, to which the model gives no density: sample them in the model too, or "
            "leave them out of the guide."
        )


def _members(guide: Any) -> Sequence[Any]:
    members = guide if isinstance(guide, (list, tuple)) else [guide]
    wrong = sorted({type(member).__name__ for member in members if not callable(member)})
    if wrong or not members:
        raise ValueError(
            f"importance_weights needs a guide with a density, or a list of such guides, found {wrong or 'an empty list'}: draws and runs "
            "have none; fit a guide to them."
        )
    return members


def _draws(guide: Any, num_samples: int, batch: Batch) -> Draws:
    """Draws of a guide, or as many of each of several."""
    members = _members(guide)
    if num_samples % len(members):
        raise ValueError(f"num_samples={num_samples} is no multiple of the number of guides, {len(members)}.")
    found = [posterior_draws(member, num_samples // len(members), batch=batch) for member in members]
    if odd := [sorted(draws) for draws in found if draws.keys() != found[0].keys()]:
        raise ValueError(
            f"importance_weights: the guides of a list draw different sites, {sorted(found[0])} and {odd[0]}: each must draw all."
        )
    return {name: torch.cat([draws[name] for draws in found]) for name in found[0]}


def log_prob(guide: Any, draws: Draws, batch: Batch) -> Tensor:
    """The log density of a guide, of several with equal weights, at draws, shape ``(S,)``."""
    terms = []
    for member in _members(guide):
        term = guide_log_prob(member, draws, batch)
        if term is None:
            raise ValueError(
                f"{type(member).__name__} has no density that could be evaluated (a point mass, a low-rank Gaussian without a remainder, or "
                "auxiliary variables): importance weights need one."
            )
        terms.append(term)
    stacked = torch.stack(terms)
    return stacked.logsumexp(0) - torch.tensor(float(len(terms)), dtype=stacked.dtype).log()


def _linearised_joint(density: LogDensity, guide: Any, draws: Draws, data: Any) -> Tensor:
    """The log joint density of the linearised model, shape ``(S,)``: the model's prior and the linearised likelihood."""
    if not isinstance(guide, LinearizedGuide):
        what = "a mixture is linearised around each mode: weigh guide.components one by one"
        raise ValueError(
            f"space='functions' needs a guide with a linearised model, such as AutoLaplace, found {type(guide).__name__}"
            + (f" ({what})." if hasattr(guide, "components") else ": use space='latents'.")
        )
    likelihood = linearised_log_likelihood(guide, draws, data)
    first = Arguments(*as_batches(data).first)
    parts = density.space.pack(draws).split(CHAINS)
    prior = [density.batch_value_and_gradient(part, first, 0.0, once=())[0] for part in parts]
    return likelihood + torch.cat(prior)


def linearised_log_likelihood(guide: LinearizedGuide, draws: Draws, data: Any) -> Tensor:
    """The log likelihood of all the data under the linearised model, with scales and masks, at draws; shape ``(S,)``."""
    packed, mode = guide.packed, guide.loc.detach()
    offsets = packed.space.pack(draws) - mode
    batches = as_batches(data)
    coverage = packed.coverage(batches)
    repeats = None if batches.is_single else packed.repeats(mode, batches)
    total = offsets.new_zeros(len(offsets), dtype=torch.float64)
    for batch in batches:
        trace = packed.trace(mode, batch)
        coverage.add(trace)
        _refuse_factors(packed, trace)
        if repeats is not None:
            packed.leave_out(trace, repeats.add(trace, packed.likelihood_names(trace), batch))
        counted = set(packed.counted(trace))
        for site, outputs in guide.moved_outputs(offsets, batch):
            if site.name not in counted:
                continue
            with pyro.validation_enabled(False):
                log_prob = unwrap(site.build(outputs))[0].log_prob(trace.nodes[site.name]["value"])
            weighted = torch.where(site.weight != 0, site.weight * log_prob.double(), 0.0)
            total = total + weighted.reshape(len(total), -1).sum(-1)
    coverage.check()
    return total


def _refuse_factors(packed: PackedModel, trace: Any) -> None:
    factors = [name for name in packed.likelihood_names(trace) if is_factor(trace.nodes[name])]
    if factors:
        raise ValueError(
            f"space='functions': {factors} are pyro.factor statements, which have no parameters to linearise: use space='latents'."
        )
