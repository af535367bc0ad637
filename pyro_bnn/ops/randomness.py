# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The states of all random number generators, as tensors and numbers."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """The states of torch (CPU and CUDA), numpy, Python, and of the generators of a data loader."""
    kind, keys, pos, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global state is what user code may draw from
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [
            str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(pos), int(has_gauss), float(cached)
        ],
        "python": [int(version), torch.tensor(words, dtype=torch.int64), gauss],
        "generators": [generator.get_state() for generator in generators],
    }  # fmt: skip


def set_random_state(state: dict[str, Any], generators: Sequence[torch.Generator]) -> None:
    """Restores what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    kind, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), pos, has_gauss, cached))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    for generator, value in zip(generators, state["generators"], strict=False):  # fit says if they differ
        generator.set_state(value)


@contextmanager
def same_random_numbers(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """A block after which the next random numbers are those that would have come without it."""
    state = random_state(generators)
    try:
        yield
    finally:
        set_random_state(state, generators)


@contextmanager
def random_numbers_from(state: dict[str, Any]) -> Iterator[None]:
    """A block that draws the numbers that came after a state, and leaves those to come as they were."""
    with same_random_numbers(()):
        set_random_state(state, ())
        yield


def loader_generators(data: Any) -> list[torch.Generator]:
    """The random number generators that a data loader holds itself, each once."""
    batch_sampler = getattr(data, "batch_sampler", None)
    owners = [data, getattr(data, "sampler", None), getattr(batch_sampler, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
