# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Modules whose attributes are sample sites that say what they are and where they start."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pyro
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule
from pyro.poutine.runtime import _PYRO_STACK, am_i_wrapped
from torch import Tensor, nn

from pyro_bnn.nn.priors import map_distribution

#: Key of the ``infer`` dictionary of a sample site under which a layer describes the site to guides.
SITE_KEY = "pyro_bnn"

# typed loosely because Pyro makes mix-in classes at run time
_PyroModule: Any = PyroModule


@dataclass
class SiteSpec:
    """
    What a layer knows of one of its random attributes.

    :ivar prior: a distribution, or an object with ``make_prior(module, name)`` that returns one.
    :ivar role: ``"factor"`` (rank-1 factors), ``"bias"`` (biases beside them), ``"base"`` (a weight that
        all components of a mixture share) or ``"weight"`` (any parameter of a Bayesian layer).
    :ivar init: the value that the parameter had before it became random, or ``None``.
    """

    prior: Any
    role: str
    init: Tensor | None = None
    event_dim: int = 0


class SilentSites:
    """
    Sites that layers take from here without a sample statement, which would cost more than their arithmetic.

    :param values: values by site.
    :param priors: by site, the prior that the layer must have for it.
    :param bool parameters: whether layers read their parameters without a ``pyro.param`` statement, too; for runs in
        which nobody collects parameters.
    :ivar taken: the sites that were taken.
    :ivar seen: by site, the prior of every site that layers read.
    :ivar plain: whether a network is running its samples one after the other.
    :ivar plain_bytes: what every sample of such networks took in memory that stays until the last has run.
    """

    def __init__(
        self, values: Mapping[str, Tensor], priors: Mapping[str, Any], parameters: bool = False
    ) -> None:
        self.values, self.priors, self.parameters = values, priors, parameters
        self.taken: set[str] = set()
        self.seen: dict[str, Any] = {}
        self.depth = len(_PYRO_STACK)
        self.plain, self.plain_bytes = False, 0

    def take(self, name: str, prior: Any) -> Tensor | None:
        """
        :param name: a site.
        :param prior: its prior in the layer.
        :return: its value, or ``None`` if there must be a sample statement: the prior is not the expected one, or a
            handler of the model listens.
        """
        self.seen[name] = prior
        if self.priors.get(name) is not prior or len(_PYRO_STACK) != self.depth:
            return None
        self.taken.add(name)
        return self.values.get(name)

    def start_plain(self, size: int) -> None:
        """
        :param int size: bytes of the parameters of one sample of a network that begins to run them one by one.
        """
        self.plain = True
        self.plain_bytes += size

    def covers_parameters(self) -> bool:
        """
        :return: whether a layer may read a parameter without a statement.
        """
        return self.parameters and len(_PYRO_STACK) == self.depth


_SILENT: ContextVar[SilentSites | None] = ContextVar("silent_sites", default=None)


@contextmanager
def silent_sites(
    values: Mapping[str, Tensor], priors: Mapping[str, Any], parameters: bool = False
) -> Iterator[SilentSites]:
    """
    Within this context, and at the present depth of Pyro's handlers, layers take sites from ``values``.

    :param values: see :class:`SilentSites`.
    :param priors: see :class:`SilentSites`.
    :param bool parameters: see :class:`SilentSites`.
    """
    silent = SilentSites(values, priors, parameters)
    token = _SILENT.set(silent)
    try:
        yield silent
    finally:
        _SILENT.reset(token)


_READERS: ContextVar[dict[str, str] | None] = ContextVar("readers", default=None)


@contextmanager
def note_readers() -> Iterator[dict[str, str]]:
    """
    Within this context it is noted who reads random parameters of layers without calling the layer.

    :return: by name of the layer, a description of the module that reads.
    """
    readers: dict[str, str] = {}
    token = _READERS.set(readers)
    try:
        yield readers
    finally:
        _READERS.reset(token)


def _reader(layer: nn.Module) -> str:
    """The module whose code is running, other than a layer."""
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module is not layer:
            return describe_module(module, getattr(module, "_pyro_name", ""))
        frame = frame.f_back
    return "the model"


def silence() -> SilentSites | None:
    """
    :return: where layers read from, if at present neither their sites nor their parameters need statements.
    """
    silent = _SILENT.get()
    return silent if silent is not None and silent.covers_parameters() else None


def runs_plain() -> bool:
    """
    :return: whether a network is running its samples one after the other.
    """
    silent = _SILENT.get()
    return silent is not None and silent.plain


class SiteModule(_PyroModule):
    """
    A :class:`~pyro.nn.PyroModule` whose random attributes carry a :class:`SiteSpec`.

    The sites have the names that :class:`~pyro.nn.PyroSample` would give them and are cached within one call of
    the outermost module in the same way. In addition ``infer["pyro_bnn"]`` tells guides the role and the initial
    value of each site, and the priors follow :meth:`~torch.nn.Module.to`.
    """

    def __reduce__(self) -> Any:
        # Pyro's mix-in classes would be copied and unpickled as the mix-in of the torch layer alone
        return _new_module, (type(self),), self.__getstate__()

    def _add_site(
        self, name: str, prior: Any, role: str, init: Tensor | None = None, *, event_dim: int
    ) -> None:
        """Makes attribute ``name`` random; an existing parameter of this name becomes its initial value."""
        old = self._parameters.pop(name, None)
        if init is None and old is not None:
            init = old.detach().clone()
        self.__dict__.setdefault("_sites", {})[name] = SiteSpec(prior, role, init, event_dim)

    def _redirect_site(self, name: str, owner: Any, key: str) -> None:
        """Makes attribute ``name`` read ``owner.read(key)``, for tied and packed parameters."""
        self._parameters.pop(name, None)
        self.__dict__.get("_sites", {}).pop(name, None)
        self.__dict__.setdefault("_redirects", {})[name] = (owner, key)

    def _redirected(self) -> dict[str, tuple[Any, str]]:
        """Owner and name, by attribute, of what :meth:`_redirect_site` redirected."""
        return self.__dict__.get("_redirects", {})

    def read(self, name: str) -> Any:
        """
        Reads an attribute as the layer itself does: a parameter, or the value of a site.

        :param str name: its name.
        :return: its value.
        """
        sites = self.__dict__.get("_sites")
        if sites is not None and name in sites:
            return self._read_site(name, sites[name])
        redirects = self.__dict__.get("_redirects")
        if redirects is not None and name in redirects:
            owner, key = redirects[name]
            return owner.read(key)
        parametrized = self.__dict__.get("_modules", {}).get("parametrizations")
        if parametrized is not None and name in parametrized:
            return parametrized[name]()
        parameters = self.__dict__.get("_parameters", {})  # torch's constructors ask before it is there
        if name in parameters and silence() is not None:
            return parameters[name]
        return super().__getattr__(name)

    def _read_from_outside(self, name: str) -> Any:
        """
        What code gets that reads a random parameter to use it in place of the layer; to be replaced where the layer computes
        with something else than the value of a site.
        """
        return self.read(name)

    def _is_folded(self) -> bool:
        """Whether a network runs that carries samples in its batch dimension."""
        folding = self.__dict__.get("_folding")
        return folding is not None and folding.active

    def _event_dim(self, name: str) -> int:
        """The number of dimensions of a parameter itself: random, tied, packed or ordinary."""
        spec = self.__dict__.get("_sites", {}).get(name)
        if spec is not None:
            return spec.event_dim
        redirect = self._redirected().get(name)
        if redirect is None:
            return self._parameters[name].dim()
        owner, key = redirect
        return owner._event_dim(key) if isinstance(owner, SiteModule) else owner.event_dim(key)

    def _site_names(self) -> list[str]:
        return list(self.__dict__.get("_sites", ()))

    def __getattr__(self, name: str) -> Any:
        overrides = self.__dict__.get("_overrides")
        if overrides is not None and name in overrides:
            return overrides[name]
        own = self.__dict__
        if name not in own.get("_sites", ()) and name not in own.get("_weights", ()):
            return self.read(name)
        readers = _READERS.get()
        if readers is not None:
            readers[own["_pyro_name"]] = _reader(self)
        return self._read_from_outside(name)

    def _read_site(self, name: str, spec: SiteSpec) -> Any:
        context = self.__dict__["_pyro_context"]
        if not context.active:
            if am_i_wrapped():
                raise ValueError(
                    f"{name!r} of {describe_module(self, self.__dict__['_pyro_name'])} is random, and the model reads it "
                    "outside of a call of the network, where it would be another draw: read it in the forward method."
                )
            return self._site_prior(name, spec).sample()
        fullname = self._pyro_get_fullname(name)
        silent = _SILENT.get()
        if silent is not None:
            value = silent.take(fullname, spec.prior)
            if value is not None:
                return value
        value = context.get(fullname)
        if value is None:
            infer: Any = {SITE_KEY: {"role": spec.role, "init": spec.init}}
            value = pyro.sample(fullname, self._site_prior(name, spec), infer=infer)
            context.set(fullname, value)
        return value

    def _site_prior(self, name: str, spec: SiteSpec) -> Any:
        return spec.prior.make_prior(self, name) if hasattr(spec.prior, "make_prior") else spec.prior

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for spec in self.__dict__.get("_sites", {}).values():
            spec.prior = map_distribution(spec.prior, fn)
            spec.init = None if spec.init is None else fn(spec.init)
        if "_owned_packed" in self.__dict__:
            self.__dict__["_owned_packed"].map(fn)
        return self


def _new_module(cls: Any) -> Any:
    return cls.__new__(cls)


def describe_module(module: nn.Module, name: str) -> str:
    """
    Names a module in an error message.

    :param module: a module.
    :param str name: its dotted path, ``""`` for the root.
    :return: the path and the class.
    """
    return f"{name or 'the network itself'} ({type(module).__name__})"


def init_to_trained(site: Any = None, *, fallback: Callable[..., Any] = init_to_median) -> Any:
    """
    An ``init_loc_fn`` for every guide of Pyro and of this package: sites of converted layers start at the value
    that the parameter had before the conversion, e.g. a trained weight.

    :param site: a sample site; without one, the function itself with its options is returned.
    :param callable fallback: initialisation of the sites that remember no value.
    :return: the initial value.

    Example::

        >>> import torch
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_bnn.nn import bayesian_
        >>> net = nn.Linear(2, 1)
        >>> trained = net.weight.detach().clone()
        >>> guide = AutoNormal(bayesian_(net), init_loc_fn=init_to_trained)
        >>> _ = guide(torch.zeros(5, 2))
        >>> bool((guide.locs.weight == trained).all())
        True
    """
    if site is None:
        return lambda site: init_to_trained(site, fallback=fallback)
    init = site["infer"].get(SITE_KEY, {}).get("init")
    if init is None:
        return fallback(site)
    return init.expand(site["fn"].shape()).clone()
