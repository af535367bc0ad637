# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A mixture of Laplace approximations around several modes, as a guide."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from typing_extensions import override

from pyro_bnn.curvature.accumulate import check_option
from pyro_bnn.distributions.mixture import PackedMixture, WeightedMixture, marginal_quantile
from pyro_bnn.infer.autoguide.laplace import AutoLaplace
from pyro_bnn.infer.autoguide.packed_guide import PackedGuide
from pyro_bnn.infer.hyperparameters import HyperparameterReport
from pyro_bnn.model.data import Arguments, Batch
from pyro_bnn.model.packed import PackedModel, SiteOutputs

Weights = Literal["equal", "evidence"]


class AutoLaplaceMixture(PackedGuide):
    r"""
    :math:`q(u) = \sum_k \pi_k N(\hat u_k, P_k^{-1})`: a Laplace approximation around each mode of a deep ensemble
    (Eschenhagen et al., 2021, "Mixtures of Laplace approximations for improved post-hoc uncertainty in deep learning").

    The modes come from an :class:`~pyro_bnn.infer.autoguide.AutoMixture` with ``component="delta"``, or from any other
    fits. Draws and densities are those of the mixture, and predictions linearise the model around the mode that a draw
    belongs to.

    :param callable model: a Pyro model.
    :param int num_components: K.
    :param str weights: ``"equal"``, as in the paper, or ``"evidence"``: :math:`\pi_k\propto` the evidence of each mode.
    :param callable init_loc_fn: a per-site initialisation function, as for any Pyro autoguide.
    :param options: of :class:`~pyro_bnn.infer.autoguide.AutoLaplace`: ``structure``, ``curvature``, ``sites``, ...
    :raises ValueError: for unknown options.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> def model(y=None):
        ...     a = pyro.sample("a", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        ...     return pyro.sample("obs", dist.Normal(a.prod(), 0.1), obs=y)
        >>> guide = AutoLaplaceMixture(model, 2).initialize(torch.tensor(1.0))
        >>> guide = guide.set_modes([{"a": torch.ones(2)}, {"a": -torch.ones(2)}])
        >>> guide = guide.laplace_approximation(torch.tensor(1.0), map_tolerance=float("inf"))
        >>> guide.sample_posterior((1000,))["a"].mean(0).abs() < 0.3
        tensor([True, True])
    """

    _shown = ("num_components", "weights")

    log_weights: Tensor
    components: Any

    def __init__(
        self,
        model: Callable[..., Any],
        num_components: int = 4,
        *,
        weights: Weights = "equal",
        init_loc_fn: Callable[..., Any] = init_to_sample,
        **options: Any,
    ) -> None:
        if not isinstance(num_components, int) or num_components < 1:
            raise ValueError(f"num_components must be an integer of at least 1, found {num_components!r}")
        check_option("weights", weights, Weights)
        super().__init__(model, init_loc_fn)
        self.num_components = num_components
        self.weights = weights
        self.components = nn.ModuleList(
            [AutoLaplace(model, init_loc_fn=init_loc_fn, **options) for _ in range(num_components)]
        )
        self.register_buffer(
            "log_weights", -torch.full((num_components,), num_components, dtype=torch.float64).log()
        )

    @classmethod
    def from_modes(
        cls,
        model: Callable[..., Any],
        modes: Any,
        data: Any,
        batch: tuple[Any, ...],
        *,
        weights: Weights = "equal",
        map_tolerance: float = float("inf"),
        **options: Any,
    ) -> Self:
        """
        Approximates around given modes.

        :param callable model: the Pyro model.
        :param modes: see :meth:`set_modes`.
        :param data: one batch or an iterable of batches, with observations.
        :param batch: arguments of the model with observations, to initialise the guide.
        :param weights: see the class.
        :param map_tolerance: see :meth:`laplace_approximation`.
        :param options: see the class.
        :return: the guide.
        """
        size = getattr(modes, "num_components", None) or len(modes)
        guide = cls(model, size, weights=weights, **options).initialize(*batch)
        return guide.set_modes(modes).laplace_approximation(data, map_tolerance=map_tolerance)

    # ------------------------------------------------------------------ set-up

    @override
    def _start(self, trace: Trace, modules: list[nn.Module], batch: Batch) -> None:
        for guide in self.components:  # each starts at a draw of its own
            guide.initialize(Arguments(*batch))
        self.log_weights = self.log_weights.to(self.components[0].loc.device)

    @property
    @override
    def packed(self) -> PackedModel:
        return self.components[0].packed

    def can_linearize(self, batch: Batch) -> bool:
        """See :meth:`AutoLaplace.can_linearize`."""
        return self.components[0].can_linearize(batch)

    def set_modes(self, modes: Any) -> Self:
        """
        Puts the components at given points.

        :param modes: a fitted ``AutoMixture`` with ``component="delta"``, or one item per component: values by site,
            or a guide with ``median()`` (an ``AutoDelta``, an ``AutoLaplace``).
        :return: the guide itself.
        :raises ValueError: if a component is no point mass, or the number of modes is not that of components.
        """
        points = _points(modes, list(self.packed.space.slices))
        if len(points) != self.num_components:
            raise ValueError(
                f"modes holds {len(points)} points, but the guide has {self.num_components} components"
            )
        for guide, point in zip(self.components, points, strict=True):
            guide.loc.data.copy_(guide.packed.space.pack(point))
        return self

    def polish(self, *args: Any, **options: Any) -> Self:
        """
        Moves each component to the minimum of its basin, see :meth:`AutoLaplace.polish`.

        :param args: one batch or an iterable of batches, with observations, or the arguments of the model.
        :param options: of :meth:`AutoLaplace.polish`.
        :return: the guide itself.
        """
        for guide in self.components:
            guide.polish(*args, **options)
        return self

    def to_point_estimate(self) -> Self:
        """
        Forgets the Gaussians: the guide is one of its points again, and can be trained further.

        :return: the guide itself.
        """
        for guide in self.components:
            guide.to_point_estimate()
        return self

    def __repr__(self) -> str:
        """What the guide is: its components, weights, and that of a component."""
        first = repr(self.components[0])
        return f"{type(self).__name__}({self.num_components} x {first}, weights={self.weights!r})"

    def laplace_approximation(self, *args: Any, map_tolerance: float = float("inf"), **options: Any) -> Self:
        """
        Computes the curvature at each mode, and the weights.

        :param args: one batch or an iterable of batches, with observations, or the arguments of the model.
        :param map_tolerance: see :meth:`AutoLaplace.laplace_approximation`; an ensemble that was trained with one
            step size has rarely converged, so that no warning is given by default.
        :param options: of :meth:`AutoLaplace.laplace_approximation`.
        :return: the guide itself.
        """
        for guide in self.components:
            guide.laplace_approximation(*args, map_tolerance=map_tolerance, **options)
        self._update_weights()
        return self

    def _update_weights(self) -> None:
        values = torch.stack([guide.log_evidence().detach() for guide in self.components])
        values = values if self.weights == "evidence" else torch.zeros_like(values)
        self.log_weights = values.log_softmax(0)

    def optimize_hyperparameters(self, *args: Any, **options: Any) -> list[HyperparameterReport]:
        """
        Tunes the prior precision of each component, and updates the weights.

        :param args: see :meth:`AutoLaplace.optimize_hyperparameters`.
        :param options: of :meth:`AutoLaplace.optimize_hyperparameters`.
        :return: one report per component.
        """
        reports = [guide.optimize_hyperparameters(*args, **options) for guide in self.components]
        self._update_weights()
        return reports

    def log_evidence(self) -> Tensor:
        r"""
        :math:`\log\sum_k Z_k`, the Laplace approximation of the log marginal likelihood with the mass of all modes;
        modes found twice count twice.

        :return: a scalar, in nats.
        """
        return torch.stack([guide.log_evidence() for guide in self.components]).logsumexp(0)

    # ------------------------------------------------------------------ posterior

    @property
    def is_fitted(self) -> bool:
        """Whether the Gaussians exist."""
        return all(guide.is_fitted for guide in self.components)

    @property
    def equal_weights(self) -> bool:
        """Whether the components count equally, so that they can be exported as chains."""
        return self.weights == "equal"

    @property
    def posterior(self) -> PackedMixture:
        """
        The mixture over the packed latent vector.

        :raises RuntimeError: before ``laplace_approximation(data)``.
        """
        return PackedMixture([guide.posterior for guide in self.components], self.log_weights)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """
        :return: the distribution of the packed vector: a point mass at one of the modes, drawn at random, before
            ``laplace_approximation``, the mixture after.
        """
        if self.is_fitted:
            return self.posterior
        # all are read, so that whoever collects parameters meets those of every component
        modes = [guide.loc for guide in self.components]
        if torch.jit.is_tracing():  # a compiled step chooses anew every time
            index = torch.randint(self.num_components, (1,))
            return dist.Delta(torch.stack(modes)[index].squeeze(0)).to_event(1)
        return dist.Delta(modes[int(torch.randint(self.num_components, ()))]).to_event(1)

    @torch.no_grad()
    def sample_posterior(
        self,
        sample_shape: Sequence[int] = (),
        *args: Any,
        by_component: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """
        :param sample_shape: leading shape of the draws.
        :param bool by_component: take component k at position k of the first sample dimension, which must have size K.
        :param generator: source of random numbers; torch's default if ``None``.
        :return: by site name, draws of shape ``sample_shape + site_shape``.
        """
        shape = torch.Size(sample_shape)
        if not by_component:
            return self.packed.space.unpack(self.posterior.rsample(shape, generator))
        if not shape or shape[0] != self.num_components:
            raise ValueError(
                f"by_component needs a first sample dimension of size {self.num_components}, found {tuple(shape)}"
            )
        parts = [guide.sample_posterior(shape[1:], generator=generator) for guide in self.components]
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Quantiles of the marginal mixtures.

        :param quantiles: probabilities between 0 and 1.
        :return: by site name, shape ``(len(quantiles),) + site_shape``.
        """
        parts = self.posterior.components
        loc = torch.stack([part.loc for part in parts])
        scale = torch.stack([part.variance for part in parts]).clamp(min=torch.finfo(loc.dtype).tiny).sqrt()
        marginals, weights = td.Normal(loc, scale), self.log_weights.exp()
        levels = torch.as_tensor(quantiles).tolist()
        return self.packed.space.unpack(
            torch.stack([marginal_quantile(marginals, q, weights) for q in levels])
        )

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        The medians of the marginal mixtures; they need not lie near any mode.

        :return: by site name, the median.
        """
        return {name: value[0] for name, value in self.quantiles([0.5]).items()}

    # ------------------------------------------------------------------ predictions

    def predictive(self, *args: Any, **options: Any) -> dict[str, td.Distribution]:
        """
        The mixture of the components' predictive distributions.

        :param args: arguments of the model; observations are not needed.
        :param options: see :meth:`AutoLaplace.predictive`.
        :return: by observed site, a distribution.
        """
        parts = [guide.predictive(*args, **options) for guide in self.components]
        return {name: _mix([part[name] for part in parts], self.log_weights) for name in parts[0]}

    @override
    def _functions(
        self,
        shape: torch.Size,
        generator: torch.Generator | None,
        batch: Batch,
        *,
        differentiable: bool = False,
    ) -> Iterator[tuple[SiteOutputs, Tensor]]:
        latent, index = self.posterior.rsample_with_index(shape, generator)
        return self._moved(latent.detach(), index, batch, differentiable=differentiable)

    @override
    def _linearized(self, latent: Tensor, batch: Batch) -> Iterator[tuple[SiteOutputs, Tensor]]:
        # drawing modes from p(k | u), proportional to pi_k N(u; u_k, P_k^-1), gives draws and modes their joint distribution
        logits = self.posterior.component_log_prob(latent) + self.log_weights
        return self._moved(latent, td.Categorical(logits=logits).sample(), batch)

    def _moved(
        self, latent: Tensor, index: Tensor, batch: Batch, *, differentiable: bool = False
    ) -> Iterator[tuple[SiteOutputs, Tensor]]:
        """The outputs at packed vectors, each through the model linearised around the mode that it belongs to."""
        sites: dict[str, SiteOutputs] = {}
        result: dict[str, Tensor] = {}
        for k, guide in enumerate(self.components):
            (mine,) = (index == k).nonzero(as_tuple=True)
            if len(mine):
                offsets = (latent[mine] - guide.loc).detach()
                for site, outputs in guide.moved_outputs(offsets, batch, differentiable=differentiable):
                    sites.setdefault(site.name, site)
                    shape = latent.shape[:1] + outputs.shape[1:]
                    result.setdefault(site.name, outputs.new_zeros(shape))[mine] = outputs
        return ((site, result[name]) for name, site in sites.items())


def _points(modes: Any, sites: list[str]) -> list[Mapping[str, Tensor]]:
    if not hasattr(modes, "component_distributions"):
        return [mode.median() if hasattr(mode, "median") else mode for mode in modes]
    components = modes.component_distributions()
    for name, component in components.items():
        if bool((component.variance != 0).any()):
            raise ValueError(f"the components of site {name!r} are no point masses: use component='delta'")
    shared = modes.sample_posterior(())
    return [
        {name: components[name].mean[k].detach() if name in components else shared[name] for name in sites}
        for k in range(modes.num_components)
    ]


def _mix(parts: list[td.Distribution], log_weights: Tensor) -> td.Distribution:
    """A mixture; over classes it is a distribution of the same family."""
    for family in (td.Categorical, td.Bernoulli):
        if all(type(part).__mro__[1] is family or type(part) is family for part in parts):
            stacked: Tensor = torch.stack([part.probs for part in parts])  # type: ignore[attr-defined]
            weights = log_weights.exp().reshape((-1,) + (1,) * (stacked.dim() - 1))
            kind: Any = type(parts[0])
            return kind(probs=(weights * stacked).sum(0))
    return WeightedMixture(parts, log_weights)
