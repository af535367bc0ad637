# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Finds out how a function uses the entries of one vector: as weights of linear maps, as scales, as offsets.

Where a slice of the vector is the weight of a linear map :math:`y_t = W x_t`, its Jacobian follows from the inputs
:math:`x` and the gradients in the outputs :math:`y`, which cost one backward pass without any weight gradient. The
capture watches torch functions rather than modules, so that functional code, tied and re-used weights, views of
packed weights and recurrent networks need no special case. What it does not recognise it reports as generic, to be
differentiated in another way.
"""

import copy
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from pyro_bnn.curvature import operations
from pyro_bnn.curvature.patches import ChannelRows, OutputPatches, PatchInputs, sizes
from pyro_bnn.curvature.uses import ElementwiseUse, LinearUse, Output, Use
from pyro_bnn.ops.jacobian import wide
from pyro_bnn.ops.recurrence import unrolled


class Capture(TorchFunctionMode):
    """
    A context in which the uses of the entries of a vector, shape ``(p,)``, that requires a gradient are recorded; all uses, or
    those of ``active`` entries, bool, shape ``(p,)``. Recorded inputs keep their graph if ``differentiable``.

    :ivar uses: the recorded :class:`~pyro_bnn.curvature.uses.Use` objects.
    :ivar outputs: the places that the gradients are to be taken in, one or several uses each.
    :ivar generic: entries that were used in a way that is not recognised, bool, shape ``(p,)``.
    :ivar roots: what the function cut from the vector before all else, as places in the graph with the positions of their
        entries: all uses of active entries lie behind them. ``None`` if the vector itself was used.
    :ivar seen: the nodes of the autograd graph that made the outputs of uses.
    """

    def __init__(self, latent: Tensor, active: Tensor | None = None, *, differentiable: bool = False) -> None:
        super().__init__()
        p = latent.shape[0]
        self.active = active
        self.differentiable = differentiable
        self.generic = torch.zeros(p, dtype=torch.bool, device=latent.device)
        #: more such entries; inside of a torch.func transform nothing may be written
        self._lost: list[Tensor] = []
        self.uses: list[Use] = []
        self.outputs: list[Output] = []
        self.roots: list[tuple[Output, Tensor]] | None = []
        self.seen: set[object] = set()
        self.latent = latent
        self._function = ""
        # values are kept so that no id is used twice
        self._tracked: dict[int, tuple[Tensor, Tensor]] = {}
        self._slots: dict[tuple[object, int], int] = {}
        self._track(latent, torch.arange(p, device=latent.device))

    def finish(self, result: Tensor) -> None:
        """Ends the capture of a function's value; entries that it holds unchanged are generic."""
        index = self._index(result)
        if index is not None:
            self._give_up([index])
        self.drop_generic()
        used = sorted({use.slot for use in self.uses})
        self.outputs = [self.outputs[slot] for slot in used]
        for use in self.uses:
            use.slot = used.index(use.slot)
        self._tracked.clear()

    def drop_generic(self) -> None:
        """Closes the set of generic entries: a use that shares an entry with it is dropped, and its entries are generic."""
        self._note_lost()
        while bool(self.generic.any()):
            dropped = [use for use in self.uses if bool(self.generic[use.index].any())]
            if not dropped:
                return
            self._give_up(use.index for use in dropped)
            self._note_lost()
            self.uses = [use for use in self.uses if use not in dropped]

    def fork(self) -> "Capture":
        """A copy of what was recorded, to be finished for one of several results."""
        other = copy.copy(self)
        other.uses = [copy.copy(use) for use in self.uses]
        other.outputs = list(self.outputs)
        other.generic = self.generic.clone()
        other._lost = list(self._lost)
        other._tracked = dict(self._tracked)
        return other

    # ------------------------------------------------------------------ bookkeeping

    def _track(self, value: Tensor, index: Tensor) -> None:
        if self.active is None or bool(self.active[index].any()):
            self._tracked[id(value)] = (value, index)

    def _index(self, value: Any) -> Tensor | None:
        found = self._tracked.get(id(value)) if isinstance(value, Tensor) else None
        return None if found is None else found[1]

    def _give_up(self, indices: Iterable[Tensor]) -> None:
        self._lost += indices

    def _note_lost(self) -> None:
        for index in self._lost:
            self.generic[index.reshape(-1)] = True
        self._lost = []

    def _record(self, y: Tensor, *uses: Use) -> Tensor:
        if not y.requires_grad:  # made without a graph
            return y
        output = Output(y)
        slot = self._slots.get(output.key)
        if slot is None:
            slot = self._slots[output.key] = len(self.outputs)
            self.outputs.append(output)
        self.seen.add(output.edge.node)
        for use in uses:
            use.slot, use.function = slot, self._function
            self.uses.append(use)
        return y

    def __torch_function__(
        self, func: Any, types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Watches one call; the result is always that of the call itself."""
        kwargs = kwargs or {}
        values = (*args, *kwargs.values())
        flat = [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]
        indices = [index for index in map(self._index, flat) if index is not None]
        if not indices:
            return func(*args, **kwargs)
        name, outer = operations.name_of(func), self._function
        self._function = outer or name  # what the program called, not what that is made of
        try:
            result, moved = self._watch(name, func, flat, args, kwargs, indices)
        finally:
            self._function = outer
        if any(value is self.latent for value in flat):
            self._note_roots(result, moved)
        return result

    def _watch(
        self, name: str, func: Any, flat: list[Any], args: Any, kwargs: dict[str, Any], indices: list[Tensor]
    ) -> tuple[Any, bool]:
        """Runs a function of tracked tensors; returns its result, and whether it only moved entries."""
        if operations.writes(name, kwargs):
            return self._write(name, func, args, kwargs, indices), False
        if name in operations.MOVES or name in operations.COPIES:
            result = func(*args, **kwargs)
            if self._move(name, func, flat, args, kwargs, result):
                return result, True
        elif isinstance(func, types.FunctionType) and func.__module__.startswith("torch.nn.functional"):
            with self:
                return operations.without_dispatch(func)(*args, **kwargs), False
        elif (
            handler := getattr(self, "_do_" + operations.FAMILIES.get(name, name).strip("_"), None)
        ) is not None:
            result = _call(handler, name, func, args, kwargs)
            if result is not NotImplemented:
                return result, False
        result = func(*args, **kwargs)
        if any(isinstance(r, Tensor) and r.requires_grad for r in operations.leaves(result)):
            self._give_up(indices)
        return result, False

    def _write(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], indices: list[Tensor]) -> Any:
        """Runs a function that writes into one of its arguments."""
        target = kwargs.get("out", args[0] if args else None)
        if name in operations.IN_PLACE and self._index(target) is None:
            result = _call(getattr(self, "_do_" + operations.IN_PLACE[name]), name, func, args, kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._give_up(indices)
        self._tracked.pop(id(target), None)
        return result

    def _note_roots(self, result: Any, moved: bool) -> None:
        """Keeps what was cut from the vector itself."""
        for value in operations.leaves(result):
            if not (isinstance(value, Tensor) and value.requires_grad) or self.roots is None:
                continue
            index = self._index(value)
            if not moved:
                self.roots = None
            elif index is not None:  # else its entries are not active
                self.roots.append((Output(value), index))

    def _move(
        self, name: str, func: Any, flat: list[Any], args: Any, kwargs: dict[str, Any], result: Any
    ) -> bool:
        """Tracks the result of a function that moves entries; tells whether that was possible."""
        tensors = [v for v in flat if isinstance(v, Tensor)]
        if name in operations.COPIES | operations.LIKE and self._index(tensors[0]) is None:
            return True  # only dtype, device or shape of a tracked tensor were asked for
        if name in operations.COPIES:
            self._track(result, self._tracked[id(tensors[0])][1])
            return True
        if name == "broadcast_tensors":
            for value, new in zip(tensors, result, strict=True):
                index = self._index(value)
                if index is not None:
                    self._track(new, index.expand(new.shape))
            return True
        if name in ("view", "type") and any(isinstance(a, torch.dtype) for a in flat):
            return False
        data = tensors[:1] if name in operations.LIKE else [v for v in tensors if v.is_floating_point()]
        if any(self._index(v) is None for v in data):
            return False

        def position(value: Any) -> Any:
            index = self._index(value)
            return value if index is None else index

        moved = func(*tree_map(position, args), **tree_map(position, kwargs))
        for value, index in zip(operations.leaves(result), operations.leaves(moved), strict=True):
            if isinstance(value, Tensor):
                self._track(value, index)
        return True

    def _kept(self, x: Tensor) -> Tensor:
        x = x if self.differentiable else x.detach()
        return x.to(wide(self.latent).dtype) if x.is_floating_point() else x

    # ------------------------------------------------------------------ linear maps

    def _do_linear(self, name: str, func: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Any:
        w = self._index(weight)
        if self._index(input) is not None or weight.dim() != 2:
            return NotImplemented
        y = func(input, weight, bias)
        if w is not None:
            self._record(y, LinearUse(w, self._kept(input), operations.same))
        return self._record_offset(y, bias, 0)

    def _do_addmm(
        self, name: str, func: Any, input: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> Any:
        if beta != 1 or alpha != 1 or self._index(a) is not None:
            return NotImplemented
        with self:
            return torch.matmul(a, b) + input

    def _do_matmul(self, name: str, func: Any, a: Tensor, b: Tensor) -> Any:
        ia, ib = self._index(a), self._index(b)
        if name == "__rmatmul__" or (ia is not None and ib is not None):
            return NotImplemented
        y = func(a, b)
        if ib is not None:
            ib = operations.matrix(ib)
            if ib.dim() == 1:
                return self._record(y, LinearUse(ib.unsqueeze(0), self._kept(a), operations.unsqueeze))
            if ib.dim() != 2 or a.dim() == 1:
                return NotImplemented
            x = self._kept(a).expand(y.shape[:-1] + a.shape[-1:])
            return self._record(y, LinearUse(ib.mT, x, operations.same))
        assert ia is not None
        ia = operations.matrix(ia)
        if ia.dim() > 2 or b.dim() < 2:
            return NotImplemented
        if ia.dim() == 1:
            return self._record(y, LinearUse(ia.unsqueeze(0), self._kept(b).mT, operations.unsqueeze))
        x = self._kept(b).mT.expand(y.shape[:-2] + (y.shape[-1], b.shape[-2]))
        return self._record(y, LinearUse(ia, x, operations.transpose))

    def _do_convolution(
        self, name: str, func: Any, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Any:  # fmt: skip
        d = operations.CONVOLUTIONS[name]
        w = self._index(weight)
        if self._index(input) is not None or input.dim() != d + 2:
            return NotImplemented
        y = func(input, weight, bias, stride, padding, dilation, groups)
        if w is not None:
            x = self._kept(input)
            if isinstance(padding, str):
                total = [dl * (k - 1) for dl, k in zip(sizes(dilation, d), weight.shape[2:], strict=True)]
                same = [v for t in reversed(total) for v in (t // 2, t - t // 2)]
                x, padding = F.pad(x, same if padding == "same" else []), 0
            geometry = (weight.shape[2:], stride, padding, dilation)
            for g, part in enumerate(w.chunk(groups)):
                inputs = PatchInputs(x.chunk(groups, 1)[g], geometry)
                self._record(y, LinearUse(part.flatten(1), inputs, ChannelRows(g, groups)))
        return self._record_offset(y, bias, d)

    def _do_transposed(
        self, name: str, func: Any, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1,
        padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Any:  # fmt: skip
        d = operations.TRANSPOSED[name]
        w = self._index(weight)
        if self._index(input) is not None or input.dim() != d + 2:
            return NotImplemented
        y = func(input, weight, bias, stride, padding, output_padding, groups, dilation)
        if w is not None:
            # a linear map from channels to patches of the output, which the fold then adds up
            geometry = (weight.shape[2:], stride, padding, dilation)
            for g, part in enumerate(w.chunk(groups)):
                x = self._kept(input).chunk(groups, 1)[g].flatten(2).mT
                rows = OutputPatches(g, groups, geometry, x.shape[1])
                self._record(y, LinearUse(part.flatten(1).mT, x, rows))
        return self._record_offset(y, bias, d)

    def _record_offset(self, y: Tensor, bias: Any, d: int) -> Tensor:
        """Records the offset, if tracked, of channels with d dimensions behind them."""
        index = self._index(bias)
        return y if index is None else self._record(y, ElementwiseUse(index.reshape((-1,) + (1,) * d)))

    def _do_embedding(
        self, name: str, func: Any, weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any
    ) -> Any:
        index = self._index(weight)
        y = func(weight, indices, padding_idx, *args)
        if index is None:
            return y
        x = wide(F.one_hot(indices, weight.shape[0]).to(y.dtype))
        if padding_idx >= 0:
            x[..., padding_idx] = 0.0
        return self._record(y, LinearUse(index.mT, x, operations.same))

    # ------------------------------------------------------------------ elementwise

    def _do_mul(self, name: str, func: Any, a: Any, b: Any) -> Any:
        ia, ib = self._index(a), self._index(b)
        index, other = (ia, b) if ia is not None else (ib, a)
        if (ia is not None and ib is not None) or not isinstance(other, Tensor) or index is None:
            return NotImplemented
        kept = self._kept(other)
        if name in operations.IN_PLACE:  # what is scaled is about to be overwritten
            kept = kept.clone()
        return self._record(func(a, b), ElementwiseUse(index, kept))

    def _do_add(self, name: str, func: Any, a: Any, b: Any, *, alpha: Any = 1) -> Any:
        ia, ib = self._index(a), self._index(b)
        index = ib if ia is None else ia
        both = ia is not None and ib is not None
        if both or index is None or alpha != 1 or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return NotImplemented
        subtracted = ia if name in ("__rsub__", "rsub") else ib
        sign = -1.0 if "sub" in name and subtracted is not None else 1.0
        return self._record(func(a, b), ElementwiseUse(index, None, sign))

    def _do_addcmul(
        self, name: str, func: Any, input: Tensor, a: Tensor, b: Tensor, *, value: Any = 1
    ) -> Any:
        if value != 1:
            return NotImplemented
        with self:
            return a * b + input

    def _affine(self, y: Tensor, weight: Any, bias: Any, shape: tuple[int, ...]) -> Tensor:
        """The affine part of a normalisation layer, as watched operations."""
        with self:
            if weight is not None:
                y = y * weight.reshape(shape)
            if bias is not None:
                y = y + bias.reshape(shape)
        return y

    def _do_layer_norm(
        self, name: str, func: Any, input: Any, shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5,
        *args: Any,
    ) -> Any:  # fmt: skip
        return self._affine(func(input, shape, None, None, eps, *args), weight, bias, tuple(shape))

    def _do_group_norm(
        self, name: str, func: Any, input: Any, groups: int, weight: Any = None, bias: Any = None, *args: Any
    ) -> Any:
        shape = (-1,) + (1,) * (input.dim() - 2)
        return self._affine(func(input, groups, None, None, *args), weight, bias, shape)

    def _do_batch_norm(self, name: str, func: Any, input: Any, weight: Any, bias: Any, *args: Any) -> Any:
        shape = (-1,) + (1,) * (input.dim() - 2)
        return self._affine(func(input, None, None, *args), weight, bias, shape)

    _do_instance_norm = _do_batch_norm

    def _do_rms_norm(
        self, name: str, func: Any, input: Any, shape: Any, weight: Any = None, eps: Any = None
    ) -> Any:
        return self._affine(func(input, shape, None, eps), weight, None, tuple(shape))

    def _do_prelu(self, name: str, func: Any, input: Tensor, weight: Tensor) -> Any:
        shape = (-1,) + (1,) * (input.dim() - 2) if weight.numel() > 1 else (1,)
        with self:
            return input.clamp(min=0) + input.clamp(max=0) * weight.reshape(shape)

    # ------------------------------------------------------------------ recurrent

    def _do_recurrent(self, name: str, func: Any, *args: Any) -> Any:
        if len(args) != 9:
            return NotImplemented
        input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first = args
        if isinstance(hx, Tensor) and not hx.is_floating_point():
            return NotImplemented  # a packed sequence, whose second argument are the sizes of its batches
        if dropout and train:
            return NotImplemented
        directions = 2 if bidirectional else 1
        step = len(params) // (num_layers * directions)
        maps = [operations.gates(params[i : i + step], has_biases) for i in range(0, len(params), step)]
        x = input.transpose(0, 1) if batch_first else input
        with self:
            y, final = unrolled(
                name,
                x,
                tuple(hx) if name == "lstm" else (hx,),
                maps,
                directions,
                projects=step > 2 + 2 * has_biases,
            )
        return (y.transpose(0, 1) if batch_first else y, *final)


def _call(handler: Callable[..., Any], name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A handler's result, or ``NotImplemented`` for a way of calling the function that it does not know."""
    try:
        _SIGNATURES[handler.__name__].bind(None, name, func, *args, **kwargs)
    except TypeError:
        return NotImplemented
    return handler(name, func, *args, **kwargs)


_SIGNATURES = {
    name: inspect.signature(value) for name, value in vars(Capture).items() if name.startswith("_do_")
}
