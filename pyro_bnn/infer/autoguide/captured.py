# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""How much of the variance of outputs a guide of low rank is certain to have."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.certificate import Certificate, covariance_bounds, variance_bounds
from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.result import HFLResult
from pyro_bnn.model.data import Batch
from pyro_bnn.model.packed import PackedModel
from pyro_bnn.ops.enclosure import Enclosure, conjugate_rows


class VarianceBounds(NamedTuple):
    r"""
    Of the linearised Laplace variance :math:`v = g^\top P^{-1} g` of outputs, each of the shape of the outputs.

    :ivar lower: at most v.
    :ivar upper: at least v.
    :ivar variance: what the guide has.

    Example::

        >>> VarianceBounds(torch.tensor(0.8), torch.tensor(1.0), torch.tensor(0.5)).captured
        tensor(0.5000)
    """

    lower: Tensor
    upper: Tensor
    variance: Tensor

    @property
    def captured(self) -> Tensor:
        """The fraction of v that the guide is certain to have; 1 where v is zero."""
        fraction = (self.variance / self.upper).clamp(max=1).nan_to_num()
        return torch.where(self.upper == 0, torch.ones_like(fraction), fraction)


def join(result: HFLResult, directions: Tensor | None, images: Tensor | None) -> tuple[Tensor, Tensor]:
    """All directions that are known, with their products: of a certified result, and those of earlier ones."""
    assert result.certificate is not None
    enclosure = result.certificate.enclosure
    found = enclosure.directions.clone(), enclosure.images.clone()
    if enclosure.is_recursive or not len(found[0]):
        # of large models not all directions are kept: the displacements then
        images_of = result.gradients - result.certificate.remainders
        found = conjugate_rows(result.displacements, images_of)
    if directions is None or images is None:
        return found
    return conjugate_rows(torch.cat([directions, found[0]]), torch.cat([images, found[1]]))


def enclosure_of(precision: Tensor, directions: Tensor, images: Tensor, gap: float | None) -> Enclosure:
    """Bounds of the inverse of a precision that exceeds a diagonal one, of shape (p,); ``gap`` is that of the images."""
    enclosure = Enclosure(lambda r: r / precision)
    enclosure.extend(directions, images)
    enclosure.gap = gap
    return enclosure


def certificate_at(precision: Tensor, enclosure: Enclosure, rows: Tensor) -> Certificate:
    """The bounds for gradients of shape (m, p) by solutions in the span of the directions."""
    (solved, left), gap = enclosure.solve(rows), enclosure.gap or 0.0
    joint = covariance_bounds(enclosure, rows, solved, left, gap)
    bounds = variance_bounds(enclosure, rows, solved, left, gap)
    return Certificate(*bounds, joint, gap, enclosure, left, precision)


def site_functionals(
    packed: PackedModel, latent: Tensor, batch: Batch, chunk_size: int
) -> Iterator[tuple[str, Functionals]]:
    """The parameters of each observed site at some inputs."""
    for i, site in enumerate(packed.outputs(latent.detach().clone().requires_grad_(True), batch)):

        def outputs(u: Tensor, i: int = i) -> Tensor:
            return packed.outputs(u, batch)[i].outputs

        yield site.name, Functionals(outputs, latent, chunk_size=chunk_size)


def bounds_at(functionals: Functionals, posterior: Any, enclosure: Enclosure) -> VarianceBounds:
    """Of functionals, of their shape, a part of their gradients at a time."""
    parts: list[tuple[Tensor, ...]] = []
    for rows in functionals.rows():
        lower, upper = variance_bounds(enclosure, rows, *enclosure.solve(rows), enclosure.gap or 0.0)
        parts.append((lower, upper, posterior.quadratic_form(rows).diagonal()))
    joined = (torch.cat(side).reshape(functionals.shape) for side in zip(*parts, strict=True))
    return VarianceBounds(*joined)


def most_missed(
    rows: Tensor, enclosure: Enclosure, factor: Tensor, bounds: VarianceBounds, number: int
) -> Tensor:
    """
    Which functionals to solve for next, from gradients of shape (m, p): one by one that with the largest fraction of its
    variance missed, given those chosen before (a pivoted Cholesky decomposition of what is missed).
    """
    known, has = rows @ enclosure.directions.mT, rows @ factor
    left = (bounds.upper - bounds.variance).clamp(min=0)
    found: list[int] = []
    columns = rows.new_zeros(len(rows), 0)
    for _ in range(min(number, len(rows))):
        j = int((left / bounds.upper.clamp(min=torch.finfo(left.dtype).tiny)).argmax())
        if not float(left[j]) > 1e-3 * float(bounds.upper[j]):
            break
        column = known @ known[j] - has @ has[j] - columns @ columns[j]
        column[j] = left[j]
        columns = torch.cat([columns, (column / left[j].sqrt())[:, None]], -1)
        left = (left - columns[:, -1].square()).clamp(min=0)
        left[j] = 0.0
        found.append(j)
    return torch.tensor(found, dtype=torch.long, device=rows.device)


def spread(m: int, number: int, device: torch.device) -> Tensor:
    """The positions of a number of m things, far from each other."""
    return torch.linspace(0, m - 1, min(m, number), device=device).round().long().unique()
