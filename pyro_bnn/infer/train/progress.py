# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Where progress bars are shown."""

import sys

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook


def shows_bars() -> bool:
    """Whether the process writes to a terminal or a notebook; a file would be filled with carriage returns."""
    return issubclass(tqdm, tqdm_notebook) or sys.stderr.isatty()
