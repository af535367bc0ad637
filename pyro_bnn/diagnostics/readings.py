# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a tree says of a model's sites, read batch by batch and joined."""

import warnings
from collections import defaultdict
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
from pyro_bnn.infer.predict.runs import ModelRunner, Reading, Sites, predicted_names
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
        #: What was read, by its kind and site, for each batch that has the site.
        self.parts: defaultdict[tuple[str, str], list[Tensor]] = defaultdict(list)
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
        observed: dict[str, Tensor] | None = None

        def read(sites: Sites) -> dict[tuple[str, str], Reading]:
            nonlocal observed
            if observed is None:
                pieces.join.add(sites, runner.ndims)
                observed = self.note(sites, runner)
            return self.readings(sites, runner)

        found = runner.run(batch, read)
        self.latent = set(runner.draws)
        for name, value in (observed or {}).items():
            mask, like = found.get(("mask", name)), found["likelihood", name][0]
            self.parts["observed", name].append(value)
            self.parts["counts", name].append(
                torch.ones_like(like, dtype=torch.bool) if mask is None else mask.all(0)
            )
        for (kind, name), value in found.items():
            if kind == "value":
                pieces.join.add_value(name, value.shape[1:])
            if kind != "mask":
                value = value.flatten(1).sum(-1) if kind == "lp" and value.dim() > 1 else value
                self.parts[kind, name].append(value)
        for name in pieces.local if not pieces.batches.is_single else ():
            self.parts["value", name].append(runner.draws[name])

    def readings(self, sites: Sites, runner: ModelRunner) -> dict[tuple[str, str], Reading]:
        """What is read at the sites of a run."""
        found = {("value", n): runner.value_reading(n, sites[n]) for n in self.deterministic if n in sites}
        predicted = set(predicted_names(sites, runner.draws))
        for name, site in sites.items():
            if is_deterministic(site):
                continue
            batch_dim, observed = len(site["fn"].batch_shape), name in predicted and site["is_observed"]
            if observed:
                check_labels(name, site, name in runner.validated)
            found["lp", name] = name, joint_term(site, runner.lead), 0
            if observed:
                found["likelihood", name] = name, unscaled_log_prob(site), 0
                if (mask := mask_of(site)) is not None:
                    found["mask", name] = name, mask, mask.dim() - batch_dim
                if self.predictions:
                    value = observation_draw(site)
                    found["sample", name] = name, value, value.dim() - batch_dim
        return found

    def note(self, sites: Sites, runner: ModelRunner) -> dict[str, Tensor]:
        """Notes latents without draws; the observations in the shape of one value of their sites."""
        self.has_factors |= any(is_factor(site) for site in sites.values())
        self.missing, observed = [], {}
        for name in predicted_names(sites, runner.draws):
            site: Any = sites[name]
            batch = site["fn"].batch_shape
            if site["is_observed"]:
                shape = batch[len(batch) - runner.ndims[name] :] + site["fn"].event_shape
                observed[name] = site["value"].expand(shape)
            elif not isinstance(base_distribution(site["fn"]), dist.Delta):
                self.missing.append(name)
        return observed

    def replace(self, guided: dict[str, SitePrediction], predictions: bool) -> None:
        """Puts what a guide says of the observations in the place of what the model says in the last batch."""
        for name, site in guided.items():
            if site.log_likelihood is not None and ("likelihood", name) in self.parts:
                self.parts["likelihood", name][-1] = site.log_likelihood
            if site.samples is not None and predictions:
                self.parts["sample", name].append(site.samples)

    def of(self, kind: str) -> dict[str, list[Tensor]]:
        """The readings of a kind by site."""
        return {name: parts for (key, name), parts in self.parts.items() if key == kind}

    def joined(self, join: Join) -> SiteValues:
        """The readings of all batches together."""
        for name, parts in self.of("lp").items():
            if name in self.latent and len(parts) > 1 and join.axis(name) is None:
                for part in parts[1:]:
                    if not close(parts[0], part):
                        raise other_prior(name, parts[0][:1], part[:1])
        totals = {name: join.total(name, parts) for name, parts in self.of("lp").items()}
        masks = {
            name: join.cat(name, parts, 0) for name, parts in self.of("counts").items() if parts[0].dim()
        }
        terms = torch.stack([torch.as_tensor(t) for t in totals.values()])
        return SiteValues(
            # at impossible values of latents the rest need not be a number
            lp=terms.sum(0).masked_fill((terms == -torch.inf).any(0), -torch.inf),
            log_prior={name: total for name, total in totals.items() if name in self.latent},
            log_likelihood={n: join.densities(n, parts) for n, parts in self.of("likelihood").items()},
            samples={n: join.cat(n, parts, random=True) for n, parts in self.of("sample").items()},
            observed={n: join.cat(n, parts, 0) for n, parts in self.of("observed").items()},
            masks={name: mask for name, mask in masks.items() if not mask.all()},
            values=self.joined_values(join),
            missing=self.missing,
        )

    def joined_values(self, join: Join) -> Draws:
        """Values along the rows where they have them, once where they are the same in all batches; others are left out."""
        found = {}
        for name, values in self.of("value").items():
            if name in self.deterministic and len(values) < self.batches:
                continue
            if len(values) > 1 and join.axis(name) is not None:
                found[name] = join.cat(name, values)
            elif all(close(values[0], value) for value in values[1:]):
                found[name] = values[0]
        left_out = [name for name in self.deterministic if name not in found]
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
