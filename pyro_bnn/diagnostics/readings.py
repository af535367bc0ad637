# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a tree says of a model's sites, read batch by batch and joined."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_bnn.infer.predict.draws import Draws
from pyro_bnn.infer.predict.pieces import Pieces
from pyro_bnn.infer.predict.predictive import SitePrediction
from pyro_bnn.infer.predict.runs import Reading, Sites, predicted_names
from pyro_bnn.model.coverage import other_prior
from pyro_bnn.model.data import Batch
from pyro_bnn.model.handlers import (
    Site,
    base_distribution,
    is_deterministic,
    is_factor,
    log_prob_of,
    mask_of,
    observation_draw,
    unscaled_log_prob,
)
from pyro_bnn.model.join import Join
from pyro_bnn.model.observations import check_labels
from pyro_bnn.model.plates import close


@dataclass
class SiteValues:
    """
    Joined readings; S is the number of draws.

    :ivar lp: the log joint density of all the data, shape ``(S,)``: ``trace.log_prob_sum()`` of the model.
    :ivar log_prior: by latent site its part of ``lp``, shape ``(S,)``.
    :ivar log_likelihood: by observed site, shape ``(S, *batch)``.
    :ivar samples: draws by observed site, shape ``(S, *batch, *event)``.
    :ivar observed: observations by site.
    :ivar masks: which observations count, by those sites where not all do.
    :ivar values: values of deterministic sites and of latents drawn batch by batch, ``(S,) + shape``.
    :ivar missing: latent sites of which there are no draws: every run takes new ones from their priors.
    """

    lp: Tensor
    log_prior: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    samples: dict[str, Tensor]
    observed: dict[str, Tensor]
    masks: dict[str, Tensor]
    values: Draws
    missing: list[str]


class SiteReadings:
    """
    Collects readings batch by batch.

    :param deterministic: deterministic sites whose values are wanted.
    :param bool predictions: whether draws of the observations are wanted.
    """

    def __init__(self, deterministic: Sequence[str], predictions: bool) -> None:
        self.deterministic, self.predictions = list(deterministic), predictions
        self.parts: dict[tuple[str, str], list[Tensor]] = {}
        self.observed: dict[str, list[Tensor]] = {}
        self.masks: dict[str, list[Tensor]] = {}
        self.latent: set[str] = set()
        self.missing: list[str] = []
        self.has_factors = False
        self.batches = 0

    def read(self, pieces: Pieces, batch: Batch) -> None:
        """Runs the model on a batch."""
        runner = pieces.runner
        runner.values = self.deterministic
        # the priors of global latents are those of every batch
        runner.latents = self.batches == 0 or bool(pieces.local)
        self.batches += 1
        observed: dict[str, Tensor] = {}
        is_noted = False

        def read(sites: Sites) -> dict[tuple[str, str], Reading]:
            nonlocal is_noted
            if not is_noted:
                is_noted = True
                pieces.join.add(sites, runner.ndims)
                self.has_factors |= any(is_factor(site) for site in sites.values())
                self.missing = [
                    name
                    for name in predicted_names(sites, runner.draws)
                    if not sites[name]["is_observed"]
                    and not isinstance(base_distribution(sites[name]["fn"]), dist.Delta)
                ]
                observed.update(observations(sites, runner.ndims, runner.draws))
            readings = {
                ("value", n): runner.value_reading(n, sites[n]) for n in self.deterministic if n in sites
            }
            predicted = set(predicted_names(sites, runner.draws))
            for name, site in sites.items():
                if is_deterministic(site):
                    continue
                if name in predicted and site["is_observed"]:
                    check_labels(name, site, name in runner.validated)
                readings["lp", name] = name, joint_term(site, runner.lead), 0
                if name in predicted and site["is_observed"]:
                    readings["likelihood", name] = name, unscaled_log_prob(site), 0
                    if (mask := mask_of(site)) is not None:
                        readings["mask", name] = name, mask, mask.dim() - len(site["fn"].batch_shape)
                    if self.predictions:
                        value = observation_draw(site)
                        readings["sample", name] = name, value, value.dim() - len(site["fn"].batch_shape)
            return readings

        found = runner.run(batch, read)
        for name in observed:
            mask = found.pop(("mask", name), None)
            like = found["likelihood", name][0]
            whole = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.all(0)
            self.masks.setdefault(name, []).append(whole)
        for key, value in found.items():
            if key[0] == "value":
                pieces.join.add_value(key[1], value.shape[1:])
            self.parts.setdefault(key, []).append(
                value.reshape(len(value), -1).sum(-1) if key[0] == "lp" else value
            )
        self.latent = set(runner.draws)
        for name, value in observed.items():
            self.observed.setdefault(name, []).append(value)
        for name in pieces.local if not pieces.batches.is_single else ():
            self.parts.setdefault(("value", name), []).append(runner.draws[name])

    def replace(self, guided: dict[str, SitePrediction], predictions: bool) -> None:
        """Puts what a guide says of the observations in the place of what the model says in the last batch."""
        for name, site in guided.items():
            if site.log_likelihood is not None and ("likelihood", name) in self.parts:
                self.parts["likelihood", name][-1] = site.log_likelihood
            if site.samples is not None and predictions:
                self.parts.setdefault(("sample", name), []).append(site.samples)

    def joined(self, join: Join) -> SiteValues:
        """The readings of all batches together."""

        def of(kind: str) -> dict[str, list[Tensor]]:
            return {name: parts for (key, name), parts in self.parts.items() if key == kind}

        for name, parts in of("lp").items():
            if name in self.latent and len(parts) > 1 and join.axis(name) is None:
                for part in parts[1:]:
                    if not close(parts[0], part):
                        raise other_prior(name, parts[0][:1], part[:1])
        totals = {name: join.total(name, parts) for name, parts in of("lp").items()}
        masks = {name: join.cat(name, parts, 0) for name, parts in self.masks.items() if parts[0].dim()}
        terms = torch.stack([torch.as_tensor(t) for t in totals.values()])
        return SiteValues(
            # at impossible values of latents the rest need not be a number
            lp=terms.sum(0).masked_fill((terms == -torch.inf).any(0), -torch.inf),
            log_prior={name: total for name, total in totals.items() if name in self.latent},
            log_likelihood={n: join.densities(n, parts) for n, parts in of("likelihood").items()},
            samples={n: join.cat(n, parts, random=True) for n, parts in of("sample").items()},
            observed={n: join.cat(n, parts, 0) for n, parts in self.observed.items()},
            masks={name: mask for name, mask in masks.items() if not mask.all()},
            values=self.joined_values(join, of("value")),
            missing=self.missing,
        )

    def joined_values(self, join: Join, parts: dict[str, list[Tensor]]) -> Draws:
        """Values along the rows where they have them, once where they are the same in all batches; others are left out."""
        found, left_out = {}, [name for name in self.deterministic if len(parts.get(name, ())) < self.batches]
        for name, values in parts.items():
            if name in left_out:
                continue
            axis = join.axis(name) if len(values) > 1 else None
            if axis is not None:
                found[name] = join.cat(name, values)
            elif all(close(values[0], value) for value in values[1:]):
                found[name] = values[0]
            else:
                left_out.append(name)
        left_out = [name for name in self.deterministic if name in left_out]
        if left_out:
            warnings.warn(
                f"The deterministic sites {left_out} are left out: they are not in every run of the model, or their values "
                "depend on the batch.",
                stacklevel=2,
            )
        return found


def joint_term(site: Site, lead: torch.Size) -> Tensor:
    """The log density of a site as it enters the joint density, with scale and mask; at least of the shape ``lead``."""
    log_prob = log_prob_of(site)
    if not site["is_observed"] and not (inside := site["fn"].support.check(site["value"])).all():
        log_prob = log_prob.masked_fill(~inside, -torch.inf)  # validation, which would say so, is off
    term = torch.as_tensor(scale_and_mask(log_prob, site["scale"], site["mask"]))
    return term.expand(torch.broadcast_shapes(term.shape, log_prob.shape, lead))


def observations(sites: Sites, ndims: dict[str, int], draws: Draws) -> dict[str, Tensor]:
    """The observed values in the shape of one value of their sites."""
    found: dict[str, Tensor] = {}
    for name in predicted_names(sites, draws):
        site: Any = sites[name]
        if site["is_observed"]:
            batch = site["fn"].batch_shape
            found[name] = site["value"].expand(batch[len(batch) - ndims[name] :] + site["fn"].event_shape)
    return found
