# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The Gaussians of another guide, moved and scaled."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.distributions as td
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.types import _size
from typing_extensions import override

from pyro_bnn.distributions.mixture import PackedMixture, marginal_quantile
from pyro_bnn.infer.autoguide.packed_guide import PackedGuide
from pyro_bnn.infer.initialize import initialize_with
from pyro_bnn.model.arguments import argument_kinds
from pyro_bnn.model.data import Arguments
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.flat import init_flat


class AutoRescaled(AutoContinuous):
    r"""
    A guide :math:`q(u) = \sum_k \pi_k N(u; m_k, D_k P_k^{-1} D_k)` over the packed latent vector, in which another guide's precisions
    :math:`P_k`, of any structure, are kept, and locations :math:`m_k`, diagonal scales :math:`D_k` and weights are parameters.

    It starts as the density of the other guide, and can be trained by any bound or by :func:`~pyro_bnn.infer.forward_kl`, which
    makes it. Predictions are those of the model, not of a linearised one: its parameters need not be near a mode.

    :param guide: a Laplace approximation with a density of all latents, or a mixture of them. It is a part of the new guide, and
        must not be changed afterwards. To load a saved guide: one built like it.
    :raises TypeError: for other guides.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_bnn.infer.autoguide import AutoLaplace
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)
        >>> x, y = torch.eye(2), torch.tensor([1.0, -1.0])
        >>> laplace = AutoLaplace(model).initialize(x, y).polish((x, y)).laplace_approximation((x, y))
        >>> guide = AutoRescaled(laplace).initialize(x, y)
        >>> guide.get_posterior().variance.detach()
        tensor([0.2000, 0.2000])
    """

    def __init__(self, guide: PackedGuide) -> None:
        if not isinstance(guide, PackedGuide):
            raise TypeError(
                f"AutoRescaled needs a Laplace approximation or a mixture of them, found {type(guide).__name__}."
            )
        super().__init__(guide.model, init_loc_fn=init_flat(init_to_median))
        self._plain = (guide.model,)
        # in a list it may have run before, which Pyro refuses of its own modules
        self.parts = nn.ModuleList(getattr(guide, "components", [guide]))
        self._guide = (guide,)
        self.argument_kinds: dict[str, bool] = {}

    @property
    @override
    def model(self) -> Any:
        """The model."""
        return self._plain[0] if self.prototype_trace is not None else super().model

    def initialize(self, *args: Any, **kwargs: Any) -> Self:
        """
        Creates the parameters.

        :param args: arguments of the model, **with observations**, or data, of which the first batch is taken.
        :param kwargs: keyword arguments of the model.
        :return: the guide itself.
        """
        if self.prototype_trace is None:
            initialize_with(self, args, kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        guide: Any = self._guide[0]
        guide.initialize(Arguments(args, kwargs))
        with evaluation_mode(self._plain[0]):
            super()._setup_prototype(*args, **kwargs)
        self.argument_kinds = argument_kinds(self._plain[0], (args, kwargs))
        parts: Any = self.parts
        loc = torch.stack([part.loc.detach() for part in parts])
        log_weights = getattr(guide, "log_weights", loc.new_zeros(1))
        self.loc = nn.Parameter(loc.clone())
        self.scale = PyroParam(torch.ones_like(loc), constraints.positive)
        self.logits = nn.Parameter(log_weights.to(loc).clone())

    @override
    def get_posterior(self, *args: Any, **kwargs: Any) -> PackedMixture:
        """:return: the distribution of the packed vector."""
        guides: Any = self.parts
        scales: Any = self.scale
        parts = [
            _Rescaled(loc, scale, guide.posterior)
            for loc, scale, guide in zip(self.loc, scales, guides, strict=True)
        ]
        return PackedMixture(parts, self.logits.log_softmax(0))

    @override
    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Quantiles of the marginals.

        :param quantiles: probabilities between 0 and 1.
        :return: by site name, shape ``(len(quantiles),) + site_shape``.
        """
        posterior = self.get_posterior()
        deviations = torch.stack([part.variance for part in posterior.components]).sqrt()
        marginals, weights = td.Normal(self.loc, deviations), self.logits.softmax(0)
        levels = torch.as_tensor(quantiles).tolist()
        rows = torch.stack([marginal_quantile(marginals, level, weights) for level in levels])
        space: Any = self.parts[0]
        return space.packed.space.unpack(rows)

    @override
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """:return: by site name, the medians of the marginals."""
        return {name: value[0] for name, value in self.quantiles([0.5]).items()}


class _Rescaled(TorchDistribution):
    """``loc + scale (u - base.loc)`` for u from a Gaussian over the packed vector."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, base: Any) -> None:
        self.loc, self.scale, self.base = loc, scale, base
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    @property
    def variance(self) -> Tensor:
        return self.base.variance * self.scale.square()

    def rsample(self, sample_shape: _size = (), generator: torch.Generator | None = None) -> Tensor:
        draws = self.base.rsample(sample_shape, generator=generator)
        return self.loc + self.scale * (draws - self.base.loc)

    def log_prob(self, value: Tensor) -> Tensor:
        # the location of the base cancels, and its gradient with it
        moved = self.base.loc + (value - self.loc) / self.scale
        return self.base.log_prob(moved) - self.scale.log().sum()
