# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Flat priors, which cannot be sampled: they start at zero in unconstrained space."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_bnn.model.handlers import Site, base_distribution


def is_flat(site: Site) -> bool:
    """Whether a site's prior is an :class:`~pyro.distributions.ImproperUniform`."""
    return isinstance(base_distribution(site["fn"]), dist.ImproperUniform)


def center(site: Site) -> Tensor:
    """The value of a sample site at zero in unconstrained space."""
    transform = biject_to(site["fn"].support)
    return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))


class StartFlatSites(Messenger):
    """Gives latent sites with flat priors a value where nothing else has."""

    def _pyro_sample(self, msg: Site) -> None:
        if msg["value"] is None and is_flat(msg):
            msg["value"] = center(msg)


def _init(init_loc_fn: Callable[[Any], Tensor], site: Site) -> Tensor:
    try:
        return init_loc_fn(site)
    except NotImplementedError:  # no initialiser of Pyro's does without a draw
        if not is_flat(site):
            raise
        return center(site)


def init_flat(init_loc_fn: Callable[..., Any]) -> Callable[[Any], Tensor]:
    """
    An initialiser that also knows flat priors.

    :param callable init_loc_fn: the initialiser; values that it has for a site are taken.
    :return: the same, with zero in unconstrained space for flat priors that it cannot draw from.

    Example::

        >>> from pyro.infer.autoguide.initialization import init_to_median
        >>> prior = dist.ImproperUniform(dist.constraints.positive, (), (2,))
        >>> init_flat(init_to_median)({"name": "s", "fn": prior})
        tensor([1., 1.])
    """
    return partial(_init, init_loc_fn)
