# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""How functionals, and their variances, change when an example is left out, from the solves that give the variances."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from typing_extensions import override

from pyro_bnn.curvature.accumulate import Curvature, check_option
from pyro_bnn.curvature.stream import ExampleStream
from pyro_bnn.infer.hfl.checks import check_accuracy, check_sizes, require_derivatives, require_slopes
from pyro_bnn.infer.hfl.functionals import Functional
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.infer.hfl.setup import set_up
from pyro_bnn.infer.hfl.solver import Preconditioner, Solver
from pyro_bnn.model.arguments import takes_data
from pyro_bnn.model.data import as_batches
from pyro_bnn.model.handlers import Site, subsample_scale, unscaled_log_prob
from pyro_bnn.model.packed import SiteOutputs, batch_of
from pyro_bnn.model.plates import Rows
from pyro_bnn.ops.described import Described, span_of
from pyro_bnn.ops.jacobian import jvp_operator, vjp


@dataclass(frozen=True, repr=False)
class Influence(Described):
    r"""
    The influence of n examples on m functionals.

    :ivar shape: the shape of the functional's value; m is its number of elements.
    :ivar matrix: the change of each functional when an example is left out, shape ``(n, m)``.
    :ivar sd: posterior standard deviations of the functionals, shape ``(m,)``: a scale for the changes.
    :ivar variances: the change of the variance of each functional under the linearised model, shape ``(n, m)``; never negative.
        ``None`` with ``curvature="hessian"``.
    :ivar leverage: :math:`\operatorname{tr} F_i J_i P^{-1} J_i^\top` of each example, shape ``(n,)``: how many parameters it
        determines. ``None`` unless asked for.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_bnn import AutoLaplace, hfl
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 1.0), obs=y)
        >>> x, y = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 3.0, 3.0])
        >>> guide = AutoLaplace(model).initialize(x, y).polish((x, y))
        >>> found = hfl.influence(guide, (x, y), functional=lambda latents: latents["w"])
        >>> found.largest(1)  # the second example; the third says nothing about w
        tensor([[1]])
    """

    shape: torch.Size
    matrix: Tensor
    sd: Tensor
    variances: Tensor | None = None
    leverage: Tensor | None = None

    @property
    def change(self) -> Tensor:
        """The changes in the shape of the functional's value, shape ``(n, *shape)``."""
        return self.matrix.reshape(len(self.matrix), *self.shape)

    def largest(self, k: int) -> Tensor:
        """Numbers of the k examples whose absence would change each functional most, in this order, shape ``(k, m)``."""
        return self.matrix.abs().topk(min(k, len(self.matrix)), dim=0).indices

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        relative = (self.matrix / torch.where(self.sd > 0, self.sd, 1.0)).abs()
        rows = {
            "examples": f"{len(self.matrix):,}",
            "functionals": f"{self.matrix.shape[1]:,}",
            "largest change of each": f"{span_of(relative.amax(0) if len(relative) else None)} sd",
        }
        if self.leverage is not None:
            rows["leverage"] = span_of(self.leverage)
        return "influence of examples when left out", rows


@takes_data(after=("targets", "functional"))
@torch.inference_mode(False)
@torch.enable_grad()
def influence(
    guide: Any,
    *args: Any,
    targets: Any = None,
    functional: Functional | None = None,
    curvature: Curvature = "hessian",
    leverage: bool = False,
    tolerance: float | None = None,
    max_iter: int | None = None,
    preconditioner: Preconditioner | None = None,
    rank: int = 64,
    block_size: int = 64,
    chunk_size: int = 256,
    **kwargs: Any,
) -> Influence:
    r"""
    How much m functionals of a model's latents change when each of n examples is left out.

    One Newton step from the point estimate, with the scores :math:`s_i = \nabla\log p(y_i\mid\hat u)` and the displacements
    :math:`d_j = P^{-1} g_j` of :func:`~pyro_bnn.infer.hfl.solve`,

    .. math:: f_j(\hat u_{-i}) - f_j(\hat u) \approx -s_i^\top d_j,

    is exact to first order in the weight of the example. With ``leverage=True`` the step has the curvature that is left without
    the example, :math:`P - J_i^\top F_i J_i`:

    .. math:: -(J_i d_j)^\top (1 - F_i K_i)^{-1} r_i, \qquad K_i = J_i P^{-1} J_i^\top,

    with the score :math:`r_i` in the outputs: exact for linear models with Gaussian noise, and better for examples that few
    others resemble. With ``curvature="ggn"`` the variances change by :math:`(J_i d_j)^\top (1 - F_i K_i)^{-1} F_i J_i d_j`, without
    ``leverage`` by :math:`(J_i d_j)^\top F_i J_i d_j`; the linearisation is held fixed.

    An example is a row of the data plate, with all that is observed of it and its weight (:func:`pyro.poutine.scale`, masks). What is
    left out is the observation: latents of its own stay, without data.

    :param guide: a point estimate, as for :func:`~pyro_bnn.infer.hfl.solve`.
    :param args: data, perhaps followed by targets and functional, as for :func:`~pyro_bnn.infer.hfl.solve`. Examples are numbered
        batch by batch.
    :param targets: one batch of inputs.
    :param functional: a function of the latents; default: the parameters of the observed sites at ``targets``.
    :param str curvature: ``"hessian"`` or ``"ggn"``.
    :param bool leverage: one further solve per output of each example; needs ``curvature="ggn"``.
    :param float tolerance: relative residual of the solves.
    :param int max_iter: largest number of iterations of a solve.
    :param preconditioner: as for :func:`~pyro_bnn.infer.hfl.solve`.
    :param int rank: of the ``"nystrom"`` preconditioner.
    :param int block_size: how many right-hand sides share a Krylov space.
    :param int chunk_size: how many vectors are multiplied at once; no matrix of gradients of all examples is formed.
    :param kwargs: keyword arguments of the model.
    :return: an :class:`Influence`.
    :raises ValueError: naming the site, where rows of the data interact (batch statistics, attention among rows), so that an example
        has no density of its own; and for options that contradict each other.

    Sources: Cook and Weisberg (1982), "Residuals and influence in regression"; Koh and Liang (2017), "Understanding black-box
    predictions via influence functions".

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_bnn.infer.autoguide import AutoLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
        >>> guide = AutoLaplace(model).initialize(x, y).polish((x, y))  # at (0.5, -0.5), and 0 without the example
        >>> influence(guide, (x, y), (x,), curvature="ggn", leverage=True).matrix.diagonal()
        tensor([-0.5000,  0.5000])
    """
    (data,) = args
    check_option("curvature", curvature, Curvature)
    if leverage and curvature != "ggn":
        raise ValueError(
            "leverage=True takes the curvature of an example from its outputs: pass curvature='ggn' with it."
        )
    check_accuracy(None, tolerance)
    check_sizes(rank=rank, block_size=block_size, chunk_size=chunk_size, max_iter=max_iter)
    problem, functionals = set_up(guide, data, targets, functional, curvature, chunk_size=chunk_size)
    if functional is not None:
        require_slopes(functionals)
        require_derivatives(functionals)
    if tolerance is None:
        tolerance = 1e-6 if problem.latent.dtype == torch.float64 else 1e-4
    solver = Solver(
        problem, tolerance=tolerance, max_iter=max_iter, preconditioner=preconditioner, rank=rank,
        block_size=block_size,
    )  # fmt: skip
    J = functionals.gradients
    D = solver(J)
    parts = [chunk.influence(D, solver if leverage else None) for chunk in _chunks(problem)]
    columns = [None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True)]
    assert columns[0] is not None
    sd = (J * D).sum(-1).clamp(min=0).sqrt()
    return Influence(functionals.shape, columns[0], sd, columns[1], columns[2])


def _chunks(problem: Problem) -> Iterator["_Examples"]:
    """The examples, batch by batch."""
    stream = ExampleStream(problem.model, problem.latent)
    leaf = problem.latent.clone().requires_grad_(True)
    for trace in problem.model.traces(leaf, as_batches(problem.data)):
        problem.model.check_observations(trace)
        yield _Examples(problem, leaf, trace, _rows(problem, stream, trace))


def _rows(problem: Problem, stream: ExampleStream, trace: Trace) -> Rows:
    """Where the examples of a batch are; raises where they cannot be taken apart."""
    batch = batch_of(trace)
    rows = stream.rows(batch, more_than=0)
    if rows is None:
        found = problem.model.rows(problem.latent, batch, 1)
        why = (
            found[0].reason
            if found and found[0].reason
            else "no dimension of the arguments was found that has one"
        )
        raise ValueError(
            f"influence needs a density for each example: {why}. Rows that interact, by batch statistics, attention or "
            "convolutions over them, have none; put the examples into a pyro.plate whose rows the model treats separately."
        )
    return rows


@dataclass(frozen=True)
class _Examples:
    """The examples of one batch: a run of the model at ``leaf``, and where they are in its sites."""

    problem: Problem
    leaf: Tensor
    trace: Trace
    rows: Rows

    def influence(
        self, displacements: Tensor, solver: Solver | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Changes of functionals and variances, shape ``(B, m)``, and leverages, shape ``(B,)``; the latter with a solver."""
        if self.problem.curvature == "hessian":
            return -self._pushed(self.scores(), displacements).mT, None, None
        sites = [s for s in self.problem.model.site_outputs(self.trace) if s.outputs.shape[-1]]
        sites = [s for s in sites if s.name in self.rows.axes]
        outputs = torch.cat([self._by_row(s, s.outputs) for s in sites], 1)  # (B, M)
        scores = torch.cat([self._by_row(s, s.scores(self._value(s))) for s in sites], 1)
        information = _block_diagonal([self._information(s) for s in sites])  # (B, M, M)
        moves = self._pushed(outputs.reshape(-1), displacements).unflatten(-1, outputs.shape)  # (m, B, M)
        if solver is None:
            matrix = -torch.einsum("mbi,bi->bm", moves, scores)
            return matrix, torch.einsum("mbi,bij,mbj->bm", moves, information, moves), None
        product = information @ self._covariances(outputs, solver)
        rest = torch.eye(outputs.shape[1]).to(product) - product
        matrix = -torch.einsum("mbi,bi->bm", moves, torch.linalg.solve(rest, scores))
        inner = torch.linalg.solve(rest, information)
        variances = torch.einsum("mbi,bij,mbj->bm", moves, inner, moves)
        return matrix, variances, product.diagonal(dim1=-2, dim2=-1).sum(-1)

    def scores(self) -> Tensor:
        """The log density of each example, shape ``(B,)``, with its graph."""
        total = self.leaf.new_zeros(self.rows.size)
        for name in self.problem.model.likelihood_names(self.trace):
            axis = self.rows.axes.get(name)
            if axis is None:  # belongs to no example
                continue
            site: Site = self.trace.nodes[name]
            term = unscaled_log_prob(site) * (site["scale"] / subsample_scale(site))
            total = total + term.movedim(axis, 0).reshape(self.rows.size, -1).sum(1)
        return total

    def _pushed(self, values: Tensor, displacements: Tensor) -> Tensor:
        """Changes of values of shape ``(M,)`` to first order, shape ``(m, M)``."""
        push = jvp_operator(values, self.leaf)
        return torch.cat([push(part) for part in displacements.split(self.problem.chunk_size)])

    def _by_row(self, site: SiteOutputs, x: Tensor) -> Tensor:
        """From shape ``site shape + (C,)`` to ``(B, R C)``."""
        return x.movedim(self.rows.axes[site.name], 0).reshape(self.rows.size, -1)

    def _value(self, site: SiteOutputs) -> Tensor:
        node: Site = self.trace.nodes[site.name]
        value: Tensor = node["value"]
        return value

    def _information(self, site: SiteOutputs) -> Tensor:
        """The Fisher information of each example, shape ``(B, R C, R C)``."""
        elements = site.information.movedim(self.rows.axes[site.name], 0)
        elements = elements.flatten(1, -3) if elements.dim() > 3 else elements.unsqueeze(1)  # (B, R, C, C)
        return _block_diagonal(list(elements.unbind(1)))

    def _covariances(self, outputs: Tensor, solver: Solver) -> Tensor:
        """:math:`K_i` of each example, shape ``(B, M, M)``; rows of a few examples at a time."""
        B, M = outputs.shape
        flat, found = outputs.reshape(-1), []
        for some in torch.arange(B, device=flat.device).split(max(1, solver.block_size // M)):
            which = (some[:, None] * M + torch.arange(M, device=flat.device)).reshape(-1)
            chosen = flat.new_zeros(len(which), len(flat))
            chosen[torch.arange(len(which)), which] = 1.0
            rows = vjp(flat, self.leaf, chosen).detach()
            solved = solver(rows)
            K = (rows.unflatten(0, (-1, M)) @ solved.unflatten(0, (-1, M)).mT).detach()
            found.append(0.5 * (K + K.mT))
        return torch.cat(found)


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    """Blocks of shape ``(B, C, C)`` as one matrix for each example."""
    sizes = [block.shape[-1] for block in blocks]
    total = blocks[0].new_zeros(len(blocks[0]), sum(sizes), sum(sizes))
    start = 0
    for block, size in zip(blocks, sizes, strict=True):
        total[:, start : start + size, start : start + size] = block
        start += size
    return total
