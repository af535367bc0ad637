# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The Pyro model of a network and the distribution of its targets."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_bnn.model.data import leaves, map_leaves
from pyro_bnn.model.plates import rows_of
from pyro_bnn.nn.priors import map_distribution
from pyro_bnn.supervised.likelihoods import LIKELIHOODS, Likelihood, outputs_of, targets

_Module: Any = PyroModule


class SupervisedModel(_Module):
    r"""
    The Pyro model of targets given inputs, :math:`y_n \sim p(y \mid f(x_n))`, of a network :math:`f` whose weights are
    sample sites: one observed site ``"obs"`` with one element per row in the plate ``"data"``.

    The network is used as it is: convert it before, with :func:`~pyro_bnn.nn.bayesian_` or
    :func:`~pyro_bnn.nn.rank1_`. The model is an ordinary :class:`~pyro.nn.PyroModule`, for every guide.

    ==================== ============================ ==================================== =======================
    likelihood           outputs of the network       distribution of a target             targets
    ==================== ============================ ==================================== =======================
    ``regression``       (N,), (N, 1) or (N, \*event)   :math:`N(f, \text{noise}^2)`          numbers
    ``heteroscedastic``  (N, 2) or (N, 2 D)           :math:`N(f_1, \exp(f_2)^2)`           numbers
    ``classification``   (N, \*event, C)               Categorical with logits f            integers below C
    ``binary``           (N,), (N, 1) or (N, \*event)   Bernoulli with logits f              0 and 1 of any type
    ``poisson``          (N,), (N, 1) or (N, \*event)   Poisson with rate :math:`e^f`         counts of any type
    callable             any                          ``likelihood(f)``                    of that distribution
    ==================== ============================ ==================================== =======================

    A heteroscedastic network returns D means followed by D logarithms of standard deviations. The elements of a target with
    ``event_dim`` dimensions are one observation. Scalar targets may come as (N,) or (N, 1); either way the site has batch
    shape (N,). Numbers, counts and binary labels are converted to the type of the outputs, and inputs and targets are moved
    to the device of the model.

    :param net: a network, called as ``net(x)``; ``net(*x)`` for a tuple or list; ``net(**x)`` for a mapping. Its result is a
        tensor or has an attribute ``logits``.
    :param likelihood: a name of the table, or a callable of the outputs of the network that returns a distribution with
        N as the last dimension of its batch shape. A callable that is a module is a part of the model.
    :param int num_data: the number of all rows, by which mini-batches are scaled, as in
        ``pyro.plate("data", num_data, subsample=...)``; by default the rows of a call are all of them.
    :param noise: standard deviation of a regression: a number, or a tensor that broadcasts to the event, stays what it is; a
        distribution is the prior of a latent site ``"noise"``; by default it is a positive parameter ``model.noise`` that
        starts at 1 and is set by ``model.noise = value``. Two models of a process have a noise each in everything of this
        package. Pyro's own SVI and Predictive share parameters by name: there use ``pyro.settings.set(module_local_params=True)``.
    :param int event_dim: the number of dimensions of one target: 0 for a number or a label, 1 for a vector, 3 for an image.
    :param int class_dim: the dimension of the classes in the outputs of a classifier: -1, the last, or 1, as in
        :func:`torch.nn.functional.cross_entropy`.
    :param str target: the name of the targets where the model is called with a mapping.
    :raises ValueError: for an unknown likelihood, or options of another one.

    Example::

        >>> from pyro_bnn.infer.autoguide import AutoMixture
        >>> from pyro_bnn.nn import bayesian_
        >>> net = bayesian_(nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)))
        >>> model = SupervisedModel(net, "classification", num_data=100)
        >>> with pyro.poutine.trace() as tr:
        ...     labels = model(torch.zeros(10, 2), torch.zeros(10, dtype=torch.long))
        >>> site = tr.trace.nodes["obs"]
        >>> type(site["fn"]).__name__, tuple(site["fn"].batch_shape), site["scale"]
        ('Categorical', (10,), 10.0)
    """

    noise: Any

    def __init__(
        self,
        net: Callable[..., Any],
        likelihood: Likelihood = "regression",
        *,
        num_data: int | None = None,
        noise: float | Tensor | Distribution | None = None,
        event_dim: int = 0,
        class_dim: int = -1,
        target: str = "labels",
    ) -> None:
        super().__init__()
        _check(likelihood, num_data, noise, event_dim, class_dim)
        self.net = net
        self.likelihood = likelihood
        self.num_data, self.event_dim, self.class_dim, self.target = num_data, event_dim, class_dim, target
        self._place_noise(noise)

    def _place_noise(self, noise: Any) -> None:
        """Makes the noise a buffer, a parameter or a sample site, of the type and on the device of the network."""
        like = _any_tensor(self.net)
        # networks of sample sites have neither parameters nor buffers that tell their device
        self.register_buffer("_device", like.new_empty(0), persistent=False)
        if self.likelihood != "regression":
            return
        if isinstance(noise, Distribution):
            self._noise_is = "latent"
            self.noise = PyroSample(map_distribution(noise, lambda t: t.to(like)))
        elif noise is None:
            self._noise_is = "parameter"
            self.noise = PyroParam(like.new_ones(()), constraint=constraints.positive)
        else:
            self._noise_is = "fixed"
            self.register_buffer("noise", torch.as_tensor(noise).to(like))

    def forward(self, x: Any = None, y: Tensor | None = None, **inputs: Any) -> Any:
        """
        :param x: inputs, N rows in the first dimension of every tensor.
        :param y: targets, shape ``(N, *event)``; drawn if omitted.
        :param inputs: the items of a mapping in place of ``x``, the targets under the name ``target``.
        :return: the targets.
        """
        x, y = self.split(x, y, **inputs)
        d = self.distribution(self.outputs(x), rows_in(x))
        y = None if y is None else targets(y, d, self.likelihood)
        n = d.batch_shape[-1]
        size = n if self.num_data is None else self.num_data
        with pyro.plate("data", size, subsample=torch.arange(n, device=self._device.device), dim=-1):
            return pyro.sample("obs", d, obs=y)

    def split(self, x: Any = None, y: Any = None, **inputs: Any) -> tuple[Any, Any]:
        """
        :param x: see :meth:`forward`.
        :param y: see :meth:`forward`.
        :param inputs: see :meth:`forward`.
        :return: inputs of the network and targets, or ``None``, on the device of the model.
        :raises TypeError: for inputs both in ``x`` and by keyword.
        """
        if x is None or isinstance(x, Mapping):
            inputs = dict(x or {}, **inputs)
            y = inputs.pop(self.target, y)
            x, inputs = inputs, {}
        if inputs:
            raise TypeError(f"the model was called with x and {sorted(inputs)}: pass x, y or keywords alone")
        return self._here(x), self._here(y)

    def outputs(self, x: Any) -> Any:
        """
        :param x: inputs, a tensor, a tuple or list of arguments of the network, or a mapping of keywords.
        :return: what the network returns, a tensor unless the likelihood is a callable. A converted network is called within
            a run of the model only.
        """
        if isinstance(x, Mapping):
            f = self.net(**x)
        else:
            f = self.net(*x) if isinstance(x, (tuple, list)) else self.net(x)
        return f if callable(self.likelihood) else outputs_of(f, self.likelihood)

    def distribution(self, f: Any, num_rows: int | None = None) -> Any:
        """
        :param f: outputs of the network.
        :param num_rows: N, to compare with.
        :return: the distribution of the targets, batch shape ``(..., N)``.
        :raises ValueError: if the outputs do not have the shape that the likelihood needs.
        """
        if callable(self.likelihood):
            d = self.likelihood(f)
        else:
            d = LIKELIHOODS[self.likelihood](f, self, num_rows)
        found = tuple(d.batch_shape)
        if not found or num_rows not in (None, found[-1]):
            raise ValueError(
                f"likelihood={self._named()!r} gives a distribution of batch shape {found} and event shape "
                f"{tuple(d.event_shape)} for {num_rows} rows: the last dimension of the batch shape must be that of the rows. Declare "
                "dimensions of one target as event dimensions (event_dim=, or .to_event in a callable)."
            )
        return d

    @property
    def settings(self) -> dict[str, Any]:
        """What the model makes of the outputs of its network: a saved guide is loaded into the same only."""
        found = {"likelihood": self._named(), "event_dim": self.event_dim, "class_dim": self.class_dim}
        return {**found, "noise": self._noise_is} if self.likelihood == "regression" else found

    def _named(self) -> str:
        if isinstance(self.likelihood, str):
            return self.likelihood
        return getattr(self.likelihood, "__name__", type(self.likelihood).__name__)

    def _here(self, value: Any) -> Any:
        """Inputs or targets on the device of the model."""
        return map_leaves(value, lambda _, leaf: leaf.to(self._device.device), every=True)

    def extra_repr(self) -> str:
        """The likelihood and the number of rows."""
        return f"likelihood={self._named()!r}, num_data={self.num_data}, event_dim={self.event_dim}"


def _check(likelihood: Any, num_data: Any, noise: Any, event_dim: int, class_dim: int) -> None:
    if not callable(likelihood) and likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood={likelihood!r} is unknown: choose from {sorted(LIKELIHOODS)}, or pass a callable of the outputs of the "
            "network that returns a distribution."
        )
    if noise is not None and likelihood != "regression":
        raise ValueError(
            f"noise={noise!r} is the standard deviation of likelihood='regression', found {likelihood!r}"
        )
    if isinstance(noise, (int, float, Tensor)) and not bool((torch.as_tensor(noise) > 0).all()):
        raise ValueError(f"noise must be positive, found {noise!r}")
    if num_data is not None and (not isinstance(num_data, int) or num_data < 1):
        raise ValueError(f"num_data must be a positive integer, found {num_data!r}")
    if event_dim < 0 or class_dim not in (1, -1):
        raise ValueError(f"event_dim={event_dim} must not be negative, and class_dim={class_dim} is 1 or -1")


def _any_tensor(net: Any) -> Tensor:
    """A floating-point tensor of the type and on the device of a network: a parameter, a buffer, or the value that a site had."""
    modules = list(net.modules()) if isinstance(net, nn.Module) else []
    specs = [spec for module in modules for spec in getattr(module, "_sites", {}).values()]
    held = [t for module in modules for t in (*module.parameters(False), *module.buffers(False))]
    for value in (*(spec.init for spec in specs), *held):
        if value is not None and value.is_floating_point():
            return value.detach()
    return torch.empty(0)


def rows_in(x: Any) -> int | None:
    """The number of rows of the first tensor among the inputs."""
    found = list(leaves(x).values())
    return rows_of(found[0], 0) if found and (not isinstance(found[0], Tensor) or found[0].dim()) else None
