# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Draws of all sites of a mixture at once: a few operations on long vectors in place of several per site."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_bnn.infer.autoguide.components import LatentSite, is_positive, is_real

#: Start and length of a run of columns.
Span = tuple[int, int]


def spans_of(sites: Sequence[LatentSite], chosen: Sequence[LatentSite]) -> list[Span]:
    """
    Where the columns of some sites lie.

    :param sites: all sites, in the order of the columns.
    :param chosen: some of them, in the same order.
    :return: runs of columns, neighbours joined.
    """
    names = {site.name for site in chosen}
    spans: list[Span] = []
    start = 0
    for site in sites:
        if site.name in names:
            if spans and sum(spans[-1]) == start:
                spans[-1] = (spans[-1][0], spans[-1][1] + site.size)
            else:
                spans.append((start, site.size))
        start += site.size
    return spans


def columns(value: Tensor, spans: Sequence[Span]) -> Tensor:
    """
    Takes columns out of a tensor.

    :param value: shape ``(..., n)``.
    :param spans: runs of columns.
    :return: the columns, a view if they are one run.
    """
    if len(spans) == 1:
        start, length = spans[0]
        return value if length == value.shape[-1] else value.narrow(-1, start, length)
    return torch.cat([value.narrow(-1, *span) for span in spans], -1)


class JointDraws:
    r"""
    Draws :math:`\mu + \sigma \epsilon` of the sites that have a location and a scale.

    :param sites: all sites with a location per component, those with a scale first.
    :param int num_scaled: how many have a scale.
    :param bool per_example: whether rank-1 factors get a draw per example.
    """

    def __init__(self, sites: Sequence[LatentSite], num_scaled: int, per_example: bool) -> None:
        scaled = [site for site in sites[:num_scaled] if site.kind != "low_rank"]
        self.groups: list[tuple[bool, bool, list[LatentSite], list[int], list[Span]]] = []
        for cauchy in (False, True):
            for rows in (False, True):
                mine = [
                    site
                    for site in scaled
                    if (site.kind == "cauchy") == cauchy and (per_example and site.role == "factor") == rows
                ]
                if mine:
                    sizes = [site.size for site in mine]
                    self.groups.append((cauchy, rows, mine, sizes, spans_of(sites, mine)))

    def draw(
        self, loc: Tensor, scale: Tensor, particles: Sequence[int], nesting: int | None, rows: int | None
    ) -> dict[str, Tensor]:
        """
        Draws all components.

        :param loc: locations, shape ``(K, n)``.
        :param scale: scales of the first columns.
        :param particles: ``(S,)`` or empty.
        :param nesting: number of plate dimensions of the model, which the values leave free; ``None`` for values
            without a component dimension (one component only).
        :param rows: number of examples for draws per example.
        :return: by site, shape ``(*particles, K, 1, ..., 1, *site)`` with as many dimensions between as plates,
            the last one of size ``rows`` for draws per example.
        """
        values = {}
        for cauchy, per_example, sites, sizes, spans in self.groups:
            mean, spread = columns(loc, spans), columns(scale, spans)
            shape: tuple[int, ...]
            if per_example:
                assert rows is not None
                mean, spread = mean.unsqueeze(1), spread.unsqueeze(1)
                shape = (*particles, len(loc), rows, mean.shape[-1])
            else:
                shape = (*particles, *mean.shape)
            if cauchy:  # by inversion, see TangentCauchy
                noise = torch.rand(shape, dtype=mean.dtype, device=mean.device)
                noise.sub_(0.5).mul_(math.pi).tan_()
            else:
                noise = torch.randn(shape, dtype=mean.dtype, device=mean.device)
            z = torch.addcmul(mean, noise, spread)
            for site, piece in zip(sites, z.split(sizes, -1), strict=True):
                if nesting is None:
                    lead: tuple[int, ...] = ()
                else:
                    free = nesting - (len(site.shape) - site.event_dim)
                    ones = (1,) * free if rows is None or not per_example else (1,) * (free - 1) + (rows,)
                    lead = (*particles, len(loc), *ones)
                piece = piece.view((*lead, *site.raw_shape))
                if site.kind == "lognormal" or is_positive(site.support):
                    piece = piece.exp()
                elif not is_real(site.support):
                    piece = site.transform(piece)
                values[site.name] = piece
        return values
