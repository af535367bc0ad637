# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Parts of a precision as submodules of a guide, so that they follow it to devices, dtypes and files."""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pyro_bnn.curvature.dense import DensePart
from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.kronecker import KroneckerPart
from pyro_bnn.curvature.low_rank import LowRankPart
from pyro_bnn.curvature.parts import Part

_KINDS: dict[str, type[Part]] = {
    part.kind: part for part in (DensePart, DiagonalPart, KroneckerPart, LowRankPart)
}
#: A part's number and kind, and the name of one of its tensors; files of earlier versions have "_" between them.
_KEY = re.compile(rf"((\d+)_({'|'.join(_KINDS)}))[._](\w+)")


class PartStore(nn.Module):
    """Holds parts, named by their number and kind; a state dict loads into any store."""

    def set(self, parts: Sequence[Part]) -> None:
        """Replaces all that the store holds."""
        for name, _ in list(self.named_children()):
            delattr(self, name)
        for i, part in enumerate(parts):
            self.add_module(f"{i}_{part.kind}", part)

    def get(self) -> list[Part]:
        """The parts, in the order they were given."""
        return [part for part in self.children() if isinstance(part, Part)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found: dict[tuple[int, str], dict[str, Tensor]] = {}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            match = _KEY.fullmatch(key.removeprefix(prefix))
            if match is not None:
                part, number, kind, name = match.groups()
                value = state_dict[f"{prefix}{part}.{name}"] = state_dict.pop(key)
                found.setdefault((int(number), kind), {})[name] = value.clone()
        self.set([_KINDS[kind](**tensors) for (_, kind), tensors in sorted(found.items())])
        super()._load_from_state_dict(state_dict, prefix, *args)
