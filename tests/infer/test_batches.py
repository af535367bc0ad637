# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Predictions, densities and exports do not depend on how the data are cut; the reference is plain Pyro on all of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

from pyro_bnn.diagnostics import log_weights, to_datatree
from pyro_bnn.infer import Mixture_ELBO, fit, posterior_predictive, predictive_moments
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.model.data import Batches

S = 5


def traces(model: Callable[..., Any], draws: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> list[Any]:
    """The model under each draw, by Pyro alone."""
    found = []
    for i in range(S):
        conditioned = poutine.condition(model, data={name: value[i] for name, value in draws.items()})
        trace = poutine.trace(conditioned).get_trace(*args, **kwargs)
        trace.compute_log_prob()
        found.append(trace)
    return found


def joint_density(
    model: Callable[..., Any], draws: dict[str, torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    return torch.stack([trace.log_prob_sum() for trace in traces(model, draws, *args, **kwargs)])


def regression(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def sensors(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("sensor", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
        pyro.sample("obs", dist.Normal((x * w).sum(-1) + torch.arange(3.0).unsqueeze(-1), 1.0), obs=y)


def sensors_last(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    """The data plate left of another one, and of its full size."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x), dim=-2), pyro.plate("sensor", 3, dim=-1):
        pyro.sample("obs", dist.Normal((x * w).sum(-1, True) + torch.arange(3.0), 1.0), obs=y)


def scaled(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("penalty", -w.abs().sum(-1))
    with poutine.scale(scale=3.0), pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((x * w).sum(-1), 1.0), obs=y)
        pyro.factor("each", -0.1 * (x * w).sum(-1).square())


def masked(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)), poutine.mask(mask=x[:, 0] > 0):
        pyro.sample("obs", dist.Normal((x * w).sum(-1), 1.0), obs=y)


def one_density(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    """The rows are the dimension of an event."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("obs", dist.Normal((x * w).sum(-1), 1.0).to_event(1), obs=y)


X = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
Y2 = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
CASES: list[tuple[Any, torch.Tensor, int]] = [
    (regression, Y, 0),
    (sensors, Y2, 1),
    (sensors_last, Y2.T.contiguous(), 0),
    (scaled, Y, 0),
    (masked, Y, 0),
]
CUTS = [(8,), (4, 4), (2, 2, 2, 2), (1,) * 8, (5, 3), (3, 3, 2)]


def cut(y: torch.Tensor, dim: int, sizes: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(X.split(sizes), y.split(sizes, dim), strict=True))


@pytest.mark.every(3)
@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize(("model", "y", "dim"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_results_do_not_depend_on_the_batches(
    model: Any, y: torch.Tensor, dim: int, sizes: tuple[int, ...]
) -> None:
    draws = {"w": torch.randn(S, 3)}
    reference = traces(model, draws, X, y)
    mean = torch.stack([trace.nodes["obs"]["fn"].mean for trace in reference])
    terms = torch.stack([trace.nodes["obs"]["unscaled_log_prob"] for trace in reference])
    mask = reference[0].nodes["obs"]["mask"]
    if mask is not None:
        terms = terms * mask
    batches = cut(y, dim, sizes)
    found = posterior_predictive(model, draws, batches)
    assert_close(found.mean, mean)
    assert_close(found.observed, y)
    assert_close(found.log_likelihood, terms)
    assert_close(predictive_moments(model, draws, batches)["obs"].mean, mean.mean(0))
    tree = to_datatree(model, draws, batches)
    lp = joint_density(model, draws, X, y)
    np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0], lp, rtol=1e-9)
    np.testing.assert_allclose(tree["observed_data"]["obs"], y)
    likelihood = tree["log_likelihood"]["obs"].values[0]
    expected = terms if mask is None else terms[:, mask]
    np.testing.assert_allclose(likelihood, expected, rtol=1e-9)


@pytest.mark.parametrize(("model", "y", "dim"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_pieces_of_one_batch(model: Any, y: torch.Tensor, dim: int) -> None:
    draws = {"w": torch.randn(S, 3)}
    whole = posterior_predictive(model, draws, (X, y))
    for size in (1, 3, 8, 20):
        found = posterior_predictive(model, draws, (X, y), batch_size=size)
        for field in ("mean", "variance", "log_likelihood", "observed"):
            assert_close(getattr(found, field), getattr(whole, field))
    tree = to_datatree(model, draws, (X, y), batch_size=3)
    np.testing.assert_allclose(
        tree["sample_stats"]["lp"].values[0], joint_density(model, draws, X, y), rtol=1e-9
    )


def test_rows_with_one_density() -> None:
    draws = {"w": torch.randn(S, 3)}
    lp = joint_density(one_density, draws, X, Y)
    for sizes in CUTS:
        batches = cut(Y, 0, sizes)
        found = posterior_predictive(one_density, draws, batches)
        assert found.mean.shape == (S, 8)
        assert found.log_likelihood.shape == (S,)
        tree = to_datatree(one_density, draws, batches)
        np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0], lp, rtol=1e-9)
    with pytest.raises(ValueError, match=r"batch_size=3.*event of site 'obs'"):
        posterior_predictive(one_density, draws, (X, Y), batch_size=3)


def test_plates_that_stand_for_more_rows() -> None:
    def model(x: torch.Tensor, y: torch.Tensor | None = None, n: int = 20) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", n, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal((x * w).sum(-1), 1.0), obs=y)

    draws = {"w": torch.randn(S, 3)}
    lp = joint_density(model, draws, X, Y)  # 20 / 8 times the likelihood
    for sizes in CUTS:
        tree = to_datatree(model, draws, cut(Y, 0, sizes))
        np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0], lp, rtol=1e-9)
        assert posterior_predictive(model, draws, cut(Y, 0, sizes)).mean.shape == (S, 8)
    # more rows than the plate has: a prediction does not need its size
    found = posterior_predictive(model, draws, {"x": X, "y": Y, "n": 5})
    assert_close(found.mean, draws["w"] @ X.T)


def test_two_tables() -> None:
    def model(x1: Any, y1: Any, x2: Any, y2: Any) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("a", len(x1)):
            pyro.sample("first", dist.Normal(w * x1, 1.0), obs=y1)
        with pyro.plate("b", len(x2)):
            pyro.sample("second", dist.Normal(w + x2, 2.0), obs=y2)

    draws = {"w": torch.randn(S)}
    data = (torch.randn(40), torch.randn(40), torch.randn(25), torch.randn(25))
    lp = joint_density(model, draws, *data)
    tree = to_datatree(model, draws, data, batch_size=10)
    np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0], lp, rtol=1e-9)
    assert tree["log_likelihood"]["first"].shape == (1, S, 40)
    assert tree["log_likelihood"]["second"].shape == (1, S, 25)
    assert tree["constant_data"]["x1"].dims == ("a",)
    # the second table whole in every batch of the first
    batches = [(*part, *data[2:]) for part in zip(data[0].split(16), data[1].split(16), strict=True)]
    tree = to_datatree(model, draws, batches)
    np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0], lp, rtol=1e-9)


def test_two_tables_of_one_length() -> None:
    def model(x1: Any, y1: Any, x2: Any, y2: Any) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("a", len(x1)):
            pyro.sample("first", dist.Normal(w * x1, 1.0), obs=y1)
        with pyro.plate("b", len(x2)):
            pyro.sample("second", dist.Normal(w + x2, 2.0), obs=y2)

    draws = {"w": torch.randn(S)}
    data = tuple(torch.randn(12) for _ in range(4))
    lp = joint_density(model, draws, *data)
    parts = [tensor.split(4) for tensor in data]
    together = list(zip(*parts, strict=True))  # both tables cut
    first_only = [(*part, *data[2:]) for part in zip(*parts[:2], strict=True)]
    for batches, size in ((together, None), (first_only, None), (data, 4), (data, 5)):
        tree = to_datatree(model, draws, batches, batch_size=size)
        np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0], lp, rtol=1e-9)
        for name, y in (("first", data[1]), ("second", data[3])):
            np.testing.assert_allclose(tree["observed_data"][name], y)


def test_tables_that_every_batch_needs_whole() -> None:
    """A table as long as a batch, latents for its rows, and labels that are the same in all batches."""

    def model(table: Any, x: Any, index: Any, y: Any) -> None:
        with pyro.plate("table", len(table)):
            effect = pyro.sample("effect", dist.Normal(table, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x + effect[..., index], 1.0), obs=y)

    draws = {"effect": torch.randn(S, 4)}
    data = torch.randn(4), torch.randn(12), torch.arange(12) % 4, torch.zeros(12)
    lp = joint_density(model, draws, *data)
    batches = [(data[0], *part) for part in zip(*(tensor.split(4) for tensor in data[1:]), strict=True)]
    tree = to_datatree(model, draws, batches)
    np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0], lp, rtol=1e-9)
    assert tree["posterior"]["effect"].shape == (1, S, 4)
    assert tree["log_likelihood"]["obs"].shape == (1, S, 12)


def test_time_first_and_packed_sequences() -> None:
    net = torch.nn.GRU(2, 3)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        hidden = net(x)[1][0]
        with pyro.plate("data", len(hidden)):
            pyro.sample("obs", dist.Normal((hidden * w).sum(-1), 1.0), obs=y)

    draws = {"w": torch.randn(S, 3)}
    x, y = torch.randn(8, 30, 2), torch.randn(30)
    expected = (net(x)[1][0] @ draws["w"].T).T.detach()
    for size in (None, 7):
        assert_close(posterior_predictive(model, draws, (x, y), batch_size=size).mean, expected)
    packed = pack_sequence([torch.randn(n, 2) for n in (3, 5, 2, 6)], enforce_sorted=False)
    expected = (net(packed)[1][0] @ draws["w"].T).T.detach()
    for size in (None, 1, 3):
        assert_close(posterior_predictive(model, draws, (packed, y[:4]), batch_size=size).mean, expected)


def test_nested_arguments() -> None:
    def model(batch: dict[str, Any], y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        x, (offset, scale) = batch["x"], batch["rest"]
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * w).sum(-1) + offset, scale), obs=y)

    draws = {"w": torch.randn(S, 3)}
    batch = {"x": X, "rest": [torch.arange(8.0), torch.tensor(2.0)]}
    expected = draws["w"] @ X.T + torch.arange(8.0)
    for size in (None, 3):
        assert_close(posterior_predictive(model, draws, (batch, Y), batch_size=size).mean, expected)
    constants = to_datatree(model, draws, (batch, Y))["constant_data"]
    assert constants["batch.x"].dims == ("data", "batch.x_dim_1")
    assert constants["batch.rest.0"].dims == ("data",)
    broken = {"x": X, "rest": [torch.full((8,), torch.nan), torch.tensor(2.0)]}
    with pytest.raises(ValueError, match=r"argument 0\['rest'\]\[0\] of the model holds 8 non-finite"):
        posterior_predictive(model, draws, (broken, Y))
    with torch.inference_mode():
        frozen = {"x": X.clone(), "rest": [torch.arange(8.0), torch.tensor(2.0)]}
    assert_close(posterior_predictive(model, draws, (frozen, Y)).mean, expected)


def encoder_model(x: torch.Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z + shift, 0.1), obs=x)


def encoder(x: torch.Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(1.0, 1e-6))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x - shift, 1e-6))


def test_latents_with_a_value_per_row() -> None:
    x = torch.randn(12)
    for data, size in (((x,), None), ((x,), 5), ([(part,) for part in x.split(4)], None)):
        found = posterior_predictive(encoder_model, encoder, data, num_samples=S, batch_size=size)
        assert_close(found.mean, x.expand(S, 12), atol=1e-4, rtol=0)
        tree = to_datatree(encoder_model, encoder, data, num_samples=S, batch_size=size)
        assert tree["posterior"]["z"].dims == ("chain", "draw", "data")
        np.testing.assert_allclose(
            tree["posterior"]["z"].values + tree["posterior"]["shift"].values[..., None],
            np.broadcast_to(x, (1, S, 12)),
            atol=1e-4,
        )
        z = torch.as_tensor(tree["posterior"]["z"].values[0])
        shift = torch.as_tensor(tree["posterior"]["shift"].values[0])
        lp = joint_density(encoder_model, {"z": z, "shift": shift}, x)
        np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0], lp, rtol=1e-9)
    draws = {"z": torch.randn(S, 12), "shift": torch.zeros(S)}
    expected = draws["z"]
    assert_close(posterior_predictive(encoder_model, draws, (x,), batch_size=5).mean, expected)
    with pytest.raises(
        ValueError, match=r"the draws of 'z' have shape \(12,\) each, the model's site has \(4,\)"
    ):
        posterior_predictive(encoder_model, draws, [(part,) for part in x.split(4)])
    guide = AutoNormal(encoder_model)
    guide(x)
    assert posterior_predictive(encoder_model, guide, (x,), num_samples=3, batch_size=5).mean.shape == (3, 12)


def test_models_that_choose_rows_themselves_are_refused() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=4) as i:
            pyro.sample("obs", dist.Normal((x[i] * w).sum(-1), 1.0), obs=y[i])

    draws = {"w": torch.randn(S, 3)}
    with pytest.raises(ValueError, match=r"plate 'data' \(4 of 8\): site 'obs' depends on which"):
        posterior_predictive(model, draws, (X, Y))
    with pytest.raises(ValueError, match=r"plate 'data' \(4 of 8\)"):
        to_datatree(model, draws, (X, Y))


def test_rows_that_interact_are_not_taken_apart() -> None:
    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(((x - x.mean(0)) * w).sum(-1), 1.0), obs=y)

    draws = {"w": torch.randn(S, 3)}
    with pytest.raises(ValueError, match="site 'obs' depends on which rows of plate 'data' run together"):
        posterior_predictive(model, draws, (X, Y), batch_size=3)


def test_rows_that_interact_where_the_first_do_not_show_it() -> None:
    def largest(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        x = x / x.max().clamp(min=1.0)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x * w, 1.0), obs=y)

    x = torch.linspace(0.1, 5.0, 100)
    for data in ((x,), (x, torch.zeros(100))):
        with pytest.raises(ValueError, match="batch_size=30: site 'obs' depends on which rows run together"):
            posterior_predictive(largest, {"w": torch.ones(S)}, data, batch_size=30)


def test_observations_outside_the_support() -> None:
    def model(y: torch.Tensor, n: int = 4) -> None:
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", n, subsample_size=len(y)):
            pyro.sample("obs", dist.Exponential(rate), obs=y)

    good, bad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    draws = {"rate": torch.rand(S) + 0.5}
    for data in ((bad,), [(good,), (bad,)]):
        for run in (posterior_predictive, predictive_moments, to_datatree):
            with pytest.raises(ValueError, match=r"Site 'obs': .* the support"):
                run(model, draws, data)
    with pytest.raises(ValueError, match="lie outside the support"):
        fit(model, AutoNormal(model), [(good,), (bad,)], num_epochs=1, progress_bar=False)
    lp = to_datatree(model, {"rate": torch.tensor([1.0, -1.0])}, (good,))["sample_stats"]["lp"].values[0]
    assert np.isfinite(lp[0])
    assert lp[1] == -np.inf


def test_guides_without_a_latent_have_no_weights() -> None:
    def model(y: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(z + noise, 1.0), obs=y)

    guide = AutoNormal(poutine.block(model, hide=["noise"]))
    guide(Y)
    with (
        pytest.warns(UserWarning, match="no draws of"),
        pytest.raises(ValueError, match=r"no density of the sites \['noise'\]"),
    ):
        log_weights(model, guide, (Y,), 10)


def test_models_that_change_their_data() -> None:
    def model(x: torch.Tensor) -> None:
        x -= 1.0
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x * w, 1.0))

    x = torch.zeros(3)
    with pytest.raises(ValueError, match="the model changes argument 0 in place"):
        posterior_predictive(model, {"w": torch.ones(4)}, (x,))
    assert_close(x, torch.zeros(3))


def test_thinned_draws_keep_their_labels() -> None:
    tree = to_datatree(regression, {"w": torch.randn(6, 3)}, (X, Y), thin=3)
    np.testing.assert_array_equal(tree["posterior"]["draw"], [0, 3])
    np.testing.assert_array_equal(tree["sample_stats"]["draw"], range(6))


def test_bounds_refuse_observations_of_another_shape() -> None:
    guide = AutoMixture(regression, 2).initialize(X, Y)
    with pytest.raises(ValueError, match=r"Site 'obs': the observation has shape \(8, 1\)"):
        Mixture_ELBO()(regression, guide)(X, Y[:, None])


def test_batches_that_could_be_parts_of_two_plates() -> None:
    def model(y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("a", y.shape[0], dim=-2), pyro.plate("b", y.shape[1], dim=-1):
            pyro.sample("obs", dist.Normal(w, 1.0), obs=y)

    draws = {"w": torch.randn(S)}
    y = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"parts of any of the plates \['a', 'b'\]"):
        posterior_predictive(model, draws, [(y[:2],), (y[2:],)])
    assert_close(posterior_predictive(model, draws, [(y[:1],), (y[1:],)]).observed, y)
    assert_close(posterior_predictive(model, draws, [(y[:, :2],), (y[:, 2:],)]).observed, y)


def test_observations_of_another_shape_are_refused() -> None:
    draws = {"w": torch.randn(S, 3)}
    with pytest.raises(ValueError, match=r"Site 'obs': the observation has shape \(8, 1\)"):
        posterior_predictive(regression, draws, (X, Y[:, None]))
    with pytest.raises(ValueError, match=r"has shape \(\), .* each value would count 8 times"):
        posterior_predictive(regression, draws, (X, torch.tensor(1.0)))


def test_labels_of_a_type_that_the_distribution_does_not_take() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("label", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)

    with pytest.raises(ValueError, match=r"ite 'label': .*Bernoulli .*torch.int64"):
        posterior_predictive(model, {"w": torch.randn(S, 3)}, (X, (Y > 0).long()))


def test_a_plate_named_like_an_argument() -> None:
    def model(data: torch.Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(mean, data[:, 1]), obs=data[:, 0])

    tree = to_datatree(model, {"mean": torch.randn(S)}, (torch.rand(8, 2) + 1,))
    assert tree["log_likelihood"]["obs"].dims == ("chain", "draw", "data")
    assert tree["constant_data"]["data"].dims == ("data_dim", "data_dim_1")


def test_models_of_any_number_of_arguments() -> None:
    def model(*args: Any) -> None:
        inputs, y = args
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(inputs[0])):
            pyro.sample("obs", dist.Normal((inputs[0] * w).sum(-1) + inputs[1], 1.0), obs=y)

    draws = {"w": torch.randn(S, 3)}
    tree = to_datatree(model, draws, ([X, torch.arange(8.0)], Y))
    assert set(tree["constant_data"].data_vars) == {"argument_0.0", "argument_0.1"}
    assert tree["constant_data"]["argument_0.1"].dims == ("data",)
    lp = joint_density(model, draws, [X, torch.arange(8.0)], Y)
    np.testing.assert_allclose(tree["sample_stats"]["lp"].values[0], lp, rtol=1e-9)


def test_names_with_slashes() -> None:
    def model(y: torch.Tensor) -> None:
        w = pyro.sample("body/w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(w, 1.0), obs=y)

    def both(y: torch.Tensor) -> None:
        pyro.sample("body.w", dist.Normal(0.0, 1.0))
        model(y)

    guide = AutoNormal(model)
    guide(Y)
    assert set(log_weights(model, guide, (Y,), 7)[0]) == {"body/w"}
    with pytest.raises(ValueError, match=r"two sites are named 'body\.w'"):
        to_datatree(both, {"body/w": torch.randn(S), "body.w": torch.randn(S)}, (Y,))


def test_models_that_differentiate() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh())

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        x = x.detach().requires_grad_(True)
        slope = torch.autograd.grad((net(x) @ w).sum(), x, create_graph=True)[0].squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(slope, 1.0), obs=y)

    draws = {"w": torch.randn(S, 4)}
    x = torch.randn(20, 1)
    weight, bias = net[0].weight, net[0].bias
    expected = ((1 - torch.tanh(x @ weight.T + bias) ** 2) * weight.T @ torch.diag_embed(draws["w"])).sum(-1)
    found = posterior_predictive(model, draws, (x,))
    assert_close(found.mean, expected.detach())
    assert not found.mean.requires_grad


def test_batches_are_checked_whole() -> None:
    good = (torch.ones(4, 2), torch.ones(4))
    for bad, message in (
        ((torch.ones(4, 2), torch.ones(4, 1)), "batch 1 of the data differs .* argument 1 .* 2 dimensions"),
        ((torch.ones(4, 2),), "argument 1 of the model is missing"),
        ((torch.ones(4, 2), torch.full((4,), torch.inf)), "argument 1 of the model holds 4 non-finite"),
    ):
        with pytest.raises(ValueError, match=message):
            list(Batches([good, bad]))
    stream = Batches(iter([good, good]))
    assert len(stream.first) == 2
    assert len(list(stream)) == 2
    with pytest.raises(ValueError, match="an iterator, which can be run through once only"):
        list(stream)


def test_a_first_batch_of_one_row_hides_what_others_show() -> None:
    """With one row and one column a product broadcasts over draws; with more rows it does not."""

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    x, w = torch.randn(7, 1), torch.randn(S, 1)
    batches = [(part,) for part in x.split((1, 3, 3))]
    assert_close(posterior_predictive(model, {"w": w}, batches).mean, w @ x.T)


def test_as_many_rows_as_draws_that_are_compared() -> None:
    """A product that takes the dimension of the draws for that of the rows agrees where both are as long."""

    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        f = x * w.reshape(-1) if w.numel() in (1, len(x)) else x * w
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(f, 1.0))

    for rows in (1, 2, 3, 5):
        x, w = torch.randn(rows), torch.randn(9)
        assert_close(posterior_predictive(model, {"w": w}, (x,)).mean, w[:, None] * x)


def test_changed_data_are_all_of_the_data() -> None:
    """Also where they can be run through once, and the first batch was looked at before."""
    parts = [torch.full((2,), float(i)) for i in range(3)]
    for source in (parts[0], [(part,) for part in parts], iter([(part,) for part in parts])):
        batches = Batches(source)
        expected = batches.first[0][0]
        changed = batches.map(lambda x: x + 10)
        assert changed.is_single == batches.is_single
        assert_close(changed.first[0][0], expected + 10)
        values = [args[0] for args, _ in changed]
        assert_close(torch.stack(values), torch.stack(parts[: len(values)]) + 10)
        assert len(values) == (1 if batches.is_single else 3)


@pytest.mark.parametrize("coupled", [False, True])
def test_rounding_under_a_narrow_density_is_no_coupling_of_rows(coupled: bool) -> None:
    """Large weights that cancel, and a noise of 1e-6: a density feels rounding of its mean that depends on how many rows run."""
    first, last = torch.randn(3, 50), 100 * torch.randn(50)
    x, w = torch.randn(200, 3), torch.full((5, 50), 1.0) + 1e-9 * torch.randn(5, 50)

    def model(x: torch.Tensor) -> None:
        scale = pyro.sample("w", dist.Normal(torch.ones(50), 1.0).to_event(1))
        h = torch.tanh(x @ first) * (1 + 1e-9 * x.abs().max() if coupled else 1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(h @ (scale * last), 1e-6))

    if coupled:
        with pytest.raises(ValueError, match="site 'obs' depends on which rows of plate 'data' run together"):
            posterior_predictive(model, {"w": w}, (x,), batch_size=30)
        return
    found = posterior_predictive(model, {"w": w}, (x,), batch_size=30)
    assert_close(
        found.mean, (torch.tanh(x @ first) @ (w * last).mT).mT.expand_as(found.mean), rtol=1e-9, atol=1e-9
    )
