# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Predictions, their moments and scores, and exports, against loops over draws."""

import math
from functools import partial
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_bnn.diagnostics import evaluate, log_weights, to_datatree
from pyro_bnn.infer import posterior_predictive, predictive_moments
from tests.programs import dense
from tests.programs.facts import Facts, Pairs, is_function, loads, operation


def compare_prediction(facts: Facts, found: Any, traces: list[Any], what: str = "") -> Pairs:
    for name in facts.space.observed:
        site = traces[0].nodes[name]
        if isinstance(site["fn"], dist.Unit):
            continue
        assert name in found, f"site {name} was not predicted"
        stacked = [dense.moments(t.nodes[name]["fn"]) for t in traces]
        values = [dense.pointwise(t.nodes[name]) for t in traces]
        if stacked[0][0] is not None:
            yield f"{what}mean of {name}", found[name].mean, torch.stack([m for m, _ in stacked])
            yield f"{what}variance of {name}", found[name].variance, torch.stack([v for _, v in stacked])
        yield (
            f"{what}shape of draws of {name}",
            tuple(found[name].samples.shape[1:]),
            tuple(site["value"].shape),
        )
        if found[name].log_likelihood is not None:
            mask = values[0][1]
            actual = found[name].log_likelihood
            yield (
                f"{what}log likelihood of {name}",
                actual[..., mask],
                torch.stack([v for v, _ in values])[..., mask],
            )


def predict(what: str, facts: Facts) -> Pairs:
    case = facts.program.make()
    draws, data, options = facts.draws(), case.data, {}
    if what == "loader":
        data = case.batches(4)
    if what == "batch_size":
        options = {"batch_size": 4}
    found = posterior_predictive(case.model, draws, data, **options)
    yield from compare_prediction(facts, found, facts.traces())
    if what == "whole":
        plain = posterior_predictive(case.model, draws, case.inputs)
        traces = facts.traces()
        for name in facts.space.observed:
            stacked = [dense.moments(t.nodes[name]["fn"])[0] for t in traces]
            if stacked[0] is not None and not isinstance(traces[0].nodes[name]["fn"], dist.Unit):
                yield f"mean of {name} without observations", plain[name].mean, torch.stack(stacked)


PREDICT = "the model draws nothing beyond its latents"
operation("posterior predictive", PREDICT, is_function)(partial(predict, "whole"))
operation(
    "predictive of a loader",
    PREDICT + "; examples are apart; latents are shared by all",
    lambda facts: is_function(facts) and loads(facts),
)(partial(predict, "loader"))
operation(
    "predictive with batch_size",
    PREDICT + "; the program has rows",
    lambda facts: is_function(facts) and facts.case.size > 4,
)(partial(predict, "batch_size"))


@operation("predictive moments", PREDICT, is_function)
def moments(facts: Facts) -> Pairs:
    case = facts.program.make()
    found = predictive_moments(case.model, facts.draws(), case.data)
    traces = facts.traces()
    for name in facts.space.observed:
        fn = traces[0].nodes[name]["fn"]
        stacked = [dense.moments(t.nodes[name]["fn"]) for t in traces]
        if stacked[0][0] is None or isinstance(fn, dist.Unit):
            continue
        mean = torch.stack([m for m, _ in stacked])
        variance = torch.stack([v for _, v in stacked])
        base, _ = dense.plain(fn, torch.ones(()))
        yield f"mean of {name}", found[name].mean, mean.mean(0)
        if not isinstance(base, (td.Categorical, td.Bernoulli, td.OneHotCategorical)):
            yield f"aleatoric variance of {name}", found[name].aleatoric, variance.mean(0)
            yield f"epistemic variance of {name}", found[name].epistemic, mean.var(0, correction=0)
        values = [dense.pointwise(t.nodes[name]) for t in traces]
        mask = values[0][1]
        density = torch.stack([v for v, _ in values]).logsumexp(0) - math.log(len(values))
        yield f"log density of {name}", found[name].log_density[mask], density[mask]


@operation(
    "scores",
    PREDICT + "; one observed site",
    lambda facts: is_function(facts) and len(facts.sites) == 1,
)
def scores(facts: Facts) -> Pairs:
    case = facts.program.make()
    prediction = posterior_predictive(case.model, facts.draws(), case.data)
    found = evaluate(prediction)
    (name,) = facts.space.observed
    traces = facts.traces()
    site = traces[0].nodes[name]
    values = [dense.pointwise(t.nodes[name]) for t in traces]
    mask = values[0][1]
    density = torch.stack([v for v, _ in values]).logsumexp(0) - math.log(len(values))
    yield "nll", found["nll"], -float(density[mask].mean())
    means = [dense.moments(t.nodes[name]["fn"])[0] for t in traces]
    if means[0] is None:
        return
    mean = torch.stack([m for m in means if m is not None]).mean(0)
    y = site["value"]
    if "rmse" in found and mean.shape == y.shape:
        yield "rmse", found["rmse"], float(((mean - y)[dense.elements(site)] ** 2).mean().sqrt())
    if "accuracy" in found and mean.dim() == y.dim() + 1:
        yield (
            "accuracy",
            found["accuracy"],
            float((mean.argmax(-1) == y)[dense.elements(site)].double().mean()),
        )
        one_hot = torch.nn.functional.one_hot(y.clamp(min=0).long(), mean.shape[-1])
        yield "brier", found["brier"], float(((mean - one_hot) ** 2).sum(-1)[dense.elements(site)].mean())


# ---------------------------------------------------------------- export


def export(what: str, facts: Facts) -> Pairs:
    case = facts.program.make()
    data, options = case.data, {}
    if what == "loader":
        data = case.batches(4)
    if what == "batch_size":
        options = {"batch_size": 4}
    tree = to_datatree(case.model, facts.draws(), data, weights=True, **options)
    traces = facts.traces()
    lp = np.array([float(t.log_prob_sum()) for t in traces])
    yield "lp", tree["sample_stats"]["lp"].values.reshape(-1), lp
    for name in facts.space.observed:
        if isinstance(traces[0].nodes[name]["fn"], dist.Unit):
            continue
        values = [dense.pointwise(t.nodes[name]) for t in traces]
        mask = values[0][1]
        expected = torch.stack([v for v, _ in values])
        actual = torch.as_tensor(tree["log_likelihood"][name].values.copy())[0]
        if actual.shape == expected.shape:
            yield f"log likelihood of {name}", actual[..., mask], expected[..., mask]
            if not bool(mask.all()):
                left = actual[..., ~mask]
                yield "masked observations count for nothing", float(left.nan_to_num().abs().max()), 0.0
        else:
            yield f"log likelihood of {name}", actual.reshape(len(traces), -1), expected[..., mask]
        predicted = tree["posterior_predictive"][name].values
        yield f"shape of {name}", tuple(predicted.shape[2:]), tuple(traces[0].nodes[name]["value"].shape)


operation("export", PREDICT, is_function)(partial(export, "whole"))
operation(
    "export of a loader",
    PREDICT + "; examples are apart; latents are shared by all",
    lambda facts: is_function(facts) and loads(facts),
)(partial(export, "loader"))
operation(
    "export with batch_size",
    PREDICT + "; the program has rows",
    lambda facts: is_function(facts) and facts.case.size > 4,
)(partial(export, "batch_size"))


def has_priors(facts: Facts) -> bool:
    priors = [site["fn"] for site in facts.space.sites.values()]
    return is_function(facts) and not any(isinstance(fn, dist.ImproperUniform) for fn in priors)


@operation("importance weights", PREDICT + "; priors can be drawn from", has_priors)
def weights(facts: Facts) -> Pairs:
    case = facts.program.make()
    guide = AutoNormal(case.model, init_scale=0.1)
    guide(*case.data)
    data = case.batches(4) if loads(facts) else case.data
    draws, found = log_weights(case.model, guide, data, num_samples=3)
    expected = []
    with case.evaluation():
        for values in dense.components(case, {n: draws[n] for n in facts.space.sites}):
            log_q = 0.0
            for n, v in values.items():
                t = facts.space.transforms[n]
                u = t.inv(v)
                loc, scale = guide._get_loc_and_scale(n)
                log_q += float(td.Normal(loc, scale).log_prob(u).sum() - t.log_abs_det_jacobian(u, v).sum())
            expected.append(float(dense.joint(case, values)) - log_q)
    yield "log weights", found, torch.tensor(expected)


def has_more_rows(facts: Facts) -> bool:
    c = facts.case
    return (
        is_function(facts)
        and loads(facts)
        and len(facts.sites) == 1
        and c.rows is not None
        and c.num_inputs > 0
    )


@operation(
    "predictive of twice the rows",
    PREDICT + "; examples are apart; one observed site; latents are shared by all",
    has_more_rows,
)
def more_rows(facts: Facts) -> Pairs:
    case = facts.program.make()
    assert case.take is not None
    assert case.rows is not None
    args = case.take(torch.arange(case.size).repeat(2))[: case.num_inputs]
    axes = [d for d in case.rows[case.num_inputs :] if d is not None]
    found = posterior_predictive(case.model, facts.draws(), args)
    (name,) = facts.space.observed
    means = [dense.moments(t.nodes[name]["fn"])[0] for t in facts.traces()]
    if means[0] is not None and axes:
        mean = torch.stack([m for m in means if m is not None])
        yield f"mean of {name}", found[name].mean, torch.cat([mean, mean], axes[0] + 1)


def amortised(what: str, facts: Facts) -> Pairs:
    case = facts.program.make()
    assert case.guide is not None
    with poutine.block(), case.evaluation():
        latents = poutine.trace(case.guide).get_trace(*case.data)
        values = {n: s["value"].detach() for n, s in latents.nodes.items() if dense.is_latent(s)}
        trace = dense.trace_at(case, values)
    batches = case.batches(4)
    if what == "predictive":
        for kind, data, options in (
            ("whole", case.data, {}),
            ("loader", batches, {}),
            ("cut", case.data, {"batch_size": 4}),
        ):
            found = posterior_predictive(case.model, case.guide, data, num_samples=2, **options)
            yield from compare_prediction(facts, found, [trace, trace], f"{kind}: ")
    else:
        for kind, data in (("whole", case.data), ("loader", batches)):
            tree = to_datatree(case.model, case.guide, data, num_samples=2)
            lp = torch.as_tensor(tree["sample_stats"]["lp"].values.copy()).reshape(-1)
            yield f"{kind}: lp", lp, torch.stack([torch.as_tensor(trace.log_prob_sum())] * 2)


AMORTISED = "the program has a guide that reads latents of rows from rows"
operation("predictive of an amortised guide", AMORTISED, lambda facts: facts.case.guide is not None)(
    partial(amortised, "predictive")
)
operation("export of an amortised guide", AMORTISED, lambda facts: facts.case.guide is not None)(
    partial(amortised, "export")
)
