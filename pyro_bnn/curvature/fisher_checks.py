# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Whether a likelihood depends on the latents through the parameters of its Fisher information, and nothing else."""

from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.model.handlers import Site, subsample_scale, unscaled_log_prob
from pyro_bnn.model.packed import PackedModel, SiteOutputs, depends_on
from pyro_bnn.ops.jacobian import vjp


def require_fixed_values(model: PackedModel, trace: Trace, latent: Tensor) -> None:
    """
    Raises :exc:`ValueError` if a model has :func:`pyro.factor` statements, or an observed value of its trace depends on the
    packed vector, which requires a gradient.
    """
    model.check_factors(trace)
    for name in model.counted(trace):
        site: Any = trace.nodes.get(name)
        if site is None or not site["is_observed"] or not isinstance(site["value"], Tensor):
            continue
        if site["value"].requires_grad and depends_on(site["value"], latent):
            raise ValueError(
                f"observed site {name!r}: the observed value depends on latents, and a Fisher matrix knows the parameters of "
                "the distribution only. Use curvature='hessian', or move the latents into the distribution: y ~ "
                "Normal(f, s) in the place of y - f ~ Normal(0, s)."
            )


@torch.enable_grad()
def require_scores(model: PackedModel, trace: Trace, latent: Tensor) -> None:
    r"""
    Raises :exc:`ValueError`, naming the site, if the gradient of the log likelihood is not what the scores give,
    :math:`J^\top\partial\log p/\partial\phi`: then the Fisher matrix does not see all of the likelihood. Each element counts
    with a random weight, since at a mode the gradients of all together cancel. The graph of the trace is kept.
    """
    require_fixed_values(model, trace, latent)
    generator = torch.Generator().manual_seed(0)
    for site in model.site_outputs(trace):
        node = trace.nodes[site.name]
        direct, through = _gradients(site, node, latent, generator)
        if not (bool(direct.isfinite().all()) and bool(through.isfinite().all())):
            continue
        eps = max(torch.finfo(x.dtype).eps for x in (latent, site.outputs, direct))
        size = torch.maximum(direct.norm(), through.norm())
        apart = (direct - through).norm()
        if bool(apart > min(10 * eps**0.5, 0.5) * size):
            raise ValueError(
                f"observed site {site.name!r}: {100 * float(apart / size):.2g} % of the gradient of its log density in the "
                f"latents does not go through the parameters {list(site.names)} of the {type(site.base).__name__}, so that "
                "their Fisher matrix does not see all of the likelihood: use curvature='hessian', or register a FisherRule "
                "with pyro_bnn.ops.fisher.register_fisher."
            )


def _gradients(
    site: SiteOutputs, node: Site, latent: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gradients of a random combination of a site's log densities: autograd's, and that through its parameters."""
    log_prob = unscaled_log_prob(node) * (node["scale"] / subsample_scale(node))
    noise = torch.randn(log_prob.shape, generator=generator).to(log_prob)
    direct = torch.zeros_like(latent)
    if log_prob.requires_grad:
        (direct,) = torch.autograd.grad(
            log_prob, latent, noise, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    if not site.outputs.shape[-1]:
        return direct, torch.zeros_like(direct)
    noise = noise.reshape(noise.shape + (1,) * (site.event_dim + 1))
    scores = (site.scores(node["value"]) * noise).expand(site.outputs.shape)
    return direct, vjp(site.outputs.reshape(-1), latent, scores.reshape(1, -1))[0]
