# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a sum of curvature over data can do, whatever its structure."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pyro_bnn.curvature.parts import Part
from pyro_bnn.curvature.stream import SiteExamples
from pyro_bnn.ops.jacobian import LinearMap


class CurvatureSum:
    """
    A sum of likelihood curvatures in one structure.

    :param index: the entries it covers, shape ``(q,)``.
    :param latent: the packed vector, shape ``(p,)``, for its dtype and device.
    """

    def __init__(self, index: Tensor, latent: Tensor) -> None:
        self.index = index
        self.latent = latent
        self.place = torch.full((len(latent),), -1, dtype=torch.long, device=latent.device)
        self.place[index] = torch.arange(len(index), device=latent.device)

    def add(self, examples: SiteExamples, cotangents: Iterable[Tensor]) -> None:
        """
        Adds one site's curvature on one chunk of data.

        :param examples: the site.
        :param cotangents: see :meth:`~pyro_bnn.curvature.stream.SiteExamples.cotangents`.
        """
        raise NotImplementedError

    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        """
        Adds a curvature given by its products, such as an exact Hessian.

        :param operator: a map from ``(S, p)`` to ``(S, p)``.
        :param chunk_size: how many products run at once.
        """
        raise NotImplementedError

    def resume(self, parts: Sequence[Part]) -> None:
        """
        Starts from curvature that is there already.

        :param parts: what :meth:`parts` returned for an earlier sum of the same structure and entries.
        """
        raise NotImplementedError

    def parts(self, prior: Callable[[Tensor], Tensor]) -> list[Part]:
        """
        :param prior: gives the curvature of the prior on some positions, ``(q,)`` or ``(q, q)``.
        :return: the parts; together they cover all entries.
        """
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """
        What adds up over the processes of a data-parallel run.

        :return: tensors to be summed in place.
        :raises ValueError: if the sums of this structure do not add up.
        """
        raise ValueError(
            f"{type(self).__name__} does not add up over processes; with torch.distributed use structure='full', "
            "'block', 'kronecker', 'diagonal' or 'low_rank'."
        )

    def _columns(self, operator: LinearMap, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
        """Images of basis vectors, restricted to the entries: slices of rows and shape (s, q)."""
        q = len(self.index)
        for start in range(0, q, chunk_size):
            rows = slice(start, min(start + chunk_size, q))
            basis = self.latent.new_zeros(rows.stop - rows.start, len(self.latent))
            basis[torch.arange(len(basis)), self.index[rows]] = 1.0
            yield rows, operator(basis)[:, self.index]
