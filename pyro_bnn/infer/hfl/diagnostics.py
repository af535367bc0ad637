# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a Hessian-free Laplace computation says about its own accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.certificate import Certificate
from pyro_bnn.ops.described import Described
from pyro_bnn.ops.notice import warn_user


class HFLWarning(UserWarning):
    """
    A Hessian-free Laplace result whose own diagnostics say that it may be inaccurate.

    Example::

        >>> import warnings
        >>> warnings.simplefilter("error", HFLWarning)  # no variance that its own diagnostics doubt
    """


@dataclass(kw_only=True, repr=False)
class Diagnostics(Described):
    """The part of :class:`~pyro_bnn.infer.hfl.HFLResult` that judges the rest."""

    method: str
    curvature: str
    variances: Tensor
    antisymmetry: float
    newton_decrement: float
    smallest_curvature: float
    residual: float
    agreement: float | None = None
    epsilon: float | None = None
    proximal: float = 0.0
    captured: float | None = None
    captured_error: float | None = None
    certificate: Certificate | None = None
    uncertified: str = ""
    iterations: int = 0
    products: int = 0
    gradient_evaluations: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def gradient_equivalents(self) -> int:
        """The cost in gradients of the loss, a curvature-vector product counted as two."""
        return self.gradient_evaluations + 2 * self.products

    def rows(self) -> dict[str, str]:
        """The diagnostics by name, for printing."""
        rows = {
            "Newton decrement of the point estimate": f"{self.newton_decrement:.2g} sd",
            "smallest curvature met": f"{self.smallest_curvature:.3g}",
            "residual of the solves": f"{self.residual:.2g}",
            "antisymmetry of the responses": f"{self.antisymmetry:.2g} sd",
        }
        if self.epsilon is not None:
            rows["epsilon"] = f"{self.epsilon:.2g} sd"
        if self.agreement is not None:
            rows["difference from epsilon / 3"] = f"{self.agreement:.2g}"
        if self.proximal:
            rows["proximal delta (biases variances down)"] = f"{self.proximal:.3g}"
        if self.captured is not None:
            rows["captured variance"] = f"{self.captured:.4f} +- {self.captured_error:.4f}"
        if self.certificate is not None:
            rows["certified relative width"] = f"{self.certificate.width:.2g}"
        elif self.uncertified:
            rows["not certified"] = self.uncertified
        return rows

    def warn(
        self, *, tolerance: float, width: float | None = None, largest_curvature: float, map_tolerance: float
    ) -> None:
        """Warns of all that makes the result inaccurate, and notes it; ``width`` is the one that was asked for."""
        dtype = self.variances.dtype
        for text in (
            *self._of_the_point(largest_curvature, map_tolerance, dtype),
            *self._of_the_bounds(width),
            *self._of_the_method(tolerance if width is None else float("inf")),
        ):
            warn_user(text, HFLWarning)
            self.warnings.append(text)

    def _of_the_point(
        self, largest_curvature: float, map_tolerance: float, dtype: torch.dtype
    ) -> Iterator[str]:
        if not self.newton_decrement <= map_tolerance:
            yield (
                f"the point estimate is {self.newton_decrement:.3g} posterior standard deviations away from the minimum "
                "(Newton decrement). Variances are those of the Laplace approximation at the point it is at: train longer "
                "or call guide.polish(data) first"
            )
        if torch.finfo(dtype).eps * largest_curvature > 1e-2 * self.smallest_curvature:
            yield (
                f"curvatures range from {self.smallest_curvature:.2g} to {largest_curvature:.2g}, more than "
                f"{str(dtype).removeprefix('torch.')} resolves to 1 %: use float64"
            )

    def _of_the_bounds(self, width: float | None) -> Iterator[str]:
        if self.certificate is None:
            return
        lower, upper = self.certificate.lower, self.certificate.upper
        if self.method in ("cg", "probe"):
            if width is not None and self.certificate.width > width:
                yield (
                    f"the bounds of the variances are up to {self.certificate.width:.2g} wide, relative to the lower one, not "
                    f"{width:.2g}: use a preconditioner, a larger max_iter, or float64"
                )
            return
        outside = (self.variances > 1.01 * upper) | (self.variances < 0.99 * lower)
        if bool(outside.any()):
            yield (
                f"{int(outside.sum())} of {len(lower)} variances of method={self.method!r} lie outside of their certified "
                "bounds by more than 1 %: read lower and upper, or use method='cg'"
            )

    def _of_the_span(self) -> str:
        share = f"{self.residual**2:.2g}"
        if self.method == "paired":
            return (
                f"runs and gradients stopped {self.residual:.2g} epsilon short of their minima, so that variances may be too small "
                f"by {share} of them: use a preconditioner, more epochs, or method='cg'"
            )
        if self.certificate is not None:
            return f"variances may be too small by {share} of them, the width of their bounds: allow more sweeps, or train longer"
        return (
            f"variances may be too small: the last directions raised one by {share} of it, and what is missing may be more than "
            "that. Allow more sweeps, or train longer in the runs"
        )

    def _of_the_method(self, tolerance: float) -> Iterator[str]:
        if self.method in ("cg", "probe"):
            if self.residual > 10 * tolerance:
                yield (
                    f"the solves stopped at a relative residual of {self.residual:.2g}, not {tolerance:.2g}: variances are "
                    "lower bounds. Use a preconditioner, a larger max_iter, or float64"
                )
        elif self.method in ("paired", "first_order"):
            if self.residual**2 > 0.02:
                yield self._of_the_span()
        elif self.residual > 0.1:
            yield (
                f"the perturbed minimisations stopped {self.residual:.2g} epsilon short of their minima, so that variances "
                "may be wrong by as large a fraction: use method='cg', float64, a preconditioner, or more epochs"
            )
        if self.agreement is not None and self.agreement > 0.01:
            yield (
                f"variances at epsilon and epsilon / 3 differ by {self.agreement:.2g}: epsilon is too large for the basin of "
                "the point estimate, or too small for the precision. Use method='cg', or float64"
            )
        if self.antisymmetry > 0.05:
            yield (
                f"the responses are antisymmetric by {self.antisymmetry:.2g} standard deviations, which at a minimum they "
                "cannot be: covariances are inaccurate"
            )
