# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One pass over the data before a fit: what a target is, how many rows there are, and how far the network is from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from pyro_bnn.infer.initialize import explain_failure
from pyro_bnn.model.data import Batch, Batches, repeatable_batches
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.supervised.likelihoods import targets
from pyro_bnn.supervised.model import SupervisedModel, rows_in


@dataclass(frozen=True)
class Survey:
    """
    :ivar options: of :class:`SupervisedModel`, what the targets say.
    :ivar num_rows: N.
    :ivar num_elements: the number of elements of all targets.
    :ivar squares: the sum of squared residuals of a regression in units of the noise given, or of 1.
    :ivar log_likelihood: at the noise given, or 1; ``None`` where targets lie outside of the support.
    """

    options: dict[str, Any]
    num_rows: int
    num_elements: int
    squares: float
    log_likelihood: float | None

    def log_likelihood_at(self, noise: float) -> float | None:
        """The log likelihood of a regression without a noise given, at another noise than 1."""
        if self.log_likelihood is None:
            return None
        return self.log_likelihood + 0.5 * self.squares * (1 - noise**-2) - self.num_elements * log(noise)

    @property
    def residual(self) -> float:
        """The root mean square of the residuals of a regression, in the units of ``squares``."""
        return (self.squares / self.num_elements) ** 0.5


def check_loader(data: Any) -> Batches:
    """Data that give every row once in every pass; raises for loaders that leave rows out or draw them at random."""
    # one of the user's own holds the options that the loader does not show
    batches = getattr(data, "batch_sampler", None)
    size = getattr(batches, "batch_size", None) or getattr(data, "batch_size", None) or 1
    sampler = _sampler(data)
    if getattr(batches, "drop_last", False) or getattr(data, "drop_last", False):
        _require_no_rest(sampler, size)
    if getattr(sampler, "replacement", False):
        raise ValueError(
            f"the loader draws rows with replacement ({type(sampler).__name__}), so that some count twice and others not "
            "at all: pass a loader that gives every row once."
        )
    drawn = getattr(sampler, "num_samples", None)
    if isinstance(sampler, RandomSampler) and drawn != len(sampler.data_source):
        raise ValueError(
            f"the loader draws {drawn} of {len(sampler.data_source)} rows, other ones in every pass (RandomSampler with "
            "num_samples=): pass a loader that gives every row once, of a torch.utils.data.Subset if only some shall count."
        )
    return repeatable_batches(data)


def _require_no_rest(sampler: Any, size: int) -> None:
    """Raises if batches of this size leave rows out, or may."""
    total = len(sampler) if hasattr(sampler, "__len__") else None
    if total is None or total % size:
        rest = "what is left of a stream" if total is None else f"{total % size} of {total} rows"
        raise ValueError(
            f"the loader has drop_last=True and leaves out {rest}, other ones in every pass if it shuffles; a posterior needs all "
            "of them: drop_last=False."
        )


def _sampler(data: Any) -> Any:
    """What draws the rows of a loader; of a loader with a batch sampler of one's own, what that one draws from."""
    inner = getattr(getattr(data, "batch_sampler", None), "sampler", None)
    return inner if inner is not None else getattr(data, "sampler", None)


@torch.no_grad()
def survey(net: nn.Module, data: Any, likelihood: Any, noise: Any, options: dict[str, Any]) -> Survey:
    """Runs a network over the data, in evaluation mode, and reads what is not given in the options from the first batch."""
    batches = check_loader(data)
    fixed = noise if isinstance(noise, (int, float, Tensor)) else 1.0 if likelihood == "regression" else None
    probe = SupervisedModel(
        net, likelihood, noise=fixed, **{k: v for k, v in options.items() if v is not None}
    )
    rows = elements = 0
    squares = torch.zeros((), dtype=torch.float64)
    likelihoods: list[float | None] = []
    with evaluation_mode(net):
        for number, batch in enumerate(batches):
            x, y = _inputs_and_targets(probe, batch)
            try:
                f = probe.outputs(x)
            except Exception as error:
                explain_failure(error, batch)
                raise
            if not number:
                _read_dimensions(probe, f, y, options)
            d = probe.distribution(f, rows_in(x))
            y = targets(y, d, likelihood)
            rows, elements = rows + len(y), elements + y.numel()
            likelihoods.append(_log_likelihood(d, y))
            if likelihood == "regression":
                squares += ((y - d.mean) / probe.noise).double().square().sum().cpu()
    found = {"event_dim": probe.event_dim, "class_dim": probe.class_dim, "target": probe.target}
    total = None if None in likelihoods else sum(value for value in likelihoods if value is not None)
    return Survey(found, rows, elements, float(squares), total)


def _log_likelihood(d: Any, y: Tensor) -> float | None:
    """The sum over rows; ``None`` for targets that the distribution does not take, which the fit says."""
    try:
        return float(d.log_prob(y).double().sum())
    except Exception:
        return None


def _inputs_and_targets(model: SupervisedModel, batch: Batch) -> tuple[Any, Tensor]:
    """What the network and the likelihood get of a batch."""
    args, kwargs = batch
    x, y = model.split(*args, **kwargs)
    if y is None:
        where = (
            f"the keys {sorted(x)}, and target={model.target!r} is none of them"
            if isinstance(x, Mapping)
            else "inputs alone"
        )
        raise ValueError(
            f"the data have no targets: a batch holds {where}. Pass (x, y), batches of this form, or mappings with the name of the "
            "targets in target=."
        )
    return x, y


def _read_dimensions(model: SupervisedModel, f: Any, y: Any, options: dict[str, Any]) -> None:
    """Sets the dimensions of a target that are not given: those behind the rows, of which a single element is a number."""
    if callable(model.likelihood) or not isinstance(y, Tensor):
        return
    if options.get("event_dim") is None:
        model.event_dim = max(y.dim() - 1, 0) if y.dim() > 2 or y[:1].numel() != 1 else 0
        if model.likelihood == "classification" and y.shape == f.shape:
            model.event_dim = 0  # one-hot vectors, which are refused by their name
    if model.likelihood == "classification" and options.get("class_dim") is None and model.event_dim:
        model.class_dim = _class_dim(tuple(f.shape), tuple(y.shape))


def _class_dim(outputs: tuple[int, ...], labels: tuple[int, ...]) -> int:
    last, second = outputs[:-1] == labels, outputs[:1] + outputs[2:] == labels
    if last == second:
        what = (
            "the classes may be its dimension 1 or its last"
            if last
            else "neither dimension 1 nor the last holds the classes"
        )
        raise ValueError(
            f"likelihood='classification': outputs of shape {outputs} for labels of shape {labels}: {what}; pass class_dim=1 or "
            "class_dim=-1."
        )
    return 1 if second else -1
