# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Hessian-free Laplace: predictive variances from point estimates, without forming a Hessian.

With :math:`L` the negative log joint density and :math:`f_j` scalar functionals of the latents, let
:math:`\theta_j(\lambda) = \arg\min L - \lambda f_j`. As :math:`\lambda\to0` the displacement per unit of
:math:`\lambda` is :math:`d_j = P^{-1} g_j`, with :math:`P = \nabla^2 L` and :math:`g_j = \nabla f_j` at the MAP, so
that :math:`g_i^\top d_j` is the linearised Laplace covariance of :math:`f_i` and :math:`f_j`.

Source: McInerney and Kallus (2024), "Hessian-free Laplace in Bayesian deep learning". The limit follows from the
implicit function theorem; the low-rank factor and its truncation are derived in the project's documentation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bnn.infer.curvature import Curvature, CurvatureAccumulator, NotAMinimumError
from pyro_bnn.infer.data import Batch, is_single_batch
from pyro_bnn.infer.packed import PackedModel
from pyro_bnn.ops.jacobian import jacobian
from pyro_bnn.ops.krylov import CGResult, conjugate_gradient
from pyro_bnn.ops.newton import newton_cg, value_and_gradient

Method = Literal["cg", "central"]


@dataclass
class HFLResult:
    r"""
    Displacements of the point estimate, one per functional, and what they say about convergence.

    :ivar displacements: :math:`d_j \approx P^{-1} g_j`, shape ``(m, p)``.
    :ivar factor: W of the guide :math:`u = \hat u + W z`, shape ``(p, r)``.
    :ivar covariance: the symmetric part of :math:`g_i^\top d_j` on the numerical range of the responses, which is
        positive semi-definite and equals :math:`J W W^\top J^\top`; shape ``(m, m)``.
    :ivar antisymmetry: largest absolute entry of the antisymmetric part in units of standard deviations; it is
        zero for exact solves at a minimum.
    :ivar newton_decrement: distance of the point estimate from the minimum in posterior standard deviations.
    :ivar smallest_curvature: the smallest curvature met by the solves, an upper bound of the smallest eigenvalue.
    :ivar residual: largest relative residual of the solves (``method="cg"``), else the largest Newton decrement of
        the perturbed minimisations relative to ``epsilon``.
    :ivar products: curvature-vector products used, summed over functionals (``method="cg"``).
    """

    displacements: Tensor
    factor: Tensor
    covariance: Tensor
    antisymmetry: float
    newton_decrement: float
    smallest_curvature: float
    residual: float
    products: int

    @property
    def variance(self) -> Tensor:
        """The variance of each functional, shape ``(m,)``."""
        return self.covariance.diagonal()


def functionals(model: PackedModel, latent: Tensor, targets: Batch) -> tuple[Tensor, Tensor]:
    """
    The parameters of all observed sites at target inputs, as one vector, and their gradients.

    :param model: the packed model.
    :param latent: the packed vector, shape ``(p,)``.
    :param targets: arguments of the model; observations are not needed.
    :return: values, shape ``(m,)``, and the Jacobian, shape ``(m, p)``.
    """
    leaf = latent.detach().clone().requires_grad_(True)
    values = _flat_outputs(model, leaf, targets)
    return values.detach(), jacobian(values, leaf)


def _flat_outputs(model: PackedModel, latent: Tensor, targets: Batch) -> Tensor:
    return torch.cat([site.outputs.reshape(-1) for site in model.outputs(latent, targets)])


def displacements(
    model: PackedModel,
    latent: Tensor,
    data: Any,
    targets: Batch,
    *,
    method: Method = "cg",
    curvature: Curvature = "hessian",
    epsilon: float | None = None,
    tolerance: float | None = None,
    max_iter: int | None = None,
) -> HFLResult:
    r"""
    Displacements and covariances of the model's outputs at target inputs.

    ``method="cg"`` is the limit :math:`\lambda\to0`: one conjugate-gradient solve with curvature-vector products
    per functional, all of them batched. ``method="central"`` minimises :math:`L \mp \lambda f_j` with
    :math:`\lambda = \epsilon/\text{sd}_j` and takes central differences, with error O(ε²); no curvature of the
    unperturbed loss is used in the result.

    :param model: the packed model.
    :param latent: the point estimate, shape ``(p,)``.
    :param data: one batch or an iterable of batches, with observations.
    :param targets: arguments of the model at the target inputs.
    :param method: ``"cg"`` or ``"central"``.
    :param curvature: ``"hessian"``, or (``"cg"`` only) ``"ggn"``.
    :param epsilon: how many posterior standard deviations a functional is moved; default 1e-3 in float64 and 3e-3
        in float32.
    :param tolerance: relative residual of the solves; default 1e-8 in float64 and 1e-4 in float32.
    :param max_iter: largest number of products of a solve; default 10 p.
    :return: an :class:`HFLResult`.
    :raises NotAMinimumError: if a solve meets non-positive curvature or a variance is negative, either of which
        proves that the point estimate is not a minimum.
    """
    double = latent.dtype == torch.float64
    tolerance = tolerance if tolerance is not None else (1e-8 if double else 1e-4)
    epsilon = epsilon if epsilon is not None else (1e-3 if double else 3e-3)
    _, J = functionals(model, latent, targets)
    unique, inverse = torch.unique(J, dim=0, return_inverse=True)
    gradient = value_and_gradient(lambda u: model.losses(u, data), latent)[1]
    operator = CurvatureAccumulator(model, latent, curvature).operator(data)
    pilot_tolerance = tolerance if method == "cg" else 1e-2
    solve = conjugate_gradient(
        operator, torch.cat([gradient[None], unique]), tolerance=pilot_tolerance, max_iter=max_iter
    )
    _check_definite(solve, curvature)
    decrement = float((solve.solution[0] @ gradient).clamp(min=0).sqrt())
    if method == "cg":
        D = solve.solution[1:]
        response = unique @ D.mT
        residual = float(solve.residual.max())
    else:
        pilot = (unique * solve.solution[1:]).sum(-1)
        D, response, residual = _central(model, latent, data, targets, pilot, epsilon, inverse)
    D, response = D[inverse], response[inverse][:, inverse]
    variance = response.diagonal()
    if (variance < 0).any():
        raise NotAMinimumError(
            f"{int((variance < 0).sum())} of {len(variance)} variances are negative (smallest "
            f"{float(variance.min()):.3g}). At a minimum that is impossible: the point estimate is not one, or the "
            "perturbed minimisations failed. Call guide.polish(data) in float64."
        )
    sd = variance.sqrt()
    sd = torch.where(sd > 0, sd, torch.ones_like(sd))
    correlation = response / sd[:, None] / sd
    antisymmetry = float((0.5 * (correlation - correlation.mT)).abs().max())
    factor = low_rank_factor(
        J / sd[:, None], D / sd[:, None], 0.5 * (correlation + correlation.mT), antisymmetry
    )
    half = J @ factor
    return HFLResult(
        displacements=D,
        factor=factor,
        covariance=half @ half.mT,
        antisymmetry=antisymmetry,
        newton_decrement=decrement,
        smallest_curvature=float(solve.smallest_curvature.min()),
        residual=residual,
        products=int(solve.iterations.sum()),
    )


def low_rank_factor(J: Tensor, D: Tensor, correlation: Tensor, antisymmetry: float) -> Tensor:
    r"""
    A factor W of a covariance in latent space with a given covariance of the functionals.

    With the singular value decomposition :math:`J D^	op = Q\Sigma Z^	op`, truncated at
    :math:`\max(|A|, 10^{-9})`, and :math:`Q^	op C Q = X X^	op`, set :math:`W = D^	op Z\Sigma^{-1} X`. Then
    :math:`J W W^	op J^	op = Q Q^	op C Q Q^	op` holds exactly, also when the displacements are not, because W is
    built from the responses that the linearised model will give. All inputs are scaled to unit variances first:
    truncating covariances instead would lose the functionals whose variance is small.

    :param J: gradients of the functionals over their standard deviations, shape ``(m, p)``.
    :param D: displacements over the standard deviations, shape ``(m, p)``.
    :param correlation: the correlation matrix C that is wanted, shape ``(m, m)``.
    :param antisymmetry: largest antisymmetric entry |A| of the responses that C came from: their noise.
    :return: shape ``(p, r)`` with r ≤ m.
    """
    Q, singular, Zt = torch.linalg.svd(J @ D.mT)
    keep = singular > max(antisymmetry, 1e-9)
    Q = Q[:, keep]
    values, vectors = torch.linalg.eigh(Q.mT @ correlation @ Q)
    root = vectors * values.clamp(min=0).sqrt()
    return D.mT @ (Zt[keep].mT / singular[keep]) @ root


def _check_definite(solve: CGResult, curvature: str) -> None:
    if solve.indefinite.any():
        raise NotAMinimumError(
            f"the {curvature} has a direction of curvature {float(solve.smallest_curvature.min()):.3g}: the point "
            "estimate is not a minimum and has no Laplace approximation. Call guide.polish(data) in float64, train "
            "longer, or use curvature='ggn'."
        )


def _central(
    model: PackedModel,
    latent: Tensor,
    data: Any,
    targets: Batch,
    pilot: Tensor,
    epsilon: float,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, float]:
    """Central differences of perturbed minima: displacements, responses and the worst remaining decrement."""
    first = torch.stack([(inverse == j).nonzero()[0, 0] for j in range(len(pilot))])
    D, responses, worst = [], [], 0.0
    for j, variance in zip(first.tolist(), pilot.tolist(), strict=True):
        step = epsilon / max(variance, torch.finfo(latent.dtype).tiny) ** 0.5
        moved, outputs = [], []
        for sign in (1.0, -1.0):

            def terms(u: Tensor, j: int = j, shift: float = sign * step) -> Iterator[Tensor]:
                yield from model.losses(u, data)
                yield -shift * _flat_outputs(model, u, targets)[j]

            result = newton_cg(
                terms,
                latent,
                tolerance=1e-6 * epsilon,
                cg_tolerance=1e-4,
                keep_graphs=is_single_batch(data),
            )
            if result.indefinite:
                raise NotAMinimumError(
                    f"the minimisation perturbed by output {j} met a direction of non-positive curvature: the point "
                    "estimate is not a minimum, or epsilon is too large for its basin. Call guide.polish(data) in "
                    "float64 or lower epsilon."
                )
            worst = max(worst, result.decrement / epsilon)
            moved.append(result.point)
            leaf = result.point.clone().requires_grad_(True)
            outputs.append(_flat_outputs(model, leaf, targets).detach()[first])
        D.append((moved[0] - moved[1]) / (2 * step))
        responses.append((outputs[0] - outputs[1]) / (2 * step))
    return torch.stack(D), torch.stack(responses, -1), worst
