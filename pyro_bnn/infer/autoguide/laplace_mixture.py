# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A mixture of Laplace approximations around several modes."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributions as td
from torch import Tensor

from pyro_bnn.infer.autoguide.laplace import AutoLaplace
from pyro_bnn.infer.autoguide.mixture import AutoMixture


class LaplaceMixture:
    r"""
    :math:`q(u) = \sum_k \pi_k N(\hat u_k, P_k^{-1})`: a Laplace approximation around each component of a deep ensemble
    or BatchEnsemble that an :class:`~pyro_bnn.infer.autoguide.AutoMixture` with ``component="delta"`` has fitted
    (Eschenhagen et al., 2021, "Mixtures of Laplace approximations for improved post-hoc uncertainty in deep learning").

    :param guides: fitted approximations of the same model.
    :param weights: ``"equal"``, as in the paper, or ``"evidence"``: :math:`\pi_k\propto` the evidence of each mode.
    :raises ValueError: if there is no guide or one is not fitted.
    """

    def __init__(
        self, guides: Sequence[AutoLaplace], weights: Literal["equal", "evidence"] = "equal"
    ) -> None:
        if not guides or not all(guide.is_fitted for guide in guides):
            raise ValueError(
                "guides must hold at least one AutoLaplace, each after laplace_approximation(data)"
            )
        if weights not in ("equal", "evidence"):
            raise ValueError(f"unknown weights {weights!r}, expected 'equal' or 'evidence'")
        self.guides = list(guides)
        logits = torch.stack([guide.log_evidence().detach() for guide in guides])
        self.log_weights = (logits if weights == "evidence" else torch.zeros_like(logits)).log_softmax(0)

    @classmethod
    def from_modes(
        cls,
        model: Any,
        modes: AutoMixture,
        data: Any,
        batch: tuple[Any, ...],
        *,
        weights: Literal["equal", "evidence"] = "equal",
        map_tolerance: float = float("inf"),
        **options: Any,
    ) -> "LaplaceMixture":
        """
        Approximates around each component of a fitted mixture of point masses.

        :param callable model: the Pyro model.
        :param modes: an ``AutoMixture`` with ``component="delta"``, fitted.
        :param data: one batch or an iterable of batches, with observations.
        :param batch: arguments of the model with observations, to initialise the guides.
        :param weights: see the class.
        :param map_tolerance: see :meth:`AutoLaplace.laplace_approximation`; an ensemble that was trained with one
            step size has rarely converged, so that no warning is given by default.
        :param options: of :class:`AutoLaplace`.
        :return: the mixture.
        :raises ValueError: if a component is no point mass.
        """
        guides = []
        with torch.no_grad():
            values = {name: component.mean for name, component in modes.component_distributions().items()}
            shared = modes.sample_posterior(())
        for name, component in modes.component_distributions().items():
            if not isinstance(component, td.Distribution) or bool((component.variance != 0).any()):
                raise ValueError(
                    f"the components of site {name!r} are no point masses: use component='delta'"
                )
        for k in range(modes.num_components):
            guide = AutoLaplace(model, **options).initialize(*batch)
            point = {
                name: values[name][k] if name in values else shared[name]
                for name in guide.packed.space.slices
            }
            guide.loc.data.copy_(guide.packed.space.pack(point))
            guides.append(guide.laplace_approximation(data, map_tolerance=map_tolerance))
        return cls(guides, weights)

    def _counts(self, num_samples: int) -> list[int]:
        index = torch.multinomial(self.log_weights.exp(), num_samples, replacement=True)
        return torch.bincount(index, minlength=len(self.guides)).tolist()

    def sample_posterior(self, sample_shape: Sequence[int] = ()) -> dict[str, Tensor]:
        """
        :param sample_shape: leading shape of the draws.
        :return: by site name, draws of shape ``sample_shape + site_shape``, in random order.
        """
        shape = torch.Size(sample_shape)
        total = shape.numel()
        parts = [g.sample_posterior((n,)) for g, n in zip(self.guides, self._counts(total), strict=True)]
        order = torch.randperm(total)
        return {
            name: torch.cat([part[name] for part in parts])[order].reshape(shape + parts[0][name].shape[1:])
            for name in parts[0]
        }

    def observed_draws(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Draws of the observed sites' real-valued parameters, each through the model linearised at its own mode.

        :param num_samples: S.
        :param args: arguments of the model; observations are not needed.
        :param kwargs: keyword arguments of the model.
        :return: by observed site, shape ``(S,) + shape + (C,)``.
        """
        parts: list[Mapping[str, Tensor]] = [
            guide.functional_samples(n, *args, **kwargs)
            for guide, n in zip(self.guides, self._counts(num_samples), strict=True)
            if n
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def log_prob(self, latent: Tensor) -> Tensor:
        """
        :param latent: packed vectors, shape ``(..., p)``.
        :return: log densities, shape ``(...)``.
        """
        each = torch.stack([guide.get_posterior().log_prob(latent) for guide in self.guides], -1)
        return (each + self.log_weights).logsumexp(-1)
