# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Derivatives of a function of one vector, from an ordinary autograd graph.

All of them run the function's forward pass once, outside :mod:`torch.func`, so any code that autograd can
differentiate is fine; only the backward passes are batched.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import grad

#: A linear map that takes and returns tensors of shape ``(..., p)``.
LinearMap = Callable[[Tensor], Tensor]


def wide(x: Tensor) -> Tensor:
    """
    :param x: any tensor.
    :return: the same in float32 if it is float16 or bfloat16: sums and decompositions need more digits than those have.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _unit_rows(like: Tensor, chunk_size: int) -> Iterator[Tensor]:
    """The rows of the identity matrix of the size of a vector, ``chunk_size`` at a time."""
    for start in range(0, len(like), chunk_size):
        rows = like.new_zeros(min(chunk_size, len(like) - start), len(like))
        rows[:, start : start + len(rows)].fill_diagonal_(1.0)
        yield rows


def vjp(outputs: Tensor, inputs: Tensor, cotangents: Tensor, *, create_graph: bool = False) -> Tensor:
    r"""
    Vector-Jacobian products :math:`J^\top c` for a batch of cotangents.

    :param outputs: the function's value, shape ``(M,)``, with a graph that reaches ``inputs``.
    :param inputs: the vector differentiated against, shape ``(p,)``.
    :param cotangents: shape ``(S, M)``.
    :param create_graph: whether the products can be differentiated again.
    :return: shape ``(S, p)``.
    """
    cotangents = cotangents.to(outputs.dtype)

    def pull_back(c: Tensor, *, batched: bool) -> Tensor:
        how = {"create_graph": create_graph, "is_grads_batched": batched}
        (product,) = grad(outputs, inputs, c, retain_graph=True, materialize_grads=True, **how)
        return product

    try:
        found = pull_back(cotangents, batched=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operation whose derivative does not run on batches
        if not len(cotangents):
            raise
        found = torch.stack([pull_back(c, batched=False) for c in cotangents])
    return found.expand(cotangents.shape[0], *inputs.shape)  # zeros come unbatched where nothing is reached


def jacobian(outputs: Tensor, inputs: Tensor, *, chunk_size: int = 256) -> Tensor:
    r"""
    The Jacobian :math:`J = \partial\text{outputs}/\partial\text{inputs}` by batched reverse passes.

    :param outputs: shape ``(M,)``, with a graph that reaches ``inputs``.
    :param inputs: shape ``(p,)``.
    :param chunk_size: how many reverse passes run at once; memory grows with it.
    :return: shape ``(M, p)``, detached.

    Example::

        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> jacobian(torch.stack([x[0] * x[1], x[0] ** 2]), x)
        tensor([[2., 1.],
                [2., 0.]])
    """
    rows = [vjp(outputs, inputs, basis).detach() for basis in _unit_rows(outputs, chunk_size)]
    return torch.cat(rows) if rows else outputs.new_zeros(0, inputs.shape[0])


def jvp_operator(outputs: Tensor, inputs: Tensor, *, create_graph: bool = False) -> LinearMap:
    r"""
    Jacobian-vector products :math:`v \mapsto J v` by differentiating the reverse pass
    (:math:`J^\top c` is linear in :math:`c`; its own reverse pass is :math:`J`).

    :param outputs: shape ``(M,)``, with a graph that reaches ``inputs``.
    :param inputs: shape ``(p,)``.
    :param create_graph: whether the products can be differentiated again.
    :return: a map from ``(S, p)`` to ``(S, M)``.
    """
    dummy = torch.zeros_like(outputs, requires_grad=True)
    (transposed,) = grad(outputs, inputs, dummy, create_graph=True, materialize_grads=True)
    if not transposed.requires_grad:  # outputs do not depend on inputs
        return lambda v: v.new_zeros(v.shape[0], outputs.shape[0])
    if create_graph:
        return lambda v: vjp(transposed, dummy, v, create_graph=True)
    return lambda v: vjp(transposed, dummy, v).detach()


def hvp_operator(value: Tensor, inputs: Tensor) -> LinearMap:
    r"""
    Hessian-vector products :math:`v \mapsto \nabla^2 \text{value}\, v` from one retained gradient graph.

    :param value: a scalar, with a graph that reaches ``inputs``.
    :param inputs: shape ``(p,)``.
    :return: a map from ``(S, p)`` to ``(S, p)``.

    Example::

        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hvp_operator((x**3).sum(), x)(torch.eye(2))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    if not value.requires_grad:  # constant, such as the log density of a flat prior
        return torch.zeros_like
    (gradient,) = grad(value, inputs, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:  # linear in inputs
        return torch.zeros_like
    return lambda v: vjp(gradient, inputs, v).detach()


def dense(operator: LinearMap, like: Tensor, *, chunk_size: int = 256) -> Tensor:
    """
    The matrix of a linear map, column block by column block.

    :param operator: a map from ``(S, p)`` to ``(S, q)``.
    :param like: a vector of shape ``(p,)`` that gives size, dtype and device.
    :param chunk_size: how many products run at once.
    :return: shape ``(p, q)``; row ``i`` is the image of the ``i``-th basis vector.
    """
    return torch.cat([operator(basis) for basis in _unit_rows(like, chunk_size)])
