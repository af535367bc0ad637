# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Properties: groups of the operations of ``tests.programs``, checked on random programs."""

import random
import warnings

import pyro
import torch

from tests.programs.matrix import Verdict, applies, judge, refusal
from tests.programs.operations import OPERATIONS, Facts
from tests.properties.generator import Spec, program_of

#: property -> names of operations, or how they begin
PROPERTIES: dict[str, tuple[str, ...]] = {
    "the split and the order of batches do not matter": (
        "Laplace from a loader",
        "predictive of a loader",
        "predictive with batch_size",
        "export of a loader",
        "export with batch_size",
        "importance weights",
    ),
    "lp is the joint density": ("export", "importance weights"),
    "the bound is the mean of the components": ("bound", "log-mixture bound", "one step of fit"),
    "Laplace is the dense one": ("Laplace,", "log evidence", "Hessian-free", "linearised prediction"),
    "predictions are those of a loop": ("posterior predictive", "predictive moments", "scores"),
    "a saved guide predicts the same": ("save and load",),
}

#: from the worst
ORDER = ("wrong", "not finite", "unclear", "refused", "exact")


def operations_of(name: str) -> list[str]:
    """The operations of a property; all of them for an empty name."""
    starts = PROPERTIES[name] if name else ("",)
    return [o for o in OPERATIONS if o.startswith(starts)]


def check(spec: Spec, name: str = "", most: int = 3) -> dict[str, Verdict]:
    """
    Up to some operations of a property that apply to a random program, chosen by its seed.

    :param spec: the program.
    :param name: the property; any operation by default.
    :param most: how many operations.
    :return: verdicts by operation.
    """
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.validation_enabled(True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program_of(spec)
            try:
                facts = Facts(program)
            except Exception as error:
                return {"running the model": refusal(error, set())}
            names = operations_of(name)
            random.Random(spec.seed).shuffle(names)
            found: dict[str, Verdict] = {}
            for operation in names:
                if len(found) == most:
                    break
                if applies(OPERATIONS[operation], facts):
                    found[operation] = judge(OPERATIONS[operation], facts)
            return found
    finally:
        torch.set_default_dtype(old)


def worst(found: dict[str, Verdict]) -> str:
    """The worst outcome of a program."""
    return min((v.outcome for v in found.values()), key=ORDER.index, default="exact")
