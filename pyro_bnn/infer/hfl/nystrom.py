# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A few random solves that serve a whole test set: the randomised Nyström approximation of its covariance."""

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.task import Found, Task


def probe(task: Task, *, seed: int = 0) -> Found:
    r"""
    The Nyström approximation :math:`K \approx Y(Z^\top Y)^{-1}Y^\top` with :math:`Y = K Z` and Gaussian Z of R columns,
    which never exceeds :math:`K = J P^{-1} J^\top`; gradients and displacements are those of the R combinations.

    The captured fraction of the trace is estimated by leaving probes out: :math:`z^\top (K - K_{-z}) z`
    is an unbiased estimate of the trace that the other probes miss.

    Source: Gittens and Mahoney (2016) for the approximation; Epperly, Tropp and Webber (2024), "XTrace", for the
    leave-one-out estimate.
    """
    functionals, like = task.functionals, task.functionals.values
    generator = torch.Generator(device=like.device).manual_seed(seed)
    shape = (min(task.num_probes, len(functionals)), len(functionals))
    Z = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    G = functionals.transposed(Z)
    decrement, D = task.solve(G)
    remainders, rest = task.left_over
    Y = functionals.responses(D)
    gram = Z @ Y.mT
    gram = 0.5 * (gram + gram.mT)
    root = inverse_root(gram)
    half = Y.mT @ root
    captured, error = _captured(gram)
    return Found(
        G,
        D,
        half.square().sum(-1),
        D.mT @ root,
        half,
        residual=task.solver.residual,
        newton_decrement=decrement,
        captured=captured,
        captured_error=error,
        remainders=remainders,
        rest=rest,
    )


def _captured(gram: Tensor) -> tuple[float, float]:
    """The fraction of the trace that the probes capture, and its standard error."""
    known = []  # of the trace along each probe, by the other probes
    for k in range(len(gram)):
        rest = [r for r in range(len(gram)) if r != k]
        known.append((gram[rest, k] @ inverse_root(gram[rest][:, rest])).square().sum())
    traces = gram.diagonal()
    missed = (traces - torch.stack(known)).clamp(min=0)
    fraction = missed.sum() / traces.sum()
    # ratio estimator: the spread of missed - fraction * trace
    spread = (missed - fraction * traces).std() / traces.mean() / len(gram) ** 0.5
    return float(1 - fraction), float(spread)


def inverse_root(gram: Tensor) -> Tensor:
    """R with R R' the pseudo-inverse of a positive semi-definite matrix, scaled to unit diagonal for its rank."""
    scale = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    values, vectors = torch.linalg.eigh(gram * scale * scale[:, None])
    floor = 1e-10 if gram.dtype == torch.float64 else 1e-5
    keep = values > floor * values[-1:].clamp(min=0)
    return scale[:, None] * vectors[:, keep] / values[keep].sqrt()
