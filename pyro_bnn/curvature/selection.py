# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Which entries of the packed latent vector are random; the rest stays a point estimate."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.curvature.capture import Capture
from pyro_bnn.curvature.uses import ElementwiseUse, LinearUse
from pyro_bnn.model.data import Batch
from pyro_bnn.model.packed import PackedModel
from pyro_bnn.nn.sites import SITE_KEY

#: Names or patterns of sites, ``callable(name) -> bool``, a mask over the packed vector, ``"last_layer"``, or ``None``.
Selection = str | Sequence[str] | Callable[[str], bool] | Tensor | None


def select(model: PackedModel, selection: Selection, latent: Tensor, batch: Batch) -> Tensor | None:
    """
    The mask of a :data:`Selection` over the packed vector, bool, shape ``(p,)``, or ``None`` for everything; raises
    :exc:`ValueError` if it is empty, a pattern matches no site, or a mask has another shape.
    """
    if selection is None:
        return None
    if isinstance(selection, Tensor):
        mask = selection.to(torch.bool)
        if mask.shape != latent.shape:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, expected {tuple(latent.shape)}, that of the packed vector"
            )
        mask = mask.to(latent.device)
    elif isinstance(selection, str) and selection == "last_layer" and selection not in model.space.slices:
        mask = last_layer(model, latent, batch)
    else:
        mask = torch.zeros_like(latent, dtype=torch.bool)
        for name in _names(model, selection):
            mask[model.space.slices[name]] = True
    if not bool(mask.any()):
        raise ValueError(f"the selection {selection!r} admits no latent site of {list(model.space.slices)}")
    return mask


def _names(model: PackedModel, selection: Any) -> list[str]:
    sites = list(model.space.slices)
    if callable(selection):
        return [name for name in sites if selection(name)]
    patterns = [selection] if isinstance(selection, str) else list(selection)
    found = []
    for pattern in patterns:
        matching = [name for name in sites if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"sites names {pattern!r}, which matches none of the latent sites {sites}")
        found += matching
    return found


def last_layer(model: PackedModel, latent: Tensor, batch: Batch) -> Tensor:
    """
    The mask of the weights of the last linear map that the model applies, and of the offsets and scales that follow it. Where the
    last latents that are used are factors of a rank-1 layer, all the latents of that layer. Raises :exc:`ValueError` if some
    parameter of an observation depends on other linear maps only.
    """
    leaf = latent.detach().clone().requires_grad_(True)
    with Capture(leaf) as capture:
        trace = model.trace(leaf, batch)
    mask = _last_layer(model, trace, capture)
    linear, generator = torch.zeros_like(mask), torch.Generator().manual_seed(0)
    for use in capture.uses:
        if isinstance(use, LinearUse):
            linear[use.index.reshape(-1)] = True
    for site in model.site_outputs(trace):
        for name, output in zip(site.names, site.outputs.split(site.sizes, -1), strict=True):
            noise = torch.randn(output.shape, generator=generator).to(output)
            (slope,) = torch.autograd.grad(output, leaf, noise, retain_graph=True, materialize_grads=True)
            if bool(slope[linear].any()) and not bool(slope[mask].any()):
                raise ValueError(
                    f"sites='last_layer': the parameter {name!r} of site {site.name!r} does not depend on the last linear map "
                    f"that the model applies, {_sites_in(model, mask)}, and would have no epistemic variance: name the layers "
                    "of all heads instead, as in sites=['head1.*', 'head2.*']."
                )
    return mask


def _last_layer(model: PackedModel, trace: Trace, capture: Capture) -> Tensor:
    mask = torch.zeros_like(capture.latent, dtype=torch.bool)
    uses, sites = capture.uses, model.space.slices
    if uses:
        last = int(uses[-1].index.reshape(-1)[0])
        (site,) = [name for name, where in sites.items() if where.start <= last < where.stop]
        layer = [name for name in sites if name.startswith(site.rpartition(".")[0] + ".")]
        hints: list[Any] = [trace.nodes[name]["infer"] for name in layer]
        if any(hint.get(SITE_KEY, {}).get("role") == "factor" for hint in hints):
            for name in layer:
                mask[sites[name]] = True
            return mask
    places = [i for i, use in enumerate(uses) if isinstance(use, LinearUse)]
    if not places:
        raise ValueError(f"no latent of {list(sites)} is the weight of a linear map: name the sites instead")
    for use in uses[places[-1] :]:
        if use is uses[places[-1]] or isinstance(use, ElementwiseUse):
            mask[use.index.reshape(-1)] = True
    return mask


def _sites_in(model: PackedModel, mask: Tensor) -> list[str]:
    """The sites of the entries of a mask."""
    return [name for name, where in model.space.slices.items() if bool(mask[where].any())]


def largest(values: Tensor, size: int, within: Tensor | None) -> Tensor:
    """The ``size`` largest of values, shape ``(p,)``, or of those ``within`` a mask, bool, shape ``(p,)``."""
    if within is not None:
        values = values.masked_fill(~within, -torch.inf)
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[values.topk(min(size, len(values))).indices] = True
    return mask if within is None else mask & within
