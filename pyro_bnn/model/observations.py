# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Checks of observations: their shape, type and range, for one site or all sites of a run."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import pyro
import torch
import torch.distributions as td
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_bnn.model.data import Batch, leaves
from pyro_bnn.model.handlers import Site, base_distribution, is_deterministic, is_factor, unwrap
from pyro_bnn.ops.families import of_family


def check_shape(name: str, site: Site) -> None:
    """Raises, naming the site, if an observation is no tensor or does not have the shape of its distribution."""
    if not isinstance(site["value"], Tensor):
        kind = type(site["value"])
        raise TypeError(
            f"Site {name!r}: the observation is a {kind.__module__}.{kind.__qualname__}, expected a tensor: pass "
            "torch.as_tensor(y)."
        )
    found, expected = tuple(site["value"].shape), tuple(site["fn"].shape())
    try:
        fits = tuple(torch.broadcast_shapes(found, expected)) == expected
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"Site {name!r}: the observation has shape {found}, its distribution has shape {expected} "
            "(batch shape + event shape). Reshape one of them, e.g. by squeeze(-1); broadcasting them "
            "would compare every point with every other."
        )
    if 0 in found:
        raise ValueError(
            f"Site {name!r}: the observation of shape {found} is empty: pass at least one data point."
        )


def check_values(sites: Mapping[str, Site], batch: Batch) -> None:
    """
    Checks the shapes of all observations: none is compared with another's, and none of the arguments of the model counts
    more than once. What the model itself observes (a residual of zero, say) may broadcast.
    """
    given = {(leaf.data_ptr(), leaf.shape) for leaf in leaves(batch).values() if isinstance(leaf, Tensor)}
    for name, site in sites.items():
        if not site["is_observed"] or is_deterministic(site) or is_factor(site):
            continue
        check_shape(name, site)
        value, expected = site["value"], site["fn"].shape()
        if expected.numel() > value.numel() and (value.data_ptr(), value.shape) in given:
            raise ValueError(
                f"Site {name!r}: the observation has shape {tuple(value.shape)}, its distribution has shape "
                f"{tuple(expected)}: each value would count {expected.numel() // value.numel()} times. Pass one value per "
                "element, expanded in the model if that is meant."
            )


def check_run(sites: Mapping[str, Site], batch: Batch, validated: Collection[str] | None = None) -> None:
    """
    What :func:`check_values` and :func:`check_labels` say of a run; ``validated`` are the sites whose support is looked at, by
    default those made with validation on.
    """
    check_values(sites, batch)
    for name, site in sites.items():
        if site["is_observed"] and not is_deterministic(site) and not is_factor(site):
            check_labels(name, site, None if validated is None else name in validated)


#: Whether validation was on outside of :func:`stand_in_data`; ``None`` where data are themselves.
_VALIDATED: ContextVar[bool | None] = ContextVar("_VALIDATED", default=None)


@contextmanager
def stand_in_data() -> Iterator[None]:
    """A context in which data stand for others of the same shapes, so that nobody looks at their values."""
    token = _VALIDATED.set(is_validation_enabled())
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        _VALIDATED.reset(token)


def is_stand_in() -> bool:
    """Whether data stand for others, see :func:`stand_in_data`."""
    return _VALIDATED.get() is not None


def validated_names(sites: Mapping[str, Site], names: Collection[str]) -> set[str]:
    """Those of some sites whose support is looked at: the user has not made them with validation off."""
    outside = _VALIDATED.get()
    return {name for name in names if (is_validated(sites[name]) if outside is None else outside)}


def is_validated(site: Site) -> bool:
    """Whether the distribution of a site was made with validation on."""
    return all(getattr(d, "_validate_args", False) for d in (site["fn"], unwrap(site["fn"])[0]))


_EXPECTED = {
    "Categorical": "Labels of C classes are the integers from 0 to C - 1",
    "Bernoulli": "Labels are 0 and 1; for -1 and 1 pass (y > 0)",
    "Poisson": "Counts are the integers from 0",
}


def check_labels(name: str, site: Site, validated: bool | None = None) -> None:
    """
    Raises, naming the site, if observations do not have a type that their distribution takes, or lie outside of its support
    where they are not masked. With validation switched off (``validate_args=False``) the support is not looked at.
    """
    value = site["value"]
    base = base_distribution(site["fn"])
    family = type(base).__name__
    if of_family(base, td.Bernoulli) and not value.is_floating_point():
        raise ValueError(
            f"Site {name!r}: the labels of a {family} are 0.0 and 1.0 in a floating-point type, found {value.dtype}: "
            "pass y.to(torch.get_default_dtype())."
        )
    if not (is_validated(site) if validated is None else validated):
        return
    try:
        wrong = outside_support(site)
    except (NotImplementedError, RuntimeError, ValueError):  # a distribution that does not say
        return
    if bool(wrong.any()):
        some = value[wrong].reshape(-1)[:3].tolist() if wrong.shape == value.shape[: wrong.dim()] else []
        raise ValueError(
            f"Site {name!r}: {int(wrong.sum())} of {wrong.numel()} observations, {some} among them, lie outside the "
            f"support {base.support} of {family}. {_EXPECTED.get(family, 'Transform them')}; mask what is missing with "
            "poutine.mask, in a model of your own."
        )


def outside_support(site: Site) -> Tensor:
    """Which values of a site lie outside of its support where they are not masked: bool, the shape of its elements or events."""
    base, mask, event_dim = unwrap(site["fn"])
    wrong: Tensor = ~base.support.check(site["value"])
    for kept in (mask, _to_elements(site["mask"], event_dim)):
        if kept is not None:
            wrong = wrong & kept
    return wrong


def _to_elements(mask: Tensor | bool | None, event_dim: int) -> Tensor | bool | None:
    return mask.reshape(mask.shape + (1,) * event_dim) if isinstance(mask, Tensor) and mask.dim() else mask
