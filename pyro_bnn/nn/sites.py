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
import torch
from pyro.infer.autoguide.initialization import init_to_median
from pyro.nn import PyroModule
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

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


def layer_priors(sites: Mapping[str, Any]) -> dict[str, Any]:
    """By site of a layer among the nodes of a run, the prior that the layer has for it."""
    hints = {name: site["infer"].get(SITE_KEY, {}) for name, site in sites.items()}
    return {name: hint["prior"] for name, hint in hints.items() if "prior" in hint}


# Pyro names the attributes of modules and keeps their values for one call of the network. Only its own attributes are
# told so in public (PyroSample), and those carry no hints for guides; the next three functions are all that asks in private.


def module_path(module: nn.Module) -> str:
    """The path of a module in its network, empty for the network itself."""
    return getattr(module, "_pyro_name", "")


def is_called(module: nn.Module) -> bool:
    """Whether the network that a module belongs to is being called."""
    context: Any = module._pyro_context
    return bool(context.active)


def once_per_call(
    module: nn.Module, name: str, make: Callable[[str], Any], *, below: str | None = None
) -> Any:
    """What ``make`` returned in the present call of the network, given a name below a path, by default the module's."""
    context: Any = module._pyro_context
    full = ".".join(filter(None, [module_path(module) if below is None else below, name]))
    value = context.get(full)
    if value is None:
        value = make(full)
        context.set(full, value)
    return value


_READERS: ContextVar[dict[str, str] | None] = ContextVar("readers", default=None)


@contextmanager
def note_readers() -> Iterator[dict[str, str]]:
    """Notes, by name of the layer, which module reads random parameters of a layer without calling it."""
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
            return describe_module(module, module_path(module))
        frame = frame.f_back
    return "the model"


def refuse_recomputation(module: nn.Module, name: str) -> None:
    """Raises where a site is read in a backward pass, in which :mod:`torch.utils.checkpoint` runs layers again."""
    # nothing public says whether a backward pass is running
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{name!r} of {describe_module(module, module_path(module))} is random, and the backward pass runs its layer again, "
            "where it would be another draw: torch.utils.checkpoint around layers with priors is not supported. Leave them "
            "out of it."
        )


class SiteModule(_PyroModule):
    """
    A :class:`~pyro.nn.PyroModule` whose random attributes carry a :class:`SiteSpec`.

    The sites have the names that :class:`~pyro.nn.PyroSample` would give them and are cached within one call of
    the outermost module in the same way. In addition ``infer["pyro_bnn"]`` tells guides the role and the initial
    value of each site, and the priors follow :meth:`~torch.nn.Module.to`.
    """

    _sites: Mapping[str, SiteSpec] = {}
    #: by attribute, where tied and packed parameters are read: ``owner.read(key)``
    _redirects: Mapping[str, tuple[Any, str]] = {}
    #: what the torch layer's forward gets in place of parameters, see :meth:`_replacing`
    _replaced: Mapping[str, Any] = {}
    #: by the suffix of their factors, weights that factors multiply
    _weights: Mapping[str, str] = {}
    #: the flat site whose prior moves along with this layer
    _owned_packed: Any = None
    #: the :class:`~pyro_bnn.nn.folding.Folding` of the network, and the dimension of the batch in activations
    _folding: Any = None
    _axis: int | None = None
    #: whether the first layer of a chain may repeat its input over the samples itself
    takes_shared_input = False
    #: what building the weight of a sample and passing the activations of an example cost, once a folded call has told
    _costs: tuple[float, float] | None = None

    def __reduce__(self) -> Any:
        # Pyro's mix-in classes would be copied and unpickled as the mix-in of the torch layer alone
        return _new_module, (type(self),), self.__getstate__()

    def _prepare(self) -> None:
        """What comes before parameters become random."""

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are not random, by attribute."""
        return dict(self.named_parameters(recurse=False, remove_duplicate=False))

    def _add_site(self, name: str, prior: Any, role: str, *, event_dim: int) -> None:
        """Makes attribute ``name`` random; an existing parameter of this name becomes its initial value."""
        old = self._own_parameters().get(name)
        if old is not None:
            delattr(self, name)
        init = None if old is None else old.detach().clone()
        self._sites = {**self._sites, name: SiteSpec(prior, role, init, event_dim)}

    def _redirect_site(self, name: str, owner: Any, key: str) -> None:
        """Makes attribute ``name`` read ``owner.read(key)``, for tied and packed parameters."""
        if name in self._own_parameters():
            delattr(self, name)
        self._sites = {key: spec for key, spec in self._sites.items() if key != name}
        self._redirects = {**self._redirects, name: (owner, key)}

    def read(self, name: str) -> Any:
        """Reads an attribute as the layer itself does: a parameter, or the value of a site."""
        if name in self._sites:
            return self._read_site(name, self._sites[name])
        if name in self._redirects:
            owner, key = self._redirects[name]
            return owner.read(key)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "parametrizations" and parametrize.is_parametrized(self, name):
                return self.parametrizations[name]()
            raise

    def _read_from_outside(self, name: str) -> Any:
        """What code gets that reads a random parameter to use it in place of the layer."""
        return self.read(name)

    def _value(self, name: str) -> Any:
        """The value of a parameter in the present call, in a folded one by :meth:`Folding.value`."""
        return self._folding.value(self, name) if self._is_folded() else self.read(name)

    def _is_folded(self) -> bool:
        """Whether a network runs that carries samples in its batch dimension."""
        return self._folding is not None and self._folding.active

    def _event_dim(self, name: str) -> int:
        """The number of dimensions of a parameter itself: random, tied, packed or ordinary."""
        return self._sites[name].event_dim if name in self._sites else len(self._shapes()[name])

    def _shapes(self) -> dict[str, torch.Size]:
        """The shapes of parameters themselves, by attribute: random, tied or ordinary."""
        shapes = {name: value.shape for name, value in self._own_parameters().items()}
        shapes |= {name: spec.init.shape for name, spec in self._sites.items() if spec.init is not None}
        return shapes | {name: owner._shapes()[key] for name, (owner, key) in self._redirects.items()}

    @contextmanager
    def _replacing(self, values: Mapping[str, Any]) -> Iterator[None]:
        """
        Gives the torch layer's forward other parameters. :func:`torch.func.functional_call` would call this layer's own
        forward again, and knows registered parameters only.
        """
        old = self._replaced
        object.__setattr__(self, "_replaced", values)
        try:
            yield
        finally:
            object.__setattr__(self, "_replaced", old)

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        if name not in self._sites and name not in self._weights.values():
            return self.read(name)
        readers = _READERS.get()
        if readers is not None:
            readers[module_path(self)] = _reader(self)
        return self._read_from_outside(name)

    def _read_site(self, name: str, spec: SiteSpec) -> Any:
        refuse_recomputation(self, name)
        if not is_called(self):
            if am_i_wrapped():
                raise ValueError(
                    f"{name!r} of {describe_module(self, module_path(self))} is random, and the model reads it "
                    "outside of a call of the network, where it would be another draw: read it in the forward method."
                )
            return self._site_prior(name, spec).sample()

        def sample(full: str) -> Tensor:
            hint: Any = {SITE_KEY: {"role": spec.role, "init": spec.init, "prior": spec.prior}}
            return pyro.sample(full, self._site_prior(name, spec), infer=hint)

        return once_per_call(self, name, sample)

    def _site_prior(self, name: str, spec: SiteSpec) -> Any:
        return spec.prior.make_prior(self, name) if hasattr(spec.prior, "make_prior") else spec.prior

    @override
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for spec in self._sites.values():
            spec.prior = map_distribution(spec.prior, fn)
            spec.init = None if spec.init is None else fn(spec.init)
        if self._owned_packed is not None:
            self._owned_packed.map(fn)
        return self


def _new_module(cls: Any) -> Any:
    return cls.__new__(cls)


def describe_module(module: nn.Module, name: str) -> str:
    """Names a module in an error message: its dotted path, ``""`` for the root, and its class."""
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
