# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Laplace approximations, against dense curvature."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.infer import NotAMinimumError
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace
from tests.programs import dense
from tests.programs.dense import Undefined
from tests.programs.facts import FEW, KNOWN, Facts, Pairs, few, known, loads, one_plate, operation
from tests.programs.program import Case


def approximation(facts: Facts, case: Case, data: Any = None, kind: str = "ggn", **options: Any) -> Any:
    guide = AutoLaplace(case.model, curvature=kind, **options).initialize(*case.data)  # type: ignore[arg-type]
    guide.loc.data = place(facts, guide, facts.point(kind))
    try:
        return guide.laplace_approximation(case.data if data is None else data, map_tolerance=math.inf)
    except NotAMinimumError as error:
        values = torch.linalg.eigvalsh(facts.curvature(kind).double())
        if values[0] > 1e-6 * values[-1]:
            raise AssertionError("refused a precision that is positive definite") from error
        raise


def order(facts: Facts, guide: Any) -> Tensor:
    """Positions in the guide's vector, in the order of the reference."""
    slices = guide.packed.space.slices
    parts = [torch.arange(slices[n].start, slices[n].stop) for n in facts.space.sites]
    return torch.cat(parts)


def place(facts: Facts, guide: Any, u: Tensor) -> Tensor:
    found = torch.empty_like(guide.loc)
    found[order(facts, guide)] = u.to(found)
    return found


def covariance(facts: Facts, guide: Any) -> Tensor:
    at = order(facts, guide)
    eye = torch.eye(facts.space.dim, dtype=guide.loc.dtype)
    return guide.posterior.quadratic_form(eye)[at[:, None], at]


def expected_covariance(precision: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(precision)
    if not values[0] > 1e-14 * values[-1]:
        raise Undefined("the precision is not positive definite")
    return torch.linalg.inv(precision)


def variances(J: Tensor, precision: Tensor) -> Tensor:
    """The diagonal of J P^-1 J', which exists if J does not see the flat directions of P."""
    values, vectors = torch.linalg.eigh(precision.double())
    rows = J.double() @ vectors
    flat = values <= 1e-13 * values[-1]
    if bool((rows[..., flat].abs() > 1e-7 * (1e-9 + rows.abs().max())).any()):
        raise Undefined("the precision is not positive definite")
    return (rows[..., ~flat].square() / values[~flat]).sum(-1)


def masked_precision(facts: Facts, kind: str, structure: str) -> Tensor:
    P = facts.curvature(kind)
    if structure == "diagonal":
        return torch.diag(P.diagonal())
    if structure == "block":
        kept = torch.zeros_like(P)
        for at in facts.space.places().values():
            kept[at[:, None], at] = P[at[:, None], at]
        return kept
    return P


def laplace(structure: str, kind: str, facts: Facts) -> Pairs:
    case = facts.program.make()
    extra = {"rank": facts.space.dim} if structure == "low_rank" else {}
    guide = approximation(facts, case, kind=kind, structure=structure, **extra)
    precision = masked_precision(facts, kind, structure)
    limit = max(factor(facts, kind), precision_factor(facts, precision))
    yield "covariance", covariance(facts, guide), expected_covariance(precision), limit  # type: ignore[misc]


def factor(facts: Facts, kind: str) -> float:
    """The digits that an ill-conditioned precision leaves."""
    return precision_factor(facts, facts.curvature(kind))


def precision_factor(facts: Facts, P: Tensor) -> float:
    """The same for a given precision."""
    P = P.double()
    values = torch.linalg.eigvalsh(P)
    condition = float(values[-1] / values[0].clamp(min=1e-300))
    precise = 1e-16 if facts.case.digits < 1e-6 else 1e-7
    return max(facts.case.digits, 30 * precise * condition)


def uncoupled(facts: Facts) -> bool:
    if not known(facts):
        return False
    c, s = facts.case, facts.space
    try:
        prior = facts.get("prior", lambda: dense.hessian(lambda v: -dense.log_prior(c, s, v), facts.start))
    except Exception:
        return True
    off = prior - torch.diag(prior.diagonal())
    return not bool(off.abs().max() > 1e-12) and bool((prior.diagonal() > 0).all())


HESSIAN = FEW + "; Newton steps find a mode in seconds"


def has_hessian(facts: Facts) -> bool:
    if not (few(facts) and facts.case.hessian):
        return False
    try:
        facts.mode  # noqa: B018
    except dense.NoReference:
        return False
    except Exception:  # the operation will say why
        return True
    return True


for _structure in ("full", "block", "diagonal"):
    operation(f"Laplace, {_structure}, ggn", KNOWN, known)(partial(laplace, _structure, "ggn"))
for _structure in ("low_rank", "function_space"):
    operation(
        f"Laplace, {_structure.replace('_', ' ')}, ggn",
        KNOWN + "; priors are not coupled",
        uncoupled,
    )(partial(laplace, _structure, "ggn"))
for _structure in ("full", "diagonal"):
    operation(f"Laplace, {_structure}, hessian", HESSIAN, has_hessian)(
        partial(laplace, _structure, "hessian")
    )
operation(
    "Laplace, full, empirical Fisher",
    "one observed site in one plate",
    lambda facts: few(facts) and one_plate(facts),
)(partial(laplace, "full", "empirical_fisher"))


@operation(
    "Laplace, last site",
    KNOWN + "; at least two latent sites",
    lambda facts: known(facts) and len(facts.space.sites) > 1,
)
def subset(facts: Facts) -> Pairs:
    case = facts.program.make()
    name = list(facts.space.sites)[-1]
    guide = approximation(facts, case, sites=[name])
    at = facts.space.places()[name]
    expected = torch.zeros(facts.space.dim, facts.space.dim)
    P = facts.curvature("ggn")
    expected[at[:, None], at] = expected_covariance(P[at[:, None], at])
    yield "covariance", covariance(facts, guide), expected, factor(facts, "ggn")  # type: ignore[misc]


@operation("Laplace, kronecker, ggn", "linear layers that one call uses", lambda facts: bool(facts.case.kron))
def kronecker(facts: Facts) -> Pairs:
    case = facts.program.make()
    guide = approximation(facts, case, structure="kronecker")
    expected = facts.get("kronecker", lambda: kronecker_factors(facts))
    yield "covariance", covariance(facts, guide), expected_covariance(expected), factor(facts, "ggn")  # type: ignore[misc]


def kronecker_factors(facts: Facts) -> Tensor:
    """Products of second moments of inputs and of output gradients, seen by hooks."""
    case, space, u = facts.case, facts.space, facts.start
    P = facts.curvature("ggn")
    prior, likelihood = facts.held["prior"], facts.held["ggn"]
    total = prior.clone()
    places = space.places()
    done = set()
    for path in case.kron:
        name = next(n for n in places if n == f"{path}.weight" or n.endswith(f".{path}.weight"))
        assert case.net is not None
        module = case.net.get_submodule(path)
        seen: dict[str, Any] = {}

        def hook(module: Any, args: Any, output: Tensor, seen: dict[str, Any] = seen) -> Tensor:
            seen["x"] = args[0].detach().clone()
            seen["shift"] = torch.zeros_like(output, requires_grad=True)
            return output + seen["shift"]

        handle = module.register_forward_hook(hook)
        trace = dense.trace_at(case, space.values(u))
        handle.remove()
        x, size = seen["x"], seen["shift"].shape
        if isinstance(module, torch.nn.Embedding):
            x = torch.nn.functional.one_hot(x, module.num_embeddings).to(u)
        G = torch.zeros(size[-1], size[-1])
        live = torch.zeros(len(x), dtype=torch.bool)
        for site_name in space.observed:
            phi, F, weight = dense.site_parameters(trace.nodes[site_name])
            J = dense.jacobian_wrt(phi, seen["shift"]).reshape(*phi.shape, *size)
            J = J.reshape(*phi.shape, len(x), -1, size[-1])
            G += torch.einsum("ncbto,ncd,ndbtp,n->op", J, F, J, weight)
            live |= (torch.einsum("ncbto,ncd,ndbto,n->b", J, F, J, weight) > 0) | (weight.max() == 0)
        rows = x.reshape(len(x), -1, x.shape[-1])[live]
        A = torch.einsum("nti,ntj->ij", rows, rows) / (rows.shape[0] * rows.shape[1])
        at = places[name]
        block = torch.kron(G, A) if not isinstance(module, torch.nn.Embedding) else torch.kron(A, G)
        total[at[:, None], at] += block
        done.add(name)
    for name, at in places.items():
        if name not in done:
            total[at[:, None], at] += likelihood[at[:, None], at]
    assert P is not None
    return total


@operation("log evidence, ggn", KNOWN, known)
def evidence(facts: Facts) -> Pairs:
    case = facts.program.make()
    guide = approximation(facts, case)
    P = facts.curvature("ggn")
    expected_covariance(P)
    with case.evaluation():
        value = -float(dense.negative_joint(case, facts.space, facts.start))
    expected = value + 0.5 * (facts.space.dim * math.log(2 * math.pi) - float(torch.logdet(P)))
    yield "evidence", float(guide.log_evidence()), expected


@operation(
    "Laplace from a loader",
    "examples are apart; the program has rows",
    lambda facts: known(facts) and loads(facts),
)
def laplace_loader(facts: Facts) -> Pairs:
    case = facts.program.make()
    for size, backwards in ((4, False), (3, True)):
        batches = case.batches(size)
        guide = approximation(facts, case, batches[::-1] if backwards else batches)
        expected = expected_covariance(facts.curvature("ggn"))
        yield f"batches of {size}", covariance(facts, guide), expected, factor(facts, "ggn")  # type: ignore[misc]


@operation(
    "linearised prediction",
    "each observation is Normal with a fixed scale, a coin or a label",
    lambda facts: few(facts) and facts.is_simple,
)
def linearized(facts: Facts) -> Pairs:
    case = facts.program.make()
    guide = approximation(facts, case)
    expected = facts.outputs()
    P = facts.curvature("ggn")
    for args in (case.inputs, case.data):
        for name, found in guide.linearized_outputs(*args).items():
            if name not in expected:
                continue
            phi, J = expected[name]
            if not J.any() and not found.variance.numel():
                continue
            variance = variances(J, P)
            yield f"mean of {name}", found.mean.reshape(phi.shape), phi
            yield f"variance of {name}", found.variance.reshape(phi.shape), variance, factor(facts, "ggn")  # type: ignore[misc]


def hessian_free(kind: str, facts: Facts) -> Pairs:
    case = facts.program.make()
    options: Any = {"curvature": kind}
    guide = AutoHessianFreeLaplace(case.model, **options).initialize(*case.data)
    guide.loc.data = place(facts, guide, facts.mode)
    guide.laplace_approximation(case.data, case.inputs, map_tolerance=math.inf)
    expected = facts.get("outputs at mode", lambda: facts._outputs(facts.mode))
    if kind == "hessian":
        P = facts.curvature("hessian")
    else:
        c, s, u = facts.case, facts.space, facts.mode
        P = facts.get("ggn at mode", lambda: dense.ggn(c, s, u)) + facts.get(
            "prior at mode", lambda: dense.hessian(lambda v: -dense.log_prior(c, s, v), u)
        )
    for name, found in guide.linearized_outputs(*case.inputs).items():
        if name in expected:
            phi, J = expected[name]
            if not J.any() and not found.variance.numel():
                continue
            variance = variances(J, P)
            yield (
                f"variance of {name}",
                found.variance.reshape(phi.shape),
                variance,
                max(1e-6, precision_factor(facts, P)),
            )  # type: ignore[misc]


for _kind in ("ggn", "hessian"):
    operation(
        f"Hessian-free Laplace, {_kind}",
        "each observation is Normal with a fixed scale, a coin or a label",
        lambda facts: has_hessian(facts) and facts.is_simple,
    )(partial(hessian_free, _kind))
