# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Assertions that every test shares."""

from typing import Any

import torch


def assert_close(actual: Any, expected: Any, *, rtol: float = 1e-7, atol: float = 0.0) -> None:
    """Compares two tensors, or anything :func:`torch.as_tensor` takes, and shows the worst entry."""
    torch.testing.assert_close(
        torch.as_tensor(actual), torch.as_tensor(expected), rtol=rtol, atol=atol, check_dtype=False
    )
