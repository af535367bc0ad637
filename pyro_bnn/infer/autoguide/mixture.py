# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Mixture guides whose components are shared by all latent sites."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import deep_setattr, helpful_support_errors
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import biject_to
from torch.nn.utils.rnn import PackedSequence

from pyro_bnn.distributions.mixture import SharedIndexMixture, mixture_quantile
from pyro_bnn.infer.autoguide.components import (
    KINDS,
    SCALED_KINDS,
    LatentSite,
    component_distribution,
    draw_components,
    draw_low_rank,
    is_real,
)
from pyro_bnn.infer.autoguide.initialization import init_component, site_hint
from pyro_bnn.infer.autoguide.joint_draws import JointDraws
from pyro_bnn.infer.handlers import SubstituteMessenger, observed_names
from pyro_bnn.nn.sites import SITE_KEY

#: A family for all sites, a mapping from site names (or patterns) to families, or a callable of name and site.
ComponentLike = str | Mapping[str, str] | Callable[[str, Any], str | None]

_Guide: Any = AutoGuide


class AutoMixture(_Guide):
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
        covariance :math:`\operatorname{diag} \sigma^2 + V V^\top` over the concatenation of all sites of this family). A mapping from site names, last
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

    scale_constraint = constraints.softplus_positive
    # parameters, made by initialize
    loc: Any
    scale: Any
    cov_factor: Any

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
            _check_kind(kind)
        self.init_loc_fn = init_loc_fn
        super().__init__(InitMessenger(init_loc_fn)(model), create_plates=create_plates)
        self.num_components = num_components
        self.component = component
        self.rest = rest
        self.init_scale = float(init_scale)
        self.scale_mode, self.rank, self.noise = scale, rank, noise
        self._index: LatentSite | None = None
        self._stratum: int | None = None
        self._is_stratified = False
        self._lead: tuple[int, ...] = ()

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
        with poutine.block():
            trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        _require_observations(trace, args)
        self.plate_names = {f.name for _, s in trace.iter_stochastic_nodes() for f in s["cond_indep_stack"]}
        self.plate_names |= {
            f.name for n in observed_names(trace) for f in trace.nodes[n]["cond_indep_stack"]
        }
        self._row_sources = _row_sources(trace, args, kwargs)
        super()._setup_prototype(*args, **kwargs)
        nodes = dict(self.prototype_trace.iter_stochastic_nodes())
        if not nodes:
            raise ValueError("AutoMixture found no latent site in the model.")
        self._check_component_keys(nodes)
        has_factors = any(_role(site) == "factor" for site in nodes.values())
        self.sites = [self._describe(name, site, has_factors) for name, site in nodes.items()]
        # scaled sites first, so that the scales align with the first columns of the locations
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

    def _describe(self, name: str, site: Any, has_factors: bool) -> LatentSite:
        fn = site["fn"]
        kind = self._kind(name, site, has_factors)
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"site {name!r} is latent inside the subsampled plate {frame.name!r}, which AutoMixture does not "
                    "support: give it its own guide in an AutoGuideList."
                )
        support = fn.support
        if _role(site) == "index":
            size = fn.enumerate_support(expand=False).shape[0]
            if size != self.num_components:
                raise ValueError(
                    f"site {name!r} distinguishes {size} components, but the guide has {self.num_components}: convert "
                    "the network with the same num_components."
                )
            shape = site["value"].shape
            return LatentSite(name, "index", support, 0, shape, shape, site["cond_indep_stack"], "index")
        if support.is_discrete:
            raise ValueError(f"site {name!r} is discrete ({fn}); AutoMixture takes continuous sites.")
        if kind == "cauchy" and not is_real(support):
            raise ValueError(
                f"site {name!r} has support {support}, but Cauchy components need the real line."
            )
        if kind == "low_rank" and (not is_real(support) or site["cond_indep_stack"]):
            raise ValueError(
                f"site {name!r} is constrained or in a plate; low-rank components allow neither."
            )
        value = site["value"]
        with helpful_support_errors(site):
            raw_shape = biject_to(support).inv(value).shape
        frames = site["cond_indep_stack"]
        return LatentSite(name, kind, support, fn.event_dim, value.shape, raw_shape, frames, _role(site))

    def _kind(self, name: str, site: Any, has_factors: bool) -> str:
        default: str | None = None
        if isinstance(self.component, str):
            default = self.component
        elif isinstance(self.component, Mapping):
            key = _matching_pattern(self.component, name)
            if key is not None:
                return self.component[key]
        else:
            kind = self.component(name, site)
            if kind is not None:
                return _check_kind(kind)
        role = _role(site)
        if role == "base":
            return "point"
        if has_factors and role != "factor":
            return self.rest
        return default or "normal"

    def _check_component_keys(self, nodes: Mapping[str, Any]) -> None:
        if isinstance(self.component, Mapping):
            used = {_matching_pattern(self.component, name) for name in nodes}
            unused = sorted(set(self.component) - used)
            if unused:
                raise ValueError(
                    f"component has keys {unused} that match no site; the sites are {sorted(nodes)[:20]}."
                )

    def _make_parameters(self, nodes: Mapping[str, Any]) -> None:
        rows = []
        for k in range(self.num_components):
            row = []
            for site in self._mixed:
                node = nodes[site.name]
                value = node["value"] if k == 0 else self.init_loc_fn(node)
                row.append(self._unconstrain(site, value.detach()).reshape(-1))
            rows.append(torch.cat(row) if row else torch.zeros(0))
        if self._mixed:
            self.loc = PyroParam(torch.stack(rows), constraints.real)
        sizes = [site.size for site in self._mixed[: self._num_scaled]]
        if sizes:
            width = len(sizes) if self.scale_mode == "shared" else sum(sizes)
            scale = torch.full((self.num_components, width), self.init_scale, dtype=rows[0].dtype).to(
                rows[0].device
            )
            if self.scale_mode == "fixed":
                self.register_buffer("scale", scale)
            else:
                self.scale = PyroParam(scale, self.scale_constraint)
        low_rank = sum(site.size for site in self._mixed if site.kind == "low_rank")
        if low_rank:
            factor = rows[0].new_empty(self.num_components, low_rank, self.rank).normal_()
            self.cov_factor = PyroParam(factor * self.init_scale / self.rank**0.5, constraints.real)
        self.points = PyroModule()
        for site in self.sites:
            if site.kind == "point":
                value = nodes[site.name]["value"].detach().clone()
                deep_setattr(self.points, site.name, PyroParam(value, site.support, site.event_dim))

    def _unconstrain(self, site: LatentSite, value: Tensor) -> Tensor:
        if value.shape != site.shape:
            raise ValueError(
                f"init_loc_fn returned shape {tuple(value.shape)} for site {site.name!r}; expected {tuple(site.shape)}."
            )
        raw = site.transform.inv(value)
        if not bool(torch.isfinite(raw).all()):
            raise ValueError(
                f"the initial value of site {site.name!r} lies outside the support of its {site.kind} component: "
                "pass another init_loc_fn."
            )
        return raw

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
        rows = self._num_rows(args, kwargs, nesting) if self.noise == "per_example" else None
        return self._joint.draw(self.loc, self._full_scale(), particles, nesting, rows)

    def site_distribution(
        self, site: LatentSite, loc: Tensor, scale: Tensor | None, nesting: int | None
    ) -> Any:
        """
        The components of one site, in the layout of :meth:`draw`.

        :param site: the site.
        :param loc: shape ``(K, *raw_shape)``.
        :param scale: the same, or ``None``.
        :param nesting: number of plate dimensions of the model, or ``None`` for one component without a dimension.
        :return: a distribution.
        """
        if nesting is None:
            shape = site.raw_shape
        else:  # the model's own plates fill the dimensions right of the components
            ones = (1,) * (nesting - len(site.shape) + site.event_dim)
            shape = torch.Size((self.num_components, *ones, *site.raw_shape))
        spread = None if scale is None else scale.view(shape)
        return component_distribution(site, loc.view(shape), spread, site.event_dim)

    def _num_rows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], nesting: int | None) -> int:
        """The number of examples in this call."""
        for key, dim in self._row_sources if nesting else ():
            value = kwargs.get(key) if isinstance(key, str) else args[key] if key < len(args) else None
            size = _size(value, dim)
            if size is not None:
                return size
        raise ValueError(
            "noise='per_example' needs a model with a data plate and an argument with one row per example."
        )

    def point_distributions(self) -> Iterator[tuple[LatentSite, Any]]:
        """
        :return: the sites that all components share, with their point masses.
        """
        for site in self.sites:
            if site.kind == "point":
                yield site, dist.Delta(attrgetter(site.name)(self.points), event_dim=site.event_dim)

    # ------------------------------------------------------------------ distributions

    def _blocks(self) -> Iterator[tuple[LatentSite, Tensor, Tensor | None]]:
        """Sites with their locations and scales, shape ``(K, *raw_shape)``."""
        if not self._mixed:
            return
        sizes = [site.size for site in self._mixed]
        locs = self.loc.split(sizes, -1)
        num = self._num_scaled
        scale: Any = self._full_scale() if num else None
        scales = scale.split(sizes[:num], -1) if num else ()
        for i, site in enumerate(self._mixed):
            shape = (self.num_components, *site.raw_shape)
            yield site, locs[i].view(shape), scales[i].view(shape) if i < num else None

    def _full_scale(self) -> Tensor:
        """The scales of all scaled columns."""
        if self.scale_mode != "shared":
            return self.scale
        sizes = [site.size for site in self._mixed[: self._num_scaled]]
        return self.scale.repeat_interleave(torch.tensor(sizes, device=self.scale.device), -1)

    def _low_rank(self) -> Any:
        """The joint Gaussian of the low-rank sites in unconstrained space, batch shape ``(K,)``, or ``None``."""
        total = sum(site.size for site in self._mixed if site.kind == "low_rank")
        if not total:
            return None
        loc, scale = [], []
        for site, mean, spread in self._blocks():
            if site.kind == "low_rank":
                assert spread is not None
                loc.append(mean.flatten(1))
                scale.append(spread.flatten(1))
        return dist.LowRankMultivariateNormal(
            torch.cat(loc, -1), self.cov_factor, torch.cat(scale, -1).square()
        )

    def _low_rank_sites(self) -> list[LatentSite]:
        return [site for site in self._mixed if site.kind == "low_rank"]

    def component_distributions(self) -> dict[str, Any]:
        """
        The components of each site, without the sites that all components share.

        :return: a dictionary from site names to distributions of batch shape ``(K,)`` whose event shape is the
            whole shape of the site; low-rank sites have no distribution of their own and are left out.
        """
        return {
            site.name: component_distribution(site, loc, scale, len(site.shape))
            for site, loc, scale in self._blocks()
            if site.kind != "low_rank"
        }

    def component_log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """
        Log densities of the components over all sites with a density; point masses are left out.

        :param values: values of the sites, shape ``(*lead, *site_shape)``.
        :return: shape ``(*lead, K)``.
        """
        total: Any = 0.0
        low_rank = self._low_rank()
        if low_rank is not None:
            parts = [
                values[site.name].flatten(-len(site.shape) or values[site.name].dim())
                if site.shape
                else values[site.name].unsqueeze(-1)
                for site in self._low_rank_sites()
            ]
            total = total + low_rank.log_prob(torch.cat(parts, -1).unsqueeze(-2))
        for site, loc, scale in self._blocks():
            if scale is not None and site.kind != "low_rank":
                value = values[site.name]
                value = value.unsqueeze(value.dim() - len(site.shape))
                total = total + component_distribution(site, loc, scale, len(site.shape)).log_prob(value)
        return total

    # ------------------------------------------------------------------ sampling

    @contextmanager
    def stratified(self, dim: int | None, num_particles: int = 1) -> Iterator[None]:
        """
        Within this context a call of the guide draws every component once, component k in slot k of batch
        dimension ``dim``. :class:`~pyro_bnn.infer.Mixture_ELBO` uses it.

        :param dim: the batch dimension, negative, left of all plates of the model; ``None`` for one component without
            a dimension.
        :param int num_particles: draws per component, in the dimension left of it, inside a plate of this size.
        """
        self._stratum, self._is_stratified = dim, True
        self._lead = (num_particles,) if num_particles > 1 else ()
        try:
            yield
        finally:
            self._stratum, self._is_stratified = None, False

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
            sizes = [site.shape.numel() for site in self._mixed]
            for site, piece in zip(self._mixed, latent.split(sizes, -1), strict=True):
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
        K = self.num_components
        assert self._stratum is not None
        probs = torch.eye(K, device=self.loc.device).view(K, *(1,) * (-self._stratum - 1), K)
        return self._sample(site, dist.Categorical(probs=probs), {})

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
                *(
                    t.unflatten(0, (self.num_components, *ones))
                    for t in (joint.loc, joint.cov_factor, joint.cov_diag)
                )
            )
        else:
            joint = dist.LowRankMultivariateNormal(
                joint.loc[index], joint.cov_factor[index], joint.cov_diag[index]
            )
        latent = pyro.sample(f"_{self._pyro_name}_low_rank", joint, infer={"is_auxiliary": True})
        sites = self._low_rank_sites()
        for site, piece in zip(sites, latent.split([site.size for site in sites], -1), strict=True):
            value = piece.reshape(
                torch.broadcast_shapes(site.shape, latent.shape[:-1] + (1,) * site.event_dim)
            )
            values[site.name] = self._sample(site, dist.Delta(value, event_dim=site.event_dim), plates)

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
                draws[site.name] = piece.reshape(shape + site.shape)
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
            rows = [site.transform(_raw_quantile(site, loc, scale, q)) for q in levels]
            result[site.name] = torch.stack(rows)
        for site in self.sites:
            if site.kind == "point":
                value = attrgetter(site.name)(self.points).detach()
                result[site.name] = value.expand(len(levels), *value.shape)
            elif site.kind == "index":
                result[site.name] = torch.tensor([int(q * (self.num_components - 1)) for q in levels])
        return {site.name: result[site.name] for site in self.sites}


def _raw_quantile(site: LatentSite, loc: Tensor, scale: Tensor | None, q: float) -> Tensor:
    """Quantile in unconstrained space, where the bijections are elementwise and increasing."""
    if scale is None:
        index = max(0, min(loc.shape[0] - 1, int(-(-q * loc.shape[0] // 1)) - 1))
        return loc.sort(0).values[index]
    base: Any = dist.Cauchy(loc, scale) if site.kind == "cauchy" else dist.Normal(loc, scale)
    each = base.icdf(torch.full_like(loc, q))
    if loc.shape[0] == 1:
        return each[0]
    return mixture_quantile(lambda v: base.cdf(v).mean(0), each.amin(0), each.amax(0), q)


def _role(site: Any) -> str | None:
    return site_hint(site).get("role")


def _check_kind(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown component family {kind!r}; choose from {list(KINDS)}.")
    return kind


def _matching_pattern(patterns: Mapping[str, str], name: str) -> str | None:
    if name in patterns:
        return name
    last = name.rpartition(".")[2]
    if last in patterns:
        return last
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)


def _size(value: Any, dim: int) -> int | None:
    """Rows of an argument, or sequences of a packed sequence."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0]) if dim == 0 else None
    return value.shape[dim] if isinstance(value, Tensor) and value.dim() > dim else None


def _row_sources(trace: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[int | str, int]]:
    """
    Arguments, by position or name, and dimensions that are as long as the data plate, the most telling ones first:
    observations come last and have one row per example, while inputs may have the time in front.
    """
    sizes = {f.size for n in observed_names(trace) for f in trace.nodes[n]["cond_indep_stack"] if f.dim == -1}
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [(key, dim) for dim in (0, 1) for key, value in reversed(named) if _size(value, dim) in sizes]


def _require_observations(trace: Any, args: tuple[Any, ...]) -> None:
    """An observed site without data looks like a latent one; catch it before parameters are made for it."""
    if observed_names(trace):
        return
    lengths = {len(a) for a in args if isinstance(a, Tensor) and a.dim()}
    for name, site in trace.iter_stochastic_nodes():
        if any(frame.size in lengths for frame in site["cond_indep_stack"]):
            raise ValueError(
                f"site {name!r} is latent inside a plate over the data, and the model has no observed site: call "
                "initialize with the observations, e.g. guide.initialize(x, y)."
            )
