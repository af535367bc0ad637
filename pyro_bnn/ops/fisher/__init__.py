# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Fisher information of likelihoods with respect to their own parameters, family by family."""

from pyro_bnn.ops.fisher import composite, rules
from pyro_bnn.ops.fisher.rule import (
    FisherRule,
    MonteCarloFisher,
    fisher_rule,
    matrix_square_root,
    register_fisher,
    score,
)

__all__ = [
    "FisherRule",
    "MonteCarloFisher",
    "composite",
    "fisher_rule",
    "matrix_square_root",
    "register_fisher",
    "rules",
    "score",
]
