# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Mixture guides whose components are shared by all latent sites."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from typing_extensions import override

from pyro_bnn.distributions.mixture import SharedIndexMixture
from pyro_bnn.infer.autoguide.component_parameters import ComponentParameters
from pyro_bnn.infer.autoguide.components import LatentSite, draw_low_rank, mirrored_draws
from pyro_bnn.infer.autoguide.data_rows import require_observations, row_sources
from pyro_bnn.infer.autoguide.families import (
    ComponentLike,
    check_component_keys,
    check_kind,
    choose_kind,
    describe_site,
    site_role,
)
from pyro_bnn.infer.autoguide.initialization import init_component
from pyro_bnn.infer.autoguide.summary import GuideSummary, outline, summarize
from pyro_bnn.infer.initialize import check_latents, initialize_with, run_model
from pyro_bnn.model.flat import init_flat
from pyro_bnn.model.handlers import SubstituteMessenger, observed_names
from pyro_bnn.model.observations import check_labels, check_shape
from pyro_bnn.nn.sites import SITE_KEY, module_path
from pyro_bnn.ops.options import require_choice

#: Options that representations show.
_SHOWN = ("num_components", "component")


class AutoMixture(ComponentParameters):
    r"""
    A mixture of :math:`K` components whose index is shared by all sites,

    .. math:: q(z) = \frac1K \sum_{k=1}^K \prod_i q_{ik}(z_i).

    With ``component="normal"`` on the factors of rank-1 layers this is the posterior of rank-1 Bayesian neural
    networks [1]; with ``component="delta"`` on rank-1 factors it is BatchEnsemble [2], on full weights a deep
    ensemble [3]; with one component and ``"normal"`` it is mean-field variational inference.

    Inside :class:`~pyro_bnn.infer.Mixture_ELBO` all components are evaluated at once, each site being drawn
    directly from its distribution, so that divergences are analytic. Elsewhere (:class:`~pyro.infer.Predictive`,
    :class:`~pyro.infer.Trace_ELBO`, importance weights) every call draws a component, and the density is the exact
    joint mixture density, carried by one auxiliary site.

    :param callable model: a Pyro model.
    :param int num_components: :math:`K`.
    :param component: the family of the components: ``"normal"``, ``"cauchy"``, ``"lognormal"``, ``"delta"`` (one
        value per component), ``"point"`` (one value that all components share) or ``"low_rank"`` (a Gaussian with
        covariance :math:`\operatorname{diag} \sigma^2 + V V^\top` over all sites of this family in unconstrained space). A
        mapping from site names, last parts of names, or patterns such as ``"layers.*.bias"`` to families, or
        ``callable(name, site)``, decides per site; sites that it leaves out get the default.
    :param str scale: ``"free"``, one trained scale per element; ``"shared"``, one per component and site;
        ``"fixed"``, the initial one.
    :param int rank: number of columns of :math:`V` for ``"low_rank"``.
    :param str noise: ``"shared"`` or ``"per_example"``: inside :class:`~pyro_bnn.infer.Mixture_ELBO`, rank-1 factors
        are drawn once per component and batch, or independently for every example, which has the same expectation
        and a lower variance. The divergence is counted once either way. Cauchy factors need ``"per_example"``: one draw
        from far in the tails otherwise spoils the gradient of the whole batch.
    :param str rest: if the model has rank-1 factors, the family of its other latent sites (biases, noise scales).
        Weights that a rank-1 layer draws through ``weight_prior`` are always shared (``"point"``) by default.
    :param callable init_loc_fn: initial value of a site, called once per component; :func:`init_component` by
        default. Use :func:`~pyro_bnn.nn.init_to_trained` to start at the weights of a trained network.
    :param float init_scale: initial scale of the components in unconstrained space; the default corresponds to a
        dropout rate of :math:`10^{-3}`, :math:`\sigma = \sqrt{p/(1-p)}` [1].
    :param callable create_plates: as for :class:`~pyro.infer.autoguide.AutoGuide`.
    :raises ValueError: if ``num_components`` or a family is not valid.

    **References**

    [1] Dusenberry et al., *Efficient and Scalable Bayesian Neural Nets with Rank-1 Factors*, ICML 2020.

    [2] Wen, Tran, Ba, *BatchEnsemble*, ICLR 2020.

    [3] Lakshminarayanan, Pritzel, Blundell, *Simple and scalable predictive uncertainty estimation using deep
    ensembles*, NeurIPS 2017.

    Example::

        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        >>> guide = AutoMixture(model, num_components=4).initialize()
        >>> guide.sample_posterior((10,))["z"].shape
        torch.Size([10, 3])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_components: int = 4,
        component: ComponentLike = "normal",
        *,
        rest: str = "delta",
        scale: str = "free",
        rank: int = 8,
        noise: str = "shared",
        init_loc_fn: Callable[[Any], Tensor] = init_component,
        init_scale: float = 0.0316,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if not isinstance(num_components, int) or num_components < 1:
            raise ValueError(f"num_components must be an integer of at least 1, found {num_components!r}.")
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, found {init_scale!r}.")
        require_choice("scale", scale, "free", "shared", "fixed")
        require_choice("noise", noise, "shared", "per_example")
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, found {rank!r}.")
        named = component.values() if isinstance(component, Mapping) else [component]
        for kind in (rest, *named):
            if not callable(kind):
                check_kind(kind)
        self.init_loc_fn = init_flat(init_loc_fn)
        super().__init__(InitMessenger(self.init_loc_fn)(model), create_plates=create_plates)
        self.num_components = num_components
        self.component = component
        self.rest = rest
        self.init_scale = float(init_scale)
        self.scale_mode, self.rank, self.noise = scale, rank, noise
        self._index: LatentSite | None = None
        self._stratum: int | None = None
        self._component: int | None = None
        self._is_stratified = False
        self._particles = 1
        self._mirrored = False

    def __repr__(self) -> str:
        """What the guide is: its components and their family, and the number of latents."""
        trace: Any = self.prototype_trace
        state = "not initialised"
        if trace is not None:
            state = f"{sum(site['value'].numel() for _, site in trace.iter_stochastic_nodes()):,} latents"
        return (
            f"{type(self).__name__}({self.num_components} x {self.component!r}, rest={self.rest!r}, {state})"
        )

    def _repr_html_(self) -> str:
        return outline(self, _SHOWN)

    def summary(self) -> GuideSummary:
        """
        What the guide holds.

        :return: facts, and a table of the sites with their families, locations and spreads, within components and between
            them, in unconstrained space; it prints itself.

        Example::

            >>> def model():
            ...     pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            >>> guide = AutoMixture(model, 2, init_loc_fn=lambda site: torch.ones(3), init_scale=0.5).initialize()
            >>> print(guide.summary())
            AutoMixture: num_components=2, component='normal'
              latents     3 in 1 sites
              parameters  12
              scales      free
              noise       shared
            site  shape  latents  family  location  sd between  sd within
            z      (3,)        3  normal         1           0        0.5
        """
        return summarize(self, _SHOWN)

    # ------------------------------------------------------------------ life cycle

    def initialize(self, *args: Any, **kwargs: Any) -> "AutoMixture":
        """
        Creates all parameters from one call of the model **with its observations**.

        :param args: arguments of the model, or data, of which the first batch is taken (see :mod:`pyro_bnn.model.arguments`).
        :param kwargs: keyword arguments of the model.
        :return: the guide itself.
        :raises ValueError: if the model was called without observations, a family does not fit the support of
            a site, or a key of ``component`` names no site.
        """
        initialize_with(self, args, kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with poutine.block(), torch.enable_grad():  # some models take derivatives themselves
            trace = run_model(self.model, (args, kwargs))
        require_observations(trace, args)
        for name in observed_names(trace):
            check_shape(name, trace.nodes[name])
            check_labels(name, trace.nodes[name])
        check_latents(trace, self)
        named = [name for name, _ in trace.iter_stochastic_nodes()] + observed_names(trace)
        self.plate_names = {f.name for name in named for f in trace.nodes[name]["cond_indep_stack"]}
        self._row_sources = row_sources(trace, args, kwargs)
        super()._setup_prototype(*args, **kwargs)
        nodes = dict(self.prototype_trace.iter_stochastic_nodes())
        check_component_keys(self.component, nodes)
        has_factors = any(site_role(site) == "factor" for site in nodes.values())
        sites = []
        for name, site in nodes.items():
            kind = choose_kind(self.component, self.rest, name, site, has_factors)
            sites.append(describe_site(name, site, kind, self.num_components))
            if self.noise == "per_example" and kind == "low_rank" and site_role(site) == "factor":
                raise ValueError(
                    f"noise='per_example' is for components with independent elements, but those of {name!r} are "
                    "low-rank: use noise='shared'."
                )
        self._arrange(sites)
        self._index = next((s for s in self.sites if s.kind == "index"), None)
        for key in list(pyro.get_param_store().keys()):
            # a guide that is initialised starts at its own values, not at those of an earlier guide of this name
            if key.startswith(module_path(self) + "."):
                del pyro.get_param_store()[key]
        self._make_parameters(nodes)

    @property
    def has_density(self) -> bool:
        """Whether no site is a point mass."""
        return all(site.family.unit is not None or site.kind == "index" for site in self.sites)

    @property
    def index_name(self) -> str | None:
        """The site of the model that holds the index of the component, if it has one."""
        return None if self._index is None else self._index.name

    @property
    def is_single(self) -> bool:
        """Whether a call is one draw from one component: no index, no noise per example."""
        return self.num_components == 1 and self.noise == "shared" and self.index_name is None

    def is_factorized(self) -> bool:
        """
        :return: whether a call is nothing but draws of the components of the named sites, which :meth:`draw` gives
            too.
        """
        own = type(self).forward is AutoMixture.forward and self.create_plates is None
        return own and not self._has_hooks and not any(s.kind in ("low_rank", "index") for s in self.sites)

    # ------------------------------------------------------------------ sampling

    @contextmanager
    def stratified(
        self, dim: int | None, num_particles: int = 1, component: int | None = None, mirrored: bool = False
    ) -> Iterator[None]:
        """
        Within this context a call of the guide draws every component once, component k in slot k of batch
        dimension ``dim``. :class:`~pyro_bnn.infer.Mixture_ELBO` uses it.

        :param dim: the batch dimension, left of all plates of the model; ``None`` for one component without any.
        :param int num_particles: draws per component, in the dimension left of it, inside a plate of this size.
        :param component: draw this component only, in a dimension of size 1, or without one if ``dim`` is ``None``.
        :param bool mirrored: see :meth:`draw`.
        """
        self._stratum, self._is_stratified, self._component = dim, True, component
        self._particles, self._mirrored = num_particles, mirrored
        try:
            yield
        finally:
            self._stratum, self._is_stratified, self._component, self._mirrored = None, False, None, False

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
        plates = self._create_plates(*args, **kwargs)
        values = {
            site.name: self._sample(site, dist.Delta(value, event_dim=site.event_dim), plates)
            for site, value in self.point_values()
        }
        if self._is_stratified or self.num_components == 1:
            self._sample_components(values, plates, args, kwargs)
        elif self._index is not None:
            self._sample_given_index(values, plates, self._index)
        elif self._mixed:
            self._sample_mixture(values, plates)
        return values

    def _sample(self, site: LatentSite, fn: Any, plates: Mapping[str, Any]) -> Tensor:
        infer: Any = {SITE_KEY: {"kind": site.kind, "role": site.role}}
        with ExitStack() as stack:
            for frame in site.frames:
                stack.enter_context(plates[frame.name])
            return pyro.sample(site.name, fn, infer=infer)

    def _sample_components(
        self, values: dict[str, Tensor], plates: Mapping[str, Any], args: Any, kwargs: Any
    ) -> None:
        """Registers every component at its place, inside the bound with the values that :meth:`draw` gives."""
        nesting = None if self._stratum is None else -self._stratum - 1
        ones = (1,) * (nesting or 0)
        if self._index is not None:  # component k has index k
            probs = self._present(torch.eye(self.num_components, device=self.loc.device))
            probs = probs.view(*(() if nesting is None else (len(probs), *ones)), -1)
            values[self._index.name] = self._sample(self._index, dist.Categorical(probs=probs), {})
        self._sample_low_rank(
            values, plates, lambda t: t[0] if nesting is None else t.unflatten(0, (-1, *ones))
        )
        drawn = (
            self.draw(nesting, self._particles, args, kwargs, self._mirrored) if self._is_stratified else {}
        )
        with SubstituteMessenger(drawn):
            for site, loc, scale in self._blocks():
                if site.kind == "low_rank":
                    continue
                fn = self.site_distribution(site, loc, scale, nesting)
                if site.name in drawn and self._particles > 1 and nesting is not None:
                    fn = fn.expand(torch.Size((self._particles, *fn.batch_shape)))
                alone = site.name in drawn and self._is_per_example(site)
                values[site.name] = self._sample(site, fn, {} if alone else plates)

    def _sample_given_index(
        self, values: dict[str, Tensor], plates: Mapping[str, Any], site: LatentSite
    ) -> None:
        """The model knows the index, so that the density given the index is the right one."""
        probs = self.loc.new_full((self.num_components,), 1.0 / self.num_components)
        index = values[site.name] = pyro.sample(site.name, dist.Categorical(probs=probs))
        self._sample_low_rank(values, plates, lambda t: t[index])
        for site, loc, scale in self._blocks():
            if site.kind != "low_rank":
                fn = site.distribution(loc[index], None if scale is None else scale[index], site.event_dim)
                values[site.name] = self._sample(site, fn, plates)

    def _sample_mixture(self, values: dict[str, Tensor], plates: Mapping[str, Any]) -> None:
        """Draws all sites from one component, as one auxiliary site with the density of the mixture."""
        low_rank = self._low_rank()
        blocks = [*([] if low_rank is None else [low_rank]), *self.component_distributions().values()]
        latent = pyro.sample(
            f"_{module_path(self)}_latent", SharedIndexMixture(blocks), infer={"is_auxiliary": True}
        )
        sizes = [s.size if s.kind == "low_rank" else s.shape.numel() for s in self._mixed]
        for site, piece in zip(self._mixed, latent.split(sizes, -1), strict=True):
            if site.kind == "low_rank":
                raw = piece.reshape(piece.shape[:-1] + site.raw_shape)
                values[site.name] = self._sample_piece(site, raw, plates)
                continue
            shape = torch.broadcast_shapes(site.shape, latent.shape[:-1] + (1,) * site.event_dim)
            value = piece.reshape(shape)
            values[site.name] = self._sample(site, dist.Delta(value, event_dim=site.event_dim), plates)

    def _sample_low_rank(
        self, values: dict[str, Tensor], plates: Mapping[str, Any], place: Callable[[Tensor], Tensor]
    ) -> None:
        """Draws the joint Gaussian, its components put in place, as one auxiliary site and hands out its pieces."""
        joint = self._low_rank()
        if joint is None:
            return
        parts: Any = map(place, (joint.loc, joint.cov_factor, joint.cov_diag))
        joint = dist.LowRankMultivariateNormal(*parts)
        name = f"_{module_path(self)}_low_rank"
        with SubstituteMessenger({name: mirrored_draws(joint, self._particles)} if self._mirrored else {}):
            latent = pyro.sample(name, joint, infer={"is_auxiliary": True})
        for site, raw in self._split_low_rank(latent):
            values[site.name] = self._sample_piece(site, raw, plates)

    def _sample_piece(self, site: LatentSite, raw: Tensor, plates: Mapping[str, Any]) -> Tensor:
        """Registers a site's part of the joint Gaussian, whose density is that of the auxiliary site."""
        value, volume = site.constrain(raw)
        return self._sample(site, dist.Delta(value, log_density=-volume, event_dim=site.event_dim), plates)

    @torch.no_grad()
    def sample_posterior(
        self,
        sample_shape: Sequence[int] = (),
        *args: Any,
        stratified: bool = True,
        by_component: bool = False,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """
        Draws from the mixture.

        :param sample_shape: shape of the draws.
        :param args: arguments of the model; needed only if the guide is not initialised.
        :param bool stratified: take each component equally often, in random order. Every draw then has the
            distribution of the mixture, and averages over draws have a lower variance than with independent draws
            (``False``).
        :param bool by_component: take component k at position k of the first sample dimension, which must have size
            :math:`K`.
        :return: a dictionary from site names to draws, shape ``(*sample_shape, *site_shape)``.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        shape = torch.Size(sample_shape)
        total, K = shape.numel(), self.num_components
        if by_component:
            if not shape or shape[0] != K:
                raise ValueError(
                    f"by_component needs a first sample dimension of size {K}, found {tuple(shape)}."
                )
            index = torch.arange(K).repeat_interleave(total // K)
        elif stratified:
            offset = int(torch.randint(K, ()))
            index = ((torch.arange(total) + offset) % K)[torch.randperm(total)]
        else:
            index = torch.randint(K, (total,))
        draws = {site.name: value.detach().expand(shape + site.shape) for site, value in self.point_values()}
        if self._index is not None:
            draws[self._index.name] = index.to(self.loc.device).reshape(shape + self._index.shape)
        low_rank = self._low_rank()
        if low_rank is not None:
            joint = draw_low_rank(low_rank, index.to(low_rank.loc.device))
            for site, raw in self._split_low_rank(joint):
                draws[site.name] = site.transform(raw).reshape(shape + site.shape)
        for site, loc, scale in self._blocks():
            if site.kind != "low_rank":
                draws[site.name] = site.draw(loc, scale, index.to(loc.device)).reshape(shape + site.shape)
        return {site.name: draws[site.name] for site in self.sites}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        The elementwise medians of the marginal mixtures. They need not lie near any component.

        :return: a dictionary from site names to medians.
        """
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        Elementwise quantiles of the marginal mixtures, by bisection between the components' quantiles.

        :param quantiles: levels between 0 and 1.
        :return: a dictionary from site names to quantiles, shape ``(len(quantiles), *site_shape)``.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        levels = [float(q) for q in quantiles]
        result = {
            site.name: value.detach().expand(len(levels), *value.shape) for site, value in self.point_values()
        }
        if self._index is not None:
            result[self._index.name] = torch.tensor([int(q * (self.num_components - 1)) for q in levels])
        spread = self.low_rank_scales()
        for site, loc, scale in self._blocks():
            if site.kind == "low_rank":
                scale = spread[site.name]
            result[site.name] = torch.stack([site.quantile(loc, scale, q) for q in levels])
        return {site.name: result[site.name] for site in self.sites}
