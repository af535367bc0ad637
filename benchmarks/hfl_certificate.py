# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Certified bounds of Hessian-free Laplace variances against dense matrices: the part ``certificate`` of hfl_accuracy.py."""

import statistics
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bnn.infer import hfl
from pyro_bnn.infer.hfl.bound import Bound
from pyro_bnn.infer.hfl.certify import certify
from pyro_bnn.infer.hfl.direct import cg
from pyro_bnn.infer.hfl.solver import Solver
from pyro_bnn.infer.hfl.task import Task
from pyro_bnn.ops.jacobian import LinearMap

Rows = Iterator[dict[str, Any]]


def random_case(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """A precision J'J + T of a linear model, T, targets, and what it is: sizes, scales and ranks over many magnitudes."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    p, n, m = pick(2, 25), pick(1, 40), pick(1, 7)
    spread, width = pick(0, 6), pick(0, 4)
    scale = torch.logspace(0, -spread, p)[torch.randperm(p, generator=generator)] * 10.0 ** pick(-2, 4)
    prior = torch.logspace(0, width, p)[torch.randperm(p, generator=generator)] * 10.0 ** pick(-3, 2)
    features = torch.randn(n, p, generator=generator) * scale
    targets = torch.randn(m, p, generator=generator)
    if pick(0, 2):  # targets like the data
        targets = targets * scale
    if m > 2:  # that depend on each other
        targets[-1] = targets[0] - 2 * targets[1]
    return features.mT @ features + torch.diag(prior), prior, targets, {"p": p, "n": n, "m": m}


def solve_linear(
    operator: LinearMap, prior: Tensor, targets: Tensor, tolerance: float, **options: Any
) -> tuple[Any, int]:
    """The certificate of a linear model, by the same solver, without the model around it, and the products."""
    latent = torch.zeros_like(prior)
    problem: Any = SimpleNamespace(
        operator=operator, latent=latent, gradient=latent, curvature="ggn", proximal=0.0
    )
    functionals: Any = SimpleNamespace(gradients=targets)
    solver = Solver(problem, tolerance=1e-6, width=tolerance, bound=Bound(prior), **options)
    task = Task(problem, functionals, solver)
    return certify(task, cg(task)), solver.products


def violations(certificate: Any, exact: Tensor, rounding: float) -> tuple[int, int]:
    """How many variances lie outside of their bounds, and covariances outside of theirs, by more than rounding of the reference."""
    variances = exact.diagonal()
    slack = rounding * variances
    outside = (certificate.lower > variances + slack) | (certificate.upper < variances - slack)
    sd = variances.clamp(min=torch.finfo(exact.dtype).tiny).sqrt()
    low, high = certificate.joint
    gaps = [torch.linalg.eigvalsh(gap / sd / sd[:, None]).min() for gap in (exact - low, high - exact)]
    return int(outside.sum()), int(min(gaps) < -rounding * len(exact))


def linear_models(number: int) -> Rows:
    """Random linear models in float64: how many bounds do not hold."""
    generator = torch.Generator().manual_seed(0)
    counts = {"models": 0, "variances": 0, "outside": 0, "covariances outside": 0, "wider than asked": 0}
    products = latents = 0
    gaps: list[float] = []
    for index in range(number):
        P, prior, targets, _ = random_case(generator)
        tolerance = (0.5, 0.05, 0.01, 1e-4)[index % 4]
        preconditioner = (None, "prior", "nystrom", lambda r, P=P: r / P.diagonal())[index // 4 % 4]
        certificate, cost = solve_linear(
            lambda v, P=P: v @ P,
            prior,
            targets,
            tolerance,
            preconditioner=preconditioner,
            rank=3,
            block_size=(64, 2)[index // 16 % 2],
        )
        rounding = 1e-13 * float(torch.linalg.cond(P)) + 1e-9
        exact = targets @ torch.linalg.solve(P, targets.mT)
        outside, joint = violations(certificate, 0.5 * (exact + exact.mT), rounding)
        products, latents = products + cost, latents + len(P)
        gaps.append(certificate.gap)
        counts["models"] += 1
        counts["variances"] += len(targets)
        counts["outside"] += outside
        counts["covariances outside"] += joint
        counts["wider than asked"] += certificate.width > 2 * tolerance
    yield {
        "case": "random linear models",
        **counts,
        "products per latent": products / latents,
        "median gap": statistics.median(gaps),
        "largest gap": max(gaps),
    }


def single_case(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Features, a prior's precision and targets in float32, whose variances span up to twelve magnitudes and more."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    p, n, m = pick(2, 25), pick(1, 40), pick(1, 7)
    scale = torch.logspace(0, -pick(0, 7), p)[torch.randperm(p, generator=generator)] * 10.0 ** pick(-2, 4)
    prior = torch.logspace(0, pick(0, 18), p)[torch.randperm(p, generator=generator)] * 10.0 ** pick(-3, 2)
    targets = torch.randn(m, p, generator=generator)
    if pick(0, 2):  # along the axes, where variances differ most
        targets = 1e-3 * targets[:p] * pick(0, 2) + torch.eye(p)[torch.randperm(p, generator=generator)[:m]]
    return (torch.randn(n, p, generator=generator) * scale).float(), prior.float(), targets.float()


def single_models(number: int) -> Rows:
    """Random linear models in float32, against the dense matrices of the same numbers in float64."""
    generator = torch.Generator().manual_seed(0)
    counts = {"models": 0, "variances": 0, "outside": 0, "covariances outside": 0}
    gaps, ranges, wide = [], [], 0
    for index in range(number):
        features, prior, targets = single_case(generator)
        certificate, _ = solve_linear(
            lambda v, F=features, T=prior: (v @ F.mT) @ F + v * T,
            prior,
            targets,
            (0.5, 0.05, 0.01, 1e-4)[index % 4],
            preconditioner=(None, "nystrom")[index // 4 % 2],
            rank=3,
            block_size=(64, 2)[index // 8 % 2],
        )
        white = features.double() * prior.double().rsqrt()
        P = white.mT @ white + torch.eye(len(prior))
        G = targets.double() * prior.double().rsqrt()
        exact = G @ torch.linalg.solve(P, G.mT)
        rounding = 1e-14 * float(torch.linalg.cond(P)) + 1e-6
        found = SimpleNamespace(
            lower=certificate.lower.double(),
            upper=certificate.upper.double(),
            joint=[side.double() for side in certificate.joint],
        )
        outside, joint = violations(found, 0.5 * (exact + exact.mT), rounding)
        counts["models"] += 1
        counts["variances"] += len(targets)
        counts["outside"] += outside
        counts["covariances outside"] += joint
        wide += not certificate.width <= 0.5
        gaps.append(certificate.gap)
        ranges.append(float(exact.diagonal().max() / exact.diagonal().min()))
    yield {
        "case": "random linear models, float32",
        **counts,
        "wider than a half": wide,
        "models whose variances differ by 1e12": sum(size >= 1e12 for size in ranges),
        "median gap": statistics.median(gaps),
        "largest gap": max(gaps),
    }


def against_dense(guide: Any, data: Any, targets: Tensor, precision: Tensor, row: dict[str, Any]) -> Rows:
    """All methods at one point against the dense GGN, whose matrix is given."""
    G = hfl.solve(guide, data, (targets,), curvature="ggn").gradients
    exact = G @ torch.linalg.solve(precision, G.mT)
    exact = 0.5 * (exact + exact.mT)
    rounding = 1e-14 * float(torch.linalg.cond(precision)) + 1e-9
    for method in ("cg", "one_sided", "central", "probe"):
        for tolerance in (0.01, None) if method == "cg" else (None,):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", hfl.HFLWarning)
                points = targets if method in ("cg", "probe") else targets[:8]
                found = hfl.solve(guide, data, (points,), curvature="ggn", method=method, tolerance=tolerance)
            certificate, m = found.certificate, found.mean.shape[0]
            part = exact[:m, :m]
            outside = (certificate.lower > part.diagonal() * (1 + rounding)) | (
                certificate.upper < part.diagonal() * (1 - rounding)
            )
            joint = 0 if certificate.joint is None else violations(certificate, part, rounding)[1]
            yield {
                **row,
                "method": method,
                "tolerance": tolerance,
                "variances": m,
                "outside": int(outside.sum()),
                "covariances outside": joint,
                "width": certificate.width,
                "products": found.products,
                "gap": certificate.gap,
            }


def width_against_products(
    guide: Any, data: Any, targets: Tensor, precision: Tensor, row: dict[str, Any]
) -> Rows:
    """What is known after every few products of one target at a time: the certified width, and the error that it bounds."""
    for target in targets[:3]:
        G = hfl.solve(guide, data, (target[None],), curvature="ggn").gradients
        exact = (G * torch.linalg.solve(precision, G.mT).mT).sum(-1)
        for steps in (1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 80):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", hfl.HFLWarning)
                found = hfl.solve(
                    guide, data, (target[None],), curvature="ggn", tolerance=1e-9, max_iter=steps
                )
            lower, upper = found.certificate.lower, found.certificate.upper
            yield {
                **row,
                "steps": steps,
                "products": found.products,
                "width": float((upper / lower - 1).max()),
                "error": float((1 - lower / exact).abs().max()),
            }


def cases(smoke: bool, tools: Any) -> Iterator[tuple[dict[str, Any], Any, Any, Tensor]]:
    """The cases of the parts toy, uci and classes of hfl_accuracy.py, which makes them."""
    from sklearn.datasets import load_iris, load_wine

    def fitted(model: Any, data: Any, seed: int = 0) -> Any:
        return tools.fitted(model, data, seed, "ggn")

    for seed in tools.SEEDS[:1] if smoke else tools.SEEDS:
        data = tools.in_between(seed)
        guide = fitted(tools.network(1, 16, 0.1), data, seed)
        yield {"data": "toy", "seed": seed}, guide, data, torch.linspace(-2, 2, 12)[:, None]
    for name in () if smoke else ("yacht", "boston", "concrete"):
        x, y, x_test, _, _ = tools.load_uci(name, 0)
        yield {"data": name}, fitted(tools.network(x.shape[1], 50, 0.3), (x, y)), (x, y), x_test
    for name, load in () if smoke else (("iris", load_iris), ("wine", load_wine)):
        raw = load()
        order = np.random.default_rng(0).permutation(len(raw.target))
        x = torch.from_numpy(raw.data[order]).double()
        x, y = (x - x.mean(0)) / x.std(0), torch.from_numpy(raw.target[order])
        data = (x[20:], y[20:])
        yield {"data": name}, fitted(tools.network(x.shape[1], 8, None, outputs=3), data), data, x[:20]


def certificate(smoke: bool, tools: Any) -> Rows:
    """All of it, with the cases of a module."""
    yield from single_models(100 if smoke else 2_000)
    yield from linear_models(100 if smoke else 10_000)
    for case, guide, data, targets in cases(smoke, tools):
        precision = tools.same_point(guide, data, curvature="ggn").precision
        yield from against_dense(guide, data, targets, precision, case)
        if case["data"] == "boston" or smoke:
            yield from width_against_products(guide, data, targets, precision, case)
