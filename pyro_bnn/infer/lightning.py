# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A bound as a LightningModule; needs the package ``lightning``."""

from collections.abc import Callable
from typing import Any, Self

import torch

from pyro_bnn.infer.initialize import initialize_guide
from pyro_bnn.infer.mixture.elbo import default_elbo
from pyro_bnn.infer.train.optimizer import make_optimizer, make_scheduler
from pyro_bnn.model.data import as_batch
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.stochastic_lbfgs import StochasticLBFGS

try:
    import lightning
except ImportError:  # an optional extra; the class says so when it is built
    _Module: Any = torch.nn.Module
    _MISSING = True
else:
    _Module = lightning.LightningModule
    _MISSING = False


class ElboModule(_Module):
    """
    Model, guide and bound for Lightning's trainer, which brings devices, precision, loggers and checkpoints.

    :param model: a Pyro model that is a module.
    :param guide: its guide.
    :param elbo: a Pyro bound; by default that of :func:`~pyro_bnn.infer.fit`.
    :param optim: see :func:`~pyro_bnn.infer.train.optimizer.make_optimizer`.
    :param scheduler: a function of the optimiser returning a torch scheduler, stepped after each step.

    Call :meth:`initialize` with one batch before training, so that all parameters exist.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        guide: torch.nn.Module,
        elbo: Any = None,
        *,
        optim: Any = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    ) -> None:
        if _MISSING:
            raise ImportError("ElboModule needs the package lightning: pip install 'pyro-bnn[lightning]'.")
        super().__init__()
        self.loss_fn = (default_elbo(guide) if elbo is None else elbo)(model, guide)
        self.optim = optim
        self.scheduler = scheduler

    def initialize(self, batch: Any) -> Self:
        """Creates all parameters of the guide from what the loader yields, with observations."""
        initialize_guide(self.loss_fn.model, self.loss_fn.guide, as_batch(batch))
        return self

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The negative bound on what the loader yields."""
        args, kwargs = as_batch(batch)
        with local_parameters():
            loss: torch.Tensor = self.loss_fn(*args, **kwargs)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def configure_optimizers(self) -> Any:
        """The optimiser and, if there is one, its scheduler."""
        # Lightning's mixed precision does not clip the gradients of the fused kernel
        optimizer = make_optimizer(self.optim, [p for p in self.parameters() if p.requires_grad], fused=False)
        if isinstance(optimizer, StochasticLBFGS):
            raise ValueError(
                "optim: StochasticLBFGS needs fit, which evaluates a step under one draw of the noise."
            )
        scheduler = make_scheduler(self.scheduler, optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
