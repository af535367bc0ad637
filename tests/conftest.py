# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import gc
from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")

import pyro
import pytest
import torch

from tests.common import seed

torch.set_num_threads(1)  # two pytest-xdist workers share two cores
gc.disable()  # modules and tests that are collected stay: looking for garbage among them is in vain


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "init(rng_seed): seed of the test (0 by default)")
    config.addinivalue_line(
        "markers",
        "every(k): combinations of parameters whose positions add up to a multiple of k are fast, the others slow",
    )


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    Tables of many combinations are whole only with the slow tests. A sum of positions, as in a Latin square, leaves every
    value in the fast ones where the other parameters have as many values as are skipped.
    """
    for item in items:
        marker = item.get_closest_marker("every")
        if marker is not None and isinstance(item, pytest.Function) and position(item) % marker.args[0]:
            item.add_marker(pytest.mark.slow)


def position(item: pytest.Function) -> int:
    """The sum of the positions of an item's values in the lists of its parametrisations."""
    total = 0
    for mark in item.iter_markers("parametrize"):
        names, rows = mark.args[:2]
        if isinstance(names, str):
            names, rows = [names], [(value,) for value in rows]
        given = [item.callspec.params[name] for name in names]
        total += next(i for i, row in enumerate(rows) if all(a is b for a, b in zip(row, given, strict=True)))
    return total


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(autouse=True)
def _pyro_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pyro's own habits: float64, validation on, an empty parameter store, a seed."""
    marker = request.node.get_closest_marker("init")
    pyro.clear_param_store()
    seed(marker.kwargs["rng_seed"] if marker else 0)
    old_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(old_dtype)
    pyro.clear_param_store()
