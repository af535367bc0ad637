# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""How results, reports and guides show themselves: a title and named rows, as text and in notebooks."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

#: Lines that a representation has at most.
MOST_LINES = 10


def shape_of(value: Tensor | None) -> str:
    """The shape of a tensor in words, e.g. ``"20 x 3"``; ``"a scalar"`` without dimensions."""
    if value is None:
        return "none"
    return " x ".join(map(str, value.shape)) or "a scalar"


def span_of(value: Tensor | None) -> str:
    """The range of the numbers in a tensor in words, e.g. ``"0.1 to 3, mean 0.5"``."""
    if value is None or not value.numel():
        return "none"
    low, high = float(value.min()), float(value.max())
    if low == high:
        return f"{low:.4g}"
    return f"{low:.4g} to {high:.4g}, mean {float(value.double().mean()):.4g}"


def first_of(names: Iterable[str], most: int = 5) -> str:
    """The first few of some words, and how many there are beside."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more if known else "none"


def as_text(title: str, rows: Mapping[str, str], most: int | None = MOST_LINES) -> str:
    """The title and below it the rows, aligned, notes without a value as they are; at most so many lines, the last of which says what is left out."""
    width = max((len(name) for name, value in rows.items() if value), default=0)
    lines = [
        title,
        *(f"  {name:<{width}}  {value}" if value else f"  {name}" for name, value in rows.items()),
    ]
    if most is not None and len(lines) > most:
        lines = [*lines[: most - 1], f"  ... {len(lines) - most + 1} more: print() shows them"]
    return "\n".join(lines)


def as_html(title: str, rows: Mapping[str, str]) -> str:
    """The same as a table for notebooks."""
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items()
    )
    return f"<table><caption>{escape(title)}</caption><tbody>{body}</tbody></table>"


def table_text(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its columns aligned, the first to the left."""
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    return [
        "  ".join(
            text.ljust(w) if not i else text.rjust(w)
            for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [columns, *cells]
    ]


def table_html(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The same for notebooks."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Described:
    """Base class of what shows itself by :meth:`described`: in ten lines at most, all of it if printed."""

    def described(self) -> tuple[str, dict[str, str]]:
        """A title, and what there is to say by name."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return as_text(*self.described())

    def __str__(self) -> str:
        return as_text(*self.described(), most=None)

    def _repr_html_(self) -> Any:
        return as_html(*self.described())
