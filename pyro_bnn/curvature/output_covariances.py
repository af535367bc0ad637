# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Covariances :math:`J P^{-1} J^\top` of a linearised model's outputs over one batch: of the parameters of each element,
and of those of each observation, whose elements (its event dimensions) share the latents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.curvature.linear_covariance import LinearCovariance
from pyro_bnn.curvature.stream import ExampleStream, SiteExamples
from pyro_bnn.model.data import Batch
from pyro_bnn.model.packed import SiteOutputs

#: parameters of one observation up to which their covariances are formed together with their variances
JOINT_LIMIT = 64


@dataclass
class SiteCovariances:
    """
    Covariances of one site, chunk by chunk.

    :ivar elements: of the parameters of each element, shape ``shape + (C, C)``.
    :ivar events: of those of each observation of E elements, shape ``batch_shape + (E C, E C)``; empty where there are no
        event dimensions, or where they were not wanted.
    """

    elements: list[Tensor] = field(default_factory=list)
    events: list[Tensor] = field(default_factory=list)


def joined(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """
    :param parts: covariances of chunks.
    :param shape: what their leading dimensions are in the whole batch.
    :return: the whole.
    """
    # chunks are smaller than the whole in the dimension along which the batch was split, and there only; sites without that
    # dimension are the same in all of them
    dims = [d for d, size in enumerate(shape) if parts[0].shape[d] != size]
    return torch.cat(parts, *dims) if dims else parts[0]


def output_covariances(
    posterior: Any,
    stream: ExampleStream,
    batch: Batch,
    *,
    joint: bool = False,
    whole: Callable[[], list[SiteOutputs]] | None = None,
) -> tuple[dict[str, SiteCovariances], list[SiteOutputs]]:
    """
    :param posterior: a Gaussian over the packed vector.
    :param stream: runs the model.
    :param batch: arguments of the model.
    :param joint: whether covariances of whole observations are wanted, however large.
    :param whole: gives the outputs of the whole batch, where they are needed if it does not run in one piece.
    :return: covariances by site; and the outputs, if the batch ran in one piece.
    """
    found: dict[str, SiteCovariances] = {}
    covariance = LinearCovariance(posterior)
    outputs: list[list[SiteOutputs]] = []
    for _, sites in stream.run_batch(batch, whole=whole):
        outputs.append([examples.site for examples in sites])
        for examples in sites:
            with torch.no_grad():
                _add(found.setdefault(examples.site.name, SiteCovariances()), covariance, examples, joint)
    return found, outputs[0] if len(outputs) == 1 else []


def _add(mine: SiteCovariances, covariance: LinearCovariance, examples: SiteExamples, joint: bool) -> None:
    site, jac = examples.site, examples.jacobian
    shape, C = site.outputs.shape[:-1], site.outputs.shape[-1]
    batch = len(shape) - site.event_dim
    E = shape[batch:].numel()
    # examples are batch dimensions of the site, never elements of its events
    if E > 1 and (joint or E * C <= JOINT_LIMIT):
        blocks = covariance.elements(jac, jac.M // (E * C))
        blocks = _placed(blocks, jac.B, jac.dim, shape[:batch])
        mine.events.append(blocks)
        apart = blocks.unflatten(-1, (E, C)).unflatten(-3, (E, C)).diagonal(dim1=-4, dim2=-2)
        mine.elements.append(apart.movedim(-1, -3).reshape(shape + (C, C)))
    else:
        blocks = covariance.elements(jac, jac.M // C)
        mine.elements.append(_placed(blocks, jac.B, jac.dim, shape))


def _placed(blocks: Tensor, size: int, dim: int, shape: torch.Size) -> Tensor:
    """Blocks by example and its parts, in the shape of the site: from (B, R, n, n) to shape + (n, n)."""
    if dim < 0:
        return blocks.reshape(shape + blocks.shape[-2:])
    rest = shape[:dim] + shape[dim + 1 :]
    return blocks.reshape((size,) + rest + blocks.shape[-2:]).movedim(0, dim)


@torch.inference_mode(False)
@torch.enable_grad()
def event_covariance(
    posterior: Any, stream: ExampleStream, batch: Batch, name: str, shape: torch.Size
) -> Tensor:
    """
    The covariance of all parameters of each observation of one site.

    :param posterior: a Gaussian over the packed vector.
    :param stream: runs the model.
    :param batch: arguments of the model.
    :param name: the site.
    :param shape: its batch shape.
    :return: shape ``batch_shape + (E C, E C)``.
    """
    found, _ = output_covariances(posterior, stream, batch, joint=True)
    return joined(found[name].events, shape)
