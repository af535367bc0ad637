# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The dimensions that no target of a guide of low rank informs, and a Gaussian for them."""

from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bnn.curvature.accumulate import CurvatureAccumulator, NotAMinimumError
from pyro_bnn.infer.hfl.multipliers import prior_shift

Remainder = Literal["isotropic", "diagonal"]


def precision_of(guide: Any, data: Any, basis: Tensor, proximal: float) -> Tensor:
    """
    The diagonal of Λ, shape (p,): that of the GGN, or the mean curvature of the dimensions without targets, which are
    orthogonal to a basis of shape (r, p).
    """
    loc, kind = guide.loc, guide.remainder
    accumulator = CurvatureAccumulator(guide.packed, loc, "ggn", chunk_size=guide.chunk_size)
    ridge: Tensor | float = 0.0
    if guide.tau is not None:
        ridge, _ = prior_shift(guide.packed, loc, data, guide.tau)
    if kind == "diagonal":
        diagonal = accumulator.diagonal(data) + proximal + ridge
        _require_curvature(kind, int((diagonal <= 0).sum()), float(diagonal.min()))
        return diagonal
    r, p = basis.shape
    if r == p:  # nothing remains
        return torch.ones_like(loc).detach()
    generator = torch.Generator(device=loc.device).manual_seed(0)
    probes = torch.randn(32, p, dtype=loc.dtype, device=loc.device, generator=generator)
    free = probes
    for _ in range(2):  # twice is enough where few dimensions remain
        free = free - free @ basis.mT @ basis
    both = torch.stack([probes, free])
    products = accumulator.operator(data)(both.flatten(0, 1)).reshape(both.shape) + ridge * both
    whole, mean = ((both * products).sum((1, 2)) / both.square().sum((1, 2))).tolist()
    noise = 1e2 * torch.finfo(loc.dtype).eps * whole
    mean += proximal
    _require_curvature(kind, 0 if mean > noise else p - r, mean)
    # the mean curvature minimises KL(q || Laplace) over isotropic remainders
    return torch.full_like(loc, mean).detach()


def _require_curvature(kind: str, number: int, value: float) -> None:
    if number:
        raise NotAMinimumError(
            f"remainder={kind!r}: {number} dimensions have a curvature of {value:.3g}, so that no proper Gaussian "
            "describes them without targets: give their latents a proper prior, or leave remainder out."
        )


def split(factor: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The factor without null directions, and an orthonormal basis of the functionals that it moves."""
    U, singular, Vt = torch.linalg.svd(rows @ factor, full_matrices=False)
    keep = singular > 1e3 * torch.finfo(factor.dtype).eps * singular.max()
    basis = torch.linalg.qr((U[:, keep].mT @ rows).mT).Q.mT
    return factor @ Vt[keep].mT, basis
