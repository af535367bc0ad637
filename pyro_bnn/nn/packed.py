# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""All weights of a network as one flat sample site."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn.nn.priors import map_distribution, unwrap
from pyro_bnn.nn.sites import (
    SITE_KEY,
    SiteModule,
    is_called,
    module_path,
    once_per_call,
    refuse_recomputation,
)
from pyro_bnn.ops.families import of_family


class PackedSite:
    r"""
    One flat site :math:`w \sim N(\mu, \operatorname{diag} \sigma^2)` that holds all weights of a network; the
    layers read views of it. Pyro's cost per sample site dominates the training of small networks, and here there
    is a single one, named ``"packed"``. The sites of the layers, which come with their names, move into it.
    """

    def __init__(self, root: Any, layers: list[tuple[str, SiteModule]]) -> None:
        self.layout: dict[str, torch.Size] = {}
        locs, scales, inits = [], [], []
        for path, layer in layers:
            for key in layer._sites:
                spec = layer._sites[key]
                full = f"{path}.{key}" if path else key
                base = unwrap(spec.prior)
                if not of_family(base, torch.distributions.Normal) or spec.init is None:
                    raise ValueError(
                        f"packed=True needs Normal priors, but that of {full!r} is {type(base).__name__}: use "
                        "packed=False."
                    )
                locs.append(base.loc.reshape(-1))
                scales.append(base.scale.reshape(-1))
                inits.append(spec.init.reshape(-1))
                self.layout[full] = spec.init.shape
                layer._redirect_site(key, self, full)
        self.prior = dist.Normal(torch.cat(locs), torch.cat(scales)).to_event(1)
        self.init = torch.cat(inits)
        self._root = root
        layers[0][1]._owned_packed = self  # this layer moves the prior along with itself

    def read(self, full: str) -> Tensor:
        """The value of a parameter by its full name, a view of the flat draw, which is sampled once per call of the network."""
        refuse_recomputation(self._root, full)
        if not is_called(self._root):
            return self.unpack(self.prior.sample())[full]
        infer: Any = {SITE_KEY: {"role": "weight", "init": self.init}}
        make = lambda name: self.unpack(pyro.sample(name, self.prior, infer=infer))  # noqa: E731
        return once_per_call(self._root, "packed", make)[full]

    def _shapes(self) -> dict[str, torch.Size]:
        """The shapes of the parameters, as layers have them."""
        return self.layout

    def unpack(self, value: Tensor) -> dict[str, Tensor]:
        """Splits draws ``(*batch, P)`` into views ``(*batch, *parameter_shape)`` by parameter name."""
        parts = value.split([shape.numel() for shape in self.layout.values()], dim=-1)
        return {
            name: part.unflatten(-1, shape)
            for (name, shape), part in zip(self.layout.items(), parts, strict=True)
        }

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to the tensors of the prior."""
        self.prior = map_distribution(self.prior, fn)
        self.init = fn(self.init)


def packed_sites(model: Any) -> dict[str, PackedSite]:
    """The flat sites of a model by name; one that is no module has none that could be found."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    found = [m._owned_packed for m in modules if isinstance(m, SiteModule) and m._owned_packed is not None]
    return {".".join(filter(None, [module_path(packed._root), "packed"])): packed for packed in found}


def unpack_site(net: Any, value: Tensor) -> dict[str, Tensor]:
    """
    Splits draws of the site ``"packed"`` of a network that was converted by ``bayesian_(net, packed=True)``.

    :param net: the network.
    :param value: draws of the site, shape ``(*batch, P)``.
    :return: views by parameter name, each of shape ``(*batch, *parameter_shape)``.
    :raises ValueError: if the network holds no packed site.

    Example::

        >>> from pyro_bnn.nn import bayesian_
        >>> net = bayesian_(torch.nn.Linear(3, 2), packed=True)
        >>> {name: tuple(w.shape) for name, w in unpack_site(net, torch.zeros(10, 8)).items()}
        {'weight': (10, 2, 3), 'bias': (10, 2)}
    """
    for packed in packed_sites(net).values():
        return packed.unpack(value)
    raise ValueError("the network has no packed site: convert it with bayesian_(net, packed=True).")
