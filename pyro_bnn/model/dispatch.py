# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What the operations of a run tell: how much memory they take, and whether Python decides by their values."""

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pyro
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_bnn.nn.folding import runs_samples_alone

#: Code that may look at values without deciding by them: checks of arguments, for example.
_LIBRARIES = tuple(
    str(Path(str(file)).parent) for file in (torch.__file__, pyro.__file__, Path(__file__).parent)
)

_HALF = (torch.float16, torch.bfloat16)
_NUMBERS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class _Watching:
    """
    The methods of :class:`Watch`. Of a function that a mode defines itself torch makes one that the compiler skips, and for
    that imports the compiler, a second or more in the first prediction of a process.
    """

    def __init__(self, sources: Iterable[Tensor] = ()) -> None:
        super().__init__()
        # as long as they live: an address that is free again may be given to others
        self._derived: WeakValueDictionary[int, Any] = WeakValueDictionary()
        for tensor in sources:
            self._derive(tensor.untyped_storage())
        self.total = 0
        self.where = ""
        self.half = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = (*args, *kwargs.values()) if kwargs else args
        held = {t.untyped_storage().data_ptr() for t in _tensors(given)}
        derived = any(place in self._derived for place in held)
        if derived and func in _NUMBERS and not self.where:
            self.where = _place()
        counts = not runs_samples_alone()
        for tensor in _tensors((out,)):
            self.half = self.half or tensor.dtype in _HALF
            storage = tensor.untyped_storage()
            # views, and what an operation in place returns, take no memory of their own
            if counts and storage.data_ptr() not in held:
                self.total += tensor.numel() * tensor.element_size()
            if derived:
                self._derive(storage)
        return out

    def _derive(self, storage: torch.UntypedStorage) -> None:
        if storage.nbytes():
            self._derived[storage.data_ptr()] = storage

    @property
    def reason(self) -> str:
        """What was found, for messages."""
        return f"{self.where} decides by a value that depends on the draws, for all of them at once"


class Watch(_Watching, TorchDispatchMode):
    """
    Watches the operations of a run.

    :ivar int total: the sizes of the tensors that operations allocate, in bytes: an upper bound of the peak memory. Networks
        that run their draws one after the other do not count: what they take does not grow with the draws.
    :ivar str where: the first line that turns a value which depends on the sources into a number or a truth value of Python,
        as ``if`` and ``.item()`` do: run for several draws at once it decides for all of them by one number. Empty if none does.
    :ivar bool half: whether something is computed in half precision, as under autocast.
    """


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments or results of an operation, and in lists of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found


def _place() -> str:
    """The line of code that reads a number now; empty if it is one of a library."""
    for frame in reversed(traceback.extract_stack(limit=12)[:-2]):
        if frame.filename.startswith(_LIBRARIES):
            if frame.filename.endswith(("_tensor.py", "_python_dispatch.py")):
                continue
            return ""
        return f"line {frame.lineno} of {Path(frame.filename).name}"
    return ""
