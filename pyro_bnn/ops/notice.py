# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Warnings that point at the user's own line, and the log.

The logger ``pyro_bnn`` keeps, at level ``INFO``, what was checked and decided: draws or components together or one by one, rows
taken apart, sums in double precision, what a search reached; ``logging.getLogger("pyro_bnn").setLevel("INFO")`` and
:func:`logging.basicConfig` show it. What a user should act on is a warning.
"""

import logging
import sys
import warnings

logger = logging.getLogger("pyro_bnn")

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
