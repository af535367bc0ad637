# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Whether batches are all of the data, and parts of one model: plates covered once, sites observed, one prior."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_bnn.model.handlers import Site, is_deterministic, unscaled_log_prob
from pyro_bnn.model.plates import close
from pyro_bnn.ops.distributed import all_reduce_sum


def is_likelihood(site: Site) -> bool:
    """Whether a node of a trace is an observed site or a factor."""
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not isinstance(site["fn"], _Subsample)
        and not is_deterministic(site)
    )


def unobserved(name: str) -> ValueError:
    """The error for a site without data."""
    return ValueError(
        f"site {name!r} was observed at initialisation but has no observation here: pass the targets as well as the inputs, "
        "as in (x, y)."
    )


def other_prior(name: str, first: Tensor, other: Tensor) -> ValueError:
    """The error for a latent site whose prior is not the same in all batches."""
    return ValueError(
        f"the prior of site {name!r} depends on the batch: its log density at the same value is {float(first.double().sum()):.6g} in the first "
        f"batch and {float(other.double().sum()):.6g} in a later one, and the prior counts once. Compute what it depends on from all the data "
        "before the model, or pass the data in one batch."
    )


class Coverage:
    """
    Counts how much of each plate the batches have covered, so that no partial sum passes for the whole, and compares their
    priors, which count once.
    """

    def __init__(
        self, observed: Sequence[str], latents: Sequence[str], before: Mapping[str, int] | None = None
    ) -> None:
        self._before = before
        self._latents = latents
        self._priors: dict[str, Tensor] = {}
        self._given: dict[str, tuple[Any, ...]] = {}
        self._times = dict.fromkeys(observed, 0)
        self._seen: dict[str, int] = {}
        self._full: dict[str, int] = {}

    def add(self, trace: Trace) -> None:
        """
        :param trace: the trace of one batch; its observed sites and factors count.
        """
        self._compare_priors(trace)
        sites = [s for s in trace.nodes.values() if s["type"] == "sample" and is_likelihood(s)]
        for name in self._times:
            self._times[name] += name in trace.nodes
        frames = {frame.name: frame for site in sites for frame in site["cond_indep_stack"]}
        for frame in frames.values():
            full = frame.full_size if frame.full_size is not None else frame.size
            self._seen[frame.name] = self._seen.get(frame.name, 0) + frame.size
            if full != frame.size:
                self._full[frame.name] = full

    @torch.no_grad()
    def _compare_priors(self, trace: Trace) -> None:
        for name in self._latents:
            if name not in trace.nodes:
                raise ValueError(
                    f"the latent site {name!r} is there in some batches only: its prior counts once, whatever the batches. Sample it in "
                    "every run of the model."
                )
            site: Site = trace.nodes[name]
            given = (site["fn"], site["mask"], site["scale"])
            if name in self._priors and all(
                a is b or (isinstance(a, float) and a == b)
                for a, b in zip(self._given[name], given, strict=True)
            ):
                continue  # the very same distribution, as that of a converted layer is
            density = torch.as_tensor(unscaled_log_prob(site) * site["scale"])
            first = self._priors.setdefault(name, density)
            self._given.setdefault(name, given)
            if first is not density and not close(first, density):
                raise other_prior(name, first, density)

    def check(self) -> None:
        """Raises if the batches did not cover a subsampled plate exactly once, or an observed site never."""
        self._priors.clear()
        self._given.clear()
        if self._times and self._before is None:
            times = torch.tensor(list(self._times.values()))
            all_reduce_sum([times])
            for name, count in zip(self._times, times.tolist(), strict=True):
                if not count:
                    raise unobserved(name)
        for name, full in self._full.items():
            seen = torch.tensor(self._seen[name])
            all_reduce_sum([seen])
            self._seen[name] = int(seen)
            total = int(seen) + (0 if self._before is None else self._before.get(name, 0))
            if int(seen) != full and (self._before is None or total > full):
                raise ValueError(
                    f"the batches cover {total} of the {full} elements of plate {name!r}: pass every data point exactly once (a "
                    "loader without drop_last, or all the data in one batch without subsampling); part after part by "
                    "laplace_approximation(part, override=False)."
                )

    @property
    def covered(self) -> dict[str, int]:
        """How much of each plate has been covered by now, of those that come part after part."""
        before = self._before or {}
        parts = {name: self._seen[name] for name, full in self._full.items() if self._seen[name] != full}
        return {**before, **{name: seen + before.get(name, 0) for name, seen in parts.items()}}

    @property
    def is_partial(self) -> bool:
        """Whether a plate is not covered as a whole yet."""
        return any(count < self._full.get(name, 0) for name, count in self.covered.items())
