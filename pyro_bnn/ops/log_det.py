# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
The log determinant of :math:`1 + A` for a positive semi-definite A that is known by its products and its diagonal.

With a Nyström approximation :math:`\hat A = U^\top\Lambda U \preceq A` and :math:`M = 1 + \hat A`,

.. math:: \log\det(1 + A) = \log\det M + \operatorname{tr}\log(1 + N), \qquad
    N = M^{-1/2}(A - \hat A) M^{-1/2} \succeq 0,

exactly: the first term is known and the second small. Random signs z estimate it by :math:`z^\top \log(1 + N) z`, which Lanczos
brackets from both sides (:class:`Krylov`), less :math:`c\,(z^\top N z - \operatorname{tr} N)`, a control variate whose trace is known.

Sources: Ubaru, Chen and Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"; Golub and Meurant (1994),
"Matrices, moments and quadrature", for the brackets; Wenger et al. (2022), "Preconditioning for scalable Gaussian process
hyperparameter optimization", for the split.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.ops.jacobian import LinearMap
from pyro_bnn.ops.lanczos import Function, Krylov, lanczos

#: Elements that the Krylov bases of the probes that run together may have.
_TOGETHER = 2**26
#: Probes that tell how many are needed.
_FEW = 8


class Sketch:
    r"""
    A Nyström approximation from below of a positive semi-definite map, that grows.

    :param operator: a map from ``(S, p)`` to ``(S, p)``.
    :param like: a vector of shape ``(p,)`` that gives size, dtype and device.
    :param generator: source of random numbers.
    """

    def __init__(self, operator: LinearMap, like: Tensor, generator: torch.Generator) -> None:
        self.operator, self.generator = operator, generator
        self.tests = self.images = like.new_zeros(0, len(like))

    @property
    def rank(self) -> int:
        """The number of products so far."""
        return len(self.tests)

    def grow(self, rank: int) -> None:
        """Further products, up to a rank of at most p."""
        p = self.tests.shape[1]
        more = min(rank, p) - self.rank
        if more <= 0:
            return
        fresh = torch.randn(
            more, p, dtype=self.tests.dtype, device=self.tests.device, generator=self.generator
        )
        for _ in range(2):
            fresh = fresh - fresh @ self.tests.mT @ self.tests
            fresh = torch.linalg.qr(fresh.mT).Q.mT
        self.images = torch.cat([self.images, self.operator(fresh)])
        self.tests = torch.cat([self.tests, fresh])

    def rows(self) -> Tensor:
        r"""F of shape ``(r, p)`` with :math:`F^\top F \preceq A`."""
        gram = _gram(self.tests, self.images)
        values, vectors = torch.linalg.eigh(0.5 * (gram + gram.mT))
        # directions that rounding does not resolve are left out, and so left to the probes
        keep = values > 100 * torch.finfo(self.images.dtype).eps * values[-1:].clamp(min=0)
        return _combined((vectors[:, keep] * values[keep].rsqrt()).mT, self.images)


class Split:
    r"""
    :math:`1 + A` as :math:`M^{1/2}(1 + N)M^{1/2}`.

    :param operator: products with A, from ``(S, p)`` to ``(S, p)``.
    :param diagonal: of A, shape ``(p,)``.
    :param rows: F of shape ``(r, p)`` with :math:`F^\top F \preceq A`.
    """

    def __init__(self, operator: LinearMap, diagonal: Tensor, rows: Tensor) -> None:
        self.operator, self.diagonal = operator, diagonal
        values, vectors = torch.linalg.eigh(_gram(rows, rows))
        keep = values > 10 * torch.finfo(rows.dtype).eps * values[-1:].clamp(min=0)
        #: eigenvalues of the approximation, shape (r,), float64, and unit eigenvectors, shape (r, p)
        self.values = values[keep]
        self.vectors = _combined((vectors[:, keep] * self.values.rsqrt()).mT, rows)
        self._half = (1 - (1 + self.values).rsqrt()).to(rows)
        self._values = self.values.to(rows)
        self.products = 0

    @property
    def log_det(self) -> float:
        r""":math:`\log\det M`."""
        return float(torch.log1p(self.values).sum())

    @property
    def captured(self) -> Tensor:
        r""":math:`\lambda / (1 + \lambda)`, shape ``(r,)``."""
        return self.values / (1 + self.values)

    def half(self, v: Tensor) -> Tensor:
        r""":math:`M^{-1/2} v` for v of shape ``(S, p)``."""
        return v - (v @ self.vectors.mT * self._half) @ self.vectors

    def remainder(self, v: Tensor) -> Tensor:
        """:math:`N v` for v of shape ``(S, p)``."""
        self.products += len(v)
        y = self.half(v)
        return self.half(self.operator(y) - (y @ self.vectors.mT * self._values) @ self.vectors)

    @cached_property
    def images(self) -> Tensor:
        r"""A times the eigenvectors, shape ``(r, p)``: r products."""
        self.products += len(self.vectors)
        return self.operator(self.vectors) if len(self.vectors) else self.vectors

    @cached_property
    def trace(self) -> Tensor:
        r""":math:`\operatorname{tr} N`, a scalar."""
        inner = (self.vectors * self.images).double().sum(-1)
        return (
            self.diagonal.double().sum() - self.values.sum() - (self.captured * (inner - self.values)).sum()
        )

    @cached_property
    def slopes(self) -> Tensor:
        r"""The diagonal of :math:`M^{-1/2} N M^{-1/2}`, shape ``(p,)``, float64."""
        s = self.captured
        rest = s[:, None] * (self.vectors @ self.images.mT).double() * s  # of A among the eigenvectors
        rest = rest - torch.diag(s / (1 + self.values))
        found = [self.diagonal.double()]
        for part in torch.arange(len(self.diagonal), device=self.diagonal.device).split(2**16):
            U, AU = self.vectors[:, part].double(), self.images[:, part].double()
            found.append((U * (rest @ U - 2 * s[:, None] * AU)).sum(0))
        return found[0] + torch.cat(found[1:])


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """The products of rows of shape ``(r, p)`` and ``(s, p)``, shape ``(r, s)``, in float64, with little memory."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(2**14, 1), b.split(2**14, 1), strict=True):
        total.addmm_(x.double(), y.double().mT)
    return total


def _combined(weights: Tensor, rows: Tensor) -> Tensor:
    """Combinations of rows of shape ``(r, p)``, in their type, with float64 weights of shape ``(s, r)``: shape ``(s, p)``."""
    found = rows.new_empty(len(weights), rows.shape[1])
    for part, out in zip(rows.split(2**14, 1), found.split(2**14, 1), strict=True):
        out.copy_(weights @ part.double())
    return found


@dataclass
class Readings:
    r"""
    What m probes found, of shape ``(m,)`` and in float64 each.

    :ivar lower: :math:`z^\top\log(1+N)z` from below.
    :ivar upper: from above.
    :ivar first: :math:`z^\top N z`.
    :ivar second: :math:`z^\top N^2 z`.
    :ivar cross: :math:`z^\top N\log(1+N)z`.
    :ivar square: :math:`z^\top\log(1+N)^2z`.
    :ivar shrunk: :math:`z^\top N^2(1+N)^{-1}z`.
    """

    lower: Tensor
    upper: Tensor
    first: Tensor
    second: Tensor
    cross: Tensor
    square: Tensor
    shrunk: Tensor


class Probes:
    r"""
    Random signs z that estimate :math:`\operatorname{tr}\log(1+N)` and traces of :math:`M^{-1/2}N(1+N)^{-1}M^{-1/2}`.

    :param split: of the map.
    :param seed: of the signs.
    :param width: of the brackets, on average, at which to stop.
    :param max_steps: of Lanczos.
    :param solve: whether to keep what the traces need, two vectors of length p for each probe.
    """

    def __init__(
        self, split: Split, *, seed: int = 0, width: float = 1e-3, max_steps: int = 200, solve: bool = False
    ) -> None:
        self.split, self.width, self.max_steps, self.solve = split, width, max_steps, solve
        self._generator = torch.Generator(device=split.diagonal.device).manual_seed(seed)
        self._readings: list[tuple[Tensor, ...]] = []
        self.steps = 0
        self._vectors: list[tuple[Tensor, Tensor, Tensor]] = []

    def __len__(self) -> int:
        return sum(len(part[0]) for part in self._readings)

    def run(self, count: int) -> None:
        """Further probes, as many together as fit."""
        p = len(self.split.diagonal)
        together = max(1, _TOGETHER // (p * max(16, self.steps)))
        for start in range(0, count, together):
            self._run(min(together, count - start))

    def _run(self, count: int) -> None:
        shape = (count, len(self.split.diagonal))
        bits = torch.randint(2, shape, device=self._generator.device, generator=self._generator)
        z = (2 * bits - 1).to(self.split.diagonal)

        def enough(k: Krylov) -> bool:
            return float((k.upper - k.lower).mean()) <= self.width

        k = lanczos(self.split.remainder, z, max_steps=self.max_steps, enough=enough)
        self.steps = max(self.steps, k.alpha.shape[1])
        functions: tuple[Function, ...] = (
            lambda x: x, lambda x: x * x, lambda x: x * x.log1p(), lambda x: x.log1p() ** 2,
            lambda x: x * x / (1 + x),
        )  # fmt: skip
        self._readings.append((k.lower, k.upper, *(k.gauss(f) for f in functions)))
        if self.solve:
            half = self.split.half
            inner, linear = k.apply(lambda x: x / (1 + x)), k.apply(lambda x: x)
            self._vectors.append((half(z), half(inner), half(linear)))

    @property
    def readings(self) -> Readings:
        """Of all probes."""
        return Readings(*(torch.cat(parts) for parts in zip(*self._readings, strict=True)))

    @property
    def spread(self) -> float:
        """The variance of one probe's estimate, or somewhat more, from all of the spectrum that they saw."""
        r = self.readings
        second = r.second.mean()
        explained = r.cross.mean() ** 2 / second if second > 0 else second
        return float(2 * (r.square.mean() - explained).clamp(min=0))

    def log_det(self) -> "LogDet":
        r"""The estimate of :math:`\log\det(1 + A)`."""
        r, split = self.readings, self.split
        control = _others(r.cross, r.second) * (r.first - split.trace)
        mean, error = _mean(0.5 * (r.lower + r.upper) - control)
        half = float(0.5 * (r.upper - r.lower).mean())
        value = split.log_det + mean
        return LogDet(value, value - half, value + half, error)

    def traces(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        :math:`\operatorname{tr}_a(1 - (1 + A)^{-1})` over groups of entries, and standard errors.

        :param groups: the group of each entry, shape ``(p,)``, 0 to G - 1; other entries are left out where it is negative.
        :return: both of shape ``(G,)``, float64.
        """
        r, split = self.readings, self.split

        def summed(x: Tensor) -> Tensor:  # (..., p) -> (..., G)
            total = x.new_zeros(*x.shape[:-1], int(groups.max()) + 2, dtype=torch.float64)
            return total.index_add_(-1, groups + 1, x.double())[..., 1:]

        known = split.captured @ summed(split.vectors.square()) if len(split.values) else 0.0
        control = _others(r.shrunk, r.second)[:, None]
        slopes, values, start = summed(split.slopes), [], 0
        for y, inner, linear in self._vectors:
            c = control[start : start + len(y)]
            values.append(summed(y * inner) - c * (summed(y * linear) - slopes))
            start += len(y)
        mean, error = _mean(torch.cat(values))
        return known + mean, error

    def pairs(self) -> tuple[Tensor, Tensor]:
        r"""
        X and Y, shape ``(r + m, p)``, with :math:`\operatorname{E}\sum_i X_i^\top C Y_i = \operatorname{tr}((1 + A)^{-1} - 1) C` for
        symmetric C.
        """
        U, captured = self.split.vectors, self.split.captured
        left = [-captured[:, None].to(U) * U]
        right = [U]
        for y, inner, _ in self._vectors:
            left.append(-inner / len(self))
            right.append(y)
        return torch.cat(left), torch.cat(right)


@dataclass(frozen=True)
class LogDet:
    """
    A log determinant, in nats.

    :ivar value: the middle of the bracket.
    :ivar lower: what it would be with the lower bounds of all probes.
    :ivar upper: with the upper ones.
    :ivar error: the standard error over probes.
    """

    value: float
    lower: float
    upper: float
    error: float


def _others(above: Tensor, below: Tensor) -> Tensor:
    """The ratio of sums over all probes but one, shape ``(m,)``: a coefficient that does not depend on that one."""
    if len(above) < 2:
        return torch.zeros_like(above)
    rest = below.sum() - below
    return torch.where(rest > 0, (above.sum() - above) / torch.where(rest > 0, rest, 1.0), 0.0)


def _mean(x: Tensor) -> Any:
    """The mean over the first dimension, and its standard error, infinite for one."""
    error = x.std(0) / len(x) ** 0.5 if len(x) > 1 else torch.full_like(x[0], torch.inf)
    return (float(x.mean()), float(error)) if x.dim() == 1 else (x.mean(0), error)


@dataclass
class Plan:
    """
    How precise an estimate has to be, and what may be spent.

    :ivar tolerance: half the width of the bracket plus one standard error, in nats of the log determinant.
    :ivar rank: of the approximation; chosen if ``None``.
    :ivar num_probes: chosen if ``None``.
    :ivar max_rank: largest rank that is chosen.
    :ivar max_probes: largest number of probes that is chosen.
    :ivar max_steps: of Lanczos.
    :ivar seed: of random numbers.
    """

    tolerance: float
    rank: int | None = None
    num_probes: int | None = None
    max_rank: int = 1024
    max_probes: int = 512
    max_steps: int = 200
    seed: int = 0

    def start(
        self, operator: LinearMap, diagonal: Tensor, *, solve: bool = False
    ) -> tuple[Tensor, Probes, int]:
        """
        A Nyström approximation with as many directions as are worth their products.

        The rank doubles while the probes that are still needed would cost more than that.

        :param operator: products with A, from ``(S, p)`` to ``(S, p)``.
        :param diagonal: of A, shape ``(p,)``.
        :param solve: see :class:`Probes`.
        :return: its rows, shape ``(r, p)``, the first few probes, to be finished, and the number of products beside theirs.
        """
        generator = torch.Generator(device=diagonal.device).manual_seed(self.seed)
        sketch = Sketch(operator, diagonal, generator)
        rank = 32 if self.rank is None else self.rank
        spent = 0
        while True:
            sketch.grow(rank)
            rows = sketch.rows()
            probes = self.first(Split(operator, diagonal, rows), solve=solve)
            full = rank >= min(self.max_rank, len(diagonal))
            if self.rank is not None or full or not self._is_worth_more(probes, rank):
                return rows, probes, sketch.rank + spent
            spent += probes.split.products
            rank = min(2 * rank, self.max_rank)

    def _is_worth_more(self, probes: Probes, rank: int) -> bool:
        missing = self.needed(probes)
        if self.num_probes is not None:
            return missing > self.num_probes
        return missing * probes.steps > 3 * rank

    def first(self, split: Split, *, solve: bool = False) -> Probes:
        """The first few probes of a split."""
        probes = Probes(
            split, seed=self.seed + 1, width=0.4 * self.tolerance, max_steps=self.max_steps, solve=solve
        )
        probes.run(_FEW if self.num_probes is None else min(self.num_probes, _FEW))
        return probes

    def finished(self, probes: Probes) -> Probes:
        """The same with the probes that are still needed."""
        wanted = self.num_probes
        if wanted is None:
            wanted = max(2 * _FEW, self.needed(probes)) if probes.spread > 0 else _FEW
        probes.run(min(wanted, self.max_probes if self.num_probes is None else wanted) - len(probes))
        return probes

    def needed(self, probes: Probes) -> int:
        """How many probes the tolerance takes, with a margin for what the first few do not know."""
        return int(1.2 * probes.spread / (0.8 * self.tolerance) ** 2) + 1
