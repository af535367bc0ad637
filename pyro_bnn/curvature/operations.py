# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What functions of torch do to the entries of their arguments, by name."""

import types
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_bnn.ops.recurrence import Affine

#: Functions that only move entries: they act on the positions as they act on the values.
MOVES = frozenset(
    [
        "reshape", "view", "transpose", "t", "T", "mT", "H", "mH", "permute", "flatten", "unflatten", "ravel", "unsqueeze",
        "squeeze", "expand", "expand_as", "view_as", "reshape_as", "broadcast_to", "broadcast_tensors", "split",
        "split_with_sizes", "tensor_split", "chunk", "unbind", "select", "narrow", "__getitem__", "movedim", "moveaxis",
        "swapaxes", "swapdims", "index_select", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "diagonal",
        "flip", "roll", "tile", "repeat",
    ]
)  # fmt: skip
#: Functions that keep entry and place.
COPIES = frozenset(
    ["contiguous", "clone", "to", "type", "float", "double", "half", "bfloat16", "type_as", "cpu", "cuda", "requires_grad_",
     "alias"]
)  # fmt: skip
#: Functions that take no more from their second argument than its shape or type.
LIKE = frozenset(["expand_as", "view_as", "reshape_as"])
#: Functions that write into their first argument, by the function whose result they write.
IN_PLACE = {
    **dict.fromkeys(("mul_", "multiply_", "__imul__"), "mul"),
    **dict.fromkeys(("add_", "sub_", "subtract_", "__iadd__", "__isub__"), "add"),
}
_WRITES = {"__setitem__"} | {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
}  # fmt: skip
_MATMULS = frozenset(["matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm"])
CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
FAMILIES = {
    **dict.fromkeys(_MATMULS, "matmul"),
    **dict.fromkeys(CONVOLUTIONS, "convolution"),
    **dict.fromkeys(TRANSPOSED, "transposed"),
    **dict.fromkeys(("__mul__", "__rmul__", "multiply"), "mul"),
    **dict.fromkeys(("__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub"), "add"),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), "recurrent"),
}


def name_of(func: Any) -> str:
    """The name of a function of torch, or of the attribute that it reads."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", name)
    return name


def writes(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function writes into one of its arguments."""
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return in_place or name in _WRITES or kwargs.get("out") is not None


@cache
def without_dispatch(func: types.FunctionType) -> Callable[..., Any]:
    """
    A copy of a function of torch that does not hand over to overrides, so that its body runs and is watched: torch has no
    public way to run the body of, say, ``multi_head_attention_forward`` under the mode that it hands over to.
    """
    inert = {name: lambda *_: False for name in func.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        func.__code__, {**func.__globals__, **inert}, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def leaves(result: Any) -> Sequence[Any]:
    """The values in a result."""
    # flattening one tensor would cost more than most functions of it
    return (result,) if isinstance(result, Tensor) else tree_flatten(result)[0]


def gates(params: Sequence[Tensor], has_biases: bool) -> Affine:
    """The maps by the parameters of one layer and direction of a recurrence."""
    weights = {"ih": params[0], "hh": params[1], "hr": params[-1]}
    biases = {"ih": params[2], "hh": params[3]} if has_biases else {}
    return lambda x, part: F.linear(x, weights[part], biases.get(part))


def matrix(index: Tensor) -> Tensor:
    """A batch of one matrix as that matrix."""
    return index.reshape(index.shape[-2:]) if index.dim() > 2 and index.shape[:-2].numel() == 1 else index


def same(g: Tensor) -> Tensor:
    """Rows of a gradient as they are."""
    return g


def unsqueeze(g: Tensor) -> Tensor:
    """Rows of a gradient in one output."""
    return g.unsqueeze(-1)


def transpose(g: Tensor) -> Tensor:
    """Rows of a gradient that are its columns."""
    return g.mT
