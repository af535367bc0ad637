# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Guides that are moved towards weighted draws: by their moments where these are the optimum, by gradients elsewhere."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_bnn.curvature.dense import FullNormal
from pyro_bnn.curvature.diagonal import DiagonalNormal
from pyro_bnn.infer.autoguide.linearized import LinearizedGuide
from pyro_bnn.infer.autoguide.packed_guide import PackedGuide
from pyro_bnn.infer.autoguide.rescaled import AutoRescaled
from pyro_bnn.infer.predict.density import guide_log_prob
from pyro_bnn.infer.predict.draws import Draws
from pyro_bnn.model.data import Batch
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.latent_space import LatentSpace
from pyro_bnn.model.parameters import local_parameters

#: The least eigenvalue of a covariance after a step, relative to that before.
_LEAST = 0.2


class Family:
    """
    A guide and how it moves.

    :ivar guide: the guide.
    """

    def __init__(self, guide: Any, batch: Batch) -> None:
        self.guide, self.batch = guide, batch
        self.parameters = [p for p in guide.parameters() if p.requires_grad]

    def state(self) -> list[Tensor]:
        """The values of the parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Puts earlier values back."""
        for parameter, value in zip(self.parameters, state, strict=True):
            parameter.copy_(value)

    def update(self, draws: Draws, weights: Tensor) -> None:
        """Moves the guide towards draws of its own, by weights ``(S,)`` of sum one."""
        raise NotImplementedError


class MomentFamily(Family):
    r"""
    Gaussians with a dense or a diagonal covariance: :math:`-E[w \log q']` is least at the weighted mean and covariance.

    In the units :math:`z` of the present Gaussian the moments under it are known, so that only their *differences* are estimated,
    :math:`E_p z = \sum_s (w_s - \frac1S) z_s` and :math:`E_p zz^\top = I + \sum_s (w_s - \frac1S) z_s z_s^\top`: constant weights move
    nothing. A step that would leave less than a fifth of a variance is shortened.
    """

    def __init__(self, guide: Any, batch: Batch, get: Callable[[], Any], put: Callable[..., None]) -> None:
        super().__init__(guide, batch)
        self.get, self.put = get, put
        self.space = LatentSpace(guide.prototype_trace)

    @torch.no_grad()
    def update(self, draws: Draws, weights: Tensor) -> None:
        """See the base class."""
        loc, scale = self.get()
        difference = self.space.pack(draws) - loc
        excess = (weights - 1 / len(weights)).to(loc)
        if scale.dim() == 1:
            z = difference / scale
            shift = excess @ z
            change = excess @ z.square() - shift.square()
            length = _length(float(change.min()))
            self.put(loc + length * scale * shift, scale * (1 + length * change).sqrt())
            return
        z = torch.linalg.solve_triangular(scale, difference.mT, upper=False).mT
        shift = excess @ z
        change = z.mT @ (excess.unsqueeze(-1) * z) - torch.outer(shift, shift)
        length = _length(float(torch.linalg.eigvalsh(change)[0]))
        eye = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
        root = torch.linalg.cholesky(eye + length * change)
        self.put(loc + length * (scale @ shift), scale @ root)


def _length(least: float) -> float:
    """How much of a change of the covariance is taken, relative to the present one, whose smallest eigenvalue this is."""
    return 1.0 if 1 + least >= _LEAST else (_LEAST - 1) / least


class GradientFamily(Family):
    """Any guide whose density can be differentiated: some steps of L-BFGS on the weighted draws."""

    STEPS = 20

    def update(self, draws: Draws, weights: Tensor) -> None:
        """See the base class."""
        optimizer = torch.optim.LBFGS(self.parameters, max_iter=self.STEPS, line_search_fn="strong_wolfe")
        before = self.state()

        @torch.enable_grad()
        def closure() -> Tensor:
            optimizer.zero_grad()
            log_prob = guide_log_prob(self.guide, draws, self.batch, differentiable=True)
            assert log_prob is not None
            # draws of weight zero may be out of the guide's reach
            loss = -torch.where(weights > 0, weights.to(log_prob) * log_prob, 0.0).sum()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        optimizer.zero_grad()
        if not all(bool(p.isfinite().all()) for p in self.parameters) or not torch.isfinite(
            torch.as_tensor(loss)
        ):
            self.restore(before)


def family_of(guide: Any, batch: Batch) -> Family:
    """
    The guide itself, or, for Laplace approximations, one of the same density with parameters.

    :raises TypeError: for a guide that is no module: its parameters live in Pyro's parameter store.
    :raises ValueError: for one without parameters, or one that holds some latents fixed.
    """
    if not isinstance(guide, torch.nn.Module):
        raise TypeError(
            f"forward_kl needs a guide that is a module and holds its parameters, found {type(guide).__name__}: a function's live in "
            "Pyro's parameter store, and of a list refine the guides one by one."
        )
    if isinstance(guide, PackedGuide):
        return _of_laplace(guide, batch)
    if all(parameter.requires_grad for parameter in guide.parameters()):  # moments would move frozen ones
        if isinstance(guide, AutoNormal):
            return MomentFamily(guide, batch, *_of_sites(guide))
        if type(guide) in (AutoDiagonalNormal, AutoMultivariateNormal):
            return _of_normal(guide, batch)
    family = GradientFamily(guide, batch)
    if not family.parameters:
        raise ValueError(f"forward_kl: {type(guide).__name__} has no parameters to refine.")
    return family


def _of_laplace(guide: Any, batch: Batch) -> Family:
    parts = getattr(guide, "components", [guide])
    held = [
        part for part in parts if getattr(part.posterior, "rank", part.posterior.loc.numel()) < len(part.loc)
    ]
    if held:
        raise ValueError(
            f"forward_kl: {type(guide).__name__} holds some latents at their point estimates, which a refinement would have to move: "
            "approximate all latents (sites=None), or use importance_weights."
        )
    posterior = guide.posterior
    if isinstance(guide, LinearizedGuide) and isinstance(posterior, (FullNormal, DiagonalNormal)):
        kind = AutoMultivariateNormal if isinstance(posterior, FullNormal) else AutoDiagonalNormal
        own: Any = kind(guide.model)
        with local_parameters(), poutine.block(), evaluation_mode(guide.model):
            own(*batch[0], **batch[1])
        family = _of_normal(own, batch)
        scale = posterior.variance.sqrt() if kind is AutoDiagonalNormal else _lower(posterior)
        family.put(posterior.loc.detach(), scale.detach())
        return family
    own = AutoRescaled(guide)
    own.initialize(*batch[0], **batch[1])
    return GradientFamily(own, batch)


def _lower(posterior: Any) -> Tensor:
    """The lower Cholesky factor of the covariance of a Gaussian with a dense precision."""
    eye = torch.eye(len(posterior.loc), dtype=posterior.loc.dtype, device=posterior.loc.device)
    return torch.linalg.cholesky(posterior.quadratic_form(eye))


def _of_normal(guide: Any, batch: Batch) -> MomentFamily:
    """A guide over the packed vector with a location, scales, and perhaps a Cholesky factor."""
    is_diagonal = isinstance(guide, AutoDiagonalNormal)

    def get() -> tuple[Tensor, Tensor]:
        if is_diagonal:
            return guide.loc.detach(), guide.scale.detach()
        return guide.loc.detach(), (guide.scale[..., None] * guide.scale_tril).detach()

    def put(loc: Tensor, scale: Tensor) -> None:
        guide.loc.data.copy_(loc)
        if scale.dim() == 2:
            diagonal = scale.diagonal()
            guide.scale_tril = scale / diagonal.unsqueeze(-1)
            scale = diagonal
        guide.scale = scale

    return MomentFamily(guide, batch, get, put)


def _of_sites(guide: AutoNormal) -> tuple[Callable[[], Any], Callable[..., None]]:
    """How the locations and scales of an ``AutoNormal`` are read and set, packed."""
    prototype: Any = guide.prototype_trace
    space = LatentSpace(prototype)

    def get() -> tuple[Tensor, ...]:
        return tuple(
            torch.cat([attrgetter(name)(part).detach().reshape(-1) for name in space.slices])
            for part in (guide.locs, guide.scales)
        )

    def put(*packed: Tensor) -> None:
        for part, values in zip((guide.locs, guide.scales), packed, strict=True):
            for name, where in space.slices.items():
                *path, last = name.split(".")
                owner = attrgetter(".".join(path))(part) if path else part
                setattr(owner, last, values[where].reshape(getattr(owner, last).shape))

    return get, put
