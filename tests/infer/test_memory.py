# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The numbers behind a MemoryError: what is there, what a structure takes, and where the limit is."""

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.infer.autoguide import AutoLaplace
from pyro_bnn.ops.memory import available_bytes, readable, require_memory
from tests.models import in_between_data, tanh_network


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_400, "999 kB"),
        (1e6, "1 MB"),
        (2.345e8, "234 MB"),
        (1e9, "1 GB"),
        (9.87e11, "987 GB"),
        (1e12, "1,000 GB"),
        (1.25e15, "1,250,000 GB"),
    ],
)
def test_sizes_have_units(size, text):
    assert readable(size) == text


def test_what_is_available_is_what_the_system_says():
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    found = available_bytes(torch.device("cpu"))
    limit = Path("/sys/fs/cgroup/memory.max")
    bounded = limit.exists() and limit.read_text().strip() != "max"
    assert found <= 1.2 * free
    if bounded:
        rest = int(limit.read_text()) - int(Path("/sys/fs/cgroup/memory.current").read_text())
        assert abs(found - min(rest, free)) < 0.2 * free
    else:
        assert found > 0.8 * free
    assert available_bytes(torch.device("meta")) == float("inf")


def test_exactly_what_is_there_fits():
    cpu = torch.device("cpu")
    require_memory(1000.0, "it", cpu, "advice", 1000.0)
    with pytest.raises(MemoryError, match=r"^it needs about 1 kB but 1 kB are available on cpu\. advice$"):
        require_memory(1001.0, "it", cpu, "advice", 1000.0)
    require_memory(1.0, "it", cpu, "advice")
    with pytest.raises(MemoryError, match=r"it needs about 1,000,000,000 GB but .* are available on cpu"):
        require_memory(1e18, "it", cpu, "advice")


#: A network of one layer of 40 units has four sites of 40, 40, 40 and 1 entries, and outputs of 1.
SIZES = {
    "full": 4 * 121**2 * 8,
    "block": 4 * (3 * 40**2 + 1) * 8,
    "diagonal": 3 * 121 * 8,
    "low_rank": 6 * 121 * (7 + 10) * 8,
    # with 28 landmarks, before they are drawn
    "nystrom": max(10 * 121 * 7 * 8, 3 * (28 * 121 + 28**2) * 8),
    # of 30 observations
    "function_space": 3 * (30 * 121 + 30**2) * 8,
}


@pytest.mark.parametrize("structure", SIZES)
def test_a_structure_takes_so_many_bytes_and_no_more(structure):
    x, y = in_between_data()
    needed = SIZES[structure]

    def fit(limit):
        guide = AutoLaplace(tanh_network(hidden=40), structure=structure, rank=7, memory_limit=limit)
        guide.initialize(x, y).laplace_approximation((x, y), map_tolerance=float("inf"))

    fit(needed)
    with pytest.raises(MemoryError, match=f"needs about {readable(needed)} but"):
        fit(needed - 1)


def test_the_function_space_form_fails_on_the_first_batch_and_counts_what_was_there():
    x, y = in_between_data()
    guide = AutoLaplace(
        tanh_network(hidden=40), structure="function_space", memory_limit=3 * (30 * 121 + 30**2) * 8 - 1
    ).initialize(x, y)
    read = []

    class Loader:
        def __iter__(self):
            for i in range(0, 30, 10):
                read.append(i)
                yield x[i : i + 10], y[i : i + 10]

    with pytest.raises(MemoryError, match="structure='function_space' with 30 rows needs about 109 kB"):
        guide.laplace_approximation(Loader(), map_tolerance=float("inf"))
    assert read[-1] == 0  # in the pass over the data that forms the rows
    # the eigenvectors of earlier data are rows, too; wider in rows than in entries, the smaller Gram matrix counts
    narrow = AutoLaplace(tanh_network(hidden=2), structure="function_space").initialize(x, y)
    narrow.laplace_approximation((x[:20], y[:20]), map_tolerance=float("inf"))
    rows = len(narrow.part_store.get()[0].tensors["values"]) + 10
    narrow.memory_limit = 3 * (rows * 7 + 7**2) * 8 - 1
    with pytest.raises(MemoryError, match=f"with {rows} rows"):
        narrow.laplace_approximation((x[20:], y[20:]), override=False, map_tolerance=float("inf"))
    narrow.memory_limit += 1
    narrow.laplace_approximation((x[20:], y[20:]), override=False, map_tolerance=float("inf"))


def test_kronecker_factors_are_counted_by_the_shapes_of_the_weights():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(30, 8), 1.0).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(2, 30), 1.0).to_event(2))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=torch.tanh(x @ w.mT) @ v.mT + b), obs=y)

    x, y = torch.randn(12, 8), torch.randint(0, 2, (12,))
    q = 240 + 60 + 2
    factors = (30**2 + 8**2) + (2**2 + 30**2) + 2 * 2
    needed = (3 * factors + 2 * q) * 8

    def fit(limit):
        guide = AutoLaplace(model, structure="kronecker", memory_limit=limit).initialize(x, y)
        guide.laplace_approximation((x, y), map_tolerance=float("inf"))

    fit(needed)
    with pytest.raises(MemoryError, match=f"over 302 entries needs about {readable(needed)} but"):
        fit(needed - 1)
