# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Any posterior as chains of draws: all that the diagnostics ask a posterior is asked here."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import MCMC
from torch import Tensor

from pyro_bnn.infer.predict.density import guide_log_prob
from pyro_bnn.infer.predict.draws import Draws, component_draws, posterior_draws
from pyro_bnn.infer.predict.weighted import WeightedChains
from pyro_bnn.infer.sample.nuts import recorded_run
from pyro_bnn.model.data import Batch
from pyro_bnn.ops.options import require_count


class Chains:
    """
    A posterior as chains of one length: MCMC chains, guides of a list, components of a mixture guide, or a single one.

    Chains whose weights are not equal become one, of draws that stand for all with equal weights: side by side they would count
    equally, and a mixture of them that was cut into chains would seem to have converged.

    :param posterior: see :func:`~pyro_bnn.diagnostics.to_datatree`.
    :param num_samples: the number of draws in all chains together; by default all that there are, of guides 1000 or as
        many fewer as divide into the chains.
    :param num_chains: chains in a mapping of draws, which hold them one after the other.
    :param batch: arguments of the guide, for guides that need them.
    :ivar shape: the numbers of chains and of draws in each.
    :ivar guides: the guides that draw; none where the draws are given.
    """

    def __init__(
        self, posterior: Any, num_samples: int | None = None, num_chains: int = 1, batch: Batch = ((), {})
    ) -> None:
        self.posterior, self.batch = posterior, batch
        self._recorded: Any = posterior if isinstance(posterior, WeightedChains) else recorded_run(posterior)
        self.guides: list[Any] = []
        #: Draws that are given, shaped ``(chains, draws) + site shape``.
        self._given: Draws = {}
        self._by_component = False
        #: Which of the stored draws of a run these are, counted chain after chain, shape ``(chains, draws)``.
        self._index = torch.zeros(0, 0, dtype=torch.long)
        if isinstance(posterior, WeightedChains) and not posterior.equal_weights:
            self._index = posterior.draw_index(num_samples).unsqueeze(0)
            self._take(posterior.samples)
        elif isinstance(posterior, WeightedChains):
            self._of_run(posterior.samples, num_samples)
        elif hasattr(posterior, "get_samples"):  # MCMC
            self._of_run(posterior.get_samples(group_by_chain=True), num_samples)
        elif isinstance(posterior, Mapping):
            size = len(next(iter(posterior.values()))) if num_samples is None else num_samples
            if size % num_chains:
                raise ValueError(f"num_chains={num_chains} does not divide the number of draws, {size}.")
            self.shape = num_chains, size // num_chains
            draws = posterior_draws(posterior, size)
            self._given = {name: value.unflatten(0, self.shape) for name, value in draws.items()}
        elif isinstance(posterior, (list, tuple)) and any(map(_is_stored, posterior)):
            self._of_list(posterior, num_samples)
        else:
            is_list = isinstance(posterior, (list, tuple))
            self.guides = list(posterior) if is_list else [posterior]
            chains, what = len(self.guides), "guides, a chain each"
            if not is_list and getattr(posterior, "equal_weights", True):
                chains, what = num_components(posterior) or 1, "components of the guide, a chain each"
                self._by_component = chains > 1
            default = max(1, 1000 // chains)
            self.shape = chains, default if num_samples is None else _per_chain(num_samples, chains, what)

    def _of_run(self, grouped: Draws, num_samples: int | None) -> None:
        chains, held = next(iter(grouped.values())).shape[:2]
        if num_samples is not None and num_samples > chains * held:
            raise ValueError(f"num_samples={num_samples}, but there are {chains * held} draws only.")
        size = held if num_samples is None else _per_chain(num_samples, chains, "chains of the run")
        columns = torch.linspace(0, held - 1, size, dtype=torch.float64).long()
        self._index = held * torch.arange(chains).unsqueeze(-1) + columns
        self._take(grouped)

    def _of_list(self, members: Sequence[Any], num_samples: int | None) -> None:
        """Stored draws, one chain of each."""
        if not all(map(_is_stored, members)):
            kinds = [type(member).__name__ for member in members]
            raise ValueError(
                f"posterior: a list holds guides or stored draws, a chain each, not both: found {kinds}."
            )
        draws = [posterior_draws(member) for member in members]
        held = min(len(next(iter(own.values()))) for own in draws)
        size = held if num_samples is None else _per_chain(num_samples, len(members), "runs, a chain each")
        draws = [posterior_draws(member, size) for member in members]
        self.shape = len(members), size
        self._given = {name: torch.stack([own[name] for own in draws]) for name in draws[0]}

    def _take(self, grouped: Draws) -> None:
        """Keeps the draws of the index."""
        self.shape = self._index.shape[0], self._index.shape[1]
        self._given = {name: self._taken(value) for name, value in grouped.items()}

    def _taken(self, value: Tensor) -> Tensor:
        flat, index = value.flatten(0, 1), self._index.to(value.device)
        return (
            value
            if torch.equal(index.flatten(), torch.arange(len(flat), device=index.device))
            else flat[index]
        )

    def draws(self, start: int = 0, length: int | None = None) -> Draws:
        """Some draws of each chain, one chain after the other, by site of shape ``(chains * length,) + site shape``."""
        length = self.shape[1] if length is None else length
        if not self.guides:
            return {n: v[:, start : start + length].flatten(0, 1) for n, v in self._given.items()}
        if self._by_component:
            return {n: v.flatten(0, 1) for n, v in component_draws(self.guides[0], length).items()}
        members = [posterior_draws(guide, length, self.batch) for guide in self.guides]
        return {
            n: torch.cat([m[n] for m in members]) if len(members) > 1 else v for n, v in members[0].items()
        }

    def blocks(self, block_size: int | None) -> Iterator[tuple[Draws, tuple[int, int]]]:
        """The draws in blocks of so many of each chain, which guides make one by one, and the shapes of the blocks."""
        chains, size = self.shape
        step = size if block_size is None else block_size
        for start in range(0, size, step):
            length = min(step, size - start)
            yield self.draws(start, length), (chains, length)

    def log_prob(self, draws: Draws) -> Tensor | None:
        """The log density of the guides, a mixture with equal weights, at draws; ``None`` where there is none."""
        terms = [guide_log_prob(guide, draws, self.batch) for guide in self.guides]
        found = [term for term in terms if term is not None]
        if not found or len(found) < len(terms):
            return None
        return torch.logsumexp(torch.stack(found), 0) - math.log(len(found))

    def predicting_guide(self) -> Any:
        """The guide that predicts by its linearised model in the place of the model; ``None`` if none does."""
        if not any(hasattr(guide, "observed_distributions") for guide in self.guides):
            return None
        if len(self.guides) > 1:
            raise ValueError(
                "prediction_draws: several linearised guides have no common linearisation; call one by one."
            )
        return self.guides[0]

    def statistics(self) -> dict[str, Tensor]:
        """What a run recorded of each draw, and where a draw of weighted chains comes from, of the shape ``(chains, draws)``."""
        found: dict[str, Tensor] = {}
        if self._recorded is not None:
            found = dict(self._recorded.sample_stats)
        elif isinstance(self.posterior, MCMC):
            divergences = self.posterior.diagnostics().get("divergences", {})
            diverging = torch.zeros(self.posterior.num_chains, self.posterior.num_samples, dtype=torch.bool)
            for chain, indices in enumerate(divergences.values()):
                diverging[chain, indices] = True
            found = {"diverging": diverging}
        return {name: self._taken(value) for name, value in _named(found).items()} | self._sources()

    def _sources(self) -> dict[str, Tensor]:
        if self.weights is None:
            return {}
        length = self.posterior.num_draws
        return {"source_chain": self._index // length, "source_draw": self._index % length}

    @property
    def weights(self) -> Tensor | None:
        """The weights of the chains of a run, of which the draws here stand for all with equal ones; ``None`` if they are equal."""
        if not isinstance(self.posterior, WeightedChains) or self.posterior.equal_weights:
            return None
        weights: Tensor = self.posterior.draw_weights.unflatten(0, (self.posterior.num_chains, -1)).sum(1)
        return weights

    def warmup(self) -> tuple[Draws, dict[str, Tensor]]:
        """Draws and statistics of the warm-up that a run recorded, ``(chains, steps) + ...``; else nothing."""
        warmup: Draws = getattr(self._recorded, "warmup", {})
        return (warmup, _named(self._recorded.warmup_stats)) if warmup else ({}, {})

    @property
    def kind(self) -> str:
        """The name of the posterior's class."""
        return type(self.guides[0] if self.guides else self.posterior).__name__


def _named(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics as a tree has them, in which ``lp`` is the density of the latents themselves."""
    return {"lp_unconstrained" if name == "lp" else name: value for name, value in stats.items()}


def _is_stored(posterior: Any) -> bool:
    """Whether draws are given, not made."""
    return isinstance(posterior, Mapping) or hasattr(posterior, "get_samples")


def num_components(guide: Any) -> int | None:
    """The number of components of a mixture guide; ``None`` for others."""
    count: int | None = getattr(guide, "num_components", None)
    return count


def _per_chain(num_samples: int, chains: int, what: str) -> int:
    """Draws of each of some chains, which are all of one length."""
    require_count("num_samples", num_samples)
    if num_samples % chains:
        few = num_samples - num_samples % chains
        numbers = " or ".join(str(n) for n in (few, few + chains) if n)
        raise ValueError(
            f"num_samples={num_samples} draws cannot be shared equally by the {chains} {what}: pass num_samples={numbers}."
        )
    return num_samples // chains
