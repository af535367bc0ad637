# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Joint covariances over the points of several batches, block by block."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.model.data import Batch, iter_batches
from pyro_bnn.ops.jacobian import jacobian, wide


def joint_covariance_blocks(guide: Any, data: Any) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    r"""
    The blocks :math:`J_i P^{-1} J_j^\top`, :math:`j \le i`, of the covariance over all points and outputs.

    :param guide: a fitted :class:`~pyro_bnn.infer.autoguide.AutoLaplace`.
    :param data: one batch or an iterable of batches in a fixed order, without observations.
    :return: an iterator over i, j and the block by observed site, shape ``shape_i + (C,) + shape_j + (C,)``.
    """
    for i, batch in enumerate(iter_batches(data)):
        mine = _half(guide, batch)
        for j, other in enumerate(iter_batches(data)):
            theirs = mine if j == i else _half(guide, other)
            blocks = {
                name: (a @ theirs[name][0].mT).reshape(shape + theirs[name][1])
                for name, (a, shape) in mine.items()
            }
            yield i, j, blocks
            if j == i:
                break


@torch.inference_mode(False)
@torch.enable_grad()
def _half(guide: Any, batch: Batch) -> dict[str, tuple[Tensor, torch.Size]]:
    r"""By site, W with :math:`W W^\top = J P^{-1} J^\top` and the shape of the outputs."""
    latent = guide.loc.detach().clone().requires_grad_(True)
    found = {}
    for site in guide.packed.outputs(latent, batch):
        J = wide(jacobian(site.outputs.reshape(-1), latent, chunk_size=guide.chunk_size))
        found[site.name] = (guide.posterior.half_solve_transposed(J).detach(), site.outputs.shape)
    return found
