# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Searches for multipliers of the prior precision: what shares one, what was found, and whether it is an optimum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.curvature.diagonal import DiagonalPart
from pyro_bnn.curvature.parts import Part
from pyro_bnn.model.data import iter_batches
from pyro_bnn.ops.described import Described
from pyro_bnn.ops.notice import warn_user

#: What a multiplier of the prior precision is shared by: everything, the sites of one module, or one site.
Per = Literal["global", "layer", "site"]
#: Logarithms of multipliers beyond which a search does not go: 1e-8 to 1e8.
LIMIT = 8 * 2.302585092994046
#: A second derivative of the evidence in log tau below which tau is not determined: a standard deviation of log tau of 10.
_FLAT = 1e-2


class HyperparameterWarning(UserWarning):
    """A search for hyperparameters ended at the edge of its range, or where the objective says nothing about them."""


@dataclass(repr=False)
class HyperparameterReport(Described):
    """
    What a search for hyperparameters found.

    :ivar tau: the multipliers of the prior precision, by site (or ``"all"``).
    :ivar objective: the objective at each evaluation: the log evidence, or the validation log likelihood.
    """

    tau: dict[str, float]
    objective: list[float]

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        rows = {}
        if self.objective:
            rows["objective"] = f"{max(self.objective):.6g} nats, the best of {len(self.objective)}"
            rows["first"] = f"{self.objective[0]:.6g} nats"
        return "multipliers of the prior precision", rows | {
            name: f"{tau:.4g}" for name, tau in self.tau.items()
        }


class Groups:
    """
    The random entries of the packed vector that share a multiplier of the prior precision.

    :param slices: by site, its entries.
    :param loc: the packed vector, shape ``(p,)``.
    :param active: which entries are random; all if ``None``.
    :param per: what has a multiplier of its own.
    :ivar masks: by group, its entries, shape ``(p,)``; ``None`` for all.
    """

    def __init__(self, slices: Mapping[str, slice], loc: Tensor, active: Tensor | None, per: Per) -> None:
        self.like = loc.detach()
        self.masks: dict[str, Tensor | None] = {"all": None} if per == "global" else {}
        for site, where in slices.items() if per != "global" else ():
            name = site.rpartition(".")[0] or site if per == "layer" else site
            mask = torch.zeros_like(self.like, dtype=torch.bool)
            mask[where] = True
            if active is not None:
                mask &= active
            old = self.masks.get(name)
            if bool(mask.any()):
                self.masks[name] = mask if old is None else mask | old

    def __len__(self) -> int:
        return len(self.masks)

    def expand(self, tau: Tensor) -> Tensor:
        """One multiplier per group as multipliers of all entries, shape ``(p,)``, or a scalar for one group of all."""
        full = torch.ones_like(self.like)
        for mask, value in zip(self.masks.values(), tau, strict=True):
            if mask is None:
                return value
            full = torch.where(mask, value, full)
        return full

    def split(self, parts: Sequence[Part]) -> list[list[Part]] | None:
        """The parts of each group, or ``None`` if a part spans several of them."""
        found: dict[str, list[Part]] = {name: [] for name in self.masks}
        for part in parts:
            for name, mask in self.masks.items():
                inside = None if mask is None else mask[part.index]
                if inside is None or bool(inside.all()):
                    found[name].append(part)
                elif bool(inside.any()) and isinstance(part, DiagonalPart):
                    found[name].append(DiagonalPart(**{k: v[inside] for k, v in part.tensors.items()}))
                elif bool(inside.any()):
                    return None
        return list(found.values())

    def report(self, tau: Tensor, objective: list[float]) -> HyperparameterReport:
        """What a search found."""
        return HyperparameterReport(dict(zip(self.masks, tau.tolist(), strict=True)), objective)

    def found(self, report: HyperparameterReport) -> Tensor:
        """The multipliers of all entries that a report holds."""
        return self.expand(torch.tensor(list(report.tau.values()), dtype=torch.float64).to(self.like))


def search(
    groups: Groups, candidates: Sequence[float], score: Callable[[Tensor], float]
) -> HyperparameterReport:
    """The best candidate of each group in turn, the others held fixed, until nothing changes."""
    if not candidates:
        raise ValueError("candidates is empty: pass the multipliers to try")
    tau = torch.ones(len(groups), dtype=groups.like.dtype, device=groups.like.device)
    history: list[float] = []
    for _ in range(5):
        before = tau.clone()
        for group in range(len(groups)):
            scores = []
            for value in candidates:
                tau[group] = value
                scores.append(score(tau))
            tau[group] = candidates[max(range(len(scores)), key=scores.__getitem__)]
            history += scores
        if len(groups) == 1 or torch.equal(before, tau):
            break
    report = groups.report(tau, history)
    warn_of_edges(report, candidates)
    return report


def climb(
    objective: Callable[[Tensor], Tensor], start: Tensor, *, max_iter: int
) -> tuple[Tensor, list[float]]:
    """
    Logarithms of multipliers at a maximum of an objective, by L-BFGS within the range of searches, and its values on the way.
    """
    logs = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [logs], max_iter=max_iter, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )
    history: list[float] = []

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -objective(logs.clamp(-LIMIT, LIMIT))
        value.backward()
        history.append(-float(value.detach()))
        return value.detach()

    with torch.enable_grad():
        optimizer.step(loss)
    return logs.detach().clamp(-LIMIT, LIMIT), history


@torch.no_grad()
def validation_score(guide: Any, data: Any, *, num_samples: int = 100, seed: int = 0) -> float:
    """
    The log predictive density of data under the linearised model, summed over observations: in closed form where there
    is one, by ``num_samples`` draws otherwise.
    """
    total = 0.0
    for args, kwargs in iter_batches(data):
        with torch.enable_grad():
            trace = guide.packed.trace(guide.loc.detach(), (args, kwargs))
            guide.packed.check_observations(trace)
            outputs = guide.linearized_outputs(*args, **kwargs)
        for name, found in outputs.items():
            generator = torch.Generator(device=found.mean.device).manual_seed(seed)
            value = trace.nodes[name]["value"]
            total += float(found.log_density(value, num_samples=num_samples, generator=generator).sum())
    return total


def warn_of_edges(report: HyperparameterReport, candidates: Sequence[float]) -> None:
    """Warns where the best candidate is the smallest or the largest of at least three."""
    lowest, highest = min(candidates), max(candidates)
    found = [
        f"{name!r}: {tau:.3g}, the {'smallest' if tau == lowest else 'largest'}"
        for name, tau in report.tau.items()
        if len(candidates) > 2 and (tau <= lowest * (1 + 1e-6) or tau >= highest * (1 - 1e-6))
    ]
    if found:
        warn_user(
            f"optimize_hyperparameters: the best multiplier of the prior precision is at the edge of the {len(candidates)} "
            f"candidates from {lowest:.3g} to {highest:.3g} ({'; '.join(found)}): the optimum may lie beyond. Pass wider "
            "candidates=; if it stays at the edge, the objective rises without end and the data do not determine the prior.",
            HyperparameterWarning,
        )


def warn_of_runaways(report: HyperparameterReport, bends: Sequence[float] | None) -> None:
    """
    Warns where the evidence has no maximum: the search went to the edge of its range, or its second derivatives
    (``bends``, in log tau, where known) have vanished.
    """
    found = []
    for i, (name, tau) in enumerate(report.tau.items()):
        low, high = tau <= 1.001e-8, tau >= 0.999e8
        flat = bends is not None and not bends[i] < -_FLAT
        if low or high or flat:
            curvature = "" if bends is None else f", second derivative in log tau {bends[i]:.2g}"
            found.append(f"{name!r}: {tau:.3g}{curvature}")
    if found:
        gain = report.objective[-1] - report.objective[0] if report.objective else 0.0
        warn_user(
            f"optimize_hyperparameters: the evidence has no maximum in the multiplier of the prior precision of {'; '.join(found)} "
            f"(gain over tau = 1: {gain:.3g} nats): the latents sit at their prior mean, or the data determine them without the "
            "prior. A guide uses this value until laplace_approximation(data) of an AutoLaplace, or further training, sets tau = 1 again. Choose per='global' or "
            "'layer', give the scale of these priors a prior of its own in the model, or use method='validation'.",
            HyperparameterWarning,
        )
