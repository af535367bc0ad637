# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The networks that a model calls, wherever it holds them, and the tensors in them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_bnn.model.data import Batch
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.handlers import Site
from pyro_bnn.model.parameters import local_parameters, statement_leaves


@contextmanager
def unchanged_buffers() -> Iterator[list[nn.Module]]:
    """
    A context that lists the modules whose forward methods run within it, and puts their buffers (running statistics)
    back at its end.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    before: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def note(module: nn.Module, *_: Any) -> None:
        if id(module) not in seen:
            seen.add(id(module))
            found.append(module)
            for name, buffer in module.named_buffers(recurse=False):
                if not is_lazy(buffer):
                    before.append((module, name, buffer, buffer.clone()))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()
        with torch.no_grad():
            for module, name, buffer, value in before:
                buffer.copy_(value)
                if getattr(module, name, None) is not buffer:  # the module has put another in its place
                    setattr(module, name, buffer)


def outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those of some modules, in the order of their first calls, that are part of no other."""
    parts = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in parts]


def tensors_of(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """
    The parameters and persistent buffers of the networks among some modules: live tensors, each once, by class, number and
    name such as ``"Sequential[0].1.running_mean"``.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for i, module in enumerate(outermost(modules)):
        for name, value in module.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor) and id(value) not in seen:
                seen.add(id(value))
                found[f"{type(module).__name__}[{i}].{name}"] = value
    return found


def named_networks(model: Any, guide: Any, called: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """
    Model and guide, where they are modules, and the networks among the modules called that are no parts of them, by name:
    ``"model"``, ``"guide"``, ``"Sequential[0]"``.
    """
    found = {n: m for n, m in (("model", model), ("guide", guide)) if isinstance(m, nn.Module)}
    held = {id(part) for module in found.values() for part in module.modules()}
    others = outermost([module for module in called if id(module) not in held])
    return found | {f"{type(module).__name__}[{i}]": module for i, module in enumerate(others)}


def model_tensors(model: Any, guide: Any, batch: Batch, latents: Any = None) -> dict[str, Tensor]:
    """
    The tensors that predictions depend on beside the guide's own, live and unconstrained by name: those of the networks that
    model and guide call, and those of their :func:`pyro.param` statements. The guide runs too unless ``latents`` is given, a
    trace with values of the latent sites.
    """
    args, kwargs = batch
    traces = []
    with ExitStack() as stack:
        for context in (
            local_parameters(),
            torch.enable_grad(),
            pyro.validation_enabled(False),
            poutine.block(),
        ):
            stack.enter_context(context)
        stack.enter_context(torch.random.fork_rng())
        called = stack.enter_context(evaluation_mode())
        if latents is None:
            latents = poutine.trace(guide).get_trace(*args, **kwargs)
            traces.append(latents)
        replayed = poutine.replay(model, trace=latents)
        traces.append(poutine.trace(replayed, param_only=True).get_trace(*args, **kwargs))
    own = list(guide.modules()) if isinstance(guide, nn.Module) else []
    parts = {id(module) for module in own}
    found = tensors_of([module for module in called if id(module) not in parts])
    held = {id(value) for value in found.values()}
    held |= {id(value) for module in own for value in module.parameters(recurse=False)}
    leaves = {name: leaf for trace in traces for name, leaf in statement_leaves(trace)}
    return found | {f"param {name!r}": leaf for name, leaf in leaves.items() if id(leaf) not in held}


class _Given(Messenger):
    """Gives the latent sites of a network their values; a site without one, or with one of another shape, is an error."""

    def __init__(self, latents: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.latents = latents
        self.met: set[str] = set()

    def _pyro_sample(self, msg: Site) -> None:
        name = msg["name"]
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if name not in self.latents:
            raise ValueError(
                f"network_at: the network samples site {name!r}, of which latents hold no value (found {sorted(self.latents)}): "
                "pass the latents of a guide, such as guide.median(), with the names of the model's sites."
            )
        value, shape = self.latents[name], msg["fn"].shape()
        if value.shape != shape:
            raise ValueError(
                f"network_at: the value of site {name!r} has shape {tuple(value.shape)}, expected {tuple(shape)}: pass one draw "
                "at a time, {name: value[i] for name, value in draws.items()}."
            )
        self.met.add(name)
        msg["value"], msg["done"] = value, True


def network_at(network: Callable[..., Any], latents: Mapping[str, Tensor]) -> Callable[..., Any]:
    """
    A network with latent sites as a plain function of its inputs, at given values of its latents.

    It is differentiable in inputs and latents, so that it serves in functionals of :func:`pyro_bnn.infer.hfl.solve`, and is
    :func:`torch.func.functional_call` for networks whose weights are sample sites. The network runs in evaluation mode and draws
    nothing; sites of the model that are not the network's are left aside.

    :param network: a network converted by :func:`~pyro_bnn.nn.bayesian_` or :func:`~pyro_bnn.nn.rank1_`, a
        :class:`~pyro.nn.PyroModule`, or any function with :func:`pyro.sample` statements.
    :param latents: values by site name, one draw: what a functional is given, ``guide.median()``, or a draw of
        ``guide.sample_posterior()``.
    :return: a function of the network's arguments, which returns what the network does.
    :raises ValueError: when called, if the network samples a site of which there is no value, or none at all, or a value has
        another shape than its site.

    Example::

        >>> from pyro_bnn.nn import bayesian_
        >>> net = bayesian_(nn.Linear(2, 1))
        >>> latents = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0]), "noise": torch.tensor(0.1)}
        >>> network_at(net, latents)(torch.tensor([[1.0, 1.0]]))
        tensor([[6.]])
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        given = _Given(latents)
        with local_parameters(), poutine.block(), given, evaluation_mode(network):
            result = network(*args, **kwargs)
        if not given.met:
            raise ValueError(
                f"network_at: the network ({type(network).__name__}) samples no site: convert it by bayesian_(net) or rank1_(net) "
                "of pyro_bnn.nn, or use torch.func.functional_call."
            )
        return result

    return call
