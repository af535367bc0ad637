# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What plots share."""

from collections.abc import Iterator
from typing import Any


def new_axes(ax: Any) -> Any:
    """The axes to draw in, new ones if there are none."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots()[1]


def each(ax: Any, sources: Any) -> Iterator[tuple[str | None, Any]]:
    """Names and sources, then a legend, of a dictionary; predictions are mappings too, from sites."""
    if type(sources) is dict:
        yield from sources.items()
        ax.legend()
    else:
        yield None, sources


def diagonal(ax: Any, limit: float = 1.0) -> None:
    """A diagonal for comparison."""
    ax.plot([0, limit], [0, limit], color="0.6", linestyle="--", linewidth=1)
