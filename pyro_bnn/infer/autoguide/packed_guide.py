# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What Laplace guides and mixtures of them share: their set-up, and predictions through linearised models."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
import torch.distributions as td
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from typing_extensions import override

from pyro_bnn.infer.autoguide.summary import GuideSummary, outline, summarize
from pyro_bnn.infer.initialize import check_latents, check_observations, initialize_with, run_model
from pyro_bnn.model.arguments import argument_kinds, takes_data
from pyro_bnn.model.data import Batch
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.flat import init_flat
from pyro_bnn.model.handlers import SubstituteMessenger, latent_names
from pyro_bnn.model.packed import PackedModel, SiteOutputs
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.prototype import detach_prototypes


class PackedGuide(AutoContinuous):
    """
    Base class of guides over the packed latent vector that predict through linearised models.

    :param callable model: a Pyro model, called as ``model(*args, **kwargs)`` with and without observations.
    :param callable init_loc_fn: a per-site initialisation function, as for any Pyro autoguide.
    """

    _shown: tuple[str, ...] = ()  # options that representations show

    def __init__(self, model: Callable[..., Any], init_loc_fn: Callable[..., Any]) -> None:
        super().__init__(model, init_loc_fn=init_flat(init_loc_fn))
        self._plain = (model,)  # in a tuple it is not registered as a submodule
        self._is_starting = False
        self.argument_kinds: dict[str, bool] = {}  # of the batch that the guide was initialised with

    @property
    @override
    def model(self) -> Any:
        """The model; while the guide is initialised, one whose sites start as ``init_loc_fn`` says."""
        return super().model if self._is_starting else self._plain[0]

    @property
    def packed(self) -> PackedModel:
        """The model as a function of the packed latent vector."""
        raise NotImplementedError

    def initialize(self, *args: Any, **kwargs: Any) -> Self:
        """
        Creates the parameters from one batch, so that optimisers, ``to``, ``double`` and ``load_state_dict`` work
        before the first step.

        :param args: arguments of the model, **with observations**, or data, of which the first batch is taken (see
            :mod:`pyro_bnn.model.arguments`).
        :param kwargs: keyword arguments of the model.
        :return: the guide itself.
        :raises ValueError: if the arguments are not finite or no site of the model is observed.
        """
        if self.prototype_trace is None:
            initialize_with(self, args, kwargs)
        return self

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._is_starting = True
        try:
            with local_parameters():
                trace, modules = self._prototype(args, kwargs)
        finally:
            self._is_starting = False
        detach_prototypes(self)
        self.argument_kinds = argument_kinds(self._plain[0], (args, kwargs))
        self._start(trace, modules, (args, kwargs))

    def summary(self) -> GuideSummary:
        """
        What the guide holds.

        :return: facts (structure, convergence of the point estimate, log evidence), and a table of the sites with their
            shapes, locations and standard deviations in unconstrained space: also relative to the prior's where the guide
            knows them (1: the data say nothing), and between the modes of a mixture; it prints itself.

        Example::

            >>> import pyro, pyro.distributions as dist
            >>> from pyro_bnn.infer.autoguide import AutoLaplace
            >>> def model(y):
            ...     w = pyro.sample("w", dist.Normal(0.0, 2.0))
            ...     with pyro.plate("data", len(y)):
            ...         pyro.sample("obs", dist.Normal(w, 1.0), obs=y)
            >>> y = torch.ones(6)
            >>> guide = AutoLaplace(model).initialize(y).polish(y).laplace_approximation(y)
            >>> guide.summary().sites["w"]["latents"], round(guide.summary().sites["w"]["sd / prior sd"], 4)
            (1, 0.2)
        """
        return summarize(self, self._shown)

    def _repr_html_(self) -> str:
        return outline(self, self._shown)

    def _prototype(self, args: Any, kwargs: Any) -> tuple[Trace, list[torch.nn.Module]]:
        """Makes Pyro's prototype; returns a run of the model and the modules that it called."""
        with poutine.block(), evaluation_mode() as modules:
            trace = run_model(self.model, (args, kwargs))
        check_observations(trace, (args, kwargs))
        check_latents(trace, self, continuous=True)
        values = {name: trace.nodes[name]["value"] for name in latent_names(trace)}
        with SubstituteMessenger(values), evaluation_mode():
            super()._setup_prototype(*args, **kwargs)
        return trace, modules

    def _start(self, trace: Trace, modules: list[torch.nn.Module], batch: Batch) -> None:
        """Makes the parameters from a run of the model and the modules that it called."""
        raise NotImplementedError

    def _linearized(self, latent: Tensor, batch: Batch) -> Iterator[tuple[SiteOutputs, Tensor]]:
        """The parameters of the observed sites at packed vectors, of the linearised model: ``(S,) + shape + (C,)``."""
        raise NotImplementedError

    def _functions(
        self,
        shape: torch.Size,
        generator: torch.Generator | None,
        batch: Batch,
        *,
        differentiable: bool = False,
    ) -> Iterator[tuple[SiteOutputs, Tensor]]:
        """The same at draws."""
        raise NotImplementedError

    @takes_data(one_batch=True)
    @torch.inference_mode(False)
    @torch.enable_grad()
    def observed_distributions(
        self, draws: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, td.Distribution]:
        r"""
        The observed sites' distributions at posterior draws, through the linearised model.

        :param draws: by site name, shape ``(S,) + site_shape``, as :meth:`sample_posterior` returns them.
        :param args: arguments of the model; observations are not needed.
        :param kwargs: keyword arguments of the model.
        :return: by observed site, a distribution of batch shape ``(S,) + batch_shape``.
        """
        (batch,) = args
        moved = self._linearized(self.packed.space.pack(draws), batch)
        return {site.name: site.build(outputs) for site, outputs in moved}

    @takes_data(one_batch=True)
    @torch.inference_mode(False)
    def functional_samples(
        self,
        num_samples: int,
        *args: Any,
        generator: torch.Generator | None = None,
        differentiable: bool = False,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """
        Coherent draws of the linearised function: one draw of the latents gives the outputs at all inputs, as
        Thompson sampling needs.

        :param int num_samples: the number S of functions.
        :param args: arguments of the model; observations are not needed.
        :param generator: source of random numbers; torch's default if ``None``. One with the same seed gives the same functions
            in every call.
        :param bool differentiable: whether the outputs keep their graph to those tensors among the arguments that require a
            gradient, and to parameters of the model; draws of the latents are constants.
        :param kwargs: keyword arguments of the model.
        :return: by observed site, real-valued parameters of its distribution, shape ``(S,) + shape + (C,)``.
        """
        (batch,) = args
        shape = torch.Size((num_samples,))
        moved = self._functions(shape, generator, batch, differentiable=differentiable)
        return {site.name: outputs for site, outputs in moved}
