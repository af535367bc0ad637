# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What references know of a program, and the registry of operations on it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.programs import dense
from tests.programs.dense import Space
from tests.programs.program import Program

Pairs = Iterator[tuple[str, Any, Any]]
Rule = Callable[["Facts"], bool]


class Facts:
    """What references know of a program, computed once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.case = program.make()
        self.held: dict[str, Any] = {}
        self.space = Space(self.case)
        self.trace = dense.prototype(self.case)

    @property
    def sites(self) -> dict[str, Any]:
        return {n: self.trace.nodes[n] for n in self.space.observed}

    @property
    def is_real(self) -> bool:
        return all(s["fn"].support.is_discrete is False for s in self.space.sites.values()) and all(
            isinstance(t, td.transforms.IndependentTransform)
            or t is td.transforms.identity_transform
            or t == td.transforms.identity_transform
            for t in self.space.transforms.values()
        )

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.held:
            try:
                # the kernels of attention have no second derivatives
                with self.case.evaluation(), sdpa_kernel(SDPBackend.MATH):
                    self.held[name] = make()
            except Exception as error:
                self.held[name] = error
        found = self.held[name]
        if isinstance(found, Exception):
            raise found
        return found

    # ------------------------------------------------------------ points

    @property
    def start(self) -> Tensor:
        return self.get("start", lambda: self.space.start(self.case.spread))

    @property
    def mode(self) -> Tensor:
        return self.get("mode", lambda: dense.newton(self.case, self.space))

    def curvature(self, kind: str) -> Tensor:
        """The precision of the definition: at the start for Fisher matrices, at the mode for Hessians."""
        c, s = self.case, self.space
        if kind == "hessian":
            return self.get(
                "hessian", lambda: dense.hessian(lambda v: dense.negative_joint(c, s, v), self.mode)
            )
        prior = self.get("prior", lambda: dense.hessian(lambda v: -dense.log_prior(c, s, v), self.start))
        likelihood = {"ggn": dense.ggn, "empirical_fisher": dense.empirical}[kind]
        return prior + self.get(kind, lambda: likelihood(c, s, self.start))

    def point(self, kind: str) -> Tensor:
        return self.mode if kind == "hessian" else self.start

    def draws(self, size: int = 3) -> dict[str, Tensor]:
        """Values of the latents under several draws."""
        generator = torch.Generator().manual_seed(8)
        rows = self.case.spread * torch.randn(size, self.space.dim, generator=generator, dtype=torch.float64)
        if not self.space.dim:
            return {}
        like = next(iter(self.space.sites.values()))["value"]
        values = [self.space.values(row.to(like.dtype)) for row in rows]
        return {n: torch.stack([v[n] for v in values]).detach() for n in values[0]}

    def traces(self, args: str = "data") -> list[Any]:
        """The model at each of these draws."""

        def make() -> list[Any]:
            found = []
            for values in dense.components(self.case, self.draws()):
                trace = dense.trace_at(
                    self.case, values, self.case.data if args == "data" else self.case.inputs
                )
                trace.compute_log_prob()
                found.append(trace)
            return found

        return self.get(f"traces {args}", make)

    def outputs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By site the parameters that a linearised prediction moves and their Jacobian, at the start."""
        return self.get("outputs", lambda: self._outputs(self.start))

    def _outputs(self, u: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        u = u.detach().clone().requires_grad_(True)
        trace = dense.trace_at(self.case, self.space.values(u))
        found = {}
        for name in self.space.observed:
            fn, _ = dense.plain(trace.nodes[name]["fn"], torch.ones(()))
            phi = fn.loc if isinstance(fn, td.Normal) else fn.logits
            found[name] = phi.detach(), dense.jacobian(phi, u).reshape(*phi.shape, -1)
        return found

    @property
    def has_fisher(self) -> bool:
        """Whether the Fisher matrices of all observations are known by enumeration or quadrature."""
        try:
            for site in self.sites.values():
                dense.family(dense.plain(site["fn"], torch.ones(()))[0])
        except dense.NoReference:
            return False
        return True

    @property
    def is_simple(self) -> bool:
        """Whether each observation is Normal with a fixed scale, a coin or a label: one obvious linear predictor."""
        for site in self.sites.values():
            fn, _ = dense.plain(site["fn"], torch.ones(()))
            if not isinstance(fn, (td.Normal, td.Bernoulli, td.Categorical)) or isinstance(
                fn, dist.OrderedLogistic
            ):
                return False
        return bool(self.sites) and self.get("simple", self._fixed_scales)

    def _fixed_scales(self) -> bool:
        u = self.space.start(0.1).requires_grad_(True)
        trace = dense.trace_at(self.case, self.space.values(u))
        for name in self.space.observed:
            fn, _ = dense.plain(trace.nodes[name]["fn"], torch.ones(()))
            if isinstance(fn, td.Normal) and fn.scale.requires_grad:
                return False
        return True


@dataclass
class Operation:
    name: str
    run: Callable[[Facts], Pairs]
    applies: Rule
    rule: str


OPERATIONS: dict[str, Operation] = {}


def operation(
    name: str, rule: str, applies: Rule
) -> Callable[[Callable[[Facts], Pairs]], Callable[[Facts], Pairs]]:
    def register(run: Callable[[Facts], Pairs]) -> Callable[[Facts], Pairs]:
        OPERATIONS[name] = Operation(name, run, applies, rule)
        return run

    return register


def is_function(facts: Facts) -> bool:
    return not facts.case.noise


def one_plate(facts: Facts) -> bool:
    """One observed site whose batch shape is that of one plate."""
    sites = list(facts.sites.values())
    return (
        len(sites) == 1
        and not dense.factors(facts.trace)
        and len(sites[0]["fn"].batch_shape) == 1
        and sum(f.vectorized for f in sites[0]["cond_indep_stack"]) == 1
    )


FEW = "at most 60 latents"
KNOWN = FEW + "; Fisher matrices by enumeration or quadrature"


def few(facts: Facts) -> bool:
    return 0 < facts.space.dim <= 60


def known(facts: Facts) -> bool:
    return few(facts) and facts.has_fisher


def loads(facts: Facts) -> bool:
    c = facts.case
    return c.take is not None and c.separate and not c.guide_rows and not c.noise
