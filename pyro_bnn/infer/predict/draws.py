# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Posterior draws from any guide, MCMC run or dictionary, always shaped (draws,) + site shape."""

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from torch import Tensor

from pyro_bnn.infer.predict.weighted import WeightedChains
from pyro_bnn.model.arguments import arguments_of, as_data
from pyro_bnn.model.data import Batch
from pyro_bnn.model.handlers import SubstituteMessenger, sample_sites
from pyro_bnn.model.latent_space import LatentSpace
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.memory import require_memory
from pyro_bnn.ops.options import require_count

#: Where draws come from: a guide, an MCMC run (anything with ``get_samples``), or draws by site name.
Posterior = Any

Draws = dict[str, Tensor]


@torch.no_grad()
def posterior_draws(
    posterior: Posterior, num_samples: int | None = None, *args: Any, batch: Any = ((), {}), **kwargs: Any
) -> Draws:
    """
    Draws from a posterior in whatever form it is.

    :param posterior: a guide (one with ``sample_posterior``, a Pyro autoguide, or a function), an
        :class:`~pyro.infer.MCMC` run or a :class:`~pyro_bnn.infer.ChainResult` (its chains one after the other, each with the
        share of its weight), or a mapping from site names to draws with the draws in the first dimension.
    :param int num_samples: the number of draws S; 100 by default for a guide, all by default otherwise. Of
        given draws an evenly spaced subset is taken.
    :param args: arguments of the guide, for guides that need them, as in ``posterior_draws(guide, 100, x)``, or data, of
        which the first batch is taken; see :mod:`pyro_bnn.model.arguments`.
    :param batch: the same as one object, data or ``(args, kwargs)``.
    :param kwargs: keyword arguments of the guide.
    :return: by site, a tensor of shape ``(S,) + site shape``.
    :raises ValueError: if more draws are asked for than there are, or less than one.

    Example::

        >>> draws = posterior_draws({"w": torch.arange(6.0)}, 3)
        >>> draws["w"]
        tensor([0., 2., 5.])
    """
    if num_samples is not None:
        require_count("num_samples", num_samples)
    if isinstance(posterior, WeightedChains):
        return posterior.resample(num_samples)
    if hasattr(posterior, "get_samples"):  # MCMC
        posterior = posterior.get_samples()
    if isinstance(posterior, Mapping):
        return _thin(posterior, num_samples)
    num_samples = 100 if num_samples is None else num_samples
    _require_memory_for(posterior, num_samples)
    args, kwargs = batch = _arguments_of(posterior, args, kwargs) if args or kwargs else arguments_of(batch)
    with local_parameters(), poutine.block():
        if hasattr(posterior, "sample_posterior"):
            return dict(posterior.sample_posterior((num_samples,), *args, **kwargs))
        if isinstance(posterior, AutoGuide) and posterior.prototype_trace is not None:
            vectorized = _autoguide_draws(posterior, num_samples, batch)
            if vectorized is not None:
                return vectorized
        return _loop_draws(posterior, num_samples, batch)


def _arguments_of(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    if len(args) == 1 and not kwargs and isinstance(args[0], tuple) and args[0] and type(args[0][0]) is tuple:
        return arguments_of(args[0])  # (args, kwargs)
    seen = getattr(guide, "argument_kinds", None)
    return arguments_of(as_data(getattr(guide, "model", guide), args, kwargs, "posterior_draws", seen=seen))


def _require_memory_for(guide: Any, num_samples: int) -> None:
    """Draws of an initialised autoguide must fit into memory; of others their size is not known before."""
    prototype: Any = getattr(guide, "prototype_trace", None)
    if prototype is None:
        return
    sites = [s for s in prototype.nodes.values() if s.get("type") == "sample" and not s["is_observed"]]
    values = [site["value"] for site in sites if isinstance(site.get("value"), Tensor)]
    needed = float(num_samples) * sum(value.numel() * value.element_size() for value in values)
    if needed > 2**30:
        require_memory(
            needed,
            f"num_samples={num_samples}",
            values[0].device,
            "Take fewer draws, or export them block by block.",
        )


def component_draws(guide: Any, num_samples: int) -> Draws:
    """So many draws from each component of an initialised mixture guide: by site, shape ``(K, n) + site shape``."""
    with local_parameters():
        return dict(guide.sample_posterior((guide.num_components, num_samples), by_component=True))


def _thin(samples: Mapping[str, Tensor], num_samples: int | None) -> Draws:
    sizes = {name: len(value) for name, value in samples.items()}
    if not sizes:
        raise ValueError(
            "The posterior is a mapping without sites: pass draws by the names of the model's latent sites."
        )
    if len(set(sizes.values())) != 1:
        raise ValueError(f"The sites do not have the same number of draws in their first dimension: {sizes}.")
    size = next(iter(sizes.values()))
    if num_samples is None or num_samples == size:
        return dict(samples)
    if num_samples > size:
        raise ValueError(f"num_samples={num_samples}, but there are {size} draws only.")
    index = torch.linspace(0, size - 1, num_samples, dtype=torch.float64).long()
    return {name: value[index.to(value.device)] for name, value in samples.items()}


@torch.no_grad()
def draws_given(guide: Any, known: Draws, batch: Batch) -> Draws:
    """Draws ``(S,) + site shape`` of all sites of a guide that samples them by Pyro's statements, given those of some."""
    with local_parameters(), poutine.block():
        return _loop_draws(guide, len(next(iter(known.values()))), batch, known)


def _loop_draws(
    guide: Any, num_samples: int, batch: Batch, known: Mapping[str, Tensor] | None = None
) -> Draws:
    """One run of the guide per draw, given those of some sites: right for every guide, slow."""
    args, kwargs = batch
    rows = []
    for index in range(num_samples):
        values = {name: value[index] for name, value in (known or {}).items()}
        sites = sample_sites(poutine.trace(SubstituteMessenger(values)(guide)).get_trace(*args, **kwargs))
        latent = {n: s for n, s in sites.items() if not s["is_observed"]}
        rows.append({n: s["value"] for n, s in latent.items() if not s["infer"].get("is_auxiliary")})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _autoguide_draws(guide: AutoGuide, num_samples: int, batch: Batch) -> Draws | None:
    """All draws at once, in a plate left of all plates of the model; ``None`` if the guide does not broadcast."""
    args, kwargs = batch
    prototype: Any = guide.prototype_trace
    # AutoStructured strips its prototype of what is needed here
    sites = {n: s for n, s in prototype.nodes.items() if s.get("type") == "sample" and not s["is_observed"]}
    frames = [frame for site in sites.values() for frame in site["cond_indep_stack"]]
    nesting = max((-frame.dim for frame in frames if frame.vectorized), default=0)
    try:
        if isinstance(guide, AutoContinuous):
            return LatentSpace(prototype).unpack(guide.get_posterior(*args, **kwargs).sample((num_samples,)))
        with pyro.plate("_draws", num_samples, dim=-1 - nesting):
            values: Mapping[str, Tensor] = guide(*args, **kwargs)
        if set(values) != set(sites):
            return None
        # fails, and so falls back to the loop, where a value did not broadcast
        return {n: values[n].reshape(num_samples, *site["value"].shape) for n, site in sites.items()}
    except (RuntimeError, ValueError, KeyError, NotImplementedError):
        return None
