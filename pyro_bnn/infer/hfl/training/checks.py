# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a training loop must be for its steps to follow the gradient of a function, as far as its steps show it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Optimisers whose weight decay is the gradient of :math:`\frac{w}{2}|\theta|^2`, added within the step.
_COUPLED = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adamax,
)  # fmt: skip
_RANDOM = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU,
    nn.RNNBase, nn.MultiheadAttention,
)  # fmt: skip
_BATCHED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def require_function(module: nn.Module) -> None:
    """
    That no layer is in a mode in which the loss is no function of the weights.

    :raises ValueError: with its name.
    """
    for name, part in module.named_modules():
        if not part.training:
            continue
        rate = getattr(part, "p", getattr(part, "dropout", 1.0))
        if isinstance(part, _BATCHED) or (isinstance(part, _RANDOM) and rate > 0):
            raise ValueError(
                f"{type(part).__name__} {name!r} was in training mode in a step, where the loss is no function of the weights: "
                "call its eval() in the loop, after any train()"
            )


def weight_decays(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    r"""
    By ``id`` of the parameter, the coefficient w of what the step itself adds to the gradient, :math:`w\\theta`.

    :raises ValueError: for an optimiser whose fixed point is no minimum of a loss that is known.
    """
    name = type(optimizer).__name__
    found: dict[int, float] = {}
    for group in optimizer.param_groups:
        if group.get("maximize"):
            raise ValueError(f"{name} maximises: give it the negative loss")
        decay = float(group.get("weight_decay", 0.0) or 0.0)
        if isinstance(optimizer, torch.optim.ASGD) and group["lambd"]:
            raise ValueError("ASGD shrinks weights by its own lambd: set lambd=0")
        if decay and (group.get("decoupled_weight_decay") or not isinstance(optimizer, _COUPLED)):
            raise ValueError(
                f"the weight decay of {name} is not the gradient of a prior, so that it ends in no minimum of a known loss: "
                "set weight_decay=0 and add the negative log prior to the loss"
            )
        found |= {id(p): decay for p in group["params"]}
    return found


def require_no_others(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """
    That a step moves no parameter of which runs do not know, and which nothing would put back.

    :raises ValueError: if an optimiser has one with a gradient.
    """
    known = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in known and p.grad is not None:
                raise ValueError(
                    f"{type(optimizer).__name__} has a gradient of a parameter of shape {tuple(p.shape)} that is none of the "
                    "trained ones of the module: give the module that has all, or take it out of the loss and the optimiser"
                )


def require_plain_gradients(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]) -> None:
    """
    That gradients at the time of a step are those of the loss.

    :raises ValueError: if a scaler has left its factor in them, or they are sparse.
    """
    if getattr(optimizer, "grad_scale", None) is not None:
        raise ValueError(
            "the gradients of a fused optimiser still have the factor of GradScaler: call scaler.unscale_(optimizer) before "
            "scaler.step(optimizer), or use fused=False"
        )
    if any(g is not None and g.layout != torch.strided for g in gradients):
        raise ValueError("gradients are sparse: use sparse=False")


def require_unclipped(norms: Tensor, largest: Tensor, alignments: Tensor, dtype: torch.dtype) -> None:
    """
    That the gradients of different batches at the same weights have not been cut to one size.

    :param norms: of the gradient in each step, shape ``(S,)``.
    :param largest: the largest entry of each, shape ``(S,)``.
    :param alignments: inner products with the first gradient, shape ``(S,)``: one batch again and again is alike in these, too.
    :raises ValueError: if three different gradients or more share the largest norm, or the largest entry.
    """
    for what, values, tolerance in (
        ("norm", norms, 1e-5),
        ("largest entry", largest, 4 * torch.finfo(dtype).eps),
    ):
        top = values.max()
        alike = values >= top * (1 - tolerance)
        number, same = int(alike.sum()), alignments[alike]
        if number >= 3 and float(same.max() - same.min()) > 1e-4 * float(norms.max()) ** 2:
            raise ValueError(
                f"the gradients of {number} of {len(values)} steps have the same {what}, {float(top):.4g}: they are clipped, so "
                "that steps do not follow the gradient of the loss. Switch gradient clipping off in the runs"
            )
