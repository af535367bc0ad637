# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The numbers of a Hessian-free Laplace computation."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.infer.hfl.diagnostics import Diagnostics
from pyro_bnn.ops.enclosure import Bracket


@dataclass(kw_only=True, repr=False)
class HFLResult(Diagnostics):
    r"""
    Variances and covariances of m scalar functionals, the displacements behind them, and diagnostics.

    Printing a result shows the diagnostics.

    :ivar str method: how it was computed.
    :ivar str curvature: ``"hessian"`` or ``"ggn"``.
    :ivar shape: shape of the functional's value; m is its number of elements.
    :ivar mean: the functionals at the point estimate, shape ``(m,)``.
    :ivar gradients: :math:`g_j`, shape ``(m, p)``; for probes, of the R random combinations.
    :ivar displacements: :math:`d_j \approx P^{-1} g_j`, shape ``(m, p)``; for probes, of the R combinations.
    :ivar variances: of the functionals, shape ``(m,)``.
    :ivar factor: W of the low-rank Gaussian :math:`\hat u + W z`, shape ``(p, r)``.
    :ivar half: :math:`J W`, shape ``(m, r)``.
    :ivar sandwich: the infinitesimal-jackknife covariance :math:`\sum_i (s_i^\top d_j)(s_i^\top d_k)` with scores
        :math:`s_i` of the data points, shape ``(m, m)``, or ``None`` if it was not asked for.
    :ivar antisymmetry: largest antisymmetric part of the responses, in units of standard deviations; zero for
        exact solves at a minimum.
    :ivar newton_decrement: distance of the point estimate from the minimum in posterior standard deviations.
    :ivar smallest_curvature: the smallest curvature met by the solves, an upper bound of the smallest eigenvalue
        of the precision (with ``proximal`` included).
    :ivar residual: largest relative residual of the solves (``"cg"``, ``"probe"``), or the largest Newton
        decrement left by the perturbed minimisations relative to ``epsilon``; of ``"paired"`` and of
        :class:`~pyro_bnn.infer.hfl.FirstOrder` the root of the share of a variance that is missing, of the latter the width of its
        bounds, or else what the last directions have added.
    :ivar agreement: largest relative difference between the variances at ``epsilon`` and at ``epsilon / 3`` (of ``FirstOrder``,
        of one curvature); ``None`` where there is no epsilon, or no check was asked for.
    :ivar epsilon: posterior standard deviations by which functionals were moved, or ``None``.
    :ivar proximal: δ of the term :math:`\frac\delta2|u-\hat u|^2` that was added to the loss.
    :ivar captured: for probes, the estimated fraction of the summed variance that they captured.
    :ivar captured_error: its standard error.
    :ivar certificate: bounds of the variances from both sides, and of covariances in the order of positive semi-definite
        matrices; ``None`` where no bound of the curvature is known.
    :ivar uncertified: the reason for that.
    :ivar num_latents: p, where the rows above are one process's part of vectors of that length; else ``None``.
    :ivar iterations: block iterations of the linear solves.
    :ivar products: curvature-vector products.
    :ivar gradient_evaluations: gradients of the loss over all the data.
    :ivar warnings: what the user was warned of.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoLaplace
        >>> guide = AutoLaplace(model).initialize(x, x).polish((x, x))
        >>> from pyro_bnn import hfl
        >>> result = hfl.solve(guide, (x, x), (torch.tensor([1.0, 2.0]),))
        >>> result.variance.shape, result.covariance.shape
        (torch.Size([2, 1]), torch.Size([2, 2]))
    """

    shape: torch.Size
    mean: Tensor
    gradients: Tensor
    displacements: Tensor
    factor: Tensor
    half: Tensor
    sandwich: Tensor | None = None
    num_latents: int | None = None

    @property
    def variance(self) -> Tensor:
        """The variance of each functional, of the functional's :attr:`shape`."""
        return self.variances.reshape(self.shape)

    @property
    def lower(self) -> Tensor | None:
        """Certified lower bounds of the variances, of the functional's :attr:`shape`; ``None`` where none are known."""
        return None if self.certificate is None else self.certificate.lower.reshape(self.shape)

    @property
    def upper(self) -> Tensor | None:
        """Certified upper bounds of the variances, of the functional's :attr:`shape`; ``None`` where none are known."""
        return None if self.certificate is None else self.certificate.upper.reshape(self.shape)

    def combination_bounds(self, weights: Tensor) -> Bracket:
        r"""
        Certified bounds of the variances of linear combinations :math:`\sum_j w_j f_j`.

        :param weights: shape ``(..., m)``, for the flattened value of the functional.
        :return: lower and upper bounds, shape ``(...)`` each.
        :raises ValueError: where the result is not certified, saying why, or was found by probes.

        Example::

            >>> import torch, pyro, pyro.distributions as dist
            >>> def model(x, y=None):
            ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            ...     with pyro.plate("data", len(x)):
            ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
            >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
            >>> from pyro_bnn import AutoLaplace, hfl
            >>> guide = AutoLaplace(model).initialize(x, y).polish((x, y))
            >>> result = hfl.solve(guide, (x, y), (x,), curvature="ggn")
            >>> low, high = result.combination_bounds(torch.tensor([1.0, -1.0]))  # of the difference: 2 / (1 + 4)
            >>> bool(low <= 0.4001), bool(high >= 0.3999)
            (True, True)
        """
        if self.certificate is None:
            raise ValueError(f"the variances are not certified: {self.uncertified}.")
        if self.certificate.joint is None:
            raise ValueError("method='probe' bounds no covariances: use method='cg'.")
        lower, upper = (((weights @ side) * weights).sum(-1) for side in self.certificate.joint)
        return Bracket(lower.clamp(min=0), upper)

    @property
    def covariance(self) -> Tensor:
        """The covariance of the flattened functionals, positive semi-definite, shape ``(m, m)``."""
        return self.half @ self.half.mT

    def responses(self) -> Tensor:
        """The symmetric covariance of the functionals whose gradients the result holds, shape ``(m, m)``."""
        K = self.gradients @ self.displacements.mT
        K = 0.5 * (K + K.mT)
        if self.method in ("one_sided", "central", "paired"):
            # function differences have a smaller bias than displacements
            K = self.covariance
            K.diagonal().copy_(self.variances)
        return K

    def after(self, old: "HFLResult") -> "HFLResult":
        """The result of further functionals with the account of both; means are joined, but for probes."""
        return replace(
            self,
            antisymmetry=max(old.antisymmetry, self.antisymmetry),
            residual=max(old.residual, self.residual),
            smallest_curvature=min(old.smallest_curvature, self.smallest_curvature),
            mean=self.mean if self.method == "probe" else torch.cat([old.mean, self.mean]),
            products=old.products + self.products,
            gradient_evaluations=old.gradient_evaluations + self.gradient_evaluations,
            iterations=old.iterations + self.iterations,
        )

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        m, p = self.mean.shape[0], self.num_latents or self.displacements.shape[1]
        sd = self.variances.sqrt()
        rows = {f"warning: {text}": "" for text in self.warnings}
        rows |= {
            "functionals": f"{m} of {p} latents",
            "standard deviations": f"{float(sd.min()):.3g} to {float(sd.max()):.3g}" if m else "none",
            **self.rows(),
        }
        if self.sandwich is not None:
            ratio = (self.sandwich.diagonal() / self.variances).sqrt()
            rows["sandwich / Laplace sd, median"] = f"{float(ratio.median()):.3g}"
        rows["cost"] = (
            f"{self.gradient_equivalents} gradient equivalents ({self.iterations} iterations, "
            f"{self.products} products, {self.gradient_evaluations} gradients)"
        )
        return f"Hessian-free Laplace: method {self.method!r}, curvature {self.curvature!r}", rows
