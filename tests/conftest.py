# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")

import pyro
import pytest
import torch

from tests.common import seed

torch.set_num_threads(1)  # two pytest-xdist workers share two cores


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "init(rng_seed): seed of the test (0 by default)")


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
