# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A guide that draws from stored draws: the samples of a chain, or weighted ones, for all that takes a guide."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.trace_struct import Trace
from torch import Size, Tensor
from torch.distributions import biject_to, constraints
from typing_extensions import override

from pyro_bnn.infer.autoguide.stored_draws import base_support, by_chain, in_order, weighted_quantiles
from pyro_bnn.infer.autoguide.summary import GuideSummary, outline, summarize
from pyro_bnn.infer.initialize import check_latents, initialize_with, run_model
from pyro_bnn.infer.predict.weighted import WeightedChains, as_weights
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import SubstituteMessenger, latent_names
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.model.prototype import detach_prototypes

_SHOWN = ("num_chains", "num_draws")


class AutoEmpirical(WeightedChains, AutoGuide):
    r"""
    The empirical distribution of stored draws, :math:`q = \sum_s w_s \delta_{z_s}`, as a guide (after
    :class:`~pyro.distributions.Empirical`).

    A call draws one of them, with all its sites, by its weight. It predicts, saves and exports like any guide; there is nothing to
    train, and no density: bounds and importance weights refuse it. Functions of draws (:func:`~pyro_bnn.infer.posterior_draws`,
    :func:`~pyro_bnn.infer.posterior_predictive`, :func:`~pyro_bnn.diagnostics.to_datatree`) take the stored ones, evenly spaced,
    in their chains, without random numbers.

    :param callable model: a Pyro model.
    :param draws: a :class:`~pyro_bnn.infer.ChainResult`, an :class:`~pyro.infer.MCMC` run, or a mapping from latent sites to
        draws with the draws in the first dimension, of NumPyro too; ``None`` for those of a file, which
        :func:`~pyro_bnn.infer.load_guide` reads. They are kept in their precision, packed in one tensor.
    :param int num_chains: chains in a mapping of draws, which hold them one after the other.
    :param weights: of the chains, shape ``(num_chains,)``, or of all draws, chain after chain, shape ``(S,)``, which sum to 1;
        those of the result, else equal ones, by default.
    :raises ValueError: if the draws are no finite numbers or do not fit together, later if they are not those of the model.

    Example::

        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> guide = AutoEmpirical(model, {"w": torch.arange(4.0)}, weights=[0.1, 0.2, 0.3, 0.4]).initialize(x, x)
        >>> guide.median()["w"], guide().keys()
        (tensor(2.), dict_keys(['w']))

    .. note:: In an :class:`~pyro.infer.autoguide.AutoGuideList` its sites are independent of those of the other parts.
    """

    has_density = False
    weights: Tensor | None

    def __init__(
        self,
        model: Callable[..., Any],
        draws: Any = None,
        *,
        num_chains: int = 1,
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__(model)
        self._start: dict[str, Any] = {}  # values of the latents while the prototype is made
        self._layout: dict[str, tuple[int, slice, Size]] = {}
        self._median: dict[str, Tensor] | None = None  # once it was asked for, of draws that stay
        self.register_buffer("weights", None)
        if draws is not None:
            self.set_draws(draws, num_chains=num_chains, weights=weights)

    def set_draws(
        self, draws: Any, *, num_chains: int = 1, weights: Tensor | Sequence[float] | None = None
    ) -> Self:
        """
        Puts other draws in the place of those that are there.

        :param draws: see the class.
        :param num_chains: see the class.
        :param weights: see the class.
        :return: the guide itself.
        """
        samples = by_chain(draws, num_chains)
        if isinstance(draws, WeightedChains) and weights is None:
            weights = draws.weights
        if self.prototype_trace is not None:
            samples = in_order(samples, self.prototype_trace)
        chains, length = next(iter(samples.values())).shape[:2]
        self.weights = as_weights(weights, chains, chains * length, what="chain or draw")
        for name in [name for name in self._buffers if name.startswith(("draws_", "stat_"))]:
            delattr(self, name)
        self._pack(samples)
        for name, value in getattr(draws, "sample_stats", {}).items():
            self.register_buffer(f"stat_{name}", value.detach().clone())
        return self

    def _pack(self, samples: Mapping[str, Tensor]) -> None:
        """Sites of one type of number go into one tensor ``draws_k``, shape ``(chains, draws, p)``."""
        kinds = list(dict.fromkeys(value.dtype for value in samples.values()))
        self._arrange({name: (kinds.index(value.dtype), value.shape[2:]) for name, value in samples.items()})
        for k, kind in enumerate(kinds):
            parts = [
                value.flatten(2) if value.dim() > 2 else value.unsqueeze(-1)
                for value in samples.values()
                if value.dtype == kind
            ]
            self.register_buffer(f"draws_{k}", torch.cat(parts, -1))

    def _arrange(self, sites: Mapping[str, tuple[int, Size]]) -> None:
        """Where the sites lie, of each of which the number of its packed tensor and its shape are known."""
        stops: dict[int, int] = {}
        self._layout = {}
        for name, (group, shape) in sites.items():
            start = stops.get(group, 0)
            stops[group] = start + shape.numel()
            self._layout[name] = group, slice(start, stops[group]), shape
        self._median = None

    # ------------------------------------------------------------------ set-up

    @property
    @override
    def model(self) -> Any:
        """The model; while the guide is initialised, one that draws nothing, since not every prior can be drawn from."""
        model = super().model
        return SubstituteMessenger(self._start)(model) if self._start else model

    def initialize(self, *args: Any, **kwargs: Any) -> Self:
        """
        Runs the model once, to know its sites and plates, and compares them with the draws.

        :param args: arguments of the model, **with observations**, or data, of which the first batch is taken (see
            :mod:`pyro_bnn.model.arguments`).
        :param kwargs: keyword arguments of the model.
        :return: the guide itself.
        :raises ValueError: if draws of a site are missing, of another shape, or outside of its support, or if there are draws of
            what is no site.
        """
        if self.prototype_trace is None:
            initialize_with(self, args, kwargs)
        return self

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with local_parameters(), poutine.block(), evaluation_mode():
            trace = run_model(self.model, (args, kwargs))
            check_latents(trace, self)
            self._start = {name: trace.nodes[name]["value"] for name in latent_names(trace)}
            try:
                super()._setup_prototype(*args, **kwargs)
            finally:
                self._start = {}
        detach_prototypes(self)
        if self._layout:
            self._match(trace)

    def _match(self, trace: Trace) -> None:
        """Brings the sites into the order of the model; refused where they are not its own."""
        samples = in_order(self.samples, trace)
        if [*samples] == [*self._layout]:
            self._arrange({n: (self._layout[n][0], value.shape[2:]) for n, value in samples.items()})
        else:
            self._pack(samples)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        self._median = None
        return super()._apply(fn, *args, **kwargs)

    @override
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, (group, _, shape) in self._layout.items():
            destination[f"{prefix}site.{name}"] = torch.tensor([group, *shape])

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        device = next((buffer.device for buffer in self.buffers()), None)
        for name in {*self._buffers} - {"weights"}:
            delattr(self, name)
        self.weights = None
        sites = {}
        for name, value in own.items():
            if name == "weights" or name.startswith(("draws_", "stat_")):
                self.register_buffer(name, torch.empty_like(value, device=device))
            elif name.startswith("site."):
                group, *shape = state_dict.pop(prefix + name).tolist()
                sites[name.removeprefix("site.")] = group, Size(shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._arrange(sites)
        if self.prototype_trace is not None and sites:
            self._match(self.prototype_trace)

    # ------------------------------------------------------------------ draws

    @property
    @override
    def samples(self) -> dict[str, Tensor]:
        """The stored draws by site, shape ``(chains, draws) + site shape``."""
        return {name: self._site(name, ()) for name in self._require()._layout}

    @property
    def sample_stats(self) -> dict[str, Tensor]:
        """What the sampler recorded of every draw, shape ``(chains, draws)``."""
        return {
            name.removeprefix("stat_"): value
            for name, value in self.named_buffers(recurse=False)
            if name.startswith("stat_")
        }

    def _require(self) -> Self:
        if not self._layout:
            raise RuntimeError(
                f"{type(self).__name__} holds no draws: pass some, AutoEmpirical(model, draws), or load those of a file by load_guide."
            )
        return self

    def _site(self, name: str, index: Any) -> Tensor:
        """Draws of a site: all for ``()``, shape ``(chains, draws) + site shape``, or some by their numbers."""
        group, where, shape = self._layout[name]
        packed: Tensor = getattr(self, f"draws_{group}")
        if isinstance(index, Tensor):
            packed = packed.flatten(0, 1)[index.to(packed.device)]
        return packed[..., where].view(packed.shape[:-1] + shape)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Draws all latent sites, as every Pyro guide does.

        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: a dictionary from site names to draws.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        index = pyro.sample(
            f"_{self._pyro_name}_draw", _DrawIndex(self._require().draw_weights), infer={"is_auxiliary": True}
        )
        plates = self._create_plates(*args, **kwargs)
        prototype: Any = self.prototype_trace
        values = {}
        for name in self._layout:
            site = prototype.nodes[name]
            batch = len(site["fn"].batch_shape)
            # draws in a dimension of their own lie left of the plates of the site
            lead = index.shape[: max(0, index.dim() - batch)]
            value = self._site(name, index.reshape(lead))
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                values[name] = pyro.sample(name, dist.Delta(value, event_dim=site["fn"].event_dim))
        return values

    @torch.no_grad()
    def sample_posterior(
        self,
        sample_shape: Sequence[int] = (),
        *args: Any,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """
        Independent draws with replacement, by weight; :meth:`get_samples` has the stored ones.

        :param sample_shape: leading shape of the draws.
        :param generator: source of random numbers; torch's default if ``None``.
        :return: by site name, draws of shape ``sample_shape + site_shape``.
        """
        index = _DrawIndex(self._require().draw_weights).sample(Size(sample_shape), generator)
        return {name: self._site(name, index) for name in self._layout}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        r"""
        Elementwise quantiles: the smallest stored value x with :math:`\sum_s w_s 1[z_s\le x] \ge q`.

        Of sites whose elements constrain each other (a simplex) they are taken in unconstrained space.

        :param quantiles: probabilities between 0 and 1.
        :return: by site name, shape ``(len(quantiles),) + site_shape``.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        levels: list[float] = torch.as_tensor(quantiles, dtype=torch.float64).tolist()
        if not all(0 <= q <= 1 for q in levels):
            raise ValueError(f"quantiles must lie between 0 and 1, found {levels}.")
        weights = None if self._require().equal_weights else self.draw_weights
        found = {}
        for name, value in self.samples.items():
            transform = self._transform(name)
            value = value.flatten(0, 1) if transform is None else transform.inv(value.flatten(0, 1))
            result = weighted_quantiles(value, weights, levels)
            found[name] = result if transform is None else transform(result)
        return found

    def _transform(self, name: str) -> Any:
        """The map from unconstrained space to the support of a site; ``None`` where elements are free of each other."""
        assert self.prototype_trace is not None
        support = self.prototype_trace.nodes[name]["fn"].support
        return None if support.is_discrete or base_support(support).event_dim == 0 else biject_to(support)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        The elementwise medians, of an even number of draws the lower of the two in the middle; they need not lie near any draw.

        :return: by site name, the median.
        """
        if self._median is None:
            self._median = {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}
        return {name: value.clone() for name, value in self._median.items()}

    # ------------------------------------------------------------------ shown

    def summary(self) -> GuideSummary:
        """
        What the guide holds.

        :return: facts, and a table of the sites with their shapes, root mean square means, standard deviations and those of the
            means of chains, of the values themselves; it prints itself.

        Example::

            >>> def model():
            ...     pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            >>> guide = AutoEmpirical(model, {"z": torch.arange(6.0).reshape(2, 3)}).initialize()
            >>> print(guide.summary())
            AutoEmpirical: num_chains=1, num_draws=2
              latents  3
              weights  equal
              density  none: neither bounds nor importance weights
            site  shape  latents  location   sd  sd between chains
            z      (3,)        3      2.63  1.5                  -
        """
        return summarize(self, _SHOWN)

    def extra_repr(self) -> str:
        """What stands between the brackets of the representation."""
        return f"{self.num_chains} chains of {self.num_draws} draws" if self._layout else "no draws"

    def _repr_html_(self) -> str:
        return outline(self, _SHOWN if self._layout else ())


class _DrawIndex(dist.TorchDistribution):
    """The number of a stored draw, by weight. It has no density that a bound could use."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.nonnegative_integer
    has_rsample = False

    def __init__(self, weights: Tensor, batch_shape: Sequence[int] = ()) -> None:
        self.weights = weights
        super().__init__(Size(batch_shape), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_DrawIndex":
        return _DrawIndex(self.weights, batch_shape)

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        device = generator.device if generator is not None else "cpu"
        points = torch.rand(shape, dtype=torch.float64, generator=generator, device=device).cpu()
        cumulative = self.weights.cumsum(0)
        last = int(self.weights.nonzero().max())
        return torch.searchsorted(cumulative, points * cumulative[-1], right=True).clamp(max=last)

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError(
            "AutoEmpirical draws from stored draws and has no density: it cannot be trained, and bounds (SVI, fit) and importance "
            "weights are not defined. Predict with it, or fit a guide that has a density to its draws."
        )
