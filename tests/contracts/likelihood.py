# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A rule for a likelihood gives its Fisher information by definition, and its factors and inverses."""

from typing import Any

import torch
from torch import Tensor

from pyro_bnn.ops.fisher import fisher_rule, score
from tests.common import assert_close


def outer(scores: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of outer products of scores."""
    return torch.einsum("s...i,s...j,s...->...ij", scores, scores, weights)


def assert_information_is_the_sum_over_the_support(d: Any, values: Tensor | None = None) -> None:
    """
    :param d: a discrete distribution.
    :param values: its support, or what of it has mass; enumerated by default.
    """
    rule = fisher_rule(d)
    values = d.enumerate_support() if values is None else values
    scores = score(rule, d, list(rule.parameters(d)), values)
    assert_close(rule.information(d), outer(scores, d.log_prob(values).exp()), rtol=1e-9, atol=1e-12)
