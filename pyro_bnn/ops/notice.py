# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Warnings that point at the user's own line."""

import sys
import warnings

#: Packages whose frames lie between a user's line and a warning.
_INNER = ("pyro_bnn", "pyro", "torch", "contextlib")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line that called this package, however many decorators lie in between."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


class CurvatureWarning(UserWarning):
    """A curvature takes another way than the fast one, or its numbers are less precise than they look."""
