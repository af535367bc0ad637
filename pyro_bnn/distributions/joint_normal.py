# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A Gaussian, or its exponential, over events of any shape."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size


def cholesky(covariance: Tensor) -> Tensor:
    """
    The Cholesky factor of covariances, found in double precision where single precision does not suffice.

    :param covariance: shape ``(..., n, n)``.
    :return: lower triangular, in the precision of ``covariance``.
    :raises ValueError: if the matrices are not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(covariance)
    if not bool(info.any()):
        return factor
    factor, info = torch.linalg.cholesky_ex(covariance.double())
    if bool(info.any()):
        raise ValueError(
            f"{int((info > 0).sum())} of {info.numel()} predictive covariances are not positive definite: the noise of the "
            "likelihood is too small beside the uncertainty of its location. Use float64."
        )
    return factor.to(covariance)


def block_diagonal(blocks: Tensor) -> Tensor:
    """From ``(..., n, k, k)`` to ``(..., n k, n k)``."""
    n, k = blocks.shape[-3], blocks.shape[-1]
    same = torch.eye(n, dtype=blocks.dtype, device=blocks.device)[:, None, :, None]
    return (blocks.unsqueeze(-2) * same).reshape(blocks.shape[:-3] + (n * k, n * k))


class JointNormal(TorchDistribution):
    r"""
    :math:`y \sim N(\mu, \Sigma)`, or :math:`\log y \sim N(\mu, \Sigma)`, with the elements of an event of any shape in one
    vector of length n.

    :param Tensor loc: shape ``batch_shape + event_shape``.
    :param Tensor covariance: shape ``batch_shape + (n, n)``.
    :param int event_dim: the number of dimensions of an event.
    :param bool log: whether it is the logarithm that is Gaussian.

    Example::

        >>> d = JointNormal(torch.zeros(5, 2, 3), torch.eye(6).expand(5, 6, 6), 2)
        >>> d.batch_shape, d.event_shape, d.sample().shape
        (torch.Size([5]), torch.Size([2, 3]), torch.Size([5, 2, 3]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, loc: Tensor, covariance: Tensor, event_dim: int, *, log: bool = False) -> None:
        at = loc.dim() - event_dim
        shape, event = loc.shape[:at], loc.shape[at:]
        self.flat = dist.MultivariateNormal(loc.flatten(at), scale_tril=cholesky(covariance))
        self.log = log
        super().__init__(shape, event, validate_args=False)

    @property
    def support(self) -> Any:
        """Real, or positive, numbers."""
        base = constraints.positive if self.log else constraints.real
        return constraints.independent(base, len(self.event_shape))

    def _shaped(self, flat: Tensor) -> Tensor:
        return flat.reshape(flat.shape[:-1] + self.event_shape)

    @property
    def covariance_matrix(self) -> Tensor:
        """The covariance of the Gaussian vector, shape ``batch_shape + (n, n)``."""
        return self.flat.covariance_matrix

    @property
    def mean(self) -> Tensor:
        """The mean, shape ``batch_shape + event_shape``."""
        mean = self.flat.loc
        return self._shaped((mean + self.flat.variance / 2).exp() if self.log else mean)

    @property
    def variance(self) -> Tensor:
        """Variances of the elements, shape ``batch_shape + event_shape``."""
        variance = self.flat.variance
        if not self.log:
            return self._shaped(variance)
        return self._shaped(variance.expm1() * (2 * self.flat.loc + variance).exp())

    def rsample(self, sample_shape: _size = ()) -> Tensor:
        """
        :param sample_shape: leading shape of the draws.
        :return: draws, shape ``sample_shape + batch_shape + event_shape``.
        """
        draws = self._shaped(self.flat.rsample(torch.Size(sample_shape)))
        return draws.exp() if self.log else draws

    def log_prob(self, value: Tensor) -> Tensor:
        """
        :param value: shape ``sample_shape + batch_shape + event_shape``.
        :return: log densities, shape ``sample_shape + batch_shape``.
        """
        flat = value.reshape(value.shape[: value.dim() - len(self.event_shape)] + (-1,))
        if not self.log:
            return self.flat.log_prob(flat)
        return self.flat.log_prob(flat.log()) - flat.log().sum(-1)
