# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A Laplace approximation of a trained network in one call."""

import copy
from collections.abc import Sequence
from functools import partial
from math import inf
from typing import Any, Literal

import torch
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_bnn.curvature.mode import UnconvergedMAPWarning
from pyro_bnn.curvature.selection import Selection
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.autoguide.laplace import LikelihoodCurvature, Structure
from pyro_bnn.infer.hyperparameters import Per
from pyro_bnn.model.data import as_batches
from pyro_bnn.nn import bayesian_, init_to_trained
from pyro_bnn.nn.convertible import check_wrapper
from pyro_bnn.nn.priors import PriorLike
from pyro_bnn.ops.notice import warn_user
from pyro_bnn.ops.options import require_choice
from pyro_bnn.supervised.guide import AutoNetworkLaplace
from pyro_bnn.supervised.likelihoods import Likelihood
from pyro_bnn.supervised.model import SupervisedModel
from pyro_bnn.supervised.survey import Survey, survey
from pyro_bnn.supervised.tuning import Tuning


@torch.inference_mode(False)
@torch.enable_grad()
def laplace(
    net: nn.Module,
    data: Any = None,
    *,
    likelihood: Likelihood,
    structure: Structure = "kronecker",
    curvature: LikelihoodCurvature = "ggn",
    sites: Selection = None,
    prior: PriorLike | None = None,
    noise: float | Tensor | Distribution | None = None,
    tune: Literal["auto", "evidence", "validation"] | None = "auto",
    validation: Any = None,
    per: Per = "global",
    candidates: Sequence[float] | None = None,
    polish: bool = False,
    map_tolerance: float = 1.0,
    event_dim: int | None = None,
    class_dim: int | None = None,
    target: str = "labels",
    generator: torch.Generator | None = None,
    **options: Any,
) -> AutoNetworkLaplace:
    r"""
    A Laplace approximation around the weights of a trained network.

    Builds a :class:`~pyro_bnn.supervised.SupervisedModel` of a copy of the network, whose weights become sample sites with a
    prior, starts a guide at the trained weights, computes the curvature there, and tunes the prior precision, and the noise
    of a regression. **The network passed is not changed, and the weights are kept**: the mean of the linearised predictions is
    the output of the network in evaluation mode, in which it runs whatever its mode is. Parameters that are frozen
    (``requires_grad=False``), and those of normalisation layers, stay what they are; so do tensors that belong to no layer (class
    tokens), with a warning unless they are frozen.

    Trained weights are the mode of the model only if they were trained under this prior (a weight decay :math:`\lambda` of
    the mean negative log likelihood of N rows is the prior :math:`N(0, 1/(N\lambda))`). The curvature is defined anywhere. The
    evidence takes the weights for the mode, and may prefer a prior precision that is off by orders of magnitude where they are
    not: by default it is then not used, and an :class:`UnconvergedMAPWarning` says how far away the mode is. Held-out data
    (``validation=``) choose without that assumption, and ``polish=True`` goes to the mode.

    ====================== =========================================================================================
    ``tune``               what chooses a multiplier of the prior precision, and the noise unless it is given
    ====================== =========================================================================================
    ``"evidence"``         their joint evidence, from one decomposition of the curvature
    ``"validation"``       the log predictive density of the held-out data
    ``"auto"``             held-out data if there are any; else the evidence if the weights are the mode; else ``None``
    ``None``               nothing; the noise is the root mean square of the residuals
    ====================== =========================================================================================

    :param net: a trained network.
    :param data: a loader, or list, of batches ``(x, y)`` or of mappings; or one batch. Every row comes once in a pass, in any
        order. ``None`` builds the guide without fitting it, for :func:`~pyro_bnn.infer.load_guide` in another process.
    :param likelihood: ``"regression"``, ``"heteroscedastic"``, ``"classification"``, ``"binary"``, ``"poisson"``, or a callable from
        the outputs of the network to a distribution; see :class:`~pyro_bnn.supervised.SupervisedModel`.
    :param str structure: of the curvature; see :class:`~pyro_bnn.infer.autoguide.AutoLaplace`, as for the next two.
    :param str curvature: ``"ggn"``, ``"mc_fisher"``, ``"empirical_fisher"`` or ``"hessian"``, which needs ``polish=True``.
    :param sites: which weights are random, e.g. ``"last_layer"``, or patterns such as ``"net.encoder.*"``.
    :param prior: of the weights, as in :func:`~pyro_bnn.nn.bayesian_`.
    :param noise: the standard deviation of a regression, if it is known; a distribution makes it a latent site. A tensor has one
        value for each output.
    :param str tune: see above.
    :param validation: held-out data in the form of ``data``.
    :param str per: ``"global"``, ``"layer"`` or ``"site"``: what has a multiplier of its own.
    :param candidates: multipliers for ``"validation"``.
    :param bool polish: whether to move the weights to the mode under the prior, before its precision is tuned, first.
    :param float map_tolerance: the distance from the mode, in posterior standard deviations, up to which the weights pass for it;
        with ``float("inf")`` they do wherever they are, and there is no warning.
    :param int event_dim: the number of dimensions of one target; by default that of the first batch, where a single number is
        none. Needed without data.
    :param int class_dim: of the classes in the outputs of a classifier, 1 or -1; by default the one that the labels fit.
    :param str target: the name of the targets in batches that are mappings.
    :param generator: source of random numbers for random curvatures.
    :param options: of :class:`~pyro_bnn.infer.autoguide.AutoLaplace`.
    :return: the fitted guide, with ``predictive``, ``save``, ``load`` and ``to_datatree``; ``guide.model`` is the model,
        ``guide.model.net`` the converted copy of the network.
    :raises ValueError: for a loader that leaves rows out or repeats them, for outputs or targets that the likelihood does not take,
        and where all parameters are frozen.

    Example::

        >>> x = torch.linspace(-1, 1, 50).unsqueeze(-1)
        >>> net = nn.Linear(1, 1)
        >>> guide = laplace(net, (x, 2 * x + 0.1 * torch.sin(50 * x)), likelihood="regression", polish=True)
        >>> guide.predictive(torch.zeros(3, 1))["obs"].stddev.shape
        torch.Size([3])

    **References**

    [1] Daxberger et al. (2021), "Laplace redux: effortless Bayesian deep learning".

    [2] Immer et al. (2021), "Scalable marginal likelihood estimation for model selection in deep learning".
    """
    method = _choice(tune, validation)
    _require_plain(net)
    net = copy.deepcopy(net)
    net.zero_grad(set_to_none=True)
    given: dict[str, Any] = {"event_dim": event_dim, "class_dim": class_dim, "target": target}
    found = None if data is None else survey(net, data, likelihood, noise, given)
    _convert(net, prior)
    given = {k: v for k, v in (given if found is None else found.options).items() if v is not None}
    model = SupervisedModel(
        net, likelihood, noise=noise, num_data=None if found is None else found.num_rows, **given
    )
    start = partial(init_to_trained, fallback=_start_of(found))
    guide = AutoNetworkLaplace(
        model, structure=structure, curvature=curvature, sites=sites, init_loc_fn=start, **options
    )
    if found is None:
        return guide
    args, kwargs = as_batches(data).first
    guide.initialize(*args, **kwargs)

    def approximate() -> None:
        if polish:
            guide.to_point_estimate().polish(data)
        guide.laplace_approximation(data, map_tolerance=inf, generator=generator)

    limit = map_tolerance if tune == "auto" else inf
    done = Tuning(guide, model, approximate, found, per, candidates, limit, polish).run(method, validation)
    if done != "validation":
        _warn_of_distance(guide, map_tolerance, method, done)
    return guide


def _choice(tune: str | None, validation: Any) -> str | None:
    """What tunes, in place of "auto"."""
    if tune is None:
        return None
    require_choice("tune", tune, "auto", "evidence", "validation")
    if tune == "auto":
        return "evidence" if validation is None else "validation"
    if (tune == "validation") != (validation is not None):
        raise ValueError(
            f"tune={tune!r}: held-out data, validation=, go with tune='validation' and with 'auto'"
        )
    return tune


def _require_plain(net: Any) -> None:
    """Raises for what is no network of torch, or one whose weights are random already."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is a {type(net).__name__}, expected a torch.nn.Module")
    if any(isinstance(module, PyroModule) for module in net.modules()):
        raise ValueError(
            "the network has been converted already (bayesian_, rank1_): pass one of torch, with its prior as prior=; or build "
            "AutoLaplace(SupervisedModel(net, likelihood, num_data=N), init_loc_fn=init_to_trained) around it."
        )
    for name, module in net.named_modules():
        check_wrapper(name, module)


def _convert(net: nn.Module, prior: PriorLike | None) -> None:
    """Makes the weights that are not frozen random."""
    parameters = dict(net.named_parameters(remove_duplicate=False))
    frozen = {name for name, p in parameters.items() if not p.requires_grad}
    if parameters and len(frozen) == len(parameters):
        raise ValueError(
            f"all {len(parameters)} parameters of the network are frozen (requires_grad=False), and frozen parameters stay what "
            "they are: call requires_grad_(True) on those that shall be random."
        )
    bayesian_(net, prior=prior, keep_frozen=True, skip=[_is_frozen, *frozen])


def _is_frozen(name: str, module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _start_of(found: Survey | None) -> Any:
    """Where latents without a trained value start: the noise at the root mean square of the residuals."""

    def start(site: Any) -> Tensor:
        if found is None or site["name"] != "noise":
            return init_to_median(site)
        like = site["fn"].sample()
        return torch.full_like(like, found.residual)

    return start


def _warn_of_distance(guide: AutoLaplace, tolerance: float, method: str | None, done: str | None) -> None:
    """Warns where the weights are no mode, whether or not a method of tuning has been used."""
    assert guide.map_report is not None
    distance = guide.map_report.newton_decrement
    if not distance > tolerance:
        return
    tuned = ""
    if done is not None:
        tuned = "The evidence takes them for it, and the prior precision that it chose may be far off. "
    elif method is not None:
        tuned = (
            "The evidence would take them for it, so that the prior, and the noise, were left as they are: tune='evidence' "
            "tunes them nonetheless. "
        )
    warn_user(
        f"the weights are {distance:.3g} posterior standard deviations away from their mode under the prior (Newton "
        f"decrement), as weights are that were trained without it. {tuned}Pass held-out data as validation=, which need no "
        "mode; or polish=True, which moves the weights there; or map_tolerance=float('inf') to leave it at that.",
        UnconvergedMAPWarning,
    )
