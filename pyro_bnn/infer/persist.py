# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Saving a fitted guide, and loading it into a fresh object of a fresh process."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_bnn.infer.checkpoint import atomic_save
from pyro_bnn.infer.data import Batch, iter_batches
from pyro_bnn.infer.initialize import EXAMPLE, example_of, is_initialized
from pyro_bnn.infer.parameters import local_parameters
from pyro_bnn.infer.predictive import evaluation_mode


def batch_of(example: dict[str, Any], device: torch.device) -> Batch:
    """
    A batch of zeros in the shapes of an example.

    :param example: what :func:`~pyro_bnn.infer.initialize.example_of` returned.
    :param device: where to put the tensors.
    :return: ``(args, kwargs)``.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for key, kind, value, dtype in example["arguments"]:
        found = torch.zeros(value, dtype=getattr(torch, dtype), device=device) if kind == "tensor" else value
        if isinstance(key, int):
            args.append(found)
        else:
            kwargs[key] = found
    return tuple(args), kwargs


def save_guide(guide: Any, path: str | os.PathLike[str], data: Any = None) -> None:
    """
    Saves the parameters of a guide, and the shapes of the data that it was initialised on.

    The file holds tensors, numbers and strings alone (no code and none of the data) and is written atomically.
    The parameters of the model, if it has any, are saved by ``model.state_dict()``.

    :param guide: an initialised guide that is a module.
    :param path: the file.
    :param data: data of the shapes that the guide was initialised on; not needed after
        :func:`~pyro_bnn.infer.fit`, which remembers them.
    :raises TypeError: if the guide is a function, whose parameters live in Pyro's parameter store.
    """
    if not isinstance(guide, torch.nn.Module):
        raise TypeError(
            "save_guide: this guide is a function; its parameters live in Pyro's parameter store, which has "
            "save and load."
        )
    example = getattr(guide, EXAMPLE, None)
    if data is not None:
        example = example_of(next(iter_batches(data)))
    state = {name: value for name, value in guide.state_dict().items() if isinstance(value, Tensor)}
    atomic_save({"format": 1, "guide": type(guide).__name__, "state": state, "example": example}, Path(path))


def load_guide(guide: Any, path: str | os.PathLike[str], data: Any = None) -> Any:
    """
    Loads what :func:`save_guide` wrote into a guide, which may be fresh.

    A fresh guide is initialised on zeros in the shapes of its original data, with validation off. A model whose
    sites depend on the values of its data needs ``data``.

    :param guide: a guide built like the one that was saved; it need not have been called.
    :param path: the file.
    :param data: one batch, or an iterable of batches, to initialise a fresh guide on.
    :return: the guide.
    :raises ValueError: if the file belongs to another class of guide, or if the shapes of the data are needed and
        neither stored nor given.

    Example::

        >>> import tempfile, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("obs", dist.Normal(w, 1.0), obs=x)
        >>> guide = AutoNormal(model)
        >>> _ = guide(torch.ones(3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_guide(guide, f"{folder}/guide.pt", torch.ones(3))
        ...     loaded = load_guide(AutoNormal(model), f"{folder}/guide.pt")
        >>> bool(loaded.median()["w"] == guide.median()["w"])
        True
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["guide"] != type(guide).__name__:
        raise ValueError(f"{path} holds a {saved['guide']}, not a {type(guide).__name__}.")
    # guides without a prototype (Pyro's messenger guides) do not tell whether they have been called
    if not is_initialized(guide) or not hasattr(guide, "prototype_trace"):
        if data is not None:
            args, kwargs = next(iter_batches(data))
        elif saved["example"] is not None:
            args, kwargs = batch_of(saved["example"], torch.device("cpu"))
        else:
            raise ValueError(f"{path} does not say what data the guide was initialised on; pass data.")
        initialize = getattr(guide, "initialize", guide)
        with ExitStack() as stack:
            for context in (local_parameters(), torch.no_grad(), pyro.validation_enabled(False)):
                stack.enter_context(context)
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(evaluation_mode(guide))  # zeros must not enter the statistics of a network
            initialize(*args, **kwargs)
    guide.load_state_dict(saved["state"], strict=True)
    if not hasattr(guide, EXAMPLE):
        setattr(guide, EXAMPLE, saved["example"])  # so that it can be saved again
    return guide
