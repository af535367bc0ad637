# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Parts of a structured curvature: each covers some entries of the packed vector, holds the curvature of the likelihood
and that of the prior there, and says what Gaussian follows when the prior's is multiplied by :math:`\tau`.
"""

from typing import ClassVar

import torch
from torch import Tensor

from pyro_bnn.distributions.precision_normal import PrecisionNormal


class NotAMinimumError(RuntimeError):
    """The point estimate is not a minimum of the negative log joint density: its curvature is indefinite."""


class Part:
    """
    Curvature over some entries.

    :param tensors: what the part consists of, by name: ``index`` (positions, shape ``(q,)``), ``prior`` (shape
        ``(q,)`` or, where priors are coupled, ``(q, q)``) and the likelihood's.
    """

    kind: ClassVar[str]

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    @property
    def index(self) -> Tensor:
        """Positions, shape ``(q,)``."""
        return self.tensors["index"]

    @property
    def prior(self) -> Tensor:
        """Curvature of the prior, shape ``(q,)`` or ``(q, q)``."""
        return self.tensors["prior"]

    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        """
        :param loc: the packed point estimate, shape ``(p,)``.
        :param tau: multiplier of the prior's curvature: a scalar or shape ``(q,)``; ``None`` for 1.
        :return: the Gaussian over the part's entries.
        """
        raise NotImplementedError

    def spectrum(self) -> tuple[Tensor, Tensor]:
        r"""
        Eigenvalues :math:`e` of the likelihood's curvature relative to the prior's, such that
        :math:`\log\det P = \sum_i \log(\tau + e_i) + c` for every scalar :math:`\tau`.

        :return: the eigenvalues, shape ``(q,)``, and the scalar c, the log determinant of the prior's curvature.
        """
        raise NotImplementedError

    def _check_positive(self, what: str) -> None:
        prior = self.prior
        smallest = prior.min() if prior.dim() == 1 else torch.linalg.eigvalsh(prior)[0]
        if not smallest > 0:
            raise NotAMinimumError(
                f"the curvature of the prior is not positive (smallest {float(smallest):.3g}), which {what} needs: "
                "use structure='full' or 'diagonal', or a prior with positive curvature at the point estimate."
            )


def indefinite(values: Tensor, what: str) -> NotAMinimumError:
    """
    :param values: eigenvalues, or diagonal entries, of a precision.
    :param what: what they are.
    :return: the error that says so.
    """
    return NotAMinimumError(
        f"the curvature at the point estimate is not positive definite: {int((values <= 0).sum())} of "
        f"{values.shape[0]} {what} are not positive, the smallest is {float(values.min()):.3g}. The point is "
        "not a minimum, or not one that the numbers resolve. Call guide.polish(data) in float64, train longer, or use "
        "curvature='ggn'."
    )
