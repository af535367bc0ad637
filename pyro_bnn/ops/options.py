# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Checks of numbers that a user passes, at the door."""

import math
from numbers import Integral, Real
from typing import Any


def require_count(name: str, value: Any, least: int = 1) -> None:
    """
    Raises :class:`ValueError` if an argument is no whole number, or smaller than the least.

    Example::

        >>> require_count("num_steps", 10)
        >>> require_count("num_steps", float("inf"))
        Traceback (most recent call last):
            ...
        ValueError: num_steps must be a whole number of at least 1, found inf.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, found {value!r}.")


def require_number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None, below: float = math.inf
) -> None:
    """
    Raises :class:`ValueError` if an argument is no number above, of at least and below these; NaN and infinities are none.

    Example::

        >>> require_number("tolerance", 1e-3, above=0, below=1)
        >>> require_number("tolerance", 1.5, above=0, below=1)
        Traceback (most recent call last):
            ...
        ValueError: tolerance must be a number above 0 and below 1, found 1.5.
    """
    fits = isinstance(value, Real) or getattr(value, "ndim", None) == 0
    if fits:
        number = float(value)
        fits = math.isfinite(number) and number < below
        fits = fits and (above is None or number > above) and (least is None or number >= least)
    if not fits:
        parts = [f"above {above:g}"] if above is not None else []
        parts += [f"of at least {least:g}"] if least is not None else []
        parts += [f"below {below:g}"] if math.isfinite(below) else []
        raise ValueError(f"{name} must be a number {' and '.join(parts)}, found {value!r}.")


def require_choice(name: str, value: Any, *choices: str) -> None:
    """
    :param name: of the argument.
    :param value: what was passed.
    :param choices: what may be passed.
    :raises ValueError: if it is none of them.
    """
    if value not in choices:
        *first, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, found {value!r}.")
