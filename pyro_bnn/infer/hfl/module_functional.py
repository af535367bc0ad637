# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""m functions of a module's weights, with their gradients by ordinary backward passes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.infer.hfl.module_weights import ModuleWeights, reshard
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
        That the functional moves as its gradients say, along the sum of some steps: it does not where a part is detached, or where
        processes do not average gradients as they do those of the loss.

        :raises ValueError: otherwise.
        """
        step = steps.sum(0)
        expected = 2 * self.weights.total(G @ step)
        sides = []
        for sign in (1, -1):
            self.weights.write(point + sign * step)
            sides.append(self._call().reshape(-1))
        self.weights.write(point)
        moved = (sides[0] - sides[1]).to(expected.device, expected.dtype)
        rounding = 100 * torch.finfo(self.weights.dtype).eps * self.values.abs().max().to(expected.device)
        scale = torch.maximum(expected.abs(), moved.abs()).max()
        if float((moved - expected).abs().max()) > 0.05 * float(scale) + float(rounding):
            raise ValueError(
                f"along a step the functional moves by {float(moved.abs().max()):.3g} and by its gradients by "
                f"{float(expected.abs().max()):.3g}: a part of it is detached, or gradients of processes are not averaged"
            )

    @torch.no_grad()
    def _call(self) -> Tensor:
        with evaluation_mode(self.weights.module):
            value = self.functional(self.weights.module)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError("the functional must return a tensor of real numbers")
        reshard(self.weights.module)
        return value.detach().clone()
