# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What runs under single draws show of a model, and how values of joint runs fit to it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn.infer.predict.draws import Draws
from pyro_bnn.model.handlers import Site, base_distribution, is_deterministic, is_factor
from pyro_bnn.model.observations import is_validated

Key = TypeVar("Key")

#: What is read at a site: its name, a tensor shaped batch shape + rest, and the number of dims of the rest.
Reading = tuple[str, Tensor, int]

#: The sample sites of a run by name.
Sites = dict[str, Site]

#: Reads the sites of a run; also given is the shape of the draws in it, ``(S, 1, ..., 1)``, or ``()`` under one draw.
Reader = Callable[[Sites, torch.Size], dict[Key, Reading]]


@dataclass
class Structure:
    """
    What runs under single draws showed of a model; a site need not be there in every batch.

    :ivar sites: the sites of these runs.
    :ivar ndims: the number of batch dimensions of each.
    :ivar nesting: the number of dimensions of the plates, at most.
    :ivar validated: the sites whose observations are held against the support.
    """

    sites: Sites = field(default_factory=dict)
    ndims: dict[str, int] = field(default_factory=dict)
    nesting: int = 0
    validated: set[str] = field(default_factory=set)

    def note(self, sites: Sites) -> None:
        """Adds the sites of a run."""
        self.validated |= {n for n in sites.keys() - self.sites.keys() if is_validated(sites[n])}
        self.sites |= sites
        self.ndims |= {name: len(site["fn"].batch_shape) for name, site in sites.items()}
        frames = [frame for site in sites.values() for frame in site["cond_indep_stack"]]
        depth = max((-frame.dim for frame in frames if frame.vectorized), default=0)
        self.nesting = max([self.nesting, depth, *self.ndims.values()])

    def lacks(self, sites: Sites) -> bool:
        """Whether there are sites that no run had before: those of some batches only."""
        return not sites.keys() <= self.sites.keys()

    def spread(self, name: str, value: Tensor) -> Tensor:
        """Draws ``(S,) + site shape`` with S left of all plates."""
        missing = self.nesting - self.ndims.get(name, 0)
        return value.reshape(value.shape[:1] + (1,) * missing + value.shape[1:])

    def align(self, name: str, value: Tensor, rest: int = 0) -> Tensor:
        """Removes the singleton dimensions between S and the batch shape from a value of a joint run."""
        own = self.ndims.get(name, 0) + rest
        return value.reshape(value.shape[:1] + (value.shape[value.dim() - own :] if own else ()))

    def value_reading(self, name: str, site: Site) -> Reading:
        """
        The value of a deterministic site. In a joint run one without a dimension for the draws is taken for one that does
        not depend on them; that it does not is what the comparison with single runs finds out.
        """
        value, batch = site["value"], site["fn"].batch_shape
        own = self.sites[name]["value"].dim()
        if len(batch) > self.ndims[name] and value.dim() <= own:
            value = value.expand(batch[:1] + value.shape)
        return name, value, own - self.ndims[name]


def predicted_names(sites: Sites, draws: Draws) -> Iterator[str]:
    """
    The sites that draws do not fix: the observed ones, and those that a model called without observations
    samples in their place.
    """
    for name, site in sites.items():
        if name not in draws and not is_deterministic(site) and not is_factor(site):
            yield name


def undrawn(sites: Sites, draws: Draws) -> Iterator[str]:
    """The sites of which every run takes new draws: those without observations, and without draws."""
    for name in predicted_names(sites, draws):
        site = sites[name]
        if not site["is_observed"] and not isinstance(base_distribution(site["fn"]), dist.Delta):
            yield name
