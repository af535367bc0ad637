# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A few random solves that serve a whole test set: the randomised Nyström approximation of its covariance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.solver import Solver


@dataclass
class Probes:
    r"""
    R random combinations of m functionals and their displacements.

    :ivar gradients: :math:`J^\top z_r`, shape ``(R, p)``.
    :ivar displacements: :math:`P^{-1} J^\top z_r`, shape ``(R, p)``.
    :ivar half: a factor of the Nyström approximation of :math:`K = J P^{-1} J^\top`, shape ``(m, r)``.
    :ivar factor: the same in latent space, shape ``(p, r)``.
    :ivar captured: estimated fraction of the trace of K that is captured.
    :ivar captured_error: its standard error.
    """

    gradients: Tensor
    displacements: Tensor
    half: Tensor
    factor: Tensor
    captured: float
    captured_error: float


def probe(functionals: Functionals, solver: Solver, num_probes: int, seed: int = 0) -> Probes:
    r"""
    The Nyström approximation :math:`K \approx Y(Z^\top Y)^{-1}Y^\top` with :math:`Y = K Z` and Gaussian Z.

    It never exceeds K. The captured fraction is estimated by leaving probes out: :math:`z^\top (K - K_{-z}) z`
    is an unbiased estimate of the trace that the other probes miss.

    :param functionals: the m functionals.
    :param solver: solves with the curvature at the point estimate.
    :param num_probes: R.
    :param seed: of the probes.
    :return: the :class:`Probes`.

    Source: Gittens and Mahoney (2016) for the approximation; Epperly, Tropp and Webber (2024), "XTrace", for the
    leave-one-out estimate.
    """
    like = functionals.values
    generator = torch.Generator(device=like.device).manual_seed(seed)
    shape = (num_probes, len(functionals))
    Z = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    G = functionals.transposed(Z)
    D = solver(G)
    Y = functionals.responses(D)
    gram = Z @ Y.mT
    gram = 0.5 * (gram + gram.mT)
    root = _inverse_root(gram)
    traces = gram.diagonal()
    known = []  # of the trace along each probe, by the other probes
    for k in range(num_probes):
        rest = [r for r in range(num_probes) if r != k]
        known.append((gram[rest, k] @ _inverse_root(gram[rest][:, rest])).square().sum())
    missed = (traces - torch.stack(known)).clamp(min=0)
    fraction = missed.sum() / traces.sum()
    # ratio estimator: the spread of missed - fraction * trace
    spread = (missed - fraction * traces).std() / traces.mean() / num_probes**0.5
    return Probes(G, D, Y.mT @ root, D.mT @ root, float(1 - fraction), float(spread))


def _inverse_root(gram: Tensor) -> Tensor:
    """R with R R' the pseudo-inverse of a positive semi-definite matrix, scaled to unit diagonal for its rank."""
    scale = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    values, vectors = torch.linalg.eigh(gram * scale * scale[:, None])
    floor = 1e-10 if gram.dtype == torch.float64 else 1e-5
    keep = values > floor * values[-1:].clamp(min=0)
    return scale[:, None] * vectors[:, keep] / values[keep].sqrt()
