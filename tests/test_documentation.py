# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The programs of the documentation run, one page after the other, each from a fresh state."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

PAGES = Path(__file__).parents[1] / "docs" / "source"


@pytest.mark.parametrize("page", ["rank1"])
def test_blocks_run(page: str) -> None:
    torch.set_default_dtype(torch.float32)
    text = (PAGES / f"{page}.rst").read_text()
    blocks = re.findall(r"\.\. code-block:: python\n\n((?: {4}.*\n|\n)+)", text)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(textwrap.dedent(block), names)
    if page == "rank1":
        accuracy = (names["probabilities"].argmax(-1) == names["y_test"]).double().mean()  # type: ignore[attr-defined]
        assert accuracy > 0.88
