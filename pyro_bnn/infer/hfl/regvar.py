# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The variation due to regularisation: an uncertainty score for all inputs from one fine-tuning run."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.infer.hfl.functionals import Functionals
from pyro_bnn.infer.hfl.loss import Problem
from pyro_bnn.infer.hfl.paired import fine_tune
from pyro_bnn.infer.hfl.solver import Solver
from pyro_bnn.model.data import Batch, iter_batches
from pyro_bnn.ops.described import Described, span_of
from pyro_bnn.ops.distributed import all_reduce_sum


@dataclass(repr=False)
class RegVarScore(Described):
    r"""
    A score, not a variance, unless few calibrating solves say otherwise.

    :ivar score: :math:`|f_\lambda(x) - f_0(x)|/\lambda` for all functionals, shape ``(m,)``.
    :ivar shape: the shape of the outputs that were scored.
    :ivar scale: the factor between exact variances and scores, the geometric mean over the calibrating solves;
        ``None`` without calibration.
    :ivar spread: the standard deviation of the logarithm of that factor: 0.1 means that calibrated scores are
        variances within about 10 %, and 2 that they are no variances at all.
    :ivar rank_correlation: Spearman's, between scores and exact variances of the calibrating solves.

    Example::

        >>> import torch
        >>> RegVarScore(torch.tensor([1.0, 2.0]), torch.Size([2]), scale=3.0).calibrated
        tensor([3., 6.])
    """

    score: Tensor
    shape: torch.Size
    scale: float | None = None
    spread: float | None = None
    rank_correlation: float | None = None

    @property
    def calibrated(self) -> Tensor:
        """:attr:`score` times :attr:`scale`, shape ``(m,)``."""
        if self.scale is None:
            raise ValueError("the score is not calibrated: ask for calibrating solves with calibrate=16, say")
        return self.scale * self.score

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        rows = {"scores": span_of(self.score)}
        if self.scale is not None:
            rows["against exact variances"] = (
                f"scale {self.scale:.3g}, spread of its logarithm {self.spread:.2g}, "
                f"rank correlation {self.rank_correlation:.2f}"
            )
        return f"RegVar score of {self.score.shape[0]} functionals (a score, not a variance)", rows


def regvar_score(
    problem: Problem,
    functionals: Functionals,
    solver: Solver,
    *,
    epsilon: float,
    num_epochs: int | None,
    twin: bool,
    calibrate: int,
    seed: int = 0,
) -> RegVarScore:
    r"""
    Fine-tunes with the loss of the second version of the paper, per data point

    .. math:: \text{NLL}(f, y) - \frac1n\log p(\theta) + \frac\lambda n\,\text{mean}|f|,

    and returns :math:`|f_\lambda(x) - f_0(x)|/\lambda`, with :math:`f_0` from a twin that is fine-tuned on the same
    batches without the regulariser. As :math:`\lambda\to0` this is :math:`|\text{mean}_i\,s_i k(x, x_i)|` with
    :math:`s_i` the signs of the training outputs and k the posterior covariance of outputs, which differs from
    :math:`k(x, x)` unless the covariance between inputs is negligible.

    Source: McInerney and Kallus (2025), "Variation due to regularization tractably recovers Bayesian deep learning",
    algorithm listing.
    """
    gradient = _mean_slope(problem, problem.latent, iter_batches(problem.data))
    direction = solver(gradient[None])[0]
    if num_epochs is None:
        score = functionals.responses(direction[None])[0].abs()
    else:
        shift = epsilon / float((gradient @ direction).clamp(min=torch.finfo(gradient.dtype).tiny).sqrt())

        def push(offsets: Tensor, batch: Batch) -> Tensor:
            slope = _mean_slope(problem, problem.latent + offsets[0], [batch])
            return torch.cat([shift * slope[None], torch.zeros_like(offsets[1:])])

        offsets = fine_tune(problem, solver, 2 if twin else 1, push, num_epochs=num_epochs)
        reference = functionals.at(problem.latent + offsets[1]).detach() if twin else functionals.values
        score = (functionals.at(problem.latent + offsets[0]).detach() - reference).abs() / shift
    result = RegVarScore(score, functionals.shape)
    if calibrate:
        generator = torch.Generator(device=score.device).manual_seed(seed)
        chosen = torch.randperm(len(functionals), generator=generator, device=score.device)[:calibrate]
        _calibrate(result, functionals, solver, chosen)
    return result


def _calibrate(result: RegVarScore, functionals: Functionals, solver: Solver, chosen: Tensor) -> None:
    """Compares the scores of some functionals with their exact variances."""
    score = result.score[chosen]
    rows = functionals.transposed(torch.nn.functional.one_hot(chosen, len(functionals)).to(score.dtype))
    exact = (rows * solver(rows)).sum(-1)
    tiny, several = torch.finfo(score.dtype).tiny, len(chosen) > 1
    ratio = exact.clamp(min=tiny).log() - score.clamp(min=tiny).log()
    result.scale = float(ratio.mean().exp())
    result.spread = float(ratio.std()) if several else 0.0
    ranks = torch.stack([score.argsort().argsort(), exact.argsort().argsort()]).to(score.dtype)
    result.rank_correlation = float(torch.corrcoef(ranks)[0, 1]) if several else 1.0


def _mean_slope(problem: Problem, u: Tensor, batches: Iterable[Batch]) -> Tensor:
    """The gradient of the mean absolute output over batches, those of all processes."""
    total, count = torch.zeros_like(problem.latent), problem.latent.new_zeros(())
    for batch in batches:
        leaf = u.detach().clone().requires_grad_(True)
        outputs = torch.cat([site.outputs.reshape(-1) for site in problem.model.outputs(leaf, batch)])
        (slope,) = torch.autograd.grad(outputs.abs().sum(), leaf, materialize_grads=True)
        total, count = total + slope, count + outputs.numel()
    all_reduce_sum([total, count])
    return total / count
