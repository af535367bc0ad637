# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a tree says of a model's sites: predictions batch by batch, joined."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bnn.infer.predict.draws import Draws
from pyro_bnn.infer.predict.pieces import Pieces
from pyro_bnn.infer.predict.sites import FIELDS, SitePrediction, join_sites
from pyro_bnn.infer.predict.stream import Found, Wanted, predictions
from pyro_bnn.model.coverage import other_prior
from pyro_bnn.model.join import Join
from pyro_bnn.model.plates import close
from pyro_bnn.ops.notice import warn_user


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


def read_sites(pieces: Pieces, deterministic: Sequence[str], *, samples: bool) -> SiteValues:
    """
    Runs the model over the data.

    :param deterministic: deterministic sites whose values are wanted.
    :param samples: whether draws of the observations are wanted.
    :raises ValueError: if nothing is observed.
    """
    wanted = Wanted(samples=samples, moments=False, terms=True, values=deterministic)
    parts = list(predictions(pieces, wanted))
    join, latent = pieces.join, pieces.draws
    missing = parts[-1].missing
    sites = join_sites(join, [_observed(part) for part in parts], FIELDS)
    if not sites and (missing or not any(part.has_factors for part in parts)):
        raise ValueError(
            "The model observes nothing in data; pass the observations too, e.g. data=(x, y) for model(x, y)."
        )
    terms = _by_site([part.terms for part in parts])
    for name, values in terms.items():
        if name in latent and len(values) > 1 and join.axis(name) is None:
            for value in values[1:]:
                if not close(values[0], value):
                    raise other_prior(name, values[0][:1], value[:1])
    totals = {name: torch.as_tensor(join.total(name, values)) for name, values in terms.items()}
    stacked = torch.stack(list(totals.values()))
    return SiteValues(
        # at impossible values of latents the rest need not be a number
        lp=stacked.sum(0).masked_fill((stacked == -torch.inf).any(0), -torch.inf),
        log_prior={name: total for name, total in totals.items() if name in latent},
        log_likelihood=_field(sites, "log_likelihood"),
        samples=_field(sites, "samples"),
        observed=_field(sites, "observed"),
        masks={name: mask for name, mask in _field(sites, "mask").items() if not mask.all()},
        values=_joined_values(join, parts, deterministic),
        missing=missing,
    )


def _observed(part: Found) -> dict[str, SitePrediction]:
    return {name: site for name, site in part.sites.items() if site.observed is not None}


def _field(sites: dict[str, SitePrediction], name: str) -> dict[str, Tensor]:
    """One field of the predictions, of those sites that have it."""
    return {site: value for site, found in sites.items() if (value := getattr(found, name)) is not None}


def _by_site(parts: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """By site, the tensors of those batches in which it is."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [part[name] for part in parts if name in part] for name in names}


def _joined_values(join: Join, parts: list[Found], deterministic: Sequence[str]) -> Draws:
    """Values along the rows where they have them, once where they are the same in all batches; others are left out."""
    found, values = {}, _by_site([part.values for part in parts])
    left_out = {name for name in deterministic if len(values.get(name, ())) < len(parts)}
    for name in [name for name in values if name not in left_out]:
        own = values[name]
        axis = join.axis(name) if len(own) > 1 else None
        if axis is not None:
            found[name] = join.cat(name, own)
        elif all(close(own[0], value) for value in own[1:]):
            found[name] = own[0]
        else:
            left_out.add(name)
    names = [name for name in deterministic if name in left_out]
    if names:
        warn_user(
            f"The deterministic sites {names} are left out: they are not in every run of the model, or their values "
            "depend on the batch.",
        )
    return found
