# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Mixture guides whose components are shared by all latent sites."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from pyro_bnn.distributions.mixture import SharedIndexMixture
from pyro_bnn.infer.autoguide.component_parameters import ComponentParameters
from pyro_bnn.infer.autoguide.components import (
    SCALED_KINDS,
    LatentSite,
    component_distribution,
    constrain,
    draw_components,
    draw_low_rank,
    raw_quantile,
)
from pyro_bnn.infer.autoguide.data_rows import num_rows, require_observations, row_sources
from pyro_bnn.infer.autoguide.families import (
    ComponentLike,
    check_component_keys,
    check_kind,
    choose_kind,
    describe_site,
    site_role,
)
from pyro_bnn.infer.autoguide.initialization import init_component
from pyro_bnn.infer.autoguide.joint_draws import JointDraws
from pyro_bnn.model.flat import init_flat
from pyro_bnn.model.handlers import SubstituteMessenger, observed_names
from pyro_bnn.model.observations import check_labels
from pyro_bnn.nn.sites import SITE_KEY


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
        covariance :math:`\operatorname{diag} \sigma^2 + V V^\top` over the concatenation of all sites of this family in
        unconstrained space). A mapping from site names, last
        parts of names, or patterns such as ``"layers.*.bias"`` to families, or ``callable(name, site)``, decides per
        site; sites that it leaves out get the default.
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
        if scale not in ("free", "shared", "fixed"):
            raise ValueError(f"scale must be 'free', 'shared' or 'fixed', found {scale!r}.")
        if noise not in ("shared", "per_example"):
            raise ValueError(f"noise must be 'shared' or 'per_example', found {noise!r}.")
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, found {rank!r}.")
        named = [rest, *([component] if isinstance(component, str) else [])]
        for kind in named + (list(component.values()) if isinstance(component, Mapping) else []):
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
        self._lead: tuple[int, ...] = ()

    def __repr__(self) -> str:
        """What the guide is: its components and their family, and the number of latents."""
        trace: Any = self.prototype_trace
        state = "not initialised"
        if trace is not None:
            state = f"{sum(site['value'].numel() for _, site in trace.iter_stochastic_nodes()):,} latents"
        return (
            f"{type(self).__name__}({self.num_components} x {self.component!r}, rest={self.rest!r}, {state})"
        )

    # ------------------------------------------------------------------ life cycle

    def initialize(self, *args: Any, **kwargs: Any) -> "AutoMixture":
        """
        Creates all parameters from one call of the model **with its observations**.

        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: the guide itself.
        :raises ValueError: if the model was called without observations, a family does not fit the support of
            a site, or a key of ``component`` names no site.
        """
        self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with poutine.block(), torch.enable_grad():  # some models take derivatives themselves
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        require_observations(trace, args)
        for name in observed_names(trace):
            check_labels(name, trace.nodes[name])
        self.plate_names = {f.name for _, s in trace.iter_stochastic_nodes() for f in s["cond_indep_stack"]}
        self.plate_names |= {
            f.name for n in observed_names(trace) for f in trace.nodes[n]["cond_indep_stack"]
        }
        self._row_sources = row_sources(trace, args, kwargs)
        super()._setup_prototype(*args, **kwargs)
        nodes = dict(self.prototype_trace.iter_stochastic_nodes())
        if not nodes:
            raise ValueError("AutoMixture found no latent site in the model.")
        check_component_keys(self.component, nodes)
        has_factors = any(site_role(site) == "factor" for site in nodes.values())
        self.sites = []
        for name, site in nodes.items():
            kind = choose_kind(self.component, self.rest, name, site, has_factors)
            self.sites.append(describe_site(name, site, kind, self.num_components))
        # scaled sites first, so that the scales align with the first columns of the locations
        if self.noise == "per_example":
            for site in self.sites:
                if site.kind == "low_rank" and site.role == "factor":
                    raise ValueError(
                        f"noise='per_example' is for components with independent elements, but those of {site.name!r} are "
                        "low-rank: use noise='shared'."
                    )
        order = ("low_rank", *SCALED_KINDS)
        mixed = (s for s in self.sites if s.kind not in ("point", "index"))
        self._mixed = sorted(mixed, key=lambda s: (s.kind not in order, s.kind != "low_rank"))
        self._num_scaled = sum(s.kind in order for s in self._mixed)
        self._joint = JointDraws(self._mixed, self._num_scaled, self.noise == "per_example")
        self._index = next((s for s in self.sites if s.kind == "index"), None)
        for key in list(pyro.get_param_store().keys()):
            # a guide that is initialised starts at its own values, not at those of an earlier guide of this name
            if key.startswith(self._pyro_name + "."):
                del pyro.get_param_store()[key]
        self._make_parameters(nodes)

    @property
    def has_density(self) -> bool:
        """Whether no site is a point mass."""
        return all(site.kind in (*SCALED_KINDS, "low_rank", "index") for site in self.sites)

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
        hooks = self._forward_hooks or self._forward_pre_hooks
        own = type(self).forward is AutoMixture.forward and self.create_plates is None
        return own and not hooks and not any(s.kind in ("low_rank", "index") for s in self.sites)

    def draw(
        self, nesting: int | None, num_particles: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """
        Draws of every component for the sites that have a location per component, in one go.

        :param nesting: number of plate dimensions of the model, or ``None`` for one component without a dimension.
        :param int num_particles: draws per component.
        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: values by site, see :meth:`~pyro_bnn.infer.autoguide.joint_draws.JointDraws.draw`.
        """
        if not self._num_scaled:
            return {}
        particles = (num_particles,) if num_particles > 1 else ()
        rows = (
            num_rows(self._row_sources if nesting else (), args, kwargs)
            if self.noise == "per_example"
            else None
        )
        return self._joint.draw(
            self._present(self.loc), self._present(self._full_scale()), particles, nesting, rows
        )

    # ------------------------------------------------------------------ sampling

    @contextmanager
    def stratified(
        self, dim: int | None, num_particles: int = 1, component: int | None = None
    ) -> Iterator[None]:
        """
        Within this context a call of the guide draws every component once, component k in slot k of batch
        dimension ``dim``. :class:`~pyro_bnn.infer.Mixture_ELBO` uses it.

        :param dim: the batch dimension, negative, left of all plates of the model; ``None`` for one component without
            a dimension.
        :param int num_particles: draws per component, in the dimension left of it, inside a plate of this size.
        :param component: draw this component only, in a dimension of size 1, or without one if ``dim`` is ``None``.
        """
        self._stratum, self._is_stratified, self._component = dim, True, component
        self._lead = (num_particles,) if num_particles > 1 else ()
        try:
            yield
        finally:
            self._stratum, self._is_stratified, self._component = None, False, None

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """
        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :return: a dictionary from site names to values.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        values: dict[str, Tensor] = {}
        for site, fn in self.point_distributions():
            values[site.name] = self._sample(site, fn, plates)
        if self._stratum is not None:
            if self._index is not None:
                values[self._index.name] = self._sample_index(self._index)
            self._sample_low_rank(values, plates)
            self._sample_all(values, plates, -self._stratum - 1, args, kwargs)
        elif self._component is not None:
            if self._index is not None:
                values[self._index.name] = self._sample_index(self._index)
            self._sample_low_rank(values, plates, torch.zeros((), dtype=torch.long))
            self._sample_all(values, plates, None, args, kwargs)
        elif self._index is not None:
            # the model knows the index, so that the density given the index is the right one
            probs = self.loc.new_full((self.num_components,), 1.0 / self.num_components)
            index = values[self._index.name] = pyro.sample(self._index.name, dist.Categorical(probs=probs))
            self._sample_low_rank(values, plates, index)
            for site, loc, scale in self._blocks():
                if site.kind != "low_rank":
                    fn = component_distribution(
                        site, loc[index], None if scale is None else scale[index], site.event_dim
                    )
                    values[site.name] = self._sample(site, fn, plates)
        elif self.num_components == 1:
            self._sample_low_rank(values, plates, torch.zeros((), dtype=torch.long))
            self._sample_all(values, plates, None, args, kwargs)
        elif self._mixed:
            blocks = list(self.component_distributions().values())
            low_rank = self._low_rank()
            joint = SharedIndexMixture([*([] if low_rank is None else [low_rank]), *blocks])
            latent = pyro.sample(f"_{self._pyro_name}_latent", joint, infer={"is_auxiliary": True})
            sizes = [s.size if s.kind == "low_rank" else s.shape.numel() for s in self._mixed]
            for site, piece in zip(self._mixed, latent.split(sizes, -1), strict=True):
                if site.kind == "low_rank":
                    values[site.name] = self._sample_piece(site, piece, plates)
                    continue
                value = piece.reshape(
                    torch.broadcast_shapes(site.shape, latent.shape[:-1] + (1,) * site.event_dim)
                )
                values[site.name] = self._sample(site, dist.Delta(value, event_dim=site.event_dim), plates)
        return values

    def _sample(self, site: LatentSite, fn: Any, plates: Mapping[str, Any]) -> Tensor:
        infer: Any = {SITE_KEY: {"kind": site.kind, "role": site.role}}
        with ExitStack() as stack:
            for frame in site.frames:
                stack.enter_context(plates[frame.name])
            return pyro.sample(site.name, fn, infer=infer)

    def _sample_all(
        self,
        values: dict[str, Tensor],
        plates: Mapping[str, Any],
        nesting: int | None,
        args: Any,
        kwargs: Any,
    ) -> None:
        """Registers the components of the sites; inside the bound with the values that :meth:`draw` gives."""
        drawn = self.draw(nesting, max(1, *self._lead, 1), args, kwargs) if self._is_stratified else {}
        with SubstituteMessenger(drawn):
            for site, loc, scale in self._blocks():
                if site.kind != "low_rank":
                    fn = self.site_distribution(site, loc, scale, nesting)
                    if site.name in drawn and self._lead and nesting is not None:
                        fn = fn.expand(torch.Size((*self._lead, *fn.batch_shape)))
                    per_example = site.role == "factor" and self.noise == "per_example" and bool(drawn)
                    values[site.name] = self._sample(site, fn, {} if per_example else plates)

    def _sample_index(self, site: LatentSite) -> Tensor:
        """Component k has index k."""
        probs = self._present(torch.eye(self.num_components, device=self.loc.device))
        lead = () if self._stratum is None else (len(probs), *(1,) * (-self._stratum - 1))
        return self._sample(site, dist.Categorical(probs=probs.view(*lead, -1)), {})

    def _sample_low_rank(
        self, values: dict[str, Tensor], plates: Mapping[str, Any], index: Tensor | None = None
    ) -> None:
        """Draws the joint Gaussian as one auxiliary site and hands out its pieces."""
        joint = self._low_rank()
        if joint is None:
            return
        if index is None:
            assert self._stratum is not None
            ones = (1,) * (-self._stratum - 1)
            joint = dist.LowRankMultivariateNormal(
                *(t.unflatten(0, (-1, *ones)) for t in (joint.loc, joint.cov_factor, joint.cov_diag))
            )
        else:
            joint = dist.LowRankMultivariateNormal(
                joint.loc[index], joint.cov_factor[index], joint.cov_diag[index]
            )
        latent = pyro.sample(f"_{self._pyro_name}_low_rank", joint, infer={"is_auxiliary": True})
        sites = self._low_rank_sites()
        for site, piece in zip(sites, latent.split([site.size for site in sites], -1), strict=True):
            values[site.name] = self._sample_piece(site, piece, plates)

    def _sample_piece(self, site: LatentSite, piece: Tensor, plates: Mapping[str, Any]) -> Tensor:
        """Registers a site's part of the joint Gaussian, whose density is that of the auxiliary site."""
        value, volume = constrain(site, piece.reshape(piece.shape[:-1] + site.raw_shape))
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
        draws: dict[str, Tensor] = {}
        low_rank = self._low_rank()
        if low_rank is not None:
            joint = draw_low_rank(low_rank, index.to(low_rank.loc.device))
            sites = self._low_rank_sites()
            for site, piece in zip(sites, joint.split([s.size for s in sites], -1), strict=True):
                draws[site.name] = site.transform(piece.reshape(shape + site.raw_shape))
        if self._index is not None:
            draws[self._index.name] = index.to(self.loc.device).reshape(shape + self._index.shape)
        for site, loc, scale in self._blocks():
            if site.kind != "low_rank":
                drawn = draw_components(site, loc, scale, index.to(loc.device))
                draws[site.name] = drawn.reshape(shape + site.shape)
        for site in self.sites:
            if site.kind == "point":
                draws[site.name] = attrgetter(site.name)(self.points).detach().expand(shape + site.shape)
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
        result = {}
        low_rank = self._low_rank()
        spread = None if low_rank is None else low_rank.variance.sqrt()
        for site, loc, scale in self._blocks():
            if site.kind == "low_rank" and spread is not None:
                scale, spread = spread[:, : site.size].view_as(loc), spread[:, site.size :]
            rows = [site.transform(raw_quantile(site, loc, scale, q)) for q in levels]
            result[site.name] = torch.stack(rows)
        for site in self.sites:
            if site.kind == "point":
                value = attrgetter(site.name)(self.points).detach()
                result[site.name] = value.expand(len(levels), *value.shape)
            elif site.kind == "index":
                result[site.name] = torch.tensor([int(q * (self.num_components - 1)) for q in levels])
        return {site.name: result[site.name] for site in self.sites}
