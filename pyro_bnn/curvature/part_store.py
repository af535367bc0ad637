# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Parts of a curvature as buffers of a module, so that they follow it to devices, dtypes and files."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pyro_bnn.curvature.dense import DensePart
from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.kronecker import KroneckerPart
from pyro_bnn.curvature.low_rank import LowRankPart
from pyro_bnn.curvature.parts import Part


class PartStore(nn.Module):
    """Holds parts; a state dict loads into an empty store."""

    def __init__(self) -> None:
        super().__init__()
        self._cached: list[Part] | None = None

    def set(self, parts: Sequence[Part]) -> None:
        """
        :param parts: replace all that the store holds.
        """
        self._buffers.clear()
        for i, part in enumerate(parts):
            for name, value in part.tensors.items():
                self.register_buffer(f"{i}_{part.kind}_{name}", value)
        self._cached = list(parts) or None

    def get(self) -> list[Part]:
        """
        :return: the parts, in the order they were given.
        """
        if self._cached is None:
            grouped: dict[tuple[int, str], dict[str, Tensor]] = {}
            kinds = {cls.kind: cls for cls in PART_KINDS}
            for key, value in self._buffers.items():
                number, rest = key.split("_", 1)
                kind = next(k for k in kinds if rest.startswith(k + "_"))
                assert value is not None
                grouped.setdefault((int(number), kind), {})[rest[len(kind) + 1 :]] = value
            self._cached = [kinds[kind](**tensors) for (_, kind), tensors in sorted(grouped.items())]
        return self._cached

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self._cached = None
        return super()._apply(fn, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._buffers.clear()
        self._cached = None
        for key, value in state_dict.items():
            if key.startswith(prefix):
                self.register_buffer(key[len(prefix) :], value.clone())
        super()._load_from_state_dict(state_dict, prefix, *args)


PART_KINDS: tuple[type[Part], ...] = (DensePart, DiagonalPart, KroneckerPart, LowRankPart)
