# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What all rank-1 layers have in common: priors of factors, weights and biases, the form, and how it is computed."""

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch

from pyro_bnn.nn.priors import check_keys, unwrap

FORMS = ("multiplicative", "residual", "additive")


@dataclass(frozen=True)
class Rank1Options:
    r"""
    What all rank-1 layers have in common.

    :param prior: prior of the factors in one of the three forms of
        :func:`~pyro_bnn.nn.priors.resolve_prior`, with the names ``"r"`` and ``"s"`` (recurrent and attention layers
        have several of each); a factor that a dictionary leaves out is absent. By default :math:`N(1, 0.1^2)`, and
        :math:`N(0, 0.3^2)` for the residual and :math:`N(0, 0.1^2)` for the additive form. ``dist.Cauchy(1., 0.1)``
        is the paper's other choice.
    :param weight_prior: prior of the shared weight; ``None`` keeps it a parameter (to be regularised by weight
        decay), a prior makes it a site, which mixtures estimate by MAP.
    :param bias_prior: prior of the bias, :math:`N(0, 1)` by default. An empty dictionary keeps the bias a parameter
        that all components share.
    :param int rank: :math:`R`; more than 1 implies the residual form.
    :param str form: ``"multiplicative"`` :math:`W \circ r s^\top`; ``"residual"``
        :math:`W \circ (1 + \sum_{j=1}^R r_j s_j^\top)`; ``"additive"`` :math:`W (x + s) + r`.
    :param float clip: factors are clipped to this distance from zero before they are applied (the divergence uses
        the unclipped draw); by default 10 for Cauchy priors [1] and none else (``math.inf`` for none at all). Cauchy
        components under another prior want a clip too.
    :param str apply: ``"scale"`` multiplies activations by the factors, ``"materialise"`` builds the weight of every
        sample, ``"auto"`` takes what touches less memory.

    Example::

        >>> import torch
        >>> from pyro_bnn.nn import Rank1Linear
        >>> layer = Rank1Linear(3, 2, rank=2, form="residual")
        >>> layer.r.shape
        torch.Size([2, 2])
    """

    prior: Any = None
    weight_prior: Any = None
    bias_prior: Any = None
    rank: int = 1
    form: str | None = None
    clip: float | None = None
    apply: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, found {self.rank!r}.")
        if self.form not in (None, *FORMS):
            raise ValueError(f"form must be one of {list(FORMS)}, found {self.form!r}.")
        if self.rank > 1 and self.form not in (None, "residual"):
            raise ValueError(f"rank={self.rank} needs form='residual', found {self.form!r}.")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, found {self.clip!r}.")
        if self.apply not in ("auto", "scale", "materialise"):
            raise ValueError(f"apply must be 'auto', 'scale' or 'materialise', found {self.apply!r}.")

    @property
    def resolved_form(self) -> str:
        """The form that the rank implies."""
        return self.form or ("residual" if self.rank > 1 else "multiplicative")

    def factor_prior(self) -> Any:
        """The prior of the factors, or its default."""
        if self.prior is not None:
            return self.prior
        loc, scale = {"multiplicative": (1.0, 0.1), "residual": (0.0, 0.3), "additive": (0.0, 0.1)}[
            self.resolved_form
        ]
        return dist.Normal(torch.tensor(loc), torch.tensor(scale))


def is_cauchy(prior: Any) -> bool:
    """Whether a distribution or hierarchical prior has Cauchy tails."""
    if getattr(prior, "family", None) == "cauchy":
        return True
    return isinstance(unwrap(prior), (torch.distributions.Cauchy, torch.distributions.HalfCauchy))


def check_rank1_keys(options: Rank1Options, names: list[str]) -> None:
    """Holds the keys of the three priors of the options against the full names of the sites there are."""
    last = {name: name.rpartition(".")[2] for name in names}
    check_keys(options.prior, [n for n in names if last[n][0] in "rs"], "prior")
    check_keys(options.weight_prior, [n for n in names if "weight" in last[n]], "weight_prior")
    check_keys(options.bias_prior, [n for n in names if "bias" in last[n]], "bias_prior")
