# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The stream of predictions: what a model, or a guide in its place, says of the data, piece by piece."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_bnn.infer.predict.draws import Draws
from pyro_bnn.infer.predict.pieces import Pieces
from pyro_bnn.infer.predict.runs import ModelRunner
from pyro_bnn.infer.predict.sites import SitePrediction, observation_kind, observation_moments, site_dims
from pyro_bnn.infer.predict.together import Key, Reader, Reading, Sites, predicted_names, undrawn
from pyro_bnn.model.data import Batch
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import (
    Site,
    is_deterministic,
    is_factor,
    log_prob_of,
    mask_of,
    masked_like,
    observation_draw,
    unscaled_log_prob,
)
from pyro_bnn.model.observations import check_labels, check_run
from pyro_bnn.model.parameters import local_parameters


@dataclass(frozen=True)
class Wanted:
    """
    What is read beside the log likelihoods.

    :ivar samples: draws of the observations.
    :ivar moments: their means and variances.
    :ivar terms: the terms of the log joint density.
    :ivar values: deterministic sites whose values are read.
    """

    samples: bool = True
    moments: bool = True
    terms: bool = False
    values: Sequence[str] = ()


@dataclass
class Found:
    """
    What is said of a batch under S draws.

    :ivar sites: predictions by observed site.
    :ivar terms: by site, its term of the log joint density, with scale and mask, shape ``(S,)``.
    :ivar values: values of deterministic sites and of latents drawn for this batch, shape ``(S,) + shape``.
    :ivar missing: latent sites of which there are no draws: every run takes new ones from their priors.
    :ivar has_factors: whether the model has a :func:`pyro.factor`.
    """

    sites: dict[str, SitePrediction]
    terms: dict[str, Tensor]
    values: Draws
    missing: list[str]
    has_factors: bool


class GuideRunner:
    """Runs a guide that says itself how observations are distributed under draws, as a model's runner runs the model."""

    def __init__(self, guide: Any, runner: ModelRunner) -> None:
        self.guide, self.runner = guide, runner
        self.draws, self.structure = runner.draws, runner.structure

    def run(self, batch: Batch, read: Reader[Key]) -> dict[Key, Tensor]:
        """By key, what is read of the guide's distributions at the model's sites, shape ``(S,) + batch shape + rest``."""
        args, kwargs = batch
        sites = self.runner.single(batch, 0)
        check_run(sites, batch, self.structure.validated)
        own: Sites = {}
        for name, fn in self.guide.observed_distributions(self.draws, *args, **kwargs).items():
            site = sites[name]
            value = site["value"] if site["is_observed"] else fn.sample()
            own[name] = {**site, "fn": masked_like(fn, site["fn"]), "value": value}
        free = set(predicted_names(sites, self.draws))
        found = read({n: s for n, s in sites.items() if n not in free} | own, torch.Size())
        return {key: value for key, (_, value, _) in found.items()}


def predicts_itself(posterior: Any, batch: Batch) -> bool:
    """Whether observations are predicted by the guide, through its linearised model."""
    if not hasattr(posterior, "observed_distributions"):
        return False
    linearizes = getattr(posterior, "can_linearize", None)
    return linearizes is None or linearizes(batch)


def predictions(pieces: Pieces, wanted: Wanted = Wanted()) -> Iterator[Found]:
    """
    What is said of the data, piece by piece; at the end ``pieces.join`` knows how they fit together.

    :param pieces: the data and the posterior.
    :param wanted: what is read.
    """
    posterior = pieces.posterior
    for batch in pieces:
        runner = pieces.runner
        runner.values = wanted.values
        runner.collects = wanted.terms or bool(wanted.values)
        with evaluation_mode(pieces.model), evaluation_mode(posterior), local_parameters():
            found = guided = None
            by_guide = predicts_itself(posterior, batch)
            if wanted.terms or not by_guide:
                own = replace(wanted, samples=False, moments=False) if by_guide else wanted
                found = _Readings(pieces, runner, own).of(batch)
            if by_guide:
                own = replace(wanted, terms=False, values=())
                guided = _Readings(pieces, GuideRunner(posterior, runner), own, note=found is None).of(batch)
            if found is None or guided is None:
                found = found or guided
            else:
                found.sites |= guided.sites
        assert found is not None
        for name, value in found.values.items():
            pieces.join.add_value(name, value.shape[1:])
        found.values |= {name: runner.draws[name] for name in pieces.local}
        yield found


class _Readings:
    """Reads the runs of one batch, and notes in ``pieces.join`` how its sites lie in plates."""

    def __init__(
        self, pieces: Pieces, runner: ModelRunner | GuideRunner, wanted: Wanted, *, note: bool = True
    ) -> None:
        self.join = pieces.join if note else None
        self.runner, self.wanted = runner, wanted
        self.facts: dict[str, dict[str, Any]] | None = None
        self.missing: list[str] = []
        self.has_factors = False

    def of(self, batch: Batch) -> Found:
        """What the runner says of a batch."""
        found = self.runner.run(batch, self)
        terms = {n: v.reshape(len(v), -1).sum(-1) for (kind, n), v in found.items() if kind == "term"}
        values = {n: v for (kind, n), v in found.items() if kind == "value"}
        fields = ("samples", "mean", "variance", "log_likelihood", "mask")
        sites = {}
        for name, fact in (self.facts or {}).items():
            given: dict[str, Any] = {field: found.get((field, name)) for field in fields}
            given["mask"] = None if given["mask"] is None else given["mask"].all(0)
            sites[name] = SitePrediction(**given, **fact)
        return Found(sites, terms, values, self.missing, self.has_factors)

    def __call__(self, sites: Sites, lead: torch.Size) -> dict[tuple[str, str], Reading]:
        structure, is_first = self.runner.structure, self.facts is None
        predicted = list(predicted_names(sites, self.runner.draws))
        if self.facts is None:
            self._note(sites, predicted)
        found = {("value", n): structure.value_reading(n, sites[n]) for n in self.wanted.values if n in sites}
        for name in predicted:
            site = sites[name]
            if site["is_observed"] and (is_first or self.wanted.terms):
                check_labels(name, site, name in structure.validated)
            batch = len(site["fn"].batch_shape)
            for field, value in self._fields(site):
                if value is not None:
                    found[field, name] = name, value, value.dim() - batch
        for name, site in sites.items() if self.wanted.terms else ():
            if not is_deterministic(site):
                found["term", name] = name, joint_term(site, lead), 0
        return found

    def _fields(self, site: Site) -> Iterator[tuple[str, Tensor | None]]:
        """What is read of a predicted site."""
        if site["is_observed"]:
            yield "log_likelihood", unscaled_log_prob(site)
        if self.wanted.samples:
            yield "samples", observation_draw(site) if site["is_observed"] else site["value"]
        if self.wanted.moments:
            yield from zip(("mean", "variance"), observation_moments(site["fn"]), strict=True)
        yield "mask", mask_of(site)

    def _note(self, sites: Sites, predicted: list[str]) -> None:
        """What is said once, by the first run."""
        ndims = self.runner.structure.ndims
        if self.join is not None:
            self.join.add(sites, ndims)
        self.missing = list(undrawn(sites, self.runner.draws))
        self.has_factors = any(map(is_factor, sites.values()))
        self.facts = {}
        for name in predicted:
            site, dims = sites[name], site_dims(sites[name], ndims[name])
            self.facts[name] = {
                "observed": _observed(site, ndims[name]) if site["is_observed"] else None,
                "dims": dims,
                "kind": observation_kind(site["fn"]),
            }


def joint_term(site: Site, lead: torch.Size) -> Tensor:
    """The log density of a site as it enters the joint density, with scale and mask; at least of the shape ``lead``."""
    log_prob = log_prob_of(site)
    if not site["is_observed"] and not (inside := site["fn"].support.check(site["value"])).all():
        log_prob = log_prob.masked_fill(~inside, -torch.inf)  # validation, which would say so, is off
    term = torch.as_tensor(scale_and_mask(log_prob, site["scale"], site["mask"]))
    return torch.broadcast_tensors(term, log_prob, term.new_empty(lead))[0]


def _observed(site: Site, ndim: int) -> Tensor:
    """The observed values in the shape of one value of their site, which has this number of batch dimensions."""
    batch = site["fn"].batch_shape
    shape = batch[len(batch) - ndim :] + site["fn"].event_shape
    value: Tensor = site["value"]
    return value.expand(shape) if value.dim() <= len(shape) else value
