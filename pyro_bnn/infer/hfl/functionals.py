# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Scalar functions of a model's latents whose variances are wanted."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.model.data import Batch
from pyro_bnn.model.packed import PackedModel, depends_on
from pyro_bnn.ops.jacobian import jacobian, jvp_operator, vjp

#: A user's function: the latents by site name, then the targets, to a tensor.
Functional = Callable[..., Tensor]


class Functionals:
    r"""
    m scalar functions :math:`f_j(u)` of the packed latent vector, with their derivatives at a point estimate.

    :param function: a differentiable map from a vector of shape ``(p,)`` to a tensor of any shape.
    :param linearized: whether values elsewhere are those of the linearisation at ``latent``.
    :param chunk_size: how many reverse passes run at once.
    :ivar values: at the point estimate, shape ``(m,)``.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        latent: Tensor,
        *,
        linearized: bool = False,
        chunk_size: int = 256,
    ) -> None:
        self.linearized = linearized
        self.chunk_size = chunk_size
        self._function = function
        self._leaf = latent.detach().clone().requires_grad_(True)
        value = function(self._leaf)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(
                f"the functional returned {type(value).__name__}"
                f"{' of dtype ' + str(value.dtype) if isinstance(value, Tensor) else ''}, expected a tensor of "
                "floating-point numbers"
            )
        self.shape = value.shape
        self._graph = value.reshape(-1)
        self.values = self._graph.detach()
        if not torch.isfinite(self.values).all():
            raise ValueError(
                f"{int((~torch.isfinite(self.values)).sum())} of {self.values.numel()} functionals are not finite "
                "at the point estimate: check the targets and the functional."
            )
        self._rows: Tensor | None = None

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def latent(self) -> Tensor:
        """The point estimate, shape ``(p,)``."""
        return self._leaf.detach()

    @property
    def has_graph(self) -> bool:
        """Whether gradients of the values reach the latents."""
        return depends_on(self._graph, self._leaf)

    @property
    def gradients(self) -> Tensor:
        """:math:`g_j`, shape ``(m, p)``."""
        if self._rows is None:
            if self._graph.requires_grad:
                self._rows = jacobian(self._graph, self._leaf, chunk_size=self.chunk_size)
            else:
                self._rows = self._leaf.new_zeros(len(self), self._leaf.shape[0]).detach()
        return self._rows

    def rows(self) -> Iterator[Tensor]:
        """The gradients, a part of shape ``(k, p)`` at a time, which are not kept."""
        for index in torch.arange(len(self), device=self._leaf.device).split(self.chunk_size):
            if self._rows is not None:
                yield self._rows[index]
            else:
                yield self.transposed(torch.nn.functional.one_hot(index, len(self)).to(self.values.dtype))

    def subset(self, index: Tensor) -> "Functionals":
        """Those at an index of shape ``(k,)``."""
        function = self._function
        some = Functionals(
            lambda u: function(u).reshape(-1)[index],
            self._leaf,
            linearized=self.linearized,
            chunk_size=self.chunk_size,
        )
        some._rows = self.gradients[index]
        return some

    def transposed(self, weights: Tensor) -> Tensor:
        """Gradients, shape ``(S, p)``, of linear combinations with weights of shape ``(S, m)``."""
        return vjp(self._graph, self._leaf, weights).detach()

    def responses(self, displacements: Tensor) -> Tensor:
        """First-order changes of all functionals, shape ``(S, m)``, to displacements of shape ``(S, p)``."""
        if self._rows is not None:
            return displacements @ self._rows.mT
        operator = jvp_operator(self._graph, self._leaf)
        return torch.cat([operator(part) for part in displacements.split(self.chunk_size)])

    def evaluate(self, latent: Tensor) -> Tensor:
        """The values of the function itself, linearised or not, shape ``(m,)``."""
        return self._function(latent).reshape(-1)

    def differences(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """
        How much the function itself grows from the point estimate less an offset to it, and from there to the point with
        the offset, each of shape ``(m,)``.
        """
        with torch.enable_grad():  # which a function may take itself
            below, above = (
                self.evaluate((self.latent + sign * offset).requires_grad_()).detach() for sign in (-1, 1)
            )
        return self.values - below, above - self.values

    def at(self, latent: Tensor) -> Tensor:
        """The values at a vector, shape ``(m,)``; a graph reaches it if it requires a gradient."""
        if self.linearized:
            return self.values + self.gradients @ (latent - self._leaf.detach())
        # which parameters of a site depend on the latents is read off the graph
        leaf = latent if latent.requires_grad else latent.detach().requires_grad_(True)
        return self._function(leaf).reshape(-1)


def output_functionals(model: PackedModel, latent: Tensor, targets: Batch, **options: Any) -> Functionals:
    """
    The parameters of the observed sites at target inputs: the mean of a Normal, the logits of a Categorical; of shape
    ``site shape + (C,)``, several observed sites flattened and concatenated.
    """

    def function(u: Tensor) -> Tensor:
        outputs = [site.outputs for site in model.outputs(u, targets)]
        return outputs[0] if len(outputs) == 1 else torch.cat([o.reshape(-1) for o in outputs])

    return Functionals(function, latent, **options)


def user_functionals(
    model: PackedModel, latent: Tensor, functional: Functional, targets: Batch | None, **options: Any
) -> Functionals:
    """A user's function of the constrained latents by site name, and of the targets if there are any."""
    args, kwargs = targets if targets is not None else ((), {})
    return Functionals(lambda u: functional(model.space.unpack(u), *args, **kwargs), latent, **options)
