# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Densities, moments and draws of mixtures against sums over their components, and their shapes inside plates."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from pyro import poutine

from pyro_bnn.curvature.dense import FullNormal
from pyro_bnn.curvature.diagonal import DiagonalNormal
from pyro_bnn.distributions.mixture import (
    EqualMixture,
    PackedMixture,
    SharedIndexMixture,
    WeightedMixture,
    marginal_quantile,
    mixture_quantile,
)
from pyro_bnn.distributions.precision_normal import BlockNormal
from tests.common import assert_close

WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def shared_index():
    loc = torch.tensor([-6.0, 0.0, 6.0])
    blocks = [
        dist.Normal(loc, torch.tensor([1.0, 0.5, 2.0])),
        dist.MultivariateNormal(
            loc.unsqueeze(-1).expand(3, 2), torch.eye(2) * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)
        ),
        dist.Normal(loc.unsqueeze(-1).expand(3, 2), 0.7).to_event(1),
    ]
    return SharedIndexMixture(blocks), blocks


def test_density_with_a_shared_index_is_the_mean_over_components_of_products():
    q, blocks = shared_index()
    assert q.event_shape == (5,)
    assert q.batch_shape == ()
    for shape in ((), (4,), (3, 4), (2, 3, 1)):
        v = 4 * torch.randn(*shape, 5)
        each = []
        for k in range(3):
            total = td.Normal(blocks[0].loc[k], blocks[0].scale[k]).log_prob(v[..., 0])
            total = total + td.MultivariateNormal(blocks[1].loc[k], blocks[1].covariance_matrix[k]).log_prob(
                v[..., 1:3]
            )
            total = total + td.Normal(blocks[2].base_dist.loc[k], 0.7).log_prob(v[..., 3:]).sum(-1)
            each.append(total)
        each = torch.stack(each, -1)
        assert_close(q.component_log_prob(v), each, rtol=1e-12)
        assert_close(q.log_prob(v), each.exp().mean(-1).log(), rtol=1e-9)


def test_draws_of_a_shared_index_move_together_and_are_equally_frequent():
    q, _ = shared_index()
    draws = q.sample((6000,))
    nearest = (draws.mean(-1, keepdim=True) - torch.tensor([-6.0, 0.0, 6.0])).abs().argmin(-1)
    counts = nearest.bincount(minlength=3)
    assert ((counts - 2000).abs() < 5 * math.sqrt(6000 * 2 / 9)).all()
    for k, (m, scales) in enumerate(
        [
            (-6.0, [1.0, 1.0, 1.0, 0.7, 0.7]),
            (0.0, [0.5, 2**0.5, 2**0.5, 0.7, 0.7]),
            (6.0, [2.0, 0.5**0.5, 0.5**0.5, 0.7, 0.7]),
        ]
    ):
        mine = draws[nearest == k]
        scale = torch.tensor(scales)
        assert ((mine.mean(0) - m).abs() < 6 * scale / len(mine) ** 0.5).all()
        assert_close(mine.std(0), scale, rtol=0.12)


@pytest.mark.parametrize("batch_shape", [(4,), (3, 4), (3, 1)])
def test_a_shared_index_inside_plates(batch_shape):
    q, _ = shared_index()

    def model():
        with pyro.plate_stack("p", batch_shape):
            return pyro.sample("v", q)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["v"]
    assert site["value"].shape == batch_shape + (5,)
    assert site["log_prob"].shape == batch_shape
    assert_close(site["log_prob"], q.log_prob(site["value"]), rtol=1e-12)
    draws = q.expand(batch_shape).sample((1000,))
    assert draws.shape == (1000, *batch_shape, 5)
    # every entry of the batch has an index of its own
    index = (draws.mean(-1, keepdim=True) - torch.tensor([-6.0, 0.0, 6.0])).abs().argmin(-1).flatten(1)
    for i in range(index.shape[1]):
        for j in range(i):
            together = (index[:, i] == index[:, j]).double().mean()
            assert abs(float(together) - 1 / 3) < 5 * (2 / 9 / 1000) ** 0.5
    assert q.expand(batch_shape).expand((2, *batch_shape)).batch_shape == (2, *batch_shape)
    assert q.expand(batch_shape)._validate_args == q._validate_args


def test_blocks_of_another_number_of_components_are_refused():
    with pytest.raises(ValueError, match=r"block 1 has batch shape \(2,\); expected \(3,\)"):
        SharedIndexMixture([dist.Normal(torch.zeros(3), 1.0), dist.Normal(torch.zeros(2), 1.0)])


@pytest.mark.parametrize("q", [0.01, 0.3, 0.5, 0.9])
def test_quantiles_invert_the_distribution_function(q):
    d = td.MixtureSameFamily(
        td.Categorical(WEIGHTS),
        td.Normal(torch.tensor([[-2.0, 0.0, 3.0], [1.0, 1.5, 9.0]]), torch.tensor(0.5)),
    )
    lower = td.Normal(torch.tensor([-2.0, 1.0]), 0.5).icdf(torch.tensor(q))
    upper = td.Normal(torch.tensor([3.0, 9.0]), 0.5).icdf(torch.tensor(q))
    found = mixture_quantile(d.cdf, lower, upper, q)
    assert_close(d.cdf(found), torch.full((2,), q), rtol=1e-10)
    # of a jump, the point where it happens
    step = mixture_quantile(lambda v: (v >= 0.25).double(), torch.tensor(0.0), torch.tensor(1.0), q)
    assert_close(step, 0.25, rtol=1e-12)


def families(batch):
    """Three components of batch shape ``batch``: univariate, multivariate, counts."""
    k = torch.tensor([-1.0, 0.5, 2.0]).view(3, *(1,) * len(batch))
    shift = torch.arange(float(torch.Size(batch).numel())).reshape(batch)
    loc = 3 * k + shift
    covariance = torch.tensor([[1.0, 0.4], [0.4, 2.0]])
    return {
        "normal": td.Normal(loc, (0.3 * k).exp().expand(loc.shape)),
        "multivariate": td.MultivariateNormal(torch.stack([loc, -loc], -1), covariance),
        "poisson": td.Poisson((0.3 * k + 0.1 * shift).exp()),
        "independent": td.Independent(td.Normal(torch.stack([loc, -loc, loc], -1), 0.5), 1),
    }


def take(d, k):
    """The k-th of the leading batch dimension."""
    if isinstance(d, td.Independent):
        return td.Independent(td.Normal(d.base_dist.loc[k], d.base_dist.scale[k]), 1)
    if isinstance(d, td.MultivariateNormal):
        return td.MultivariateNormal(d.loc[k], d.covariance_matrix[k])
    return td.Poisson(d.rate[k]) if isinstance(d, td.Poisson) else td.Normal(d.loc[k], d.scale[k])


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("name", ["normal", "multivariate", "poisson", "independent"])
@pytest.mark.parametrize("weighted", [False, True])
def test_mixtures_of_predictions(weighted, name, batch):
    components = families(batch)[name]
    parts = [take(components, k) for k in range(3)]
    weights = WEIGHTS if weighted else torch.full((3,), 1 / 3)
    d = WeightedMixture(parts, weights.log()) if weighted else EqualMixture(components)
    assert d.batch_shape == batch
    assert d.event_shape == components.event_shape
    for sample in ((), (5,), (4, 5)):
        value = parts[1].sample(torch.Size(sample))
        each = torch.stack([part.log_prob(value).exp() * w for part, w in zip(parts, weights, strict=True)])
        assert d.log_prob(value).shape == sample + batch
        assert_close(d.log_prob(value), each.sum(0).log(), rtol=1e-9)
        assert d.sample(torch.Size(sample)).shape == sample + batch + d.event_shape
    mean = sum(w * part.mean for part, w in zip(parts, weights, strict=True))
    second = sum(w * (part.variance + part.mean.square()) for part, w in zip(parts, weights, strict=True))
    assert_close(d.mean, mean, rtol=1e-10)
    assert_close(d.variance, second - mean.square(), rtol=1e-9)
    n = 20_000
    draws = d.sample((n,))
    assert ((draws.mean(0) - d.mean).abs() < 5 * (d.variance / n).sqrt()).all()
    assert_close(draws.var(0), d.variance, rtol=0.08)


@pytest.mark.parametrize("weighted", [False, True])
def test_elements_of_a_batch_have_components_of_their_own_and_events_do_not(weighted):
    loc = torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1).expand(3, 4, 2)
    parts = td.Independent(td.Normal(loc, 0.5), 1)
    d = (
        WeightedMixture([take(parts, k) for k in range(3)], WEIGHTS.log())
        if weighted
        else EqualMixture(parts)
    )
    draws = d.sample((3000,))
    index = (draws.unsqueeze(-1) - torch.tensor([-9.0, 0.0, 9.0])).abs().argmin(-1)
    assert bool((index[..., 0] == index[..., 1]).all())
    weights = WEIGHTS if weighted else torch.full((3,), 1 / 3)
    same = weights.square().sum()
    for i in range(4):
        for j in range(i):
            together = (index[:, i, 0] == index[:, j, 0]).double().mean()
            assert abs(float(together - same)) < 5 * float((same * (1 - same) / 3000).sqrt())


def test_packed_mixtures_are_weighted_sums_of_dense_gaussians():
    A = torch.randn(3, 3)
    first, second = A @ A.mT + torch.eye(3), torch.tensor([1.0, 4.0, 0.5])
    loc = torch.randn(2, 3)
    d = PackedMixture(
        [FullNormal(loc[0], first), DiagonalNormal(loc[1], second)], torch.tensor([0.3, 0.7]).log()
    )
    dense = [
        td.MultivariateNormal(loc[0], precision_matrix=first),
        td.MultivariateNormal(loc[1], precision_matrix=torch.diag(second)),
    ]
    x = torch.randn(2, 5, 3)
    each = torch.stack([part.log_prob(x) for part in dense], -1)
    assert_close(d.component_log_prob(x), each, rtol=1e-10)
    assert_close(d.log_prob(x), (each.exp() * torch.tensor([0.3, 0.7])).sum(-1).log(), rtol=1e-10)
    mean = 0.3 * loc[0] + 0.7 * loc[1]
    second_moment = 0.3 * (dense[0].variance + loc[0].square()) + 0.7 * (dense[1].variance + loc[1].square())
    assert_close(d.mean, mean, rtol=1e-12)
    assert_close(d.variance, second_moment - mean.square(), rtol=1e-10)
    draws, index = d.rsample_with_index((4, 10_000))
    assert draws.shape == (4, 10_000, 3)
    assert index.shape == (4, 10_000)
    share = (index == 1).double().mean()
    assert abs(float(share) - 0.7) < 5 * (0.21 / 40_000) ** 0.5
    for k in range(2):
        mine = draws[index == k]
        assert ((mine.mean(0) - loc[k]).abs() < 5 * (dense[k].variance / len(mine)).sqrt()).all()
        assert_close(mine.var(0), dense[k].variance, rtol=0.08)
    assert d.expand([2]).sample((3,)).shape == (3, 2, 3)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert_close(*(d.rsample((9,), generator=g) for g in generators), rtol=0)


def test_a_packed_mixture_of_one_component_is_that():
    part = DiagonalNormal(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 9.0]))
    d = PackedMixture([part], torch.zeros(1))
    x = torch.randn(3, 2)
    assert_close(d.log_prob(x), part.log_prob(x), rtol=1e-12)
    assert_close(d.variance, part.variance, rtol=1e-12)
    draws, index = d.rsample_with_index((5,))
    assert draws.shape == (5, 2)
    assert index.tolist() == [0] * 5


def test_components_on_subspaces_have_no_density_elsewhere():
    part = DiagonalNormal(torch.tensor([1.0]), torch.tensor([4.0]))
    loc = torch.tensor([[1.0, 100.0], [1.0, -3.0]])
    parts = [BlockNormal(m, [(torch.tensor([0]), part)]) for m in loc]
    d = PackedMixture(parts, torch.tensor([0.25, 0.75]).log())
    at = torch.tensor(
        [[1.2, 100.0], [1.2, -3.0], [1.2, 7.0], [1.2, 100.0 * (1 + 1e-14)], [1.2, 100.0 + 1e-9]]
    )
    one = td.Normal(1.0, 0.5).log_prob(torch.tensor(1.2))
    expected = torch.stack([one + math.log(0.25), one + math.log(0.75), *[one - torch.inf] * 3])
    expected[3] = expected[0]  # the same point up to rounding
    assert_close(d.log_prob(at), expected, rtol=1e-12)


def test_fixed_coordinates_agree_up_to_rounding():
    """Of components on subspaces: relative to the size of the coordinate from 1 on, absolute below."""
    for fixed, size in ((0.0, 1.0), (1e6, 1e6), (-3e-9, 1.0)):
        part = BlockNormal(
            torch.tensor([0.0, fixed]), [(torch.tensor([0]), DiagonalNormal(torch.zeros(1), torch.ones(1)))]
        )
        d = PackedMixture([part, part], torch.tensor([0.4, 0.6]).log())
        eps = torch.finfo(torch.float64).eps
        inside, outside = fixed + 0.5e4 * eps * size, fixed + 3e4 * eps * size
        expected = td.Normal(0.0, 1.0).log_prob(torch.tensor(0.3))
        assert_close(d.log_prob(torch.tensor([0.3, inside])), expected)
        assert d.log_prob(torch.tensor([0.3, outside])) == -math.inf


def test_what_mixtures_take_from_their_components():
    parts = [td.Gamma(torch.full((2,), a), torch.ones(2)) for a in (1.0, 4.0)]
    d = WeightedMixture(parts, torch.tensor([0.25, 0.75]).log())
    assert d.support is parts[0].support
    packed = PackedMixture([FullNormal(torch.randn(3), torch.eye(3)) for _ in range(2)], torch.zeros(2))
    expanded = packed.expand((4,))
    assert expanded.batch_shape == (4,)
    assert expanded.event_shape == (3,)
    assert packed.has_rsample
    one = td.Normal(torch.randn(1, 5), 1.0)
    assert_close(marginal_quantile(one, 0.3), one.icdf(torch.tensor(0.3))[0])
    two = td.Normal(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [0.5]]))
    for weights in (None, torch.tensor([0.9, 0.1])):
        q = marginal_quantile(two, 0.7, weights)
        mixed = (two.cdf(q) * (torch.full((2,), 0.5) if weights is None else weights)[:, None]).sum(0)
        assert_close(mixed, torch.tensor([0.7]), rtol=1e-9)


def test_probabilities_of_labels_are_averaged() -> None:
    logits = torch.randn(5, 4, 2, 3)
    d = EqualMixture(td.Independent(td.Categorical(logits=logits), 1))
    assert_close(d.probs, logits.softmax(-1).mean(0))
    assert_close(EqualMixture(td.Bernoulli(logits=logits)).probs, logits.sigmoid().mean(0))
    assert not hasattr(EqualMixture(td.Normal(logits, 1.0)), "probs")
