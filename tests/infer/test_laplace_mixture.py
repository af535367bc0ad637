# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from pyro.infer.autoguide.initialization import init_to_value

from pyro_bnn.diagnostics import to_datatree
from pyro_bnn.infer import load_guide, posterior_predictive, save_guide
from pyro_bnn.infer.autoguide import AutoLaplace, AutoLaplaceMixture, AutoMixture
from pyro_bnn.infer.predict.density import guide_log_prob
from tests.common import assert_close
from tests.models import in_between_data, tanh_network


def ensemble(hidden=3, **options):
    x, y = in_between_data()
    model = tanh_network(hidden=hidden)
    modes = AutoMixture(model, num_components=3, component="delta").initialize(x, y)
    modes.loc.data.normal_()
    return model, x, y, modes, AutoLaplaceMixture.from_modes(model, modes, (x, y), (x, y), **options)


def test_components_and_weights():
    _, _, _, modes, guide = ensemble(weights="evidence")
    for k, part in enumerate(guide.components):
        for name, component in modes.component_distributions().items():
            assert_close(part.median()[name], component.mean[k].detach(), rtol=1e-12)
    evidences = torch.stack([part.log_evidence() for part in guide.components])
    assert_close(guide.log_weights, evidences - evidences.logsumexp(0), rtol=1e-10, atol=1e-12)
    assert_close(guide.log_evidence(), evidences.logsumexp(0), rtol=1e-12)


@pytest.mark.parametrize("weights", ["equal", "evidence"])
def test_density_is_that_of_the_mixture(weights):
    _, _, _, _, guide = ensemble(weights=weights)
    point = guide.components[0].loc.detach() + 0.1
    parts = [
        torch.distributions.MultivariateNormal(part.loc, precision_matrix=part.precision)
        for part in guide.components
    ]
    each = torch.stack([part.log_prob(point) for part in parts]).detach()
    assert_close(guide.get_posterior().log_prob(point), (each + guide.log_weights).logsumexp(0), rtol=1e-10)
    draws = guide.sample_posterior((5,))
    latent = guide.packed.space.pack(draws)
    assert_close(guide_log_prob(guide, draws), guide.posterior.log_prob(latent), rtol=1e-10)
    # the density integrates to one: importance weights of the mixture under a wide normal average to one
    narrow = guide.posterior
    wide = dist.Normal(narrow.mean, 1.5 * narrow.variance.sqrt()).to_event(1)
    moments = narrow.rsample((40_000,))
    assert_close(moments.mean(0), narrow.mean, atol=0.06, rtol=0)
    assert_close(moments.var(0), narrow.variance, rtol=0.08)
    assert torch.isfinite(wide.log_prob(moments)).all()


def test_quantiles_are_those_of_the_marginal_mixtures():
    _, _, _, _, guide = ensemble(weights="evidence")
    draws = guide.posterior.rsample((100_000,))
    levels = [0.1, 0.5, 0.9]
    packed = torch.cat([v.reshape(3, -1) for v in guide.quantiles(levels).values()], -1)
    below = (draws <= packed[:, None]).double().mean(1)
    assert_close(below, torch.tensor(levels)[:, None].expand_as(below), atol=0.006, rtol=0)
    assert_close(guide.median()["w2"], guide.quantiles([0.5])["w2"][0], rtol=0)


def test_predictions_linearise_around_the_mode_of_each_draw():
    model, x, _, _, guide = ensemble()
    parts = [part.linearized_outputs(x[:4])["obs"] for part in guide.components]
    mean = torch.stack([part.mean[:, 0] for part in parts])
    variance = torch.stack([part.variance[:, 0] for part in parts])
    expected = variance.mean(0) + mean.var(0, correction=0)
    functions = guide.functional_samples(20_000, x[:4])["obs"][..., 0]
    assert_close(functions.var(0), expected, rtol=0.06)
    prediction = posterior_predictive(model, guide, (x[:4],), num_samples=20_000)
    assert_close(prediction.mean.var(0), expected, rtol=0.06)
    predictive = guide.predictive(x[:4])["obs"]
    assert_close(predictive.variance, expected + 0.1**2, rtol=1e-10)
    value = torch.zeros(4)
    each = torch.stack([part.predictive(x[:4])["obs"].log_prob(value) for part in guide.components])
    assert_close(predictive.log_prob(value), each.logsumexp(0) - torch.tensor(3.0).log(), rtol=1e-10)
    assert_close(predictive.sample((20_000,)).var(0), predictive.variance, rtol=0.06)


def test_last_layers_live_on_subspaces_of_their_own():
    model, x, y, _, guide = ensemble(sites=["w2", "b2"])
    draws = guide.sample_posterior((60,))
    first = torch.stack([part.median()["w1"] for part in guide.components])
    member = (draws["w1"].unsqueeze(1) == first).flatten(2).all(-1)
    assert (member.sum(1) == 1).all()
    assert member.any(0).all()
    logits = guide.posterior.component_log_prob(guide.packed.space.pack(draws))
    assert torch.equal(torch.isfinite(logits), member)
    assert posterior_predictive(model, guide, (x, y), num_samples=10).mean.shape == (10, len(x))


def test_it_is_a_guide(tmp_path):
    model, x, y, modes, guide = ensemble(structure="kronecker", weights="evidence")
    for _ in range(3):
        assert torch.isfinite(torch.tensor(Trace_ELBO().loss(model, guide, x, y)))
    # the ELBO is a lower bound of the evidence estimated with the same weights
    trace = pyro.poutine.trace(guide).get_trace(x, y)
    replayed = pyro.poutine.trace(pyro.poutine.replay(model, trace)).get_trace(x, y)
    latent = trace.nodes[f"_{guide._pyro_name}_latent"]["value"]
    assert_close(trace.log_prob_sum(), guide.posterior.log_prob(latent), rtol=1e-10)
    assert torch.isfinite(replayed.log_prob_sum())
    assert Predictive(model, guide=guide, num_samples=20)(x)["obs"].shape == (20, len(x))
    again = [guide.sample_posterior((4,), generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert_close(again[0]["w1"], again[1]["w1"], rtol=0)
    tree = to_datatree(model, guide, (x, y), num_samples=30)
    assert tree["posterior"]["w2"].sizes["chain"] == 1
    save_guide(guide, tmp_path / "guide.pt", (x, y))
    fresh = AutoLaplaceMixture(model, 3, structure="kronecker", weights="evidence")
    load_guide(fresh, tmp_path / "guide.pt")
    point = guide.components[1].loc.detach()
    assert_close(fresh.get_posterior().log_prob(point), guide.get_posterior().log_prob(point), rtol=0)
    assert_close(fresh.log_evidence(), guide.log_evidence(), rtol=0)
    equal = AutoLaplaceMixture.from_modes(model, modes, (x, y), (x, y))
    tree = to_datatree(model, equal, (x, y), num_samples=30)
    assert (tree["posterior"]["w2"].sizes["chain"], tree["posterior"]["w2"].sizes["draw"]) == (3, 10)
    before = equal.log_evidence()
    equal.optimize_hyperparameters()
    assert equal.log_evidence() > before


def test_part_of_the_sites_in_a_guide_list():
    x, y = in_between_data()
    model = tanh_network(hidden=3, noise=None)
    guide = AutoGuideList(model)
    init = init_to_value(values={"sigma": torch.tensor(0.3)})
    guide.append(AutoDelta(pyro.poutine.block(model, expose=["sigma"]), init_loc_fn=init))
    known = pyro.poutine.condition(model, data={"sigma": torch.tensor(0.3)})
    guide.append(AutoLaplaceMixture(pyro.poutine.block(known, hide=["sigma"]), 2))
    guide(x, y)
    guide[1].laplace_approximation((x, y))
    losses = []
    for other in ((model, guide), (known, guide[1])):  # the same draws of the same sites
        pyro.set_rng_seed(0)
        losses.append(torch.tensor(Trace_ELBO().loss(*other, x, y)))
    assert_close(*losses, rtol=1e-12)


def test_classes_mix_by_their_probabilities():
    x, y = torch.randn(20, 2), torch.randint(0, 3, (20,))

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=x @ w), obs=y)

    guide = AutoLaplaceMixture(model, 2).initialize(x, y)
    guide.laplace_approximation((x, y))
    parts = torch.stack([part.predictive(x)["obs"].probs for part in guide.components])
    assert_close(guide.predictive(x)["obs"].probs, parts.mean(0), rtol=1e-10)


def test_modes_from_other_fits():
    x, y = in_between_data()
    model = tanh_network(hidden=3)
    members = [AutoLaplace(model).initialize(x, y) for _ in range(2)]
    for member in members:
        member.loc.data.normal_()
    guide = AutoLaplaceMixture(model, 2).initialize(x, y).set_modes(members)
    assert_close(guide.components[1].loc, members[1].loc, rtol=1e-12)
    polished = guide.polish((x, y)).laplace_approximation((x, y))
    assert all(part.map_report.newton_decrement < 1e-3 for part in polished.components)


def test_bad_input():
    x, y = in_between_data()
    model = tanh_network(hidden=3)
    with pytest.raises(RuntimeError, match=r"call laplace_approximation"):
        AutoLaplaceMixture(model, 2).initialize(x, y).sample_posterior()
    with pytest.raises(ValueError, match="unknown weights 'even'"):
        AutoLaplaceMixture(model, weights="even")
    normal = AutoMixture(model, num_components=2, component="normal").initialize(x, y)
    with pytest.raises(ValueError, match="no point masses"):
        AutoLaplaceMixture.from_modes(model, normal, (x, y), (x, y))
    with pytest.raises(ValueError, match="1 points, but the guide has 2 components"):
        AutoLaplaceMixture(model, 2).initialize(x, y).set_modes([normal.sample_posterior()])


def test_a_mixture_in_single_precision_loads(tmp_path):
    def single(y=None):
        a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=torch.float32), 2.0).to_event(1))
        pyro.sample("obs", dist.Normal(a.prod(), 0.1), obs=y)

    y = torch.tensor(1.0, dtype=torch.float32)
    guide = AutoLaplaceMixture(single, 2, weights="evidence").initialize(y)
    guide.set_modes([{"a": torch.ones(2)}, {"a": -torch.ones(2)}]).laplace_approximation(y)
    save_guide(guide, tmp_path / "guide.pt")
    loaded = load_guide(AutoLaplaceMixture(single, 2, weights="evidence"), tmp_path / "guide.pt")
    u = torch.tensor([0.9, 1.1], dtype=torch.float32)
    assert_close(loaded.posterior.log_prob(u), guide.posterior.log_prob(u))
