# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The search for the mode of a joint density."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.definite import require_finite_mode
from pyro_bnn.model.data import is_single_batch
from pyro_bnn.model.derivatives import require_finite
from pyro_bnn.model.double import double_precision, doubled
from pyro_bnn.model.packed import PackedModel
from pyro_bnn.ops.newton import NewtonResult, Terms, lbfgs, newton_cg, value_and_gradient
from pyro_bnn.ops.notice import logger, warn_user

#: largest number of latents whose Hessian may be held: products with the identity and an eigendecomposition per step
DENSE_LIMIT = 1000


class UnconvergedMAPWarning(UserWarning):
    """
    The gradient at the point estimate is large in units of posterior standard deviations.

    Example::

        >>> import warnings
        >>> warnings.simplefilter("error", UnconvergedMAPWarning)  # no approximation away from a mode
    """


def find_mode(
    model: PackedModel,
    start: Tensor,
    data: Any,
    *,
    tolerance: float,
    max_iter: int,
    float64: bool,
    report: bool = True,
) -> NewtonResult:
    """
    Minimises the negative log joint density by L-BFGS and Newton steps from ``start``, shape ``(p,)``, to a Newton decrement of
    ``tolerance``, in double precision if ``float64``, and says, if ``report``, where the search has not converged in the
    metric of the exact Hessian. Raises :exc:`NotAMinimumError` if a site runs off, as there is no mode, and
    :exc:`ValueError` where the gradient is not finite, :exc:`RuntimeError` if ``float64`` meets tensors of lower precision that do not combine with it.
    """
    start = start.detach()
    with double_precision(model.modules) if float64 else nullcontext():
        try:
            first = start.double() if float64 else start
            model.check_data(first, doubled(data) if float64 else data)
            terms = partial(_terms, model, data, float64)
            found = _search(terms, first, data, tolerance, max_iter)
            if not isfinite(found.decrement):
                require_finite(model, value_and_gradient(terms, found.point)[1])
        except RuntimeError as error:
            if float64 and "dtype" in str(error):
                raise RuntimeError(
                    f"float64=True: the model mixes precisions ({error}): keep its tensors in modules (as buffers) "
                    "or pass them as arguments, or create them with the dtype of its inputs."
                ) from error
            raise
    require_finite_mode(model.space, start, found.point)
    logger.info(
        "polish: Newton decrement %.3g (tolerance %.3g) in %s, after %d gradients of the Newton steps",
        found.decrement, tolerance, found.point.dtype, found.evaluations,
    )  # fmt: skip
    if report:
        _report(found, tolerance)
    return found


def _terms(model: PackedModel, data: Any, float64: bool, latent: Tensor) -> Iterator[Tensor]:
    return model.losses(latent, doubled(data) if float64 else data)


def _search(terms: Terms, start: Tensor, data: Any, tolerance: float, max_iter: int) -> NewtonResult:
    # exact Newton steps get on faster than slow rounds of L-BFGS
    least = 0.5 if len(start) <= DENSE_LIMIT else 0.0
    point = lbfgs(terms, start, max_iter=max_iter, least_progress=least)
    return newton_cg(
        terms, point, tolerance=tolerance, keep_graphs=is_single_batch(data), dense_limit=DENSE_LIMIT
    )


def _report(found: NewtonResult, tolerance: float) -> None:
    """What was reached where the search has not converged, unless that is the precision of the numbers."""
    single = found.point.dtype != torch.float64
    if found.converged or (found.decrement <= 1e-2 and not found.indefinite):
        return
    shape = "with a direction of flat or negative curvature left, " if found.indefinite else ""
    advice = (
        "pass float64=True, which searches in double precision"
        if single
        else "networks with kinks (ReLU) have modes on them, where the Hessian says nothing: use smooth activations "
        "(Tanh, SiLU, GELU) or curvature='ggn'; scale inputs and targets to unit variance"
    )
    warn_user(
        f"polish stopped {shape}at a Newton decrement of {found.decrement:.3g} posterior standard deviations "
        f"(tolerance {tolerance:.3g}) in {found.point.dtype}: no step improves the joint density any more. To get further, "
        f"{advice}.",
        UnconvergedMAPWarning,
    )
