# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A result of Hessian-free Laplace says that it is inaccurate from the documented sizes on, and not before."""

import warnings
from typing import Any

import pytest
import torch

from pyro_bnn.infer import hfl
from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.infer.hfl.diagnostics import Diagnostics, HFLWarning
from tests.infer.models import linear_data, linear_model

EPS = torch.finfo(torch.float64).eps
GOOD = {
    "method": "cg", "curvature": "hessian", "variances": torch.ones(2, dtype=torch.float64), "antisymmetry": 0.0,
    "newton_decrement": 0.0, "smallest_curvature": 1.0, "residual": 0.0,
}  # fmt: skip


def said(*, largest_curvature: float = 1.0, map_tolerance: float = 0.1, **facts: object) -> list[str]:
    found = Diagnostics(**(GOOD | facts))  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found.warn(tolerance=1e-6, largest_curvature=largest_curvature, map_tolerance=map_tolerance)
    assert [str(w.message) for w in caught] == found.warnings
    assert all(w.category is HFLWarning for w in caught)
    return found.warnings


@pytest.mark.parametrize(
    ("name", "limit", "text", "facts"),
    [
        ("newton_decrement", 0.1, "away from the minimum", {}),
        ("largest_curvature", 1e-2 / EPS, "more than float64 resolves to 1 %", {}),
        ("largest_curvature", 5e-2 / EPS, "more than float64 resolves to 1 %", {"smallest_curvature": 5.0}),
        ("residual", 1e-5, "the solves stopped at a relative residual", {"method": "cg"}),
        ("residual", 1e-5, "the solves stopped at a relative residual", {"method": "probe"}),
        ("residual", 0.02**0.5, "short of their minima", {"method": "paired"}),
        ("residual", 0.1, "short of their minima", {"method": "central"}),
        ("residual", 0.1, "short of their minima", {"method": "one_sided"}),
        ("agreement", 0.01, "variances at epsilon and epsilon / 3 differ", {"method": "central"}),
        ("antisymmetry", 0.05, "the responses are antisymmetric", {}),
    ],
)
def test_limits(name: str, limit: float, text: str, facts: dict[str, object]) -> None:
    assert said(**facts, **{name: 0.99 * limit}) == []
    (found,) = said(**facts, **{name: 1.01 * limit})
    assert text in found


def test_a_decrement_that_is_no_number_is_said() -> None:
    (found,) = said(newton_decrement=float("nan"))
    assert "away from the minimum" in found


def test_costs_and_rows() -> None:
    found = Diagnostics(**GOOD, gradient_evaluations=5, products=7, epsilon=0.1, agreement=0.2)  # type: ignore[arg-type]
    assert found.gradient_equivalents == 5 + 2 * 7
    assert set(Diagnostics(**GOOD).rows()) == {  # type: ignore[arg-type]
        "Newton decrement of the point estimate", "smallest curvature met", "residual of the solves",
        "antisymmetry of the responses",
    }  # fmt: skip
    more = Diagnostics(**GOOD, epsilon=0.1, agreement=0.2, proximal=0.3, captured=0.5, captured_error=0.1)  # type: ignore[arg-type]
    assert more.rows()["captured variance"] == "0.5000 +- 0.1000"
    assert len(more.rows()) == 8


@pytest.mark.parametrize(
    ("dtype", "method", "epsilon", "is_said"),
    [
        (torch.float32, "central", 0.9e-3, True),
        (torch.float32, "central", 1.1e-3, False),
        (torch.float32, "one_sided", 2.9e-2, False),
        (torch.float32, "one_sided", 3.1e-2, True),
        (torch.float32, "cg", 1e-6, False),
        (torch.float64, "central", 1e-5, False),
    ],
)
def test_perturbations_that_single_precision_does_not_resolve(
    dtype: torch.dtype, method: Any, epsilon: float, is_said: bool
) -> None:
    torch.set_default_dtype(dtype)
    x, y = linear_data(12)
    guide = AutoLaplace(linear_model).initialize(x, y).polish((x, y))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hfl.solve(guide, (x, y), (x[:1],), method=method, epsilon=epsilon, curvature="ggn", check=False)
    assert any("float32 resolves perturbations" in str(w.message) for w in caught) == is_said


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.float64, 1e-3), (torch.float32, 3e-3)])
def test_perturbations_are_small_by_default(dtype: torch.dtype, epsilon: float) -> None:
    torch.set_default_dtype(dtype)
    x, y = linear_data(12)
    guide = AutoLaplace(linear_model).initialize(x, y).polish((x, y))
    found = hfl.solve(guide, (x, y), (x[:1],), method="central", curvature="ggn", check=False)
    assert found.epsilon == epsilon
