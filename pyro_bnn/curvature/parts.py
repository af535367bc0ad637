# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Parts of a structured precision: each covers some entries of the packed vector, sums the curvature of the likelihood there,
holds that of the prior, and says what Gaussian follows when the prior's is multiplied by :math:`\tau`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pyro_bnn.curvature.jacobian import Pulled
from pyro_bnn.distributions.precision_normal import PrecisionNormal
from pyro_bnn.ops.jacobian import LinearMap

#: Gives the curvature of the prior on some positions: shape ``(q,)``, or ``(q, q)`` where they are coupled.
Prior = Callable[[Tensor], Tensor]


class NotAMinimumError(RuntimeError):
    """
    The point estimate is not a minimum of the negative log joint density: its curvature is indefinite.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_bnn import AutoLaplace
        >>> def model():  # two modes, and a maximum of the loss between them
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     pyro.factor("likelihood", 4 * w**2 - w**4)
        >>> guide = AutoLaplace(model, curvature="hessian", init_loc_fn=lambda site: torch.zeros(())).initialize()
        >>> try:
        ...     _ = guide.laplace_approximation(())
        ... except NotAMinimumError:
        ...     print("call polish, or start elsewhere")
        call polish, or start elsewhere
    """


class Part(nn.Module):
    """
    The precision of some entries, as buffers.

    :param tensors: ``index`` (positions, shape ``(q,)``), ``prior`` (shape ``(q,)`` or ``(q, q)``; not while data are
        summed) and the likelihood's.
    """

    kind: ClassVar[str]
    index: Tensor
    prior: Tensor
    place: Tensor

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name."""
        return dict(self.named_buffers(remove_duplicate=False))

    # ------------------------------------------------------------------ sum

    @classmethod
    def zero(cls, index: Tensor, latent: Tensor) -> Self:
        """An empty sum over entries; ``latent``, shape ``(p,)``, gives dtype and device."""
        part = cls(index=index, curvature=cls._zeros(len(index), latent))
        part.place = places(index, len(latent))
        return part

    @staticmethod
    def _zeros(q: int, latent: Tensor) -> Tensor:
        raise NotImplementedError

    def add(self, pulled: Pulled) -> None:
        """Adds the curvature on one chunk of data: the products with cotangents that make it up."""
        raise NotImplementedError

    def add_rows(self, rows: Tensor) -> None:
        r"""Adds :math:`R^\top R` for rows of shape ``(n, q)``."""
        raise NotImplementedError

    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        """Adds a curvature given by its products, from ``(S, p)`` to ``(S, p)``."""
        raise NotImplementedError

    def sums(self) -> list[Tensor]:
        """What adds up over processes, to be summed in place."""
        return [self.tensors["curvature"]]

    def resume(self, earlier: Any) -> None:
        """Adds what a part of the same entries has already."""
        raise NotImplementedError

    def finish(self, prior: Prior) -> "Part":
        """The part with the curvature of the prior."""
        raise NotImplementedError

    def _images(self, operator: LinearMap, chunk_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of a map's matrix on the entries: their numbers and shape ``(s, q)``."""
        for rows in torch.arange(len(self.index), device=self.index.device).split(chunk_size):
            basis = self.tensors["curvature"].new_zeros(len(rows), len(self.place))
            basis[torch.arange(len(rows)), self.index[rows]] = 1.0
            yield rows, operator(basis)[:, self.index]

    # ------------------------------------------------------------------ damp

    def posterior(self, loc: Tensor, tau: Tensor | None = None) -> PrecisionNormal:
        """The Gaussian over the entries at ``loc``, shape ``(p,)``; ``tau`` multiplies the prior, scalar or ``(q,)``."""
        raise NotImplementedError

    def spectrum(self) -> tuple[Tensor, Tensor]:
        r"""
        Eigenvalues :math:`e`, shape ``(q,)``, of the likelihood's curvature relative to the prior's, and the scalar c with
        :math:`\log\det P = \sum_i \log(\tau + e_i) + c`.
        """
        raise NotImplementedError

    def lowest(self) -> tuple[float, Tensor] | None:
        """The lowest curvature, relative to the diagonal, and its direction, if that is not positive."""
        return lowest_entry(self.prior)

    def _check_positive(self, what: str) -> None:
        prior = self.prior
        smallest = prior.min() if prior.dim() == 1 else torch.linalg.eigvalsh(prior)[0]
        if not smallest > 0:
            raise NotAMinimumError(
                f"the curvature of the prior is not positive (smallest {float(smallest):.3g}), which {what} needs: "
                "use structure='full' or 'diagonal', or a prior with positive curvature at the point estimate."
            )


class CurvatureSum:
    """A sum of likelihood curvatures over data, in parts that cover different entries."""

    def __init__(self, sums: Sequence[Part]) -> None:
        self.sums = list(sums)

    def add(self, examples: Any, cotangents: Iterable[Tensor]) -> None:
        """Adds one site's curvature on one chunk of data, a :class:`~pyro_bnn.curvature.stream.SiteExamples`."""
        for chunk in cotangents:
            pulled = Pulled(examples.jacobian, chunk)
            for part in self.sums:
                part.add(pulled)

    def add_operator(self, operator: LinearMap, chunk_size: int) -> None:
        """Adds a curvature given by its products, from ``(S, p)`` to ``(S, p)``, such as an exact Hessian."""
        for part in self.sums:
            part.add_operator(operator, chunk_size)

    def resume(self, parts: Sequence[Part]) -> None:
        """Starts from the parts of an earlier sum of the same structure and entries."""
        for part, earlier in zip(self.sums, parts, strict=True):
            part.resume(earlier)

    def tensors(self) -> list[Tensor]:
        """What adds up over the processes of a data-parallel run, to be summed in place."""
        return [tensor for part in self.sums for tensor in part.sums()]

    def parts(self, prior: Prior) -> list[Part]:
        """The parts with the curvature of the prior; together they cover all entries."""
        return [part.finish(prior) for part in self.sums]


def places(index: Tensor, size: int) -> Tensor:
    """By entry of a vector its place among some positions, or -1."""
    found = torch.full((size,), -1, dtype=torch.long, device=index.device)
    found[index] = torch.arange(len(index), device=index.device)
    return found


def indefinite(values: Tensor, what: str) -> NotAMinimumError:
    """The error that says how many eigenvalues, or diagonal entries, of a precision are not positive."""
    return NotAMinimumError(
        f"the curvature at the point estimate is not positive definite: {int((values <= 0).sum())} of "
        f"{values.shape[0]} {what} are not positive, the smallest is {float(values.min()):.3g}. The point is "
        "not a minimum, or not one that the numbers resolve. Call guide.polish(data) in float64, train longer, or use "
        "curvature='ggn'."
    )


def require_finite(values: Tensor) -> None:
    """Raises if a precision has entries that are not finite."""
    if not torch.isfinite(values).all():
        raise NotAMinimumError("the curvature has non-finite entries: check the data and the point estimate")


def lowest_entry(diagonal: Tensor) -> tuple[float, Tensor] | None:
    """The smallest entry of a diagonal and where entries are not positive, if some are not."""
    wrong = ~(diagonal > 0)
    if diagonal.dim() > 1 or not bool(wrong.any()):
        return None
    return float(diagonal.min()), wrong.to(diagonal)


#: Relative curvatures below so many times the precision of the numbers are rounding errors.
ROUNDING = 64


def lowest_pair(matrix: Tensor) -> tuple[float, Tensor] | None:
    """The lowest eigenpair of a matrix relative to its diagonal, unless it is positive beyond rounding."""
    scale = matrix.diagonal().abs().clamp(min=torch.finfo(matrix.dtype).tiny).rsqrt()
    values, vectors = torch.linalg.eigh(matrix * scale * scale.unsqueeze(-1))
    if float(values[0]) > ROUNDING * torch.finfo(matrix.dtype).eps:
        return None
    return float(values[0]), vectors[:, 0]
