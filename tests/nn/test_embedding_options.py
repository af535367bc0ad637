# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Embeddings with a padding symbol, a largest norm, sparse gradients and the batch in the second dimension."""

import copy
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.func import functional_call

from pyro_bnn.model.handlers import SubstituteMessenger
from pyro_bnn.nn import bayesian_, rank1_
from tests.common import assert_close
from tests.infer.component_oracle import with_factors

CONVERSIONS = {
    "rank1": rank1_,
    "rank1 with random weights": lambda net: rank1_(net, weight_prior=dist.Normal(0.0, 1.0)),
    "additive": lambda net: rank1_(net, form="additive"),
    "bayesian": bayesian_,
    "packed": lambda net: bayesian_(net, packed=True),
}


def draws(net: Any, index: Tensor, lead: tuple[int, ...]) -> dict[str, Tensor]:
    """Values of all sites that lie far from the initial ones."""
    nodes = poutine.trace(net).get_trace(index).iter_stochastic_nodes()
    return {name: 2 * torch.randn(*lead, *site["fn"].event_shape) + 1 for name, site in nodes}


@pytest.mark.parametrize("lead", [(), (3, 1)])
@pytest.mark.parametrize("name", list(CONVERSIONS))
def test_padding_is_not_random(name: str, lead: tuple[int, ...]) -> None:
    plain = nn.Sequential(nn.Embedding(7, 4, padding_idx=2))
    net = CONVERSIONS[name](copy.deepcopy(plain))
    index = torch.tensor([[2, 1, 2], [0, 2, 5]])
    with SubstituteMessenger(draws(net, index, lead)):
        found = net(index)
    padded = index == 2
    assert (found[..., padded, :] == 0).all()
    assert (found[..., ~padded, :] != 0).all()


def test_a_trained_padding_row_stays() -> None:
    plain = nn.Embedding(7, 4, padding_idx=2)
    plain.weight.data[2] = 3.0
    for convert in CONVERSIONS.values():
        net = convert(nn.Sequential(copy.deepcopy(plain)))
        index = torch.tensor([[2, 1]])
        with SubstituteMessenger(draws(net, index, (3, 1))):
            assert (net(index)[:, 0, 0] == 3.0).all()


@pytest.mark.parametrize("name", ["rank1 with random weights", "bayesian"])
@pytest.mark.parametrize("K", [1, 3])
def test_draws_are_not_renormed(name: str, K: int) -> None:
    """``max_norm`` bounds the rows that are looked up, and the caller's draws stay as they are."""
    plain = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5))
    net = CONVERSIONS[name](copy.deepcopy(plain))
    index = torch.tensor([[2, 1, 2], [0, 2, 5]])
    lead = () if K == 1 else (K, 1)
    values = draws(net, index, lead)
    if "rank" in name:
        values |= {key: torch.ones_like(value) for key, value in values.items() if key.endswith((".r", ".s"))}
    kept = {key: value.clone() for key, value in values.items()}
    with SubstituteMessenger(values):
        found = net(index)
    for key, value in kept.items():
        assert torch.equal(values[key], value)
    for k in range(K):
        table = kept["0.weight"] if K == 1 else kept["0.weight"][k, 0]
        expected = nn.functional.embedding(index, table.clone(), max_norm=0.5)
        assert_close(found if K == 1 else found[k], expected, rtol=1e-10)


def test_factors_are_not_renormed() -> None:
    """The norm is one of rows of the table, not of the factors that a lookup takes."""
    net = rank1_(nn.Sequential(nn.Embedding(7, 4, max_norm=10.0)))
    index = torch.tensor([[2, 1]])
    values = {"0.r": torch.ones(4), "0.s": torch.full((7,), 50.0)}
    with SubstituteMessenger(values):
        found = net(index)
    assert_close(found, 50 * net[0].weight[index].detach(), rtol=1e-12)
    assert (values["0.s"] == 50).all()


def test_sparse_gradients_are_refused() -> None:
    for convert in (rank1_, bayesian_):
        with pytest.raises(
            ValueError, match=r"0 \(Embedding\) has sparse=True.*set its attribute sparse to False"
        ):
            convert(nn.Sequential(nn.Embedding(7, 4, sparse=True)))


class TimeFirst(nn.Module):
    """Tokens of shape ``(time, batch)``."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.rnn, self.head = nn.Embedding(7, 4), nn.GRU(4, 5), nn.Linear(5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.emb(tokens))[0])


@pytest.mark.parametrize("T", [3, 6])
@pytest.mark.parametrize("conversion", ["rank1", "bayesian"])
def test_tokens_with_the_time_first(conversion: str, T: int) -> None:
    B, K = 6, 2
    plain = TimeFirst()
    index = torch.randint(0, 7, (T, B))
    if conversion == "rank1":
        net = rank1_(copy.deepcopy(plain), batch_dim=1, skip="rnn")
    else:
        net = bayesian_(copy.deepcopy(plain), batch_dim=1)
    values = draws(net, index, (K, 1))
    with SubstituteMessenger(values):
        found = net(index)
    for k in range(K):
        mine = {name: value[k, 0] for name, value in values.items()}
        expected = functional_call(plain, with_factors(plain, mine), (index,))
        assert_close(found[k], expected.detach(), rtol=1e-10, atol=1e-12)
