# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What fit refuses before the first step, and what it says of a loss that is not finite."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from pyro_bnn.infer.autoguide.mixture import AutoMixture
from pyro_bnn.infer.initialize import run_model
from pyro_bnn.infer.mixture.runs import rehearsal
from pyro_bnn.infer.train.state import NonFiniteLossError
from pyro_bnn.infer.train.step import GradientStep
from pyro_bnn.model.data import Batch, check_finite
from pyro_bnn.model.handlers import base_distribution, sample_sites, subsample_scale
from pyro_bnn.model.networks import unchanged_buffers
from pyro_bnn.model.observations import check_run
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.distributed import world_size

#: Independent draws of the noise that a loss needs whose scales are to be fitted several iterations at a time.
LEAST_DRAWS = 50


def check_batch(model: Callable[..., Any], batch: Batch) -> None:
    """Runs the model alone, and raises if the observations of a batch do not fit it."""
    with local_parameters(), rehearsal(model), pyro.validation_enabled(True), torch.no_grad():
        check_run(sample_sites(run_model(model, batch)), batch)


def check_scale(model: Callable[..., Any], batch: Batch) -> None:
    """Of several processes each sees a part of the data, which only a plate of the full size can tell."""
    args, kwargs = batch
    with poutine.block(), local_parameters(), torch.no_grad(), unchanged_buffers():
        sites = sample_sites(poutine.trace(model).get_trace(*args, **kwargs))
    for name, site in sites.items():
        if site["is_observed"] and site["cond_indep_stack"] and subsample_scale(site) == 1:
            raise ValueError(
                f"fit in {world_size()} processes: site {name!r} is not in a plate of the full data. Write "
                "pyro.plate('data', N, subsample_size=len(x)) with the size N of all data, of which every process "
                "passes its own part."
            )


def check_autocast(
    step: GradientStep, number: int, batch: Batch, generators: Sequence[torch.Generator]
) -> None:
    """Compares the loss in low precision with the same draw in full precision."""
    low_precision = step.autocast
    if low_precision is None:
        return
    if low_precision == torch.float16:
        raise ValueError(
            "autocast=torch.float16: its gradients underflow without a scaled loss; use torch.bfloat16."
        )
    if not any(p.dtype == torch.float32 for p in step.tensors.trained):
        raise ValueError(
            f"autocast={low_precision}: no parameter is float32, and autocast leaves other types as they are. "
            "Convert model, guide and data by .float(), or leave autocast out."
        )

    with torch.no_grad():
        low = step.rehearse(batch, number, generators)
        step.autocast = None
        full = step.rehearse(batch, number, generators)
        step.autocast = low_precision
    if not abs(low - full) <= 0.02 * abs(full) + 1e-3:
        raise ValueError(
            f"autocast={low_precision}: the loss of the first batch is {low:.6g} in low and {full:.6g} in full "
            "precision. This model needs full precision; leave autocast out."
        )


def check_draws(guide: Callable[..., Any], elbo: Any, batch: Batch) -> None:
    """
    Refuses a loss to whose noise the iterations of one step would adapt: an average over few draws, or one whose gradient is
    not that of the draw.
    """
    args, kwargs = batch
    with poutine.block(), local_parameters(), rehearsal(guide), torch.no_grad():
        sites = sample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    random = {n: s for n, s in sites.items() if not isinstance(base_distribution(s["fn"]), dist.Delta)}
    rough = [n for n, s in random.items() if not s["fn"].has_rsample and not s["infer"].get("enumerate")]
    if rough:
        raise ValueError(
            f"StochasticLBFGS: site {rough[0]!r} of the guide has no reparametrised draws, so that the gradient is not that of one "
            "draw's loss. Use Adam."
        )
    if not random:
        return
    mixtures = (
        [m for m in guide.modules() if isinstance(m, AutoMixture)] if isinstance(guide, nn.Module) else []
    )
    rows = mixtures[0].num_draws(*batch) if mixtures == [guide] else 1
    particles = getattr(elbo, "num_particles", 1)
    draws = rows * (particles // 2 if getattr(elbo, "antithetic", False) else particles)
    if draws < LEAST_DRAWS:
        raise ValueError(
            f"StochasticLBFGS: the loss is an average over {draws} independent draws of the noise, to which the scales of the guide "
            f"would adapt within a step; it needs {LEAST_DRAWS}. Use Mixture_ELBO(num_particles={2 * LEAST_DRAWS}, antithetic=True), "
            "AutoMixture(..., noise='per_example') for rank-1 networks, which counts rows, or Adam."
        )


@contextmanager
def note_step(steps_taken: Callable[[], int]) -> Iterator[None]:
    """Adds to an error of the model, the loader or a callback where the run was."""
    try:
        yield
    except NonFiniteLossError:
        raise
    except Exception as error:
        error.add_note(f"fit stopped after {steps_taken()} steps; the parameters are those of that step.")
        raise


def explain(
    model: Callable[..., Any], guide: Callable[..., Any], parameters: dict[str, Tensor], batch: Batch
) -> str:
    """Names what is not finite: an argument, parameters, or the sites whose density is not."""
    try:
        check_finite(batch)
    except ValueError as error:
        return str(error)
    bad = [name for name, p in parameters.items() if not is_finite(p)]
    causes = []
    if bad:
        causes.append(
            f"parameters {bad} are not finite after the last step: its gradient was not, although its loss was (the slope of a "
            "root or norm at zero), or the step was too large"
        )
    sites: list[str] = []
    try:
        for name in _sites_without_density(model, guide, batch):
            sites += [name] if name not in sites else []
    except (ValueError, RuntimeError) as error:
        causes.append(f"running model and guide again fails with {error}")
    if sites:
        causes.append(f"site {sites[0]!r} has a value or log density that is not finite")
    if sites[1:]:
        causes.append(f"so have {sites[1:]}")
    return (
        f"{'; '.join(causes) or 'no single site shows it'}. The parameters are back in their last good state. A smaller "
        "learning rate, gradient clipping or scaled inputs usually help."
    )


def _sites_without_density(
    model: Callable[..., Any], guide: Callable[..., Any], batch: Batch
) -> Iterator[str]:
    args, kwargs = batch
    with poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        for trace in (guide_trace, poutine.trace(replayed).get_trace(*args, **kwargs)):
            trace.compute_log_prob()
            for name, site in sample_sites(trace).items():
                if not (is_finite(site["value"]) and is_finite(site["log_prob"])):
                    yield name


def is_finite(value: Any) -> bool:
    """Whether a value holds no NaN and no infinity."""
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())
