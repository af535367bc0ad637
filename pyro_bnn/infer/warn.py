# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Warnings that point at the user's line."""

import sys
import warnings

_OURS = {"pyro_bnn", "pyro", "torch", "contextlib"}


def warn_user(message: str, category: type[Warning]) -> None:
    """
    Warns at the innermost line outside of this package and of those that it is called through.

    :param message: the text.
    :param category: of the warning.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
