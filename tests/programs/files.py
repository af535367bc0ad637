# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Guides that were saved and loaded."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_bnn.infer import load_guide, posterior_predictive, save_guide
from pyro_bnn.infer.autoguide import AutoEmpirical, AutoLaplace, AutoMixture
from tests.common import seed
from tests.programs.facts import Facts, Pairs, few, is_function, operation
from tests.programs.laplace import approximation
from tests.programs.predictions import compare_prediction
from tests.programs.program import Case


def restored(facts: Facts, build: Callable[[Case], Any]) -> Pairs:
    case, fresh = facts.program.make(), facts.program.make()
    if case.net is not None and case.train:
        case.net.train()
        with torch.no_grad():
            poutine.block(case.model)(*case.data)  # running statistics move
    guide = build(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guide.pt"
        save_guide(guide, path, case.data)
        simple = all(a is None or isinstance(a, (Tensor, int, float)) for a in fresh.data)
        loaded = load_guide(empty(guide, fresh), path, **({} if simple else {"data": fresh.data}))
    if case.net is not None and not case.train:
        fresh.net.load_state_dict(case.net.state_dict())  # type: ignore[union-attr]
    predictions = []
    for model, g, args in ((case.model, guide, case.inputs), (fresh.model, loaded, fresh.inputs)):
        seed(2)
        predictions.append(posterior_predictive(model, g, args, num_samples=3))
    for name in predictions[0]:
        for field in ("samples", "mean"):
            before, after = (getattr(p[name], field) for p in predictions)
            if before is not None:
                yield f"{field} of {name}", after, before


def empty(guide: Any, case: Case) -> Any:
    if isinstance(guide, AutoEmpirical):
        return AutoEmpirical(case.model)
    if isinstance(guide, AutoMixture):
        return AutoMixture(case.model, 2, "normal", rest="normal")
    return AutoLaplace(case.model)


def normal_mixture(case: Case) -> Any:
    guide = AutoMixture(case.model, 2, "normal", rest="normal").initialize(*case.data)
    with torch.no_grad():
        for name, p in guide.named_parameters():
            if "scale" not in name:
                p += 0.3 * torch.randn_like(p)
    return guide


def real_line(facts: Facts) -> bool:
    return is_function(facts) and not facts.case.guide_rows


@operation(
    "save and load a mixture",
    "the model draws nothing beyond its latents; no latent belongs to a row",
    real_line,
)
def save_mixture(facts: Facts) -> Pairs:
    yield from restored(facts, normal_mixture)


@operation(
    "save and load a Laplace guide",
    "at most 60 latents, none belongs to a row",
    lambda f: few(f) and real_line(f),
)
def save_laplace(facts: Facts) -> Pairs:
    yield from restored(facts, lambda case: approximation(facts, case))


@operation(
    "a guide of draws: predictions, draws, save and load",
    "the model draws nothing beyond its latents",
    is_function,
)
def save_draws(facts: Facts) -> Pairs:
    case = facts.program.make()
    draws = facts.draws()
    guide = AutoEmpirical(case.model, draws).initialize(*case.data)
    yield from compare_prediction(facts, posterior_predictive(case.model, guide, case.data), facts.traces())
    with poutine.block(), case.evaluation():
        for _ in range(2):
            trace = poutine.trace(guide).get_trace(*case.data)
            values = {n: trace.nodes[n]["value"] for n in draws}
            found = [
                s
                for s in range(len(facts.traces()))
                if all(torch.equal(v, draws[n][s]) for n, v in values.items())
            ]
            yield "a call is one of the draws", len(found), 1
            replayed = poutine.trace(poutine.replay(case.model, trace)).get_trace(*case.data)
            yield "its joint density", replayed.log_prob_sum(), facts.traces()[found[0]].log_prob_sum()
    yield from restored(facts, lambda other: AutoEmpirical(other.model, draws).initialize(*other.data))
