# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Whether a model gives each component of a mixture, run together with the others, what it gives it alone."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from pyro.util import check_model_guide_match
from torch import Tensor

from pyro_bnn.infer.autoguide.components import is_real
from pyro_bnn.infer.mixture.constant_priors import plain_layers
from pyro_bnn.infer.mixture.runs import JointRun, Step, rehearsal, subsamples
from pyro_bnn.infer.predict.runs import NO_FUNCTION
from pyro_bnn.model.dispatch import Watch
from pyro_bnn.model.handlers import Site, check_broadcast, is_deterministic, log_prob_of, sample_sites
from pyro_bnn.model.observations import check_values
from pyro_bnn.model.plates import FAILURES, close, first_line
from pyro_bnn.nn.sites import SITE_KEY, note_readers
from pyro_bnn.ops.graph import graph_nodes
from pyro_bnn.ops.notice import warn_user

#: How far the trial values lie from the guide's draws, relative to their size: apart enough for a mix-up to be seen.
SPREAD = 0.3


class ComponentLoopWarning(UserWarning):
    """
    The components of a mixture run through the model one by one; the text says why they cannot together.

    Example::

        >>> import warnings
        >>> warnings.simplefilter("error", ComponentLoopWarning)  # rather stop than loop
    """


def check_alone(step: Step) -> tuple[Trace, Mapping[str, Any], dict[str, str]]:
    """
    Runs guide and model under one draw of the first component, as plainly as can be: the trace of the guide, by plain site
    of a layer its prior there, and by layer, who reads its parameters in its place.
    """
    with rehearsal(step.model), note_readers() as readers:
        guide_trace = step.guide_trace(0)
        own = sample_sites(guide_trace)
        values = {name: site["value"] for name, site in own.items()} | subsamples(guide_trace)
        model_trace = step.model_trace(values)
        sites = sample_sites(model_trace)
        check_latents(sites, own)
        check_values(sites, (step.args, step.kwargs))
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, step.nesting + int(step.per_example))
    for name in own.keys() & sites.keys() if step.split else ():
        # examples meet their component inside the network only, so nothing else may differ between components
        hint = own[name]["infer"].get(SITE_KEY, {})
        if hint.get("kind", "point") != "point" and hint["role"] is None:
            raise ValueError(
                f"site {name!r} lies outside the converted network and differs between components, which "
                "batch='split' cannot match with the examples: give it the family 'point', e.g. "
                f"component={{{name!r}: 'point'}}."
            )
    return guide_trace, plain_layers(sites), readers


def require_function(step: Step, alone: Trace) -> None:
    """Refuses a model of which two runs under the same values and random numbers differ: every component would change the next."""
    values = {name: site["value"] for name, site in sample_sites(alone).items()} | subsamples(alone)
    runs = []
    for _ in range(2):
        with rehearsal(step.model):  # takes random numbers back
            try:
                runs.append(densities(sample_sites(step.model_trace(values))))
            except FAILURES as failure:  # the first run of all did not fail
                raise ValueError(
                    NO_FUNCTION.format(f"a second run fails, {first_line(failure)}")
                ) from failure
    first, second = runs
    for name, density in first.items():
        if name in second and not is_close(second[name].detach(), density.detach()):
            what = f"the density of site {name!r} differs between two runs under the same values and random numbers"
            raise ValueError(NO_FUNCTION.format(what))


def check_latents(model_sites: Mapping[str, Site], guide_sites: Mapping[str, Any]) -> None:
    """Refuses a latent site of the model that is not among those of the guide, and an observed one that is."""
    for name, site in model_sites.items():
        if not site["is_observed"] and name not in guide_sites:
            raise ValueError(
                f"site {name!r} of the model is missing from the guide: if it is an observation, pass its data; "
                "if it is latent, add a guide for it."
            )
        if site["is_observed"] and name in guide_sites:
            raise ValueError(
                f"site {name!r} is observed in this call of the model, but the guide draws it, which would replace its data: "
                "initialize the guide with the data, or leave the data out."
            )


def difference(step: Step, run: JointRun, alone: Trace, readers: Mapping[str, str]) -> str:
    """
    Compares one run of all components with runs of the first and the last one, under the same values: the densities of
    all sites of the model, per entry.
    Says what differs; ``alone`` is a trace of the guide under one draw of one component, ``readers`` are those who read
    parameters of a layer in its place.
    """
    own = sample_sites(alone)
    with rehearsal(step.model), torch.enable_grad():
        try:
            drawn = run.draw()
        except FAILURES as failure:
            return first_line(failure)
        if own.keys() - drawn.keys():
            return f"the guide has no joint draw of {sorted(own.keys() - drawn.keys())}"
        frozen = dict(run.frozen)
        values, singles = _references(step, drawn, own, frozen)
        if step.per_example:
            _check_rows(step, values, own, frozen)
        try:
            with Watch(values.values()) as watch:
                joint = densities(run.run(values, frozen))
            if watch.where:
                return watch.reason
            for name, density in joint.items():
                check_broadcast(name, density.shape, step.nesting + 1 + (step.S > 1), "components")
        except FAILURES as failure:
            return first_line(failure)
        for (s, k), single in singles.items():
            for name, density in joint.items():
                if error := _compare(step, name, density.detach(), single.get(name), s, k, watch.half):
                    return error
        for name in unreached(joint.values(), values, run.layers):
            layer = name.rpartition(".")[0]
            if layer in readers:
                return f"{readers[layer]} reads the parameters of {layer!r} without the layer"
    return ""


def _references(
    step: Step, drawn: Mapping[str, Tensor], own: Mapping[str, Site], frozen: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[tuple[int, int], dict[str, Tensor]]]:
    """
    Trial values, and under them, by draw and component, the densities of the first and the last draw, each run alone.
    """
    for spread in (SPREAD, 0.0):
        values = _apart(step, drawn, spread)
        singles = {}
        try:
            for s, k in dict.fromkeys([(0, 0), (step.S - 1, step.K - 1)]):
                mine = {name: _own_value(step, values[name], site, s, k) for name, site in own.items()}
                trace = step.model_trace(mine | frozen)
                frozen.update(subsamples(trace))
                singles[s, k] = {name: t.detach() for name, t in densities(sample_sites(trace)).items()}
        except FAILURES:
            if spread:  # values that far from the guide need not be legal
                continue
            raise
        if all(bool(t.isfinite().all()) for single in singles.values() for t in single.values()):
            break
    return values, singles


def unreached(outputs: Iterable[Tensor], values: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """The sites with trained values among some on which no output depends."""
    nodes = {node for output in outputs for node in graph_nodes(output)}
    reached = {*nodes, *(node.variable for node in nodes if hasattr(node, "variable"))}
    own = {name: values[name] for name in names if name in values and values[name].requires_grad}
    return [n for n, value in own.items() if (value if value.is_leaf else value.grad_fn) not in reached]


def densities(sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """By site, what its entries add to the log joint density; deterministic sites are left out."""
    return {
        name: scale_and_mask(log_prob_of(site), site["scale"], site["mask"])
        for name, site in sites.items()
        if not is_deterministic(site)
    }


def pick(value: Tensor, event_dim: int, s: int, k: int, nesting: int) -> Tensor:
    """One draw of one component, ``(*plates, *event)``, of values ``(S, K, *plates, *event)`` or less on the left."""
    for place, index in ((nesting + 2, s), (nesting + 1, k)):
        if value.dim() - event_dim >= place:
            value = value[index if len(value) > 1 else 0]
    return value


def _apart(step: Step, drawn: Mapping[str, Tensor], spread: float) -> dict[str, Tensor]:
    """Values that differ clearly between the components; those that components share stay as they are."""
    values = dict(drawn)
    for site in (site for mixture in step.mixtures for site in mixture.sites):
        if site.name in values and site.kind not in ("point", "index", "lognormal") and is_real(site.support):
            value = values[site.name]
            size = value.detach().square().mean().sqrt() or 0.1
            noise = spread * (value.detach().abs() + 0.3 * size)
            signs = _alternating(value, step.nesting + 1 + site.event_dim)
            values[site.name] = value + noise * (torch.randn_like(value) + signs)
    return values


def _alternating(value: Tensor, place: int) -> Tensor:
    """1, -1, ... along a dimension, counted from the right, so that neighbours there do not come close by chance; 0 without it."""
    if value.dim() < place:
        return value.new_zeros(())
    index = torch.arange(value.shape[-place], device=value.device)
    return (1 - 2 * (index % 2)).to(value.dtype).reshape(-1, *[1] * (place - 1))


def _own_value(step: Step, value: Tensor, site: Site, s: int, k: int) -> Tensor:
    """The value of a site for one draw of one component alone."""
    return pick(value, len(site["fn"].event_shape), s, k, step.nesting).reshape(site["value"].shape)


def _compare(step: Step, name: str, joint: Tensor, single: Tensor | None, s: int, k: int, half: bool) -> str:
    """How the density of a site differs; empty if it does not."""
    if single is None:
        return f"site {name!r} is there only if the components run together"
    found = _core(pick(joint, 0, s, k, step.nesting))
    expected = _core(pick(single, 0, 0, 0, step.nesting))
    if found.shape != expected.shape:
        return f"the density of site {name!r} has shape {tuple(joint.shape)}, that of one component {tuple(expected.shape)}"
    if step.split:  # any dimension may be that of the examples
        sizes, parts = found.shape, step.S * step.K
        cuts = [(dim, n // parts) for dim, n in enumerate(sizes) if n % parts == 0]
        part = s * step.K + k
        same = any(
            is_close(*(t.narrow(d, part * n, n) for t in (found, expected)), half=half) for d, n in cuts
        )
        same = same or is_close(found, expected, half=half)
    else:
        same = is_close(found, expected, half=half)
    return "" if same else f"the density of site {name!r} depends on which components run together"


def _core(value: Tensor) -> Tensor:
    """Without singleton dimensions on the left."""
    while value.dim() and len(value) == 1:
        value = value[0]
    return value


def is_close(found: Tensor, expected: Tensor, *, half: bool = False) -> bool:
    """
    Whether densities differ by rounding only, which is not the same in products of other sizes; ``half`` says that a
    part of the run was in half precision.
    """
    tolerance = 4e-3 if half else 1e-7 if expected.dtype == torch.float64 else 1e-4
    return close(expected, found, tolerance=tolerance, floor=1.0)


def _check_rows(
    step: Step, values: Mapping[str, Tensor], own: Mapping[str, Site], frozen: Mapping[str, Tensor]
) -> None:
    """Compares a run in which every example has its factors with runs in which all have those of one example."""
    mine = {name: _own_value(step, values[name], site, 0, 0) for name, site in own.items()}

    def run(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return densities(sample_sites(step.model_trace(values | dict(frozen))))

    each = run(mine)
    factors = {
        site.name: site for mixture in step.mixtures for site in mixture.sites if site.role == "factor"
    }
    rows = {own[name]["value"].shape[-1 - site.event_dim] for name, site in factors.items()}
    for row in {0, max(rows) - 1}:
        shared = {}
        for name, value in mine.items():
            event_dim = len(own[name]["fn"].event_shape)
            if name in factors and value.shape[-1 - event_dim] > 1:
                value = value.select(-1 - event_dim, row).unsqueeze(-1 - event_dim)
            shared[name] = value
        for name, density in run(shared).items():
            at_row = [
                t[..., row].detach() for t in (each[name], density) if t.dim() and t.shape[-1] == max(rows)
            ]
            if name not in mine and len(at_row) == 2 and not is_close(*at_row):
                raise ValueError(
                    f"noise='per_example' gives every example its own factors, but the density of {name!r} at example "
                    f"{row} does not depend on those of this example alone: the network must keep one example per row "
                    "of its batch. Use noise='shared'."
                )


def check_used(
    likelihood: Tensor, values: Mapping[str, Tensor], layers: Collection[str], readers: Mapping[str, str]
) -> None:
    """Refuses, or warns of, values that were drawn for layers of this package and that no observation depends on."""
    unused = unreached([likelihood], values, layers)
    if not unused:
        return
    layer_of = {name: name.rpartition(".")[0] for name in layers}
    used = {layer for name, layer in layer_of.items() if name not in unused}
    whole = list(dict.fromkeys(layer_of[name] for name in unused if layer_of[name] not in used))
    parts = [name for name in unused if layer_of[name] in used]
    for layer in whole:
        if layer in readers:
            raise ValueError(
                f"the sites of layer {layer!r} are drawn, but no observation depends on them: {readers[layer]} reads the "
                "parameters without the layer, in a way that the draws do not reach. Leave the layer out by skip=."
            )
    named = " and ".join([f"the layers {whole}"] * bool(whole) + [f"the sites {parts}"] * bool(parts))
    warn_user(
        f"no observation depends on {named}, which keep their prior. Layers that no batch needs are left out by skip= of "
        "the conversion.",
    )
