# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A point estimate that becomes a Gaussian, and predicts through the linearised model."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Self

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from typing_extensions import override

from pyro_bnn.curvature.mode import find_mode
from pyro_bnn.curvature.output_covariances import (
    SiteCovariances,
    basis_functions,
    event_covariance,
    joint_covariance,
    output_covariances,
)
from pyro_bnn.curvature.stream import DEFAULT_BUDGET, ExampleStream
from pyro_bnn.infer.autoguide.outputs import LinearizedOutputs, require_slopes
from pyro_bnn.infer.autoguide.packed_guide import PackedGuide
from pyro_bnn.infer.autoguide.point_estimate import MAPReport, PointEstimateWarning
from pyro_bnn.model.arguments import takes_data
from pyro_bnn.model.data import Arguments, Batch, as_batches, iter_batches
from pyro_bnn.model.observations import is_stand_in
from pyro_bnn.model.packed import PackedModel, SiteOutputs
from pyro_bnn.ops.jacobian import jacobian, jvp_operator
from pyro_bnn.ops.newton import value_and_gradient
from pyro_bnn.ops.notice import warn_user


class LinearizedGuide(PackedGuide):
    r"""
    Base class of guides that are a point estimate first and a Gaussian around it afterwards.

    Until the subclass's ``laplace_approximation(data)`` is called the guide is a Delta over the packed
    unconstrained latent vector, so that :class:`~pyro.infer.SVI` or :func:`pyro_bnn.infer.fit` finds the MAP.
    Afterwards it is a Gaussian whose predictions go through the *linearised* model
    :math:`\phi(\hat u) + J(u - \hat u)`, with :math:`\phi` the parameters of the observed sites.

    :param callable model: a Pyro model, called as ``model(*args, **kwargs)`` with and without observations.
    :param callable init_loc_fn: a per-site initialisation function, as for any Pyro autoguide.
    :param int chunk_size: how many reverse passes run at once; memory grows with it, results do not change.
    :param int budget: how many numbers a chunk of data may keep; larger batches are split, results do not change.
    """

    #: whether the posterior has a density (low-rank Gaussians do not)
    has_density = True
    #: what is taken for the curvature of the likelihood
    curvature: Any = "hessian"

    loc: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        chunk_size: int = 256,
        budget: int = DEFAULT_BUDGET,
    ) -> None:
        super().__init__(model, init_loc_fn)
        self.chunk_size = chunk_size
        self.budget = budget
        self.map_report: MAPReport | None = None
        self._packed: PackedModel | None = None
        self._posterior: dist.TorchDistribution | None = None
        self._said_so = False  # that draws are all the same

    @override
    def _start(self, trace: Trace, modules: list[nn.Module], batch: Batch) -> None:
        packed = PackedModel(self._plain[0], trace, modules)
        if not is_stand_in():
            packed.log_likelihood(trace)  # raises where it is not finite
        self._packed = packed
        self.loc = nn.Parameter(self._init_loc())
        if not packed.observed and self.curvature != "hessian":
            packed.check_factors(packed.trace(self.loc, batch))

    @property
    @override
    def packed(self) -> PackedModel:
        if self._packed is None:
            raise RuntimeError(
                "the guide is not initialised: call guide.initialize(*args) with one batch of data and observations"
            )
        return self._packed

    def __repr__(self) -> str:
        """What the guide is: its options, the number of latents, and whether it has been fitted."""
        options = [f"{name}={getattr(self, name)!r}" for name in self._shown]
        if self._packed is None:
            state = "not initialised"
        else:
            fitted = "Gaussian" if self.is_fitted else "point estimate, no laplace_approximation yet"
            state = f"{len(self.loc):,} latents, {fitted}"
        return f"{type(self).__name__}({', '.join([*options, state])})"

    # ------------------------------------------------------------------ posterior

    def to_point_estimate(self) -> Self:
        """
        Forgets the Gaussian: the guide is the point estimate that it was before ``laplace_approximation``, and can be
        trained further. :func:`pyro_bnn.infer.fit` does this itself.

        :return: the guide itself.
        """
        for name, _ in list(self.named_buffers(recurse=False)):
            setattr(self, name, None)
        self.map_report = None
        self._posterior = None
        return self

    def _make_posterior(self) -> dist.TorchDistribution | None:
        """The Gaussian from the module's buffers, or ``None`` before ``laplace_approximation``."""
        raise NotImplementedError

    @property
    def posterior(self) -> dist.TorchDistribution:
        """
        The Gaussian over the packed latent vector.

        :raises RuntimeError: before ``laplace_approximation(data)``.
        """
        if self._posterior is None:
            self._posterior = self._make_posterior()
        if self._posterior is None:
            raise RuntimeError(
                f"{type(self).__name__} is still a point estimate: call laplace_approximation(data) first"
            )
        return self._posterior

    @property
    def is_fitted(self) -> bool:
        """Whether the Gaussian exists."""
        return self._posterior is not None or self._make_posterior() is not None

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """:return: the distribution of the packed vector: a Delta before ``laplace_approximation``, the Gaussian after."""
        return self.posterior if self.is_fitted else dist.Delta(self.loc).to_event(1)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        self._posterior = None
        return super()._apply(fn, *args, **kwargs)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # buffers that only laplace_approximation creates are None in a fresh object
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        held = dict(self.named_buffers(recurse=False))
        for name in held.keys() - own.keys():
            setattr(self, name, None)
        parameters = dict(self.named_parameters(recurse=False))
        for name, value in own.items():
            fits = name in held and held[name].shape == value.shape
            if not fits and "." not in name and name not in parameters and hasattr(self, name):
                setattr(self, name, torch.empty_like(value, device=self.loc.device))
        self._posterior = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def sample_posterior(
        self,
        sample_shape: Sequence[int] = (),
        *args: Any,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """
        :param sample_shape: leading shape of the draws.
        :param generator: source of random numbers; torch's default if ``None``.
        :return: by site name, draws of shape ``sample_shape + site_shape``; before ``laplace_approximation`` all the same, with
            a :class:`PointEstimateWarning`, once.
        """
        shape = torch.Size(sample_shape)
        if self.is_fitted:
            return self.packed.space.unpack(self._draw(shape, generator).to(self.loc))
        if not self._said_so:
            self._said_so = True
            warn_user(
                f"{type(self).__name__} is still a point estimate: its draws are all the same, and the epistemic variance "
                "of predictions is zero. Call guide.laplace_approximation(data) first; to predict with the point estimate "
                "on purpose pass its draw, {name: value[None] for name, value in guide.median().items()}.",
                PointEstimateWarning,
            )
        return self.packed.space.unpack(self.loc.expand(shape + self.loc.shape))

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        posterior: Any = self.posterior
        return posterior.rsample(shape, generator=generator)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """:return: by site name, the posterior median (the MAP in unconstrained space)."""
        return {name: value.clone() for name, value in self.packed.space.unpack(self.loc).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        :param quantiles: probabilities between 0 and 1.
        :return: by site name, shape ``(len(quantiles),) + site_shape``.
        """
        scale = self.posterior.variance.clamp(min=0).sqrt()
        q = torch.as_tensor(quantiles).to(scale)
        rows = self.loc + td.Normal(0.0, 1.0).icdf(q).unsqueeze(-1) * scale
        return self.packed.space.unpack(rows.to(self.loc))

    @override
    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        # the Gaussian of a network in half precision is in float32
        return super()._unpack_latent(latent.to(self.loc.dtype))

    # ------------------------------------------------------------------ point estimate

    @takes_data()
    @torch.inference_mode(False)
    @torch.enable_grad()
    def polish(
        self,
        *args: Any,
        tolerance: float = 1e-6,
        max_iter: int = 2000,
        float64: bool = False,
        **kwargs: Any,
    ) -> Self:
        r"""
        Moves the point estimate to the minimum of :math:`L(u)` by L-BFGS and Newton-CG steps over all the data.

        An exact Hessian needs this: after a few thousand Adam steps it is often still indefinite. In float32 about
        three digits are within reach, where the search stops by itself. ``guide.map_report`` says what was reached; with
        ``curvature="hessian"`` a warning says where the search ended without a minimum.

        :param args: one batch or an iterable of batches, with observations, as in ``polish((x, y))`` or
            ``polish(loader)``, or the arguments of the model, as in ``polish(x, y)`` (see :mod:`pyro_bnn.model.arguments`);
            every pass uses all of it.
        :param tolerance: the Newton decrement, in posterior standard deviations, at which to stop.
        :param max_iter: largest number of L-BFGS iterations.
        :param bool float64: whether to search in double precision; parameters and buffers of the model's modules are
            converted for that time, and are as they were afterwards. The result is rounded to the guide's own
            precision.
        :param kwargs: keyword arguments of the model.
        :return: the guide itself.
        :raises NotAMinimumError: if the joint density has no maximum; the message names the site that runs off.
        :raises RuntimeError: after ``laplace_approximation``, or if ``float64=True`` and the model holds tensors of
            lower precision outside of its modules and arguments that do not combine with double precision.
        :raises ValueError: for a model that is no function of its latents (see :meth:`laplace_approximation`).
        """
        data = as_batches(*args)
        if self.is_fitted:
            raise RuntimeError(
                "polish moves the point estimate: call it before laplace_approximation, or after guide.to_point_estimate()"
            )
        self.packed.require_function(self.loc, data)
        # in the metric of a Gauss-Newton matrix laplace_approximation judges the point
        options: Any = {"max_iter": max_iter, "float64": float64, "report": self.curvature == "hessian"}
        found = find_mode(self.packed, self.loc, data, tolerance=tolerance, **options)
        self.loc.data.copy_(found.point)
        self.map_report = MAPReport(found.value, found.gradient_norm, found.decrement)
        return self

    @takes_data()
    def negative_log_joint(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        r"""
        :math:`L` and its gradient at the point estimate.

        :param args: data with observations, or the arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: a scalar and a tensor of shape ``(p,)``.
        """
        (data,) = args
        losses = partial(self.packed.losses, data=data, require_finite=True)
        return value_and_gradient(losses, self.loc)

    # ------------------------------------------------------------------ predictions

    @takes_data(one_batch=True)
    @torch.inference_mode(False)
    @torch.enable_grad()
    def linearized_outputs(
        self, *args: Any, differentiable: bool = False, **kwargs: Any
    ) -> dict[str, LinearizedOutputs]:
        r"""
        The closed-form Gaussian over the parameters of each observed site,
        :math:`N(\phi(\hat u), J P^{-1} J^\top)`.

        :param args: arguments of the model; observations are not needed.
        :param bool differentiable: whether mean and covariance keep their graph: to those tensors among the arguments that
            require a gradient, and to parameters of the model. The posterior, :math:`\hat u` and P, is constant.
        :param kwargs: keyword arguments of the model.
        :return: by observed site, :class:`LinearizedOutputs`.

        Source: Khan et al. (2019), Immer et al. (2021).
        """
        (batch,) = args
        posterior, stream = self.posterior, self._stream(differentiable=differentiable)
        whole = cache(partial(self.packed.outputs, stream.latent, batch, keep=differentiable))
        found, sites = output_covariances(posterior, stream, batch, whole=whole)
        if len(sites) != len(self.packed.observed):
            sites = whole()  # means and distributions of the batch
        result = {}
        for site in sites:
            mean = site.outputs if differentiable else site.outputs.detach()
            mine = found.get(site.name, SiteCovariances())
            parts = mine.elements or [mean.new_zeros(mean.shape + mean.shape[-1:])]
            covariance = stream.joined(site.name, parts)
            require_slopes(site.name, covariance, mean)
            joint: Any = partial(event_covariance, posterior, stream, batch, site.name)
            if mine.events:
                joint = stream.joined(site.name, mine.events)
            result[site.name] = LinearizedOutputs(mean, covariance, site.names, site, joint, differentiable)
        return result

    def _stream(self, *, differentiable: bool = False) -> ExampleStream:
        return ExampleStream(self.packed, self.loc, budget=self.budget, differentiable=differentiable)

    @takes_data(one_batch=True)
    def predictive(
        self,
        *args: Any,
        method: Any = "auto",
        num_samples: int = 100,
        generator: torch.Generator | None = None,
        differentiable: bool = False,
        **kwargs: Any,
    ) -> dict[str, td.Distribution]:
        """
        The predictive distribution of each observed site.

        :param args: arguments of the model; observations are not needed.
        :param str method: see :meth:`LinearizedOutputs.distribution`.
        :param num_samples: draws of the linearised parameters where there is no closed form.
        :param generator: source of random numbers for these draws; one with the same seed in every call makes them fixed
            functions of the arguments.
        :param bool differentiable: see :meth:`linearized_outputs`.
        :param kwargs: keyword arguments of the model.
        :return: by observed site, a distribution (see :meth:`LinearizedOutputs.distribution`).
        """
        found = self.linearized_outputs(*args, differentiable=differentiable, **kwargs)
        return {
            name: outputs.distribution(method, num_samples=num_samples, generator=generator)
            for name, outputs in found.items()
        }

    @override
    def _linearized(self, latent: Tensor, batch: Batch) -> Iterator[tuple[SiteOutputs, Tensor]]:
        return self.moved_outputs(latent - self.loc.detach(), batch)

    @override
    def _functions(
        self, shape: torch.Size, generator: Any, batch: Batch, *, differentiable: bool = False
    ) -> Iterator[tuple[SiteOutputs, Tensor]]:
        offsets = self._draw(shape, generator).detach() - self.loc.detach()
        return self.moved_outputs(offsets, batch, differentiable=differentiable)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def can_linearize(self, batch: Batch) -> bool:
        """
        :param batch: arguments of the model.
        :return: whether all likelihoods have parameters in which they can be linearised. With ``curvature="hessian"`` they
            need not have any; predictions at draws are then those of the model itself.
        """
        if self.curvature != "hessian":  # others have asked for them already
            return True
        latent = self.loc.detach().clone().requires_grad_(True)
        try:
            self.packed.outputs(latent, batch)
        except (KeyError, ValueError):
            return False
        return True

    def moved_outputs(
        self, offsets: Tensor, batch: Batch, *, differentiable: bool = False
    ) -> Iterator[tuple[SiteOutputs, Tensor]]:
        """The parameters of the observed sites at linearised offsets, shape (S,) + shape + (C,)."""
        latent = self.loc.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            sites = self.packed.outputs(latent, batch)
        for site in sites:
            outputs = site.outputs if differentiable else site.outputs.detach()
            if site.names:
                with torch.enable_grad():
                    flat = site.outputs.reshape(-1)
                    try:
                        product = jvp_operator(flat, latent, create_graph=differentiable)
                    except RuntimeError:  # an operation without second derivatives
                        rows = jacobian(flat, latent, chunk_size=self.chunk_size)
                        product = partial(nn.functional.linear, weight=rows)
                    moved = [product(chunk) for chunk in offsets.split(self.chunk_size)]
                    moves = torch.cat(moved).reshape(offsets.shape[:1] + outputs.shape)
                    require_slopes(site.name, moves, outputs)
                    outputs = outputs + moves
            else:
                outputs = outputs.expand(offsets.shape[:1] + outputs.shape)
            yield site, outputs

    @takes_data(one_batch=True)
    @torch.inference_mode(False)
    @torch.enable_grad()
    def basis_functions(
        self, *args: Any, differentiable: bool = False, **kwargs: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        r"""
        The linearised model as a Bayesian linear model :math:`\phi(x) + W(x) z`, :math:`z\sim N(0, I_r)`, with
        :math:`W(x) W(x')^\top = J(x) P^{-1} J(x')^\top`: the covariance function of a Gaussian process.

        :param args: arguments of the model; observations are not needed.
        :param bool differentiable: see :meth:`linearized_outputs`.
        :param kwargs: keyword arguments of the model.
        :return: by observed site, :math:`\phi`, shape ``shape + (C,)``, and W, shape ``shape + (C, r)``.
        """
        return basis_functions(self.posterior, self._stream(differentiable=differentiable), *args)

    @takes_data(one_batch=True)
    def joint_covariance(
        self, *args: Any, batch_dims: int = 0, differentiable: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        r"""
        The covariance of the linearised parameters of each observed site over all points and outputs at once,
        :math:`J P^{-1} J^\top`.

        :param args: arguments of the model; observations are not needed.
        :param int batch_dims: how many leading dimensions of a site's shape are batches of points, whose covariances with each
            other are not wanted.
        :param bool differentiable: see :meth:`linearized_outputs`.
        :param kwargs: keyword arguments of the model.
        :return: by observed site of ``shape = batch + rest``, shape ``batch + rest + (C,) + rest + (C,)``.
        """
        found = self.basis_functions(*args, differentiable=differentiable, **kwargs)
        return {name: joint_covariance(basis, batch_dims) for name, (_, basis) in found.items()}

    def linearized_batches(self, data: Any) -> Iterator[dict[str, LinearizedOutputs]]:
        """
        Predictions for an iterable of batches, one at a time, so that memory stays that of one batch.

        :param data: one batch or an iterable of batches; observations are not needed.
        :return: an iterator over :meth:`linearized_outputs`.
        """
        return (self.linearized_outputs(Arguments(*batch)) for batch in iter_batches(data))
