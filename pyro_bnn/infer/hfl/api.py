# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Variances and covariances of any functional of a model's latents."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import Curvature, check_option
from pyro_bnn.infer.hfl.checks import check_accuracy, check_sizes, require_derivatives, require_slopes
from pyro_bnn.infer.hfl.diagnostics import HFLWarning
from pyro_bnn.infer.hfl.functionals import Functional
from pyro_bnn.infer.hfl.regvar import RegVarScore, regvar_score
from pyro_bnn.infer.hfl.result import HFLResult
from pyro_bnn.infer.hfl.run import Method, solve_for
from pyro_bnn.infer.hfl.setup import set_up
from pyro_bnn.infer.hfl.solver import Preconditioner, Solver
from pyro_bnn.model.arguments import takes_data
from pyro_bnn.ops.notice import warn_user
from pyro_bnn.ops.options import require_count


@takes_data(after=("targets", "functional"))
@torch.inference_mode(False)
@torch.enable_grad()
def solve(
    guide: Any,
    *args: Any,
    targets: Any = None,
    functional: Functional | None = None,
    method: Method = "cg",
    curvature: Curvature = "hessian",
    epsilon: float | None = None,
    tolerance: float | None = None,
    max_iter: int | None = None,
    correct_gradient: bool = True,
    proximal: float | Literal["auto"] = 0.0,
    preconditioner: Preconditioner | None = None,
    rank: int = 64,
    block_size: int = 64,
    robust: bool = False,
    check: bool = True,
    num_probes: int = 32,
    num_epochs: int = 200,
    map_tolerance: float = 0.1,
    chunk_size: int = 256,
    **kwargs: Any,
) -> HFLResult:
    r"""
    The Laplace covariance of m functionals of a model's latents, without forming a Hessian.

    ========================  ==========================================================================
    ``method``                what it computes
    ========================  ==========================================================================
    ``"cg"``                  the limit :math:`\lambda\to0`: :math:`P d_j = g_j` by block conjugate gradients
    ``"one_sided"``           :math:`(f(\theta_\lambda) - f(\hat\theta))/\lambda`, the paper's estimator; error O(ε)
    ``"central"``             :math:`(f(\theta_\lambda) - f(\theta_{-\lambda}))/2\lambda`; error O(ε²)
    ``"paired"``              minibatch fine-tuning beside a twin at λ = 0 on the same batches
    ``"probe"``               ``num_probes`` random solves for any number of functionals (Nyström)
    ========================  ==========================================================================

    The user's knob is ε, by how many posterior standard deviations a functional is moved: :math:`\lambda_j =
    \epsilon/\text{sd}_j`, with sd from a rough solve. Usable values: up to 1e-2 (one-sided) or 3e-2 (central), down
    to 1e-8 in float64 and 1e-3 in float32.

    With ``curvature="ggn"`` and a prior whose curvature at the point estimate is a positive number for every latent, such as any
    independent Gaussian, the result certifies its variances: ``lower`` and ``upper`` contain :math:`g^\top P^{-1} g`,
    whatever the method and however early a solve has stopped (:doc:`/hfl`).

    :param guide: a point estimate: :class:`~pyro_bnn.infer.autoguide.AutoLaplace` or
        :class:`~pyro_bnn.infer.autoguide.AutoHessianFreeLaplace` after ``polish`` or training, or any Pyro autoguide
        whose ``median`` is the MAP in unconstrained space, such as :class:`~pyro.infer.autoguide.AutoDelta` of a
        model with unconstrained latents.
    :param args: one batch or an iterable of batches, **with observations**, covering every data point once, perhaps followed
        by targets and functional, as in ``solve(guide, (x, y), (x_test,))``; or, where ``targets`` is named, the arguments of
        the model, as in ``solve(guide, x, y, targets=(x_test,))`` (see :mod:`pyro_bnn.model.arguments`).
    :param targets: one batch of inputs. Without ``functional``, the functionals are the parameters of the observed
        sites there (mean, logits).
    :param callable functional: any differentiable function of the latents by site name (constrained values), and of
        ``targets`` if given, that returns a tensor; :func:`~pyro_bnn.infer.network_at` calls a network at these latents, as
        in ``lambda latents, x: network_at(net, latents)(x).max()``.
    :param str method: see the table.
    :param str curvature: ``"hessian"``, or ``"ggn"``: the linearised model.
    :param float epsilon: ε; default 1e-3 in float64 and 3e-3 in float32.
    :param float tolerance: the accuracy at which the solves of ``"cg"`` and ``"probe"`` stop. Where the variances can be
        certified it is the relative width of their bounds, (upper - lower) / lower, of every functional; where they cannot,
        and where none is given, a relative residual (default 1e-6 in float64 and 1e-4 in float32), whose square times the
        condition number is about the relative error of a variance.
    :param int max_iter: largest number of iterations of a solve.
    :param bool correct_gradient: subtract the gradient at the point estimate from the loss, which targets the Laplace
        approximation at that point also when it is not quite a minimum.
    :param proximal: δ of a term :math:`\frac\delta2|u-\hat u|^2`; ``"auto"`` takes twice the most negative curvature
        if there is one. It makes an indefinite problem solvable and biases variances down; the result reports it.
    :param preconditioner: ``"nystrom"`` (the most useful one: ``2 * rank`` products, once), ``"prior"`` (free; for many
        more latents than data), ``"diagonal"`` (of the GGN), a fitted Laplace guide of the same model (``"block"`` and
        ``"full"`` GGNs help most where they fit), or a map. Blocks of many targets seldom need one.
    :param int rank: directions of the ``"nystrom"`` preconditioner.
    :param int block_size: how many right-hand sides share a Krylov space.
    :param bool robust: also compute the infinitesimal-jackknife (sandwich) covariance.
    :param bool check: compare ε with ε/3 on at most 8 functionals.
    :param int num_probes: solves of ``"probe"``.
    :param int num_epochs: passes of ``"paired"``; from 20 on, in two to four rounds of variance reduction.
    :param map_tolerance: the Newton decrement, in posterior standard deviations, above which a warning says that the
        point estimate has not converged.
    :param int chunk_size: how many reverse passes run at once.
    :param kwargs: keyword arguments of the model.
    :return: an :class:`~pyro_bnn.infer.hfl.HFLResult`; print it.
    :raises NotAMinimumError: if a solve meets negative curvature or a variance is negative, either of which proves
        that the point estimate is not a minimum or that a minimisation failed.
    :raises ValueError: for a functional that depends on the latents without a gradient (an argmax, a probability of
        exceeding a threshold, a detached value), or with another than it has (a part of it is detached): take draws of
        functions.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoLaplace
        >>> guide = AutoLaplace(model).initialize(x, x).polish((x, x))
        >>> from pyro_bnn import hfl
        >>> result = hfl.solve(guide, (x, x), (torch.tensor([1.0, 2.0]),))
        >>> bool((result.variance[1] / result.variance[0] - 4).abs() < 1e-6)  # f(x) = w x
        True
    """
    (data,) = args
    _check_options(method, curvature, robust)
    check_accuracy(epsilon, tolerance)
    check_sizes(
        rank=rank, block_size=block_size, num_probes=num_probes, num_epochs=num_epochs, chunk_size=chunk_size,
        max_iter=max_iter,
    )  # fmt: skip
    problem, functionals = set_up(
        guide, data, targets, functional, curvature, correct_gradient=correct_gradient, chunk_size=chunk_size
    )
    if functional is not None:
        require_slopes(functionals, by_direction=method == "probe")
        require_derivatives(functionals)
    return solve_for(
        problem, functionals, method=method, epsilon=epsilon, tolerance=tolerance, max_iter=max_iter,
        proximal=proximal, preconditioner=preconditioner, rank=rank, block_size=block_size, robust=robust,
        check=check, num_probes=num_probes, num_epochs=num_epochs, map_tolerance=map_tolerance,
    )  # fmt: skip


def _check_options(method: str, curvature: str, robust: bool) -> None:
    if method == "regvar":
        raise ValueError("method='regvar' is a score, not a covariance: call hfl.regvar, or hfl.variance")
    check_option("method", method, Method)
    check_option("curvature", curvature, Curvature)
    if robust and method == "probe":
        raise ValueError("robust=True needs the displacement of every functional: use method='cg'")


@takes_data(after=("targets",))
def regvar(
    guide: Any,
    *args: Any,
    targets: Any,
    curvature: Curvature = "hessian",
    epsilon: float = 0.1,
    num_epochs: int | None = 200,
    twin: bool = True,
    calibrate: int = 0,
    tolerance: float = 1e-4,
    preconditioner: Preconditioner | None = None,
    chunk_size: int = 256,
    **kwargs: Any,
) -> RegVarScore:
    """
    The RegVar score of the outputs at ``targets``: one fine-tuning run for all of them.

    It is a score and in general not a variance; see :func:`~pyro_bnn.infer.hfl.regvar.regvar_score` and the
    documentation.

    :param guide: a point estimate, as for :func:`solve`.
    :param args: data, as for :func:`solve`, perhaps followed by targets.
    :param targets: one batch of inputs.
    :param curvature: ``"hessian"`` or ``"ggn"``.
    :param epsilon: see :func:`~pyro_bnn.infer.hfl.regvar.regvar_score`.
    :param num_epochs: passes over the data, or ``None`` for the limit of vanishing λ by one linear solve.
    :param twin: whether the reference is a twin run on the same batches, or the point estimate.
    :param calibrate: how many exact solves calibrate the score.
    :param tolerance: relative residual of the linear solves.
    :param preconditioner: as for :func:`solve`.
    :param chunk_size: how many reverse passes run at once.
    :param kwargs: keyword arguments of the model.
    :return: a :class:`~pyro_bnn.infer.hfl.RegVarScore`.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoLaplace
        >>> guide = AutoLaplace(model).initialize(x, x).polish((x, x))
        >>> from pyro_bnn import hfl
        >>> hfl.regvar(guide, (x, x), (x,)).score.shape
        torch.Size([3])
    """
    (data,) = args
    check_option("curvature", curvature, Curvature)
    check_accuracy(epsilon, tolerance)
    check_sizes(num_epochs=num_epochs, chunk_size=chunk_size)
    require_count("calibrate", calibrate, least=0)
    problem, functionals = set_up(guide, data, targets, None, curvature, chunk_size=chunk_size)
    solver = Solver(problem, tolerance=tolerance, preconditioner=preconditioner)
    return regvar_score(
        problem, functionals, solver, epsilon=epsilon, num_epochs=num_epochs, twin=twin, calibrate=calibrate
    )


@takes_data(after=("targets", "functional"), also=(solve, regvar))
def variance(
    guide: Any, *args: Any, targets: Any = None, functional: Functional | None = None, **options: Any
) -> Tensor:
    r"""
    Variances of any functional of a model's latents; see :func:`solve` for the arguments.

    :param guide: a point estimate.
    :param args: data, perhaps followed by targets and functional, or the arguments of the model.
    :param targets: one batch of inputs, or ``None``.
    :param functional: a function of the latents; default: the parameters of the observed sites at ``targets``.
    :param options: of :func:`solve`. ``method="regvar"`` takes those of :func:`regvar` instead and returns the score
        calibrated by 16 exact solves, with a warning where it is not a variance.
    :return: variances, of the shape of the functional's value.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_bnn.infer.autoguide import AutoLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
        >>> guide = AutoLaplace(model).initialize(x, y).polish((x, y))
        >>> variance(guide, (x, y), functional=lambda latents: latents["w"].sum())
        tensor(0.4000)
    """
    if options.get("method") != "regvar":
        return solve(guide, *args, targets=targets, functional=functional, **options).variance
    if functional is not None:
        raise ValueError("method='regvar' scores the outputs at targets: pass targets and no functional")
    options = {"calibrate": 16, **{k: v for k, v in options.items() if k != "method"}}
    score = regvar(guide, *args, targets=targets, **options)
    if score.spread is not None and score.spread > 0.1:
        warn_user(
            f"the calibrated RegVar score differs from the variance by factors of about {math.exp(score.spread):.2g}: "
            "it is a score. Use method='probe' for variances of many outputs",
            HFLWarning,
        )
    return score.calibrated.reshape(score.shape)


@takes_data(after=("targets", "functional"), also=(solve,))
def covariance(
    guide: Any, *args: Any, targets: Any = None, functional: Functional | None = None, **options: Any
) -> Tensor:
    r"""
    The covariance of all elements of a functional; see :func:`solve` for the arguments.

    :param guide: a point estimate.
    :param args: data, perhaps followed by targets and functional, or the arguments of the model.
    :param targets: one batch of inputs, or ``None``.
    :param functional: a function of the latents; default: the parameters of the observed sites at ``targets``.
    :param options: of :func:`solve`. With ``robust=True`` the sandwich covariance is returned.
    :return: shape ``(m, m)``, for the flattened value of the functional.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoLaplace
        >>> guide = AutoLaplace(model).initialize(x, x).polish((x, x))
        >>> from pyro_bnn import hfl
        >>> hfl.covariance(guide, (x, x), functional=lambda latents: torch.stack([latents["w"], 2 * latents["w"]])).shape
        torch.Size([2, 2])
    """
    result = solve(guide, *args, targets=targets, functional=functional, **options)
    return result.covariance if result.sandwich is None else result.sandwich
