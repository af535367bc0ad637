# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""m functions of a module's weights, with their gradients by ordinary backward passes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.training.weights import ModuleWeights, reshard
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.ops.distributed import any_process, broadcast


class ModuleFunctional:
    """
    :param weights: those of the module.
    :param functional: a function of the module.
    :ivar values: where the weights are when :meth:`gradients` is called, shape ``(m,)``.
    :ivar shape: of the functional's value.
    """

    def __init__(self, weights: ModuleWeights, functional: Callable[[Any], Tensor]) -> None:
        self.weights = weights
        self.functional = functional
        self.values = torch.empty(0)
        self.shape = torch.Size()

    def gradients(self) -> Tensor:
        r"""
        :math:`g_j`, shape ``(m, p)``: a call and a backward pass for each, since sharded modules free what a pass has used.

        :raises ValueError: if processes differ, or the functional does not depend on the weights.
        """
        value = self._call()
        self.shape, self.values = value.shape, value.reshape(-1)
        first = self.values.clone()
        broadcast([first])
        module = self.weights.module
        grouped = self.weights.is_sharded or any(
            isinstance(part, torch.nn.parallel.DistributedDataParallel) for part in module.modules()
        )
        if grouped and any_process(not torch.equal(first, self.values)):
            raise ValueError("the functional has other values in other processes: give all the same targets")
        rows = []
        with self.weights.gradients_aside(), evaluation_mode(module), torch.enable_grad():
            for j in range(self.values.numel()):
                output = self.functional(module).reshape(-1)[j]
                if not output.requires_grad:
                    raise ValueError(
                        "the functional has no gradient: it is detached, or calls no trained weight"
                    )
                output.backward()
                rows.append(self.weights.vector([p.grad for p in self.weights.parameters]))
                for p in self.weights.parameters:
                    p.grad = None
        reshard(module)
        G = torch.stack(rows) if rows else self.weights.read().new_zeros(0, len(self.weights.read()))
        if any_process(not bool(torch.isfinite(G).all())) if grouped else not bool(torch.isfinite(G).all()):
            raise ValueError("the gradient of the functional is not finite at the point estimate")
        return G

    def require_slopes(self, G: Tensor, steps: Tensor, point: Tensor) -> None:
        """
        That each functional moves as its gradient says, along the sum of some steps: it does not where a part is detached, or where
        processes do not average gradients as they do those of the loss.

        :raises ValueError: otherwise.
        """
        step = steps.sum(0)
        expected = self.weights.total(G @ step)
        whole, half = self._slope(point, step, 1.0).to(expected), self._slope(point, step, 0.5).to(expected)
        gap = (whole - expected).abs()
        rounding = 100 * torch.finfo(self.weights.coarsest).eps * self.values.abs().to(expected)
        # at a kink, or in what rounding leaves, steps of two lengths find two slopes
        wrong = (gap > 0.05 * torch.maximum(whole.abs(), expected.abs()) + rounding) & (
            (whole - half).abs() < 0.1 * gap
        )
        if bool(wrong.any()):
            j = int(wrong.nonzero()[0])
            raise ValueError(
                f"along a step element {j} of the functional moves by {float(whole[j]):.3g} and by its gradient by "
                f"{float(expected[j]):.3g}: a part of it is detached, or gradients of processes are not averaged"
            )

    def require_no_steps(self, G: Tensor, point: Tensor) -> None:
        """
        That no functional changes with the weights whose gradient is zero, as one that rounds or compares: its variance is not 0.

        :raises ValueError: otherwise.
        """
        flat = self.weights.total(G.square().sum(-1)) == 0
        if not bool(flat.any()):
            return
        generator = torch.Generator().manual_seed(0)
        moved = torch.zeros_like(flat)
        for scale in (0.1, 1.0, 3.0):
            for _ in range(4):
                noise = torch.randn(len(point), generator=generator, dtype=torch.float64).to(point)
                self.weights.write(point + scale * (1 + point.abs()) * noise)
                moved |= flat & (self._call().reshape(-1) != self.values).to(flat.device)
        self.weights.write(point)
        # of sharded modules processes may move copies of a weight apart, and are to decide alike
        if any_process(bool(moved.any())) if self.weights.is_sharded else bool(moved.any()):
            raise ValueError(
                f"{int(moved.sum())} of {len(flat)} elements of the functional change with the weights but have a zero gradient at "
                "the point estimate, so that their variance would be 0: something like rounding or a comparison has no slope"
            )

    def _slope(self, point: Tensor, step: Tensor, factor: float) -> Tensor:
        """Central differences along a step, of shape (m,)."""
        sides = []
        for sign in (factor, -factor):
            self.weights.write(point + sign * step)
            sides.append(self._call().reshape(-1))
        self.weights.write(point)
        return (sides[0] - sides[1]) / (2 * factor)

    @torch.no_grad()
    def _call(self) -> Tensor:
        with evaluation_mode(self.weights.module):
            value = self.functional(self.weights.module)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError("the functional must return a tensor of real numbers")
        reshard(self.weights.module)
        return value.detach().clone()
