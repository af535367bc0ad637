# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Operations on programs. Each yields pairs of what the package says and what the reference says, or raises what the
package raises. ``applies`` is the rule by which a cell is absent.
"""

from tests.programs import bounds, files, laplace, predictions, sampling  # noqa: F401
from tests.programs.facts import OPERATIONS, Facts, Operation

__all__ = ["OPERATIONS", "Facts", "Operation"]
