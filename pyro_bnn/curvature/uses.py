# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Per-example Jacobians of recorded uses of a vector's entries, see :class:`~pyro_bnn.curvature.capture.Capture`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from typing_extensions import override

from pyro_bnn.curvature.patches import ChannelRows, OutputPatches, PatchInputs, gram


class Output:
    """
    A place in an autograd graph that gradients are taken in: that of a tensor when it was made. What the program
    does to the tensor in place later moves the tensor on, not this place.
    """

    def __init__(self, y: Tensor) -> None:
        self.edge: GradientEdge = get_gradient_edge(y)
        self.shape, self.dtype, self.device = y.shape, y.dtype, y.device

    @property
    def key(self) -> tuple[object, int]:
        """The same for two outputs if they are the same place."""
        return self.edge.node, self.edge.output_nr

    def zeros(self) -> Tensor:
        """The gradient where there is no path."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


@dataclass
class Layout:
    """
    Where the examples are among the batch dimensions of a tensor: the dimension ``dim``, which, if it is larger than the
    number of examples, runs over examples first (``major``) or last.
    """

    dim: int
    major: bool = True

    def split(self, x: Tensor, B: int) -> Tensor:
        """A tensor that has the dimension, with the B examples in a dimension of their own, moved to the front."""
        size = x.shape[self.dim]
        if size != B:
            x = x.unflatten(self.dim, (B, size // B) if self.major else (size // B, B))
        return x.movedim(self.dim if self.major or size == B else self.dim + 1, 0)

    def fits(self, use: "Use", output: Output, B: int) -> bool:
        """Whether a use whose output this is has the dimension, free, and as a multiple of the B examples."""
        # shapes only: no memory is touched
        rows, dims = use.batch_rows(torch.empty(output.shape, device="meta"))
        if self.dim >= dims or not rows.shape[self.dim] or rows.shape[self.dim] % B:
            return False
        return use.allows(self.dim, dims)


class Use:
    """
    One use of entries of the vector at positions ``index``: the gradient is taken in the output number ``slot`` of a
    ``function`` that the program called, where :func:`find_layout` finds the examples.
    """

    layout: Layout | None = None
    slot: int = -1
    function: str = ""

    def __init__(self, index: Tensor) -> None:
        self.index = index

    def batch_rows(self, g: Tensor) -> tuple[Tensor, int]:
        """The gradient in the output in the form whose leading dimensions may hold the examples, and how many do."""
        raise NotImplementedError

    def allows(self, dim: int, dims: int) -> bool:
        """Whether the examples may be in one of these dimensions."""
        return True

    def placed_rows(self, g: Tensor, B: int) -> Tensor:
        """The rows of the gradient in the output, the B examples first."""
        return self.examples_first(self.batch_rows(g)[0], B)

    def examples_first(self, x: Tensor, B: int) -> Tensor:
        """See :meth:`Layout.split`."""
        assert self.layout is not None
        return self.layout.split(x, B)


class LinearUse(Use):
    """
    Entries, at positions of shape ``(out, in)``, that are the weight of a linear map of ``x``, shape ``(*batch, in)`` or a
    function that forms it; ``rows`` turns the gradient in the output tensor into shape ``(*batch, out)``.
    """

    def __init__(
        self, index: Tensor, x: Tensor | Callable[[], Tensor], rows: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(index)
        self.x = x
        self.rows = rows

    @override
    def batch_rows(self, g: Tensor) -> tuple[Tensor, int]:
        rows = self.rows(g)
        return rows, rows.dim() - 1

    @property
    def rows_per_example(self) -> int:
        """1 where the inputs are known to be one row per example of the output itself, else 0."""
        return int(isinstance(self.x, Tensor) and self.x.dim() == 2)

    def _inputs(self) -> Tensor:
        return self.x if isinstance(self.x, Tensor) else self.x()

    def input_numel(self) -> int:
        """How many numbers the inputs are."""
        return self.x.numel() if isinstance(self.x, PatchInputs) else self._inputs().numel()

    def input_gram(self, dtype: torch.dtype) -> tuple[Tensor, int]:
        """The sum of outer products of the inputs in a precision, shape ``(in, in)``, and the number of terms."""
        if isinstance(self.x, PatchInputs):
            return self.x.gram(dtype)
        x = self._inputs().to(dtype)
        x = x.reshape(-1, x.shape[-1])
        return gram(x), x.shape[0]

    def present(self) -> Tensor:
        """Which rows have an input other than zero, bool, shape ``batch``."""
        if isinstance(self.x, PatchInputs):
            return self.x.present()
        x = self._inputs()
        present = x[..., :16].any(-1)
        rest = ~present
        if bool(rest.any()):  # few rows, mostly
            present[rest] = x[rest].any(-1)
        return present

    def output_gram(self, g: Tensor, present: Tensor | None = None) -> Tensor:
        """The sum of outer products of the gradient's rows, or of those with ``present``, shape ``(out, out)``."""
        if isinstance(self.rows, ChannelRows) and present is None:
            return self.rows.gram(g)
        rows = self.rows(g)
        rows = rows.reshape(-1, rows.shape[-1])
        return gram(rows if present is None else rows[present.reshape(-1)])

    def placed(self, values: Tensor, B: int) -> Tensor:
        """Values of rows, shape ``batch``, by example, shape ``(B, T)``."""
        return self.examples_first(values, B).reshape(B, -1)

    def inputs(self, B: int) -> Tensor:
        """The inputs, shape ``(B, T, in)``."""
        x = self._inputs()
        return self.examples_first(x, B).reshape(B, -1, x.shape[-1])

    def gradients(self, g: Tensor, B: int) -> Tensor:
        """The rows of the gradient in the output, shape ``(B, T, out)``."""
        return self.placed_rows(g, B).reshape(B, -1, self.index.shape[0])

    def projected(self, v: Tensor, B: int) -> Tensor:
        """Inner products of the inputs with a vector, shape ``(B, T)``."""
        return self.placed(self.x.project(v) if isinstance(self.x, PatchInputs) else self._inputs() @ v, B)

    def contracted(self, g: Tensor, u: Tensor, B: int) -> Tensor:
        """Inner products of the rows of the gradient with a vector, shape ``(B, T)``."""
        rows = self.rows
        return self.placed(
            rows.project(g, u) if isinstance(rows, (ChannelRows, OutputPatches)) else rows(g) @ u, B
        )


class ElementwiseUse(Use):
    """
    Entries, at positions that broadcast to the shape of the output, that scale a tensor (``x`` given) or are added to one,
    or subtracted (``sign`` -1).
    """

    def __init__(self, index: Tensor, x: Tensor | None = None, sign: float = 1.0) -> None:
        super().__init__(index)
        self.x = x
        self.sign = sign

    @override
    def batch_rows(self, g: Tensor) -> tuple[Tensor, int]:
        return g, g.dim()

    @override
    def allows(self, dim: int, dims: int) -> bool:  # dimensions along which the entries vary hold no examples
        at = dim - (dims - self.index.dim())
        return at < 0 or self.index.shape[at] == 1

    def jacobian(self, g: Tensor, B: int) -> Tensor:
        """The gradient in the entries for each example, shape ``(B, q)``."""
        assert self.layout is not None
        product = g if self.x is None else g * self.x
        rest = [1] * (product.dim() - self.index.dim()) + list(self.index.shape)
        product = self.layout.split(product, B)
        rest.pop(self.layout.dim)
        if product.dim() > len(rest) + 1:  # the dimension held more than the examples
            rest.insert(self.layout.dim, 1)
        return self.sign * product.sum_to_size((B, *rest)).reshape(B, -1)


def find_layout(use: Use, plain: Tensor, weighted: Tensor, weights: Tensor, *, eps: float) -> Layout | None:
    """
    Finds the dimension that holds the examples, by the gradients in the use's output of a sum over examples (``plain``) and
    of one with random ``weights``, shape ``(B,)``: if and only if each example's outputs depend on its own slice alone, the
    second is the first times the weights. Both were computed in the relative precision ``eps``.
    """
    B = weights.shape[0]
    (a, dims), (b, _) = use.batch_rows(plain), use.batch_rows(weighted)
    tolerance = min(1e3 * eps, 0.1) * float(b.abs().max()) if b.numel() else 0.0
    if not tolerance >= 0:  # not finite
        return None
    for dim in range(dims):
        size = a.shape[dim]
        if size == 0 or size % B or not use.allows(dim, dims):
            continue
        for major in (True, False) if size > B else (True,):
            layout = Layout(dim, major)
            x, y = layout.split(a, B), layout.split(b, B)
            factor = weights.reshape((B,) + (1,) * (x.dim() - 1))
            if torch.allclose(x * factor, y, rtol=max(1e-3, 8 * eps), atol=tolerance):
                return layout
    return None
