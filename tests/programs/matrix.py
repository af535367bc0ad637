# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Runs a cell, and judges it."""

import inspect
import math
import re
import traceback
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from tests.common import seed
from tests.programs.dense import Undefined
from tests.programs.operations import OPERATIONS, Facts, Operation
from tests.programs.program import PROGRAMS, Case, Program

#: arguments of this package that a message may point to
ARGUMENTS = (
    "autocast|batch|batch_dim|batch_size|component|curvature|data|fold|guide|kl|likelihood|method|num_components|rank|skip|"
    "sites|structure|targets|vectorize|sharing|subset_size|posterior|draws|map_tolerance"
)

#: arguments of scores
SCORED = "labels|observed|probs|samples|mean|variance|log_likelihood|scores"


@dataclass
class Verdict:
    """``exact``, ``refused``, ``unclear`` (an error that names nothing of the program), ``wrong`` or ``not finite``."""

    outcome: str
    error: float = 0.0
    message: str = ""

    @property
    def is_right(self) -> bool:
        return self.outcome in ("exact", "refused")

    def __str__(self) -> str:
        return f"exact ({self.error:.0e})" if self.outcome == "exact" else f"{self.outcome}: {self.message}"


def names_of(case: Case, facts: Facts | None = None) -> set[str]:
    """What of a program a message may name: sites, plates, arguments, modules."""
    found = set()
    model = case.model.forward if isinstance(case.model, nn.Module) else case.model
    found |= set(inspect.signature(model).parameters)
    for module in (case.net, case.model):
        if isinstance(module, nn.Module):
            for path, part in module.named_modules():
                found |= {path, type(part).__name__, type(part).__mro__[1].__name__}
    if facts is not None:
        for name, site in facts.trace.nodes.items():
            if site["type"] == "sample":
                found |= {name, type(site["fn"]).__name__, *(f.name for f in site["cond_indep_stack"])}
    return {name for name in found if name and not name.startswith("_")} - {
        "args",
        "kwargs",
        "Module",
        "object",
    }


def is_named(message: str, names: set[str]) -> bool:
    """Whether a message names a part of the program, or an argument of this package."""
    if (
        re.search(rf"^({ARGUMENTS}|{SCORED}): ", message)
        or re.search(r"\bargument \d", message)
        or re.search(rf"\b({ARGUMENTS})=", message)
    ):
        return True
    for name in names:
        quoted = rf"['\"`]{re.escape(name)}['\"`]"
        if re.search(quoted, message) or (
            len(name) > 3 and re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message)
        ):
            return True
    return bool(re.search(rf"(?<!\w)['\"`]?({ARGUMENTS})['\"`]", message))


def error_of(actual: Any, expected: Any) -> tuple[float, str]:
    """The largest difference relative to the largest entry, and what is odd about the comparison."""
    if isinstance(expected, tuple):
        return (0.0, "") if tuple(actual) == expected else (float("inf"), f"{actual}, expected {expected}")
    if actual is None:
        return float("inf"), "nothing, expected a value"
    a = torch.as_tensor(actual).detach().double()
    e = torch.as_tensor(expected).detach().double()
    if a.shape != e.shape:
        return float("inf"), f"shape {tuple(a.shape)}, expected {tuple(e.shape)}"
    if not bool(torch.isfinite(a).all()):
        return float("nan"), "not finite"
    if not e.numel():
        return 0.0, ""
    error = float((a - e).abs().max() / e.abs().max().clamp(min=1e-12))
    at = int((a - e).abs().argmax())
    return error, f"{float(a.reshape(-1)[at]):.6g}, expected {float(e.reshape(-1)[at]):.6g}"


def judge(operation: Operation, facts: Facts) -> Verdict:
    """Runs one operation on one program."""
    case, worst, note = facts.case, 0.0, ""
    must_refuse = any(operation.name.startswith(prefix) for prefix in case.must_refuse)
    seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for what, actual, expected, *tolerance in operation.run(facts):
                error, detail = error_of(actual, expected)
                if math.isnan(error):
                    return Verdict("not finite", error, f"{what}: {detail}")
                limit = max([case.digits, *tolerance])
                if error > limit:
                    return Verdict("wrong", error, f"{what}: {detail} (error {error:.1e})")
                worst, note = max(worst, error), what
    except Undefined as reason:
        return Verdict("wrong", message=f"answered, where there is no answer: {reason}")
    except Exception as error:
        return refusal(error, names_of(case, facts))
    if must_refuse:
        return Verdict("wrong", message=f"answered, where the answer cannot be known ({note})")
    return Verdict("exact", worst)


def refusal(error: Exception, names: set[str]) -> Verdict:
    """An error of this package that names a part of the program is a refusal; any other is unclear."""
    message = re.sub(r"\s+", " ", " ".join([str(error), *getattr(error, "__notes__", [])]))
    named = isinstance(error, ValueError | RuntimeError | NotImplementedError | MemoryError | TypeError)
    named = named and from_package(error) and is_named(message, names)
    return Verdict("refused" if named else "unclear", message=f"{type(error).__name__}: {message}")


def from_package(error: BaseException) -> bool:
    """Whether this package or Pyro's base class of its guides raised an error, rather than torch or Pyro under it."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(part in frames[-1].filename for part in ("pyro_bnn", "pyro/infer/autoguide"))


def run(program: Program, operations: Collection[str] = OPERATIONS.keys()) -> dict[str, Verdict]:
    """The cells of a program and these operations, all by default, that its rules do not leave out."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.validation_enabled(True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                facts = Facts(program)
            except Exception as error:
                return {"running the model": refusal(error, set())}
            return {
                name: judge(operation, facts)
                for name, operation in OPERATIONS.items()
                if name in operations and applies(operation, facts)
            }
    finally:
        torch.set_default_dtype(old)


def applies(operation: Operation, facts: Facts) -> bool:
    if facts.case.only and not operation.name.startswith(facts.case.only):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return operation.applies(facts)
        except Exception:  # the operation will say why
            return True


def load() -> dict[str, Program]:
    """All programs, by name."""
    from tests.programs import (  # noqa: F401
        batches,
        components,
        curvatures,
        densities,
        networks,
        plain,
        processes,
    )

    return PROGRAMS


__all__ = ["Tensor", "Verdict", "judge", "load", "run"]
