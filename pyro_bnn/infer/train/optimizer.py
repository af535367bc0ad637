# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""One torch optimiser for all parameters, and the scaling of the KL for any bound."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bnn.model.handlers import Site


def make_optimizer(optim: Any, params: Sequence[Tensor], *, fused: bool = True) -> torch.optim.Optimizer:
    """
    One torch optimiser over all parameters.

    :param optim: ``None`` (Adam with learning rate 0.005), a learning rate for Adam, a callable that takes the
        parameters and returns an optimiser (``functools.partial(torch.optim.AdamW, lr=1e-3)``), a
        :class:`pyro.optim.PyroOptim` with fixed arguments, or a :class:`torch.optim.Optimizer`.
    :param params: the parameters.
    :param bool fused: whether Adam by default or by a learning rate may be the fused kernel, which takes its gradients
        as they are (a scaler of gradients and clipping under mixed precision refuse it).
    :return: the optimiser.
    :raises ValueError: if an optimiser object leaves parameters out.

    Example::

        >>> make_optimizer(0.1, [torch.zeros(2, requires_grad=True)]).param_groups[0]["lr"]
        0.1
    """
    found = _build(5e-3 if optim is None else optim, params, fused)
    if isinstance(found, torch.optim.LBFGS):
        raise ValueError(
            "optim: LBFGS needs a loss without noise. Use pyro_bnn.infer.StochasticLBFGS, or Adam; Laplace guides have "
            "polish(data), which runs L-BFGS."
        )
    return found


def _build(optim: Any, params: Sequence[Tensor], fused: bool) -> torch.optim.Optimizer:
    """The optimiser that an argument means."""
    if isinstance(optim, (int, float)):
        # the fused kernel is one call for all parameters; it exists for floating-point tensors only
        fused = fused and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)
        return torch.optim.Adam(params, lr=float(optim), fused=fused or None)
    if isinstance(optim, torch.optim.Optimizer):
        held = {id(p) for group in optim.param_groups for p in group["params"]}
        left_out = sum(id(p) not in held for p in params)
        if left_out:
            raise ValueError(
                f"optim holds {len(held)} parameters and leaves out {left_out} of model and guide. Call "
                "guide.initialize on a batch before making the optimiser, or pass a callable such as "
                "functools.partial(torch.optim.Adam, lr=1e-3)."
            )
        return optim
    if isinstance(optim, PyroLRScheduler):
        raise ValueError(
            "optim: a scheduler of pyro.optim; pass the optimiser as optim and the torch scheduler as scheduler, e.g. "
            "scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)."
        )
    if isinstance(optim, PyroOptim):
        if callable(optim.pt_optim_args):
            raise ValueError("optim: a PyroOptim with per-parameter arguments has no single torch optimiser.")
        build: Any = optim.pt_optim_constructor
        return cast(torch.optim.Optimizer, build(params, **optim.pt_optim_args))
    if not callable(optim):
        raise TypeError(f"optim must be a number, a callable or an optimiser, not {type(optim).__name__}.")
    return cast(Callable[..., torch.optim.Optimizer], optim)(params)


def make_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> Any:
    """
    A scheduler of the learning rate.

    :param scheduler: ``None``, a function of the optimiser, or a torch scheduler that holds the optimiser.
    :param optimizer: the optimiser.
    :return: the scheduler, or ``None``.
    :raises ValueError: if a scheduler object holds another optimiser.
    """
    if scheduler is None:
        return None
    if hasattr(scheduler, "step"):
        if scheduler.optimizer is not optimizer:
            raise ValueError(
                "scheduler: this object belongs to another optimiser. Pass its optimiser as optim, or a function such as "
                "lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)."
            )
        return scheduler
    return scheduler(optimizer)


class ScaleLatents(Messenger):
    r"""
    Multiplies the log densities of latent sites by a factor, in a model and in its guide.

    Under any bound whose loss is :math:`-E_q[\log p(y \mid z)] + E_q[\log q(z) - \log p(z)]` this scales the
    second term, the KL divergence.

    :param float scale: the factor, positive.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def _pyro_sample(self, msg: Site) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.scale
