# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Saving a fitted guide with the network that it belongs to, and loading both into fresh objects of a fresh process."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any, cast

import pyro
import torch
from pyro.infer.autoguide.guides import AutoCallable
from torch import Tensor

from pyro_bnn.infer.initialize import EXAMPLE, example_of, is_initialized
from pyro_bnn.infer.predict.weighted import WeightedChains
from pyro_bnn.infer.train.files import atomic_save, checked_load
from pyro_bnn.infer.train.reading import differences, read
from pyro_bnn.model.data import Batch, iter_batches
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.networks import model_tensors
from pyro_bnn.model.observations import stand_in_data
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.prototype import detach_prototypes
from pyro_bnn.ops.notice import warn_user

#: Attributes of guides that say what their parameters and buffers mean.
SETTINGS = (
    "structure", "curvature", "sites", "subnetwork", "num_components", "component", "rest", "scale_mode", "noise",
    "remainder",
)  # fmt: skip


def batch_of(example: dict[str, Any], device: torch.device) -> Batch:
    """A batch of zeros in the shapes of an example; integers are the smallest of those that were there."""
    found = [(key, _value_of(device, *rest)) for key, *rest in example["arguments"]]
    args = tuple(value for key, value in found if isinstance(key, int))
    return args, {key: value for key, value in found if not isinstance(key, int)}


def _value_of(device: torch.device, kind: str, value: Any, dtype: str) -> Any:
    if kind == "value":
        return value
    if kind in ("tensor", "integers"):
        shape, least = (value, 0) if kind == "tensor" else value
        return torch.full(shape, least, dtype=getattr(torch, dtype), device=device)
    items = {key: _value_of(device, *rest) for key, *rest in value}
    return items if kind == "dict" else {"list": list, "tuple": tuple}[kind](items.values())


def save_guide(
    guide: Any, path: str | os.PathLike[str], data: Any = None, *, model: Any = None, network: bool = True
) -> None:
    """
    Saves what predictions need: the parameters of a guide, and the parameters and buffers of the networks that its
    model calls.

    The file holds tensors, numbers and strings alone (no code, and of the data only the shapes), a digest of itself,
    and is written completely or not at all. The model runs once, on ``data`` or on those that the guide was initialised
    on, to tell what it calls; also a network that a function holds is found.

    :param guide: an initialised guide that is a module.
    :param path: the file.
    :param data: data of the shapes that the guide was initialised on; not needed for guides that remember them, as
        Pyro's and this project's do, and after :func:`~pyro_bnn.infer.fit`.
    :param callable model: the model, for a guide without an attribute ``model``.
    :param bool network: ``False`` saves digests in place of the networks' tensors (of a large network that is kept
        elsewhere); :func:`load_guide` then refuses a model whose tensors are others.
    :raises TypeError: if the guide is a function, whose parameters live in Pyro's parameter store.
    :raises OSError: if the file cannot be written; one that was there before is unchanged.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> import tempfile
        >>> from pyro_bnn import AutoMixture
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_guide(AutoMixture(model, 2).initialize(x, x), f"{folder}/guide.pt")
        ...     loaded = load_guide(AutoMixture(model, 2), f"{folder}/guide.pt")
        >>> loaded.num_components
        2
    """
    if not isinstance(guide, torch.nn.Module):
        raise TypeError(
            "save_guide: this guide is a function; its parameters live in Pyro's parameter store, which has "
            "save and load."
        )
    batch = next(iter_batches(data)) if data is not None else _remembered_batch(guide)
    example = getattr(guide, EXAMPLE, None) if data is None else None
    if example is None and batch is not None:
        example = example_of(batch)
    if batch is None and _model_of(guide, model) is not None:
        raise ValueError(
            "save_guide: the guide does not remember the data that it was initialised on, and the networks of its model "
            "are found by running it: pass data."
        )
    tensors = _tensors(guide, model, batch, None if data is not None else _latents(guide))
    if tensors is not None:
        tensors = {name: t.detach() if network else digest(t) for name, t in tensors.items()}
    saved = {
        "guide": type(guide).__name__,
        "settings": _settings(guide),
        "state": {name: value for name, value in guide.state_dict().items() if isinstance(value, Tensor)},
        "example": example,
        "network": tensors,
        "reading": _reading(guide, model, example),
    }
    atomic_save(saved, path)


def load_guide(guide: Any, path: str | os.PathLike[str], data: Any = None, *, model: Any = None) -> Any:
    """
    Loads what :func:`save_guide` wrote into a guide, which may be fresh, and into the networks of its model.

    A fresh guide is initialised on zeros in the shapes of its original data, with validation off. A model whose
    sites depend on the values of its data needs ``data``.

    :param guide: a guide built like the one that was saved; it need not have been called.
    :param path: the file.
    :param data: one batch, or an iterable of batches, to initialise a fresh guide on.
    :param callable model: the model, for a guide without an attribute ``model``.
    :return: the guide.
    :raises ValueError: naming the file, if it is damaged or no saved guide; if it belongs to another class of guide, to
        one with other settings (``structure="kronecker"`` in the file, ``"diagonal"`` here) or to another model, also
        one of the same tensors whose outputs are others (at the median of the guide and inputs that are no data); or if
        the shapes of the data are needed and neither stored nor given.

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
        ...     save_guide(guide, f"{folder}/guide.pt")
        ...     loaded = load_guide(AutoNormal(model), f"{folder}/guide.pt")
        >>> bool(loaded.median()["w"] == guide.median()["w"])
        True
    """
    path = os.fspath(path)
    saved = checked_load(path, "saved guide", {"guide", "state", "example"})
    _check_class(guide, saved, path)
    _restore_draws(guide, saved["state"], path)
    batch = _initialized_on(guide, saved, path, data)
    own = guide.state_dict()
    lossy = [n for n, v in saved["state"].items() if isinstance(own.get(n), Tensor) and not _keeps(v, own[n])]
    if lossy:
        raise ValueError(
            f"{path} holds {lossy[0]} in {saved['state'][lossy[0]].dtype}, the guide here in {own[lossy[0]].dtype}, which "
            "would round it. Build model and guide in the precision of the file, e.g. by torch.set_default_dtype."
        )
    try:
        guide.load_state_dict(saved["state"], strict=True)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} belongs to a guide of another model or with other options: {reason}"
        ) from error
    if not hasattr(guide, EXAMPLE):
        setattr(guide, EXAMPLE, saved["example"])  # so that it can be saved again
    _load_network(guide, model, saved.get("network"), path, batch)
    _require_same_reading(saved, _reading(guide, model, saved["example"]), path)
    return guide


def _reading(guide: Any, model: Any, example: dict[str, Any] | None) -> Any:
    model = _model_of(guide, model)
    return None if model is None or example is None else read(guide, model, batch_of(example, _device(guide)))


def _require_same_reading(saved: dict[str, Any], own: Any, path: str) -> None:
    """Raises for a model of the same tensors that makes something else of them."""
    if saved.get("reading") is None or own is None:
        return
    found = differences(saved["reading"], own)
    if found:
        raise ValueError(
            f"{path} belongs to a model of the same tensors that computes something else: with the same latents and inputs "
            f"{found[0]}. Build the model as when the guide was saved: activations, scales of adapters, the likelihood."
        )


def digest(tensor: Tensor) -> str:
    """A short text that tells tensors apart by their bits, shapes and types."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _prototype(guide: Any) -> Any:
    """The whole trace that a guide was initialised with, for guides that keep it."""
    trace = getattr(guide, "prototype_trace", None)
    return trace if trace is not None and "args" in trace.nodes.get("_INPUT", {}) else None


def _latents(guide: torch.nn.Module) -> Any:
    """The trace with its latent sites, unless functions among the parts of the guide have parameters of their own."""
    is_whole = not any(isinstance(part, AutoCallable) for part in guide.modules())
    return _prototype(guide) if is_whole else None


def _remembered_batch(guide: Any) -> Batch | None:
    """The arguments of the call that initialised a guide, or zeros in their shapes."""
    trace = _prototype(guide)
    if trace is not None:
        node = trace.nodes["_INPUT"]
        return tuple(node["args"]), dict(node["kwargs"])
    example = getattr(guide, EXAMPLE, None)
    return batch_of(example, _device(guide)) if example is not None else None


def _device(guide: torch.nn.Module) -> torch.device:
    return next((t.device for t in (*guide.parameters(), *guide.buffers())), torch.device("cpu"))


def _model_of(guide: Any, model: Any) -> Any:
    if model is not None:
        return model
    try:
        return guide.model
    except (AttributeError, TypeError):  # a guide of one's own, or one that was pickled
        return None


def _tensors(guide: Any, model: Any, batch: Batch | None, latents: Any) -> dict[str, Any] | None:
    model = _model_of(guide, model)
    if model is None or batch is None:
        return None
    try:
        return model_tensors(model, guide, batch, latents)
    except Exception as error:
        error.add_note(
            "The model was run to find its networks; pass data, on the device and in the dtype of the guide."
        )
        raise


def _settings(guide: torch.nn.Module) -> dict[str, Any]:
    """The settings of a guide and of its parts, by name."""
    parts = [(prefix, part) for prefix, part in guide.named_modules() if hasattr(part, "prototype_trace")]
    found = {
        f"{prefix}.{name}".lstrip("."): _plain(getattr(part, name, None))
        for prefix, part in parts
        for name in SETTINGS
    }
    # of a model that tells what it makes of the outputs of its network, which has no tensors
    found |= {
        f"model.{name}": value for name, value in getattr(_model_of(guide, None), "settings", {}).items()
    }
    return {name: value for name, value in found.items() if isinstance(value, (str, int))}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = [f"{key}: {kind}" for key, kind in sorted(value.items())]
    is_texts = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
    return ", ".join(value) if is_texts else value


def _check_class(guide: Any, saved: dict[str, Any], path: str) -> None:
    if saved["guide"] != type(guide).__name__:
        raise ValueError(f"{path} holds a {saved['guide']}, not a {type(guide).__name__}.")
    if "settings" not in saved:  # files of format 1
        return
    found, expected = saved["settings"], _settings(guide)
    for name in sorted(found.keys() | expected.keys(), key=lambda n: (n.count("."), n)):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{path} holds a {saved['guide']} with {name}={found.get(name)!r}; this one has "
                f"{name}={expected.get(name)!r}. Build the guide as it was built when it was saved."
            )


def _restore_draws(guide: torch.nn.Module, state: dict[str, Any], path: str) -> None:
    """Gives guides of stored draws those of the file: others of a list are initialised by a call, for which they are needed."""
    for prefix, part in guide.named_modules():
        if isinstance(cast(Any, part), WeightedChains):
            start = f"{prefix}." if prefix else ""
            own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            try:
                part.load_state_dict(own, strict=False)
            except ValueError as error:
                error.add_note(
                    f"load_guide read the draws of {path}, which belongs to a guide of another model."
                )
                raise


def _initialized_on(guide: Any, saved: dict[str, Any], path: str, data: Any) -> Batch | None:
    """Initialises a fresh guide; returns the arguments that it was initialised on, now or before."""
    # guides without a prototype (Pyro's messenger guides) do not tell whether they have been called
    if is_initialized(guide) and hasattr(guide, "prototype_trace"):
        return _remembered_batch(guide)
    if data is not None:
        batch = next(iter_batches(data))
    elif saved["example"] is not None:
        batch = batch_of(saved["example"], torch.device("cpu"))
    else:
        raise ValueError(f"{path} does not say what data the guide was initialised on; pass data.")
    # zeros need not be observations that the model could make
    values = pyro.validation_enabled(False) if data is not None else stand_in_data()
    quiet = evaluation_mode(guide)  # zeros must not enter the statistics of a network
    with local_parameters(), torch.enable_grad(), values, torch.random.fork_rng(), quiet:
        try:
            getattr(guide, "initialize", guide)(*batch[0], **batch[1])
        except Exception as error:
            zeros = f"zeros in the shapes that {path} holds; pass data instead"
            origin = "data" if data is not None else zeros
            error.add_note(f"load_guide initialised the guide of {path} on {origin}.")
            raise
    detach_prototypes(guide)
    return batch


def _load_network(
    guide: Any, model: Any, saved: dict[str, Any] | None, path: str, batch: Batch | None
) -> None:
    """Copies the tensors of the networks, or compares their digests."""
    own = _tensors(guide, model, batch, _latents(guide)) or {}
    if saved is None:
        if own:
            warn_user(
                f"{path} does not hold the networks of the model ({_first(own)}), on which predictions depend: load "
                "them from where they were saved, then save the guide again."
            )
        return
    odd = [n for n in saved.keys() | own.keys() if n not in saved or n not in own]
    odd += [n for n in saved.keys() & own.keys() if not _fits(saved[n], own[n])]
    if odd:
        raise ValueError(
            f"{path} belongs to another model: of the tensors of its networks, those that differ from this model in name, shape, precision or digest are "
            f"{_first(sorted(odd))}. Build the model, and load its network, as when the guide was saved."
        )
    with torch.no_grad():
        for name, value in saved.items():
            if isinstance(value, Tensor):
                own[name].copy_(value)


def _fits(saved: Any, own: Tensor) -> bool:
    if not isinstance(saved, Tensor):
        return saved == digest(own)
    return saved.shape == own.shape and _keeps(saved, own)


def _keeps(saved: Tensor, own: Tensor) -> bool:
    """Whether a tensor can take the values of another without rounding."""
    return torch.promote_types(saved.dtype, own.dtype) == own.dtype


def _first(names: Any) -> str:
    """Some names, for a message."""
    names = list(names)
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(str, names[:5])) + rest
