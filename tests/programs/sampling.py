# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Log densities for samplers, against runs of Pyro's handlers."""

import torch

from pyro_bnn.infer import log_density
from tests.programs import dense
from tests.programs.facts import Facts, Pairs, is_function, loads, operation


@operation(
    "log density and gradient, three chains",
    "the model draws nothing beyond its latents",
    lambda facts: is_function(facts) and facts.space.dim > 0,
)
def chains(facts: Facts) -> Pairs:
    case = facts.program.make()
    start = facts.space.start(case.spread)
    rows = torch.stack([start, -0.7 * start.flip(0), 1.5 * start])
    density = log_density(case.model, case.data)
    together = density.value_and_gradient(rows)
    for i, row in enumerate(rows):
        leaf = row.clone().requires_grad_()
        with case.evaluation():
            expected = -dense.negative_joint(case, facts.space, leaf)
        (gradient,) = torch.autograd.grad(expected, leaf)
        alone = density.value_and_gradient(row)
        for what, (value, slope) in (("together", (x[i] for x in together)), ("alone", alone)):
            yield f"density of chain {i}, {what}", value, expected.detach()
            yield f"gradient of chain {i}, {what}", slope, gradient


@operation(
    "log density from a loader",
    "examples are apart; the program has rows, and no latent belongs to one",
    lambda facts: loads(facts) and facts.space.dim > 0,
)
def loader(facts: Facts) -> Pairs:
    case = facts.program.make()
    leaf = facts.space.start(case.spread).requires_grad_()
    with case.evaluation():
        expected = -dense.negative_joint(case, facts.space, leaf)
    (gradient,) = torch.autograd.grad(expected, leaf)
    value, slope = log_density(case.model, case.batches()).value_and_gradient(leaf)
    yield "density", value, expected.detach()
    yield "gradient", slope, gradient
