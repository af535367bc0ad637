# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
r"""
Log joint densities with some latents integrated out, which are Gaussian given all others.

With latents h that stay and w that are integrated out, :math:`\log p(h, w, D)` is quadratic in w, with precision A(h) and mode m(h):

.. math::
    \log p(h, D) &= \log p(h, m, D) - \tfrac12\log\det A + \tfrac q2\log 2\pi, \qquad w \mid h, D \sim N(m, A^{-1}), \\
    \nabla\log p(h, D) &= E_{w\mid h, D}[\nabla_h\log p(h, w, D)] \qquad\text{(Fisher's identity)},

where the expectation of a quadratic function is its mean over the q + 1 corners of a simplex. An error E of A in the first formula is
one of second order in the second, in which the mean over the corners stands for :math:`\log p(h, m, D) - q/2`: in a model of float32
this matters, as does a second Newton step for m.

In a network with Gaussian noise and a Gaussian prior w are the weights of the last layer, which follow every move of the others: they
are what makes the joint density stiff.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.infer.sample.joint import Joint, Leaves, Share, Tensors
from pyro_bnn.model.data import Batch
from pyro_bnn.model.plates import FAILURES, first_line
from pyro_bnn.ops.replay import Bound, UnrecordableError
from pyro_bnn.ops.tape import record

#: Standard deviations from its mode at which a density is compared with a Gaussian, and the units in the last place by which it may differ.
_DISTANCES, _UNITS = (1.0, 30.0, 1000.0), 100.0
#: Vectors whose conditionals are held together.
_CHUNK = 64


class Collapsed(Joint):
    """
    The log density of the other latents.

    :param Joint joint: of all latents.
    :param names: the sites that are integrated out.
    :param shares: of the batches; the share that is evaluated has the batches for its arguments.
    """

    def __init__(self, joint: Joint, names: Sequence[str], shares: Sequence[Share]) -> None:
        super().__init__(joint.packed, joint.moving)
        self.names, self.shares = list(names), list(shares)
        self.inner = joint.space.only(names)
        self.space = joint.space.only(joint.space.slices.keys() - set(names))
        self.checks = 0

    @property
    def share(self) -> Share:
        """All batches together, as what is evaluated."""
        return Share((tuple(share.batch for share in self.shares), {}))

    def _whole(self, parts: Mapping[str, Tensor], w: Tensor, batch: Batch) -> Tensor:
        """The log density of all latents, those that are integrated out at a packed vector ``(q,)``."""
        parts = {**parts, **self.inner.split(w)}
        ordered = {name: parts[name] for name in self.packed.space.slices}
        pairs = zip(self.shares, batch[0], strict=True)
        return torch.stack([super(Collapsed, self).log_prob(ordered, s, b, None) for s, b in pairs]).sum()

    def conditional(self, parts: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """
        The mode ``(q,)`` and the lower triangular root ``(q, q)`` of the precision of what is integrated out, float64; NaN where the
        precision is not positive definite beyond rounding errors.
        """
        like = next(iter(parts.values()))
        zero = like.new_zeros(self.inner.dim)
        slope = torch.func.grad(lambda w: self._whole(parts, w, batch))
        with Leaves():
            found: Any = torch.func.vjp(slope, zero)
        at_zero, pull = found
        (rows,) = torch.func.vmap(pull, randomness="different")(torch.eye(len(zero)).to(like))
        root = _root(-rows.double(), torch.finfo(like.dtype).eps)

        def newton(step: Tensor) -> Tensor:
            return torch.cholesky_solve(step.double().unsqueeze(-1), root).squeeze(-1)

        mode = newton(at_zero)
        # once more from where the terms of the slope are small, and so are their rounding errors
        with Leaves():
            return mode + newton(slope(mode.to(like))), root

    @override
    @torch.inference_mode(False)
    @torch.enable_grad()
    def value_and_gradient(
        self, u: Tensor, share: Share, tensors: Tensors, factor: Tensor | None = None
    ) -> Tensors:
        batch = share.with_tensors(tensors)
        u = u.clone() if u.is_inference() else u.detach()
        # chain by chain: units of a layer that are the same for all of many output layers enter products of two matrices, and
        # of chains together products of one small matrix for each chain and output layer
        found = [self._one(row, batch) for row in u.reshape(-1, u.shape[-1])]
        value, gradient = (torch.stack(parts) for parts in zip(*found, strict=True))
        return value.reshape(u.shape[:-1]), gradient.reshape(u.shape)

    def _one(self, u: Tensor, batch: Batch) -> Tensors:
        """At one vector ``(p,)``."""
        parts = {n: x.detach().requires_grad_() for n, x in self.space.split(u).items()}
        mode, root = self.conditional(parts, batch)
        mode, root = mode.detach(), root.detach()
        # points of which mean and covariance are those of the conditional: their mean of a quadratic function is its expectation
        points = (
            mode + torch.linalg.solve_triangular(root.mT, _simplex(self.inner.dim).to(root), upper=True).mT
        )
        with Leaves():
            values = torch.func.vmap(lambda w: self._whole(parts, w, batch), randomness="different")(
                points.to(u)
            )
        value = values.mean()
        slopes = torch.autograd.grad(value, [*parts.values()], materialize_grads=True)
        half = 0.5 * self.inner.dim
        total = value.detach() + half + half * math.log(2 * math.pi) - root.diagonal().log().sum()
        return total, torch.cat([slope.reshape(-1) for slope in slopes])

    @override
    def evaluate(self, u: Tensor, share: Share, factor: Tensor | None = None) -> Tensors:
        found = super().evaluate(u, share, factor)
        if bool(found[0].isfinite()):
            self.require_gaussian(u)
        return found

    def require(self, anchors: Tensor) -> None:
        """Raises if the sites cannot be integrated out, as far as some vectors ``(A, p)`` show."""
        try:
            self.value_and_gradient(anchors[0], self.share, self.share.tensors)
        except torch.linalg.LinAlgError:  # of the model at these latents
            pass
        except FAILURES as error:
            raise ValueError(
                f"collapse: the model cannot be run at several values of {self.names} together, or not be differentiated twice in them "
                f"({type(error).__name__}: {first_line(error)}). It may not decide by their values, leave torch or write into tensors."
            ) from error
        for anchor in anchors:
            self.require_gaussian(anchor)

    @torch.inference_mode(False)
    @torch.no_grad()
    def require_gaussian(self, u: Tensor) -> None:
        """Raises if the conditional density at a vector ``(p,)`` is not that of a Gaussian on a line, near and far, both ways."""
        u = u.clone() if u.is_inference() else u
        parts, batch = self.space.split(u), self.share.batch
        mode, root = self.conditional(parts, batch)
        if not bool(root.isfinite().all()):
            raise self._not_gaussian(
                f"their precision is not positive definite, or singular but for rounding errors of {u.dtype}"
            )
        self.checks += 1  # another line in every check
        generator = torch.Generator(device=u.device).manual_seed(self.checks)
        noise = torch.randn(len(mode), 1, generator=generator, dtype=mode.dtype, device=u.device)
        along = torch.linalg.solve_triangular(root.mT, noise / noise.norm(), upper=True).squeeze(-1)

        def value(distance: float) -> float:
            return float(self._whole(parts, (mode + distance * along).to(u), batch))

        top, size = value(0.0), float(root.norm())
        unit = torch.finfo(u.dtype).eps * _UNITS
        # how much larger terms are that cancel: an error of one unit in the largest entry of the precision, seen along the line
        loss = 1 + (size * float(along.norm())) ** 2
        shift = size * float(mode.norm())
        falls = {t: (top - value(t), top - value(-t)) for t in _DISTANCES}
        slack = {t: unit * (1 + abs(top) + t * shift + 0.5 * t**2 * math.sqrt(loss)) for t in _DISTANCES}
        far = _DISTANCES[-1]
        for t, (right, left) in falls.items():
            # the Gaussian of the conditional has the rounding errors of second derivatives
            expected = 0.5 * t**2
            wrong = max(abs(right - expected), abs(left - expected)) - slack[t] - unit * loss * expected
            if not (wrong <= 0 and math.isfinite(right + left)):
                raise self._not_gaussian(
                    f"{t:g} standard deviations from its mode the log density falls by {right:.6g} and {left:.6g}, that of a Gaussian by "
                    f"{expected:.6g}"
                )
            # the parabola through its farthest points has not
            share = t / far
            even = abs(right + left - share**2 * sum(falls[far])) / 2 <= slack[t] + share**2 * slack[far]
            odd = (
                abs(right - left - share * (falls[far][0] - falls[far][1])) / 2
                <= slack[t] + share * slack[far]
            )
            if not (even and odd):
                raise self._not_gaussian(
                    f"{t:g} and {far:g} standard deviations from its mode the log density falls by {right:.6g} and {falls[far][0]:.6g} one "
                    f"way, {left:.6g} and {falls[far][1]:.6g} the other, which is no parabola"
                )

    def _not_gaussian(self, why: str) -> ValueError:
        return ValueError(
            f"collapse: given all other latents the sites {self.names} are not Gaussian: {why}. Integrate out sites with Gaussian priors "
            "in which the mean of a Gaussian likelihood is linear, such as the last layer of a network, or none."
        )

    # ------------------------------------------------------------ to and from all latents

    @override
    def restrict(self, u: Tensor) -> Tensor:
        parts = self.packed.space.slices
        return torch.cat([u[..., parts[name]] for name in self.space.slices], -1)

    @override
    @torch.inference_mode(False)
    @torch.no_grad()
    def complete(self, u: Tensor) -> tuple[Tensor, Tensor]:
        rows = u.clone().reshape(-1, u.shape[-1])  # a tensor of inference mode cannot take part in a graph
        if not len(rows):
            shape = (*u.shape[:-1], self.packed.space.dim)
            return u.new_zeros(shape), u.new_zeros(shape[:-1], dtype=torch.float64)
        noise = torch.randn(len(rows), self.inner.dim, dtype=torch.float64, device=u.device)
        conditional = self._conditional_of(rows)
        pairs = zip(rows.split(_CHUNK), noise.split(_CHUNK), strict=True)
        found = [self._draw([conditional(u) for u in part], more) for part, more in pairs]
        drawn, log_prob = (torch.cat(parts) for parts in zip(*found, strict=True))
        for row in rows[log_prob.isfinite()][:: _CHUNK + 1]:  # each time another place among those of a chain
            self.require_gaussian(row)
        pieces = {n: rows[:, part] for n, part in self.space.slices.items()}
        pieces |= {n: drawn[:, part].to(u) for n, part in self.inner.slices.items()}
        whole = torch.cat([pieces[name] for name in self.packed.space.slices], -1)
        return whole.reshape(*u.shape[:-1], -1), log_prob.reshape(u.shape[:-1])

    def _conditional_of(self, rows: Tensor) -> Callable[[Tensor], Tensors]:
        """Mode and root as a function of a vector: a recording, if it agrees with runs of the model at the first and the last of some."""
        share, eps = self.share, torch.finfo(rows.dtype).eps

        def compute(u: Tensor, *tensors: Tensor) -> Tensors:
            return self.conditional(self.space.split(u), share.with_tensors(tensors))

        def run(u: Tensor) -> Tensors:
            return compute(u, *share.tensors)

        with suppress(UnrecordableError):
            replayed = Bound(record(compute, (rows[0],), share.tensors, data_stay=True), share.tensors)
            if all(_same(run(u), replayed(u), eps) for u in (rows[0], rows[-1])):
                return replayed
        return run

    def _draw(self, conditionals: list[Tensors], noise: Tensor) -> Tensors:
        """Draws ``(C, q)`` of what is integrated out given its modes and roots, and their log densities ``(C,)``."""
        mode, root = (torch.stack(parts) for parts in zip(*conditionals, strict=True))
        step = torch.linalg.solve_triangular(root.mT, noise.unsqueeze(-1), upper=True).squeeze(-1)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * self.inner.dim * math.log(2 * math.pi)
        return mode + step, log_det - 0.5 * noise.square().sum(-1) - constant


def _root(precision: Tensor, eps: float) -> Tensor:
    """The lower triangular root of a matrix with relative errors ``eps``, NaN where it may be singular."""
    root, failed = torch.linalg.cholesky_ex(precision)
    sound = root.diagonal().square() > len(root) ** 0.5 * eps * precision.diagonal()
    return root.where(sound.all() & (failed == 0), torch.nan)


def _same(one: Tensors, other: Tensors, eps: float) -> bool:
    """Whether modes and roots of two precisions differ, in units of the first, by rounding errors of numbers with errors ``eps``."""
    (mode, root), (other_mode, other_root) = one, other
    shift = root.mT @ (other_mode - mode)
    ratio = torch.linalg.solve_triangular(other_root, root, upper=False) - torch.eye(len(root)).to(root)
    return bool((torch.cat([shift, ratio.flatten()]).abs() <= eps**0.5).all())


def _simplex(dim: int) -> Tensor:
    """The corners of a regular simplex with mean zero and covariance one, shape ``(dim, dim + 1)``, float64."""
    k = torch.arange(1, dim + 1, dtype=torch.float64)
    # rows of Helmert's matrix, an orthonormal basis of what is orthogonal to the vector of ones
    rows = torch.ones(dim, dim + 1, dtype=torch.float64).tril() - k.diag(1)[:dim]
    return math.sqrt(dim + 1) * rows / (k * (k + 1)).sqrt().unsqueeze(-1)


def collapsed(joint: Joint, sites: str | Sequence[str], shares: Sequence[Share]) -> Collapsed:
    """
    The log density with some sites integrated out.

    :param joint: of all latents.
    :param sites: names of latent sites, or of modules, all of whose sites are meant.
    :param shares: of the batches.
    :raises ValueError: if a name is that of no latent site, if a site is constrained, or if none is left.
    """
    known = list(joint.space.slices)
    asked = [sites] if isinstance(sites, str) else list(sites) if isinstance(sites, Sequence) else [sites]
    if not all(isinstance(name, str) for name in asked):
        raise TypeError(
            f"collapse: expected the name of a latent site or module, or several, found {sites!r}; the sites are {known}."
        )
    by_name = {a: [n for n in known if n == a or n.startswith(f"{a}.")] for a in asked}
    unknown = [a for a, found in by_name.items() if not found]
    if unknown or not asked:
        raise ValueError(
            f"collapse: {unknown or sites!r} names no latent site of the model, whose sites are {known}."
        )
    names = [n for n in known if any(n in found for found in by_name.values())]
    bound = [n for n in names if joint.space.is_constrained(n)]
    if bound:
        raise ValueError(
            f"collapse: the sites {bound} are constrained, and Gaussian sites are not: leave them out."
        )
    if len(names) == len(known):
        raise ValueError(
            f"collapse: {names} are all latents of the model, whose posterior is Gaussian, then: a Laplace approximation is exact."
        )
    return Collapsed(joint, names, shares)
