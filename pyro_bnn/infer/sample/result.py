# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What samplers return: chains with what was recorded of them, and the weights of chains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor
from typing_extensions import override

from pyro_bnn.infer.autoguide.empirical import AutoEmpirical
from pyro_bnn.infer.predict.weighted import WeightedChains, as_weights
from pyro_bnn.ops.described import Described, first_of, shape_of, span_of

#: Statistics whose range representations show.
_SHOWN = ("acceptance_rate", "step_size", "tree_depth", "n_steps")


@dataclass(repr=False)
class ChainResult(WeightedChains, Described):
    r"""
    Chains of a sampler.

    The names of statistics are those that ArviZ knows: ``energy``, ``step_size``, ``acceptance_rate``, ``diverging``,
    ``n_steps``, ``tree_depth``, and ``lp``, the log density of the unconstrained latents with the Jacobian of the constraints. A tree
    for ArviZ has that as ``lp_unconstrained``, since its ``lp`` is :math:`\log p(y, z)` of the latents themselves.

    Chains of different modes need not be equally likely. Whatever reads a result honours their weights: predictions, moments,
    scores and the export for ArviZ take the draws of :meth:`draw_index`, in which a chain of weight w has the share w.

    :param samples: draws by site, shape ``(chains, draws) + site shape``.
    :param sample_stats: by name, what was recorded of every draw, shape ``(chains, draws)``.
    :param warmup: draws of the warm-up, shape ``(chains, steps) + site shape``.
    :param warmup_stats: statistics of the warm-up, shape ``(chains, steps)``.
    :param weights: the weight of each chain, shape ``(chains,)``, which sum to 1; ``None`` if chains are equally likely.
    :param info: numbers and words about the run that the representation shows, e.g. ``{"method": "MCLMC", "gradients": 9134}``;
        the method is its title.
    :raises ValueError: if the shapes do not fit, or the weights do not sum to one.

    Example::

        >>> import torch
        >>> run = ChainResult({"w": torch.tensor([[0.0, 1.0], [2.0, 3.0]])}, weights=torch.tensor([0.75, 0.25]))
        >>> run.num_chains, run.get_samples()["w"]
        (2, tensor([0., 1., 1., 3.]))
    """

    samples: dict[str, Tensor]
    sample_stats: dict[str, Tensor] = field(default_factory=dict)
    warmup: dict[str, Tensor] = field(default_factory=dict)
    warmup_stats: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"{type(self).__name__}: samples holds no site.")
        first = next(iter(self.samples.values()))
        if first.dim() < 2:
            raise ValueError(
                f"{type(self).__name__}: samples of shape {tuple(first.shape)}, expected (chains, draws) + site shape; those of one chain are "
                "value.unsqueeze(0)."
            )
        chains, draws = first.shape[:2]
        _check_shapes("samples", self.samples, (chains, draws))
        _check_shapes("sample_stats", self.sample_stats, (chains, draws))
        for name, values in (("warmup", self.warmup), ("warmup_stats", self.warmup_stats)):
            steps = next((value.shape[1] for value in values.values() if value.dim() > 1), 0)
            _check_shapes(name, values, (chains, steps))
        self.weights = as_weights(self.weights, chains, what="chain")

    def reweighted(self, weights: Tensor | Sequence[float] | None) -> Self:
        """
        The same chains with other weights, such as those of modes by evidence or by stacking.

        :param weights: of the chains, shape ``(chains,)``, which sum to 1; ``None`` for equal ones.
        :return: a result that shares the draws of this one.

        Example::

            >>> import torch
            >>> run = ChainResult({"w": torch.zeros(2, 5)})
            >>> run.reweighted([0.75, 0.25]).weights.tolist()
            [0.75, 0.25]
        """
        return replace(self, weights=as_weights(weights, self.num_chains, what="chain"))

    def guide(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> AutoEmpirical:
        """
        The draws, their statistics and weights as a guide, which predicts, saves and exports like any other.

        :param callable model: the Pyro model that was sampled.
        :param args: arguments of the model, **with observations**, or data; they initialise the guide.
        :param kwargs: keyword arguments of the model.
        :return: an :class:`~pyro_bnn.infer.autoguide.AutoEmpirical`, which is not initialised where no arguments are given.

        Example::

            >>> import torch, pyro, pyro.distributions as dist
            >>> def model(y):
            ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("data", len(y)):
            ...         pyro.sample("obs", dist.Normal(z, 1.0), obs=y)
            >>> guide = ChainResult({"z": torch.arange(10.0).reshape(2, 5)}).guide(model, torch.ones(3))
            >>> guide.num_chains, guide.median()["z"]
            (2, tensor(4.))
        """
        guide = AutoEmpirical(model, self)
        return guide.initialize(*args, **kwargs) if args or kwargs else guide

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        found = self.sample_stats
        rows = {
            "sites": first_of(f"{name} ({shape_of(value[0, 0])})" for name, value in self.samples.items())
        }
        if "diverging" in found:
            total = self.num_chains * self.num_draws
            rows["divergences"] = f"{int(found['diverging'].sum())} of {total} transitions"
        for name in _SHOWN:
            if name in found:
                rows[name.replace("_", " ")] = span_of(found[name])
        rows["warm-up"] = f"{next(iter(self.warmup.values())).shape[1]} steps" if self.warmup else "not kept"
        if self.weights is not None:
            rows["weights"] = first_of([f"{w:.3g}" for w in self.weights.tolist()], most=10)
        rows |= {
            name.replace("_", " "): _in_words(value) for name, value in self.info.items() if name != "method"
        }
        return f"{self._method()}: {self.num_chains} chains of {self.num_draws} draws", rows

    def _method(self) -> str:
        return str(self.info.get("method", "MCMC"))


class NUTSResult(ChainResult):
    """
    Chains of :func:`~pyro_bnn.infer.nuts`: a :class:`ChainResult` with ``step_size``, ``tree_depth``, ``energy``,
    ``acceptance_rate`` and ``diverging`` of every draw.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_bnn.infer import nuts
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> run = nuts(model, (x, x), num_samples=4, warmup_steps=4, num_chains=1, progress_bar=False)
        >>> run.num_chains, run.samples["w"].shape
        (1, torch.Size([1, 4]))
    """

    @override
    def _method(self) -> str:
        return str(self.info.get("method", "NUTS"))


def _check_shapes(what: str, values: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    odd = {name: tuple(value.shape) for name, value in values.items() if tuple(value.shape[:2]) != shape}
    if odd:
        raise ValueError(
            f"{what}: {odd} do not begin with {shape}, the numbers of chains and of draws in each."
        )


def _in_words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
