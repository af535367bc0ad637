# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The packed latent vector: all latent sites of a model, unconstrained, flattened and concatenated."""

import copy
from collections.abc import Collection, Mapping
from typing import Self

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from pyro_bnn.model.handlers import Site, latent_names


def bijection(name: str, site: Site) -> Transform:
    """
    From vectors to the support of a site.

    :raises NotImplementedError: where torch has none, such as for positive definite matrices.
    """
    fn = site["fn"]
    try:
        return biject_to(fn.support)
    except NotImplementedError:
        raise NotImplementedError(
            f"latent site {name!r} ({type(fn).__name__}): torch has no bijection from vectors to its support, {fn.support}. Write it "
            "in terms of sites that have one: a covariance or precision matrix by LKJCholesky and scales."
        ) from None


class LatentSpace:
    r"""
    The bijection between the values of a model's latent sites and one real vector :math:`u`.

    Sites appear in the order of the prototype trace, each mapped to unconstrained space by
    :func:`~torch.distributions.biject_to` of its support: the order and the transforms that
    :class:`~pyro.infer.autoguide.AutoContinuous` uses.

    :param trace: a prototype trace of the model, e.g. ``guide.prototype_trace``.
    :ivar int dim: length ``p`` of the packed vector.
    :ivar dict slices: the slice of each site, by name.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("a", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     pyro.sample("b", dist.LogNormal(0.0, 1.0))
        >>> space = LatentSpace(pyro.poutine.trace(model).get_trace())
        >>> space.dim, space.slices["b"]
        (3, slice(2, 3, None))
        >>> space.unpack(torch.zeros(3))["b"]
        tensor(1.)
    """

    def __init__(self, trace: Trace) -> None:
        self._supports: dict[str, Constraint] = {}
        self._shapes: dict[str, torch.Size] = {}
        for name in latent_names(trace):
            site: Site = trace.nodes[name]
            self._supports[name] = site["fn"].support
            self._shapes[name] = bijection(name, site).inv(site["value"]).shape
        self._lay_out()

    def _lay_out(self) -> None:
        """The places of the sites, one after the other."""
        self.slices: dict[str, slice] = {}
        self.dim = 0
        for name, shape in self._shapes.items():
            self.slices[name] = slice(self.dim, self.dim + shape.numel())
            self.dim += shape.numel()

    def only(self, names: Collection[str]) -> Self:
        """The space of some of the sites, in the same order."""
        found = copy.copy(self)
        found._supports = {name: support for name, support in self._supports.items() if name in names}
        found._shapes = {name: shape for name, shape in self._shapes.items() if name in names}
        found._lay_out()
        return found

    def is_constrained(self, name: str) -> bool:
        """Whether the support of a site is not all of real space."""
        transform = biject_to(self._supports[name])
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        return not (isinstance(transform, ComposeTransform) and not transform.parts)

    def split(self, latent: Tensor) -> dict[str, Tensor]:
        """
        The parts of packed vectors.

        :param latent: packed vectors, shape ``sample_shape + (p,)``.
        :return: by site name, unconstrained tensors of shape ``sample_shape + unconstrained site_shape``.
        """
        start = latent.shape[:-1]
        return {n: latent[..., self.slices[n]].reshape(start + shape) for n, shape in self._shapes.items()}

    def constrain(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of sites, given what :meth:`split` returns."""
        return {name: biject_to(self._supports[name])(part) for name, part in parts.items()}

    def unpack(self, latent: Tensor) -> dict[str, Tensor]:
        """
        The constrained values of all sites.

        :param latent: packed vectors, shape ``sample_shape + (p,)``.
        :return: by site name, tensors of shape ``sample_shape + site_shape``.
        """
        return self.constrain(self.split(latent))

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """
        The inverse of :meth:`unpack`.

        :param values: by site name, tensors of shape ``sample_shape + site_shape``.
        :return: packed vectors, shape ``sample_shape + (p,)``.
        """
        parts = []
        for name, shape in self._shapes.items():
            unconstrained = biject_to(self._supports[name]).inv(values[name])
            sample_shape = unconstrained.shape[: unconstrained.dim() - len(shape)]
            parts.append(unconstrained.reshape(sample_shape + (-1,)))
        return torch.cat(parts, -1)

    def log_abs_det_jacobian(self, latent: Tensor) -> Tensor:
        r"""
        :math:`\log|\det \partial \theta/\partial u|`, summed over all sites.

        :param latent: packed vectors, shape ``sample_shape + (p,)``.
        :return: shape ``sample_shape``.
        """
        total = self.log_det(self.split(latent), latent.dim() - 1)
        return latent.new_zeros(latent.shape[:-1]) + total

    def log_det(self, parts: Mapping[str, Tensor], sample_dims: int = 0) -> Tensor | float:
        """The same for what :meth:`split` returns, with so many dimensions for the samples."""
        total: Tensor | float = 0.0
        for name, part in parts.items():
            if self.is_constrained(name):
                transform = biject_to(self._supports[name])
                terms = transform.log_abs_det_jacobian(part, transform(part))
                total = total + terms.reshape(terms.shape[:sample_dims] + (-1,)).sum(-1)
        return total

    def support(self, name: str) -> Constraint:
        """The support of a site in the prototype."""
        return self._supports[name]
