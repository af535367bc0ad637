# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Whether a precision is known well enough for its inverse.

Sums in a precision :math:`\varepsilon` leave an error of about :math:`\kappa\varepsilon` in variances, with :math:`\kappa` the
condition number in units of the latents' own scales. Where that is too much in float32, the same Jacobians are summed and
factored in float64; what remains is the rounding of the Jacobians and of the factor, about
:math:`\sqrt\kappa\,\varepsilon`.
"""

from typing import Any

import torch

from pyro_bnn.curvature.dense import FullNormal
from pyro_bnn.curvature.kronecker import KroneckerNormal
from pyro_bnn.curvature.low_rank import LowRankNormal
from pyro_bnn.distributions.precision_normal import BlockNormal

#: Relative errors of variances above which sums in float32 are repeated in float64, and above which a warning is given.
TOLERANCE = 0.01
#: The condition number is estimated from below, and sums have many terms.
_SAFETY = 10.0


def condition_number(posterior: Any, *, to_prior: bool = False) -> float:
    """
    An estimate of the condition number of a Gaussian's precision, in units of the scales of its coordinates: for a
    dense matrix the largest ratio of a variance's reciprocal given all earlier coordinates to that given nothing, for the
    other structures that of the eigenvalues relative to the prior.

    :param posterior: a Gaussian over the packed vector.
    :param to_prior: for low rank, the ratio to the prior itself, of which a posterior variance is a difference.
    :return: at least 1.
    """
    if isinstance(posterior, BlockNormal):
        return max((condition_number(part, to_prior=to_prior) for _, part in posterior.parts), default=1.0)
    if isinstance(posterior, FullNormal):
        pivots = posterior.cholesky.detach().diagonal().square()
        return float((posterior.precision.detach().diagonal() / pivots).max())
    if isinstance(posterior, KroneckerNormal):
        return float(posterior.eigenvalues.detach().max() / posterior.eigenvalues.detach().min())
    if isinstance(posterior, LowRankNormal) and posterior.eigenvalues.numel():
        values = 1 + posterior.eigenvalues.detach()
        rest = 1.0 if to_prior or len(values) < len(posterior.loc) else float("inf")
        return float(values.max()) / min(rest, float(values.min()))
    return 1.0


def expected_error(posterior: Any, sums: torch.dtype) -> float:
    """
    :param posterior: a Gaussian over the packed vector.
    :param sums: the precision of sums and decompositions.
    :return: the relative error of variances to be expected.
    """
    of_sums = _SAFETY * condition_number(posterior, to_prior=True) * torch.finfo(sums).eps
    return max(of_sums, condition_number(posterior) ** 0.5 * torch.finfo(posterior.loc.dtype).eps)


def describe(posterior: Any, error: float) -> str:
    """
    :param posterior: a Gaussian over the packed vector.
    :param error: see :func:`expected_error`.
    :return: a message.
    """
    return (
        f"the precision has condition number {condition_number(posterior):.2g}, so that {posterior.loc.dtype} knows variances "
        f"to about {100 * error:.2g} %: scale inputs alike, give latents proper priors of their size, or use float64."
    )
