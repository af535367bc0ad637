# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Where progress bars are shown."""

import sys

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook


def shows_bars() -> bool:
    """Whether the process writes to a terminal or a notebook; a file would be filled with carriage returns."""
    is_terminal = getattr(sys.stderr, "isatty", None)  # there may be no stderr, or one that is no file
    return issubclass(tqdm, tqdm_notebook) or (is_terminal is not None and is_terminal())
