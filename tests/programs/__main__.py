# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Runs the matrix; see ``python -m tests.programs --help``."""

from tests.programs.page import main

if __name__ == "__main__":
    main()
