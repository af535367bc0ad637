# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What is said of a point estimate: how well it has converged, and that its draws are all the same."""

from dataclasses import dataclass
from math import isnan

from typing_extensions import override

from pyro_bnn.curvature.mode import UnconvergedMAPWarning
from pyro_bnn.ops.described import Described
from pyro_bnn.ops.notice import warn_user


class PointEstimateWarning(UserWarning):
    """
    Draws of a guide that is a point estimate are all the same: the epistemic uncertainty of predictions is zero.

    Example::

        >>> import warnings
        >>> warnings.simplefilter("error", PointEstimateWarning)  # no prediction without an approximation
    """


@dataclass(repr=False)
class MAPReport(Described):
    r"""
    How well converged a point estimate is.

    :ivar loss: :math:`L(\hat u)`, the negative log joint density in unconstrained space.
    :ivar gradient_norm: :math:`|\nabla L|`.
    :ivar newton_decrement: :math:`\sqrt{g^\top P^{-1} g}`: the length of the Newton step in posterior standard
        deviations. Zero at the MAP.
    :ivar smallest_curvature: an estimate of the smallest eigenvalue of the precision P; nan after ``polish``, which forms none.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoLaplace
        >>> guide = AutoLaplace(model).initialize(x, x).polish((x, x)).laplace_approximation((x, x))
        >>> guide.map_report.newton_decrement < 1e-6
        True
    """

    loss: float
    gradient_norm: float
    newton_decrement: float
    smallest_curvature: float = float("nan")

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        found = {
            "negative log joint density": f"{self.loss:.6g} nats",
            "gradient norm": f"{self.gradient_norm:.3g}",
            "Newton decrement": f"{self.newton_decrement:.3g} posterior standard deviations",
        }
        if not isnan(self.smallest_curvature):
            found["smallest curvature"] = f"{self.smallest_curvature:.3g}"
        return "how well the point estimate has converged", found

    def warn_beyond(self, limit: float) -> None:
        """Warns if the Newton decrement is larger than a limit."""
        if not self.newton_decrement <= limit:
            warn_user(
                f"the point estimate is {self.newton_decrement:.3g} posterior standard deviations away from the "
                f"minimum (Newton decrement; gradient norm {self.gradient_norm:.3g}). The approximation describes "
                "the point it is at: train longer or call guide.polish(data) first.",
                UnconvergedMAPWarning,
            )
