# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import functools
from pathlib import Path
from typing import Any

import arviz as az
import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from pyro.ops.stats import fit_generalized_pareto
from scipy.special import logsumexp
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.arviz_matrix import arviz_generation
from pyro_bnn.diagnostics import log_weights, to_datatree, to_inference_data, write_tree
from pyro_bnn.infer import fit
from pyro_bnn.infer.sample.nuts import RecordingNUTS
from pyro_bnn.nn import bayesian_
from tests.common import assert_close
from tests.infer.models import NOISE, TextbookNet, linear_data, linear_model, linear_posterior

#: Whether the installed ArviZ is of the generation with ``InferenceData``.
OLD = arviz_generation() == 0


def exact_draws(x: torch.Tensor, y: torch.Tensor, num: int = 1000) -> dict[str, torch.Tensor]:
    mean, covariance = linear_posterior(x, y)
    return {"weight": torch.distributions.MultivariateNormal(mean, covariance).sample((num,))}


def exact_guide(x: torch.Tensor, y: torch.Tensor) -> AutoMultivariateNormal:
    """A guide set to the exact posterior of :func:`linear_model`."""
    guide = AutoMultivariateNormal(linear_model)
    guide(x, y)
    mean, covariance = linear_posterior(x, y)
    tril = torch.linalg.cholesky(covariance)
    scale = tril.diagonal()
    with torch.no_grad():
        guide.loc.copy_(mean)
        guide.scale = pyro.nn.PyroParam(scale.clone(), guide.scale_constraint)
        guide.scale_tril = pyro.nn.PyroParam(tril / scale[:, None], guide.scale_tril_constraint)
    return guide


def psis_loo(log_likelihood: np.ndarray) -> np.ndarray:
    """Pareto-smoothed importance-sampling LOO (Vehtari, Gelman, Gabry 2017), from the formulas."""
    size = len(log_likelihood)
    tail = int(np.ceil(min(size / 5, 3 * np.sqrt(size))))
    elpd = []
    for column in log_likelihood.T:
        log_ratio = -column - np.max(-column)
        order = np.argsort(log_ratio)
        cutoff = log_ratio[order[-tail - 1]]
        excess = np.exp(log_ratio[order[-tail:]]) - np.exp(cutoff)
        k, sigma = (float(v) for v in fit_generalized_pareto(torch.as_tensor(excess)))
        probs = (np.arange(tail) + 0.5) / tail
        smoothed = sigma * np.expm1(-k * np.log1p(-probs)) / k + np.exp(cutoff)
        log_ratio[order[-tail:]] = np.minimum(np.log(smoothed), 0.0)
        elpd.append(logsumexp(log_ratio + column) - logsumexp(log_ratio))
    return np.asarray(elpd)


def test_loo_equals_loo_by_hand() -> None:
    x, y = linear_data()
    draws = exact_draws(x, y)
    kwargs: dict[str, Any] = {"num_chains": 4}
    tree = to_datatree(linear_model, draws, (x, y), **kwargs)
    data = to_inference_data(linear_model, draws, (x, y), **kwargs)
    assert isinstance(data, az.InferenceData if OLD else xr.DataTree)

    matrix = dist.Normal(draws["weight"] @ x.T, NOISE).log_prob(y).numpy()
    exported = tree["log_likelihood"]["obs"]
    assert exported.dims == ("chain", "draw", "data")
    np.testing.assert_allclose(exported.values.reshape(1000, -1), matrix, rtol=1e-12)

    expected = psis_loo(matrix)
    new = arviz_stats.loo(tree, pointwise=True, reff=1.0)
    np.testing.assert_allclose(new.elpd_i.values, expected, rtol=0, atol=2e-3)
    np.testing.assert_allclose(new.elpd, expected.sum(), rtol=1e-3)
    installed = az.loo(data, pointwise=True, reff=1.0)
    found = installed.loo_i if OLD else installed.elpd_i
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=2e-3)

    # and the exact leave-one-out density of the conjugate model
    exact = 0.0
    for i in range(len(x)):
        keep = torch.arange(len(x)) != i
        mean, covariance = linear_posterior(x[keep], y[keep])
        scale = (x[i] @ covariance @ x[i] + NOISE**2).sqrt()
        exact += float(dist.Normal(x[i] @ mean, scale).log_prob(y[i]))
    np.testing.assert_allclose(new.elpd, exact, atol=0.5)


def test_importance_weights_of_the_exact_posterior_are_constant() -> None:
    x, y = linear_data(12)
    stats = to_datatree(linear_model, exact_guide(x, y), (x, y), num_samples=200)["sample_stats"]
    np.testing.assert_allclose(stats["log_weight"].values, -np.log(200), atol=1e-9)
    # lp - log q is the log evidence, a multivariate normal density
    covariance = torch.eye(12) * NOISE**2 + x @ x.T
    evidence = dist.MultivariateNormal(torch.zeros(12), covariance).log_prob(y)
    np.testing.assert_allclose((stats["lp"] - stats["log_q"]).values, float(evidence), rtol=1e-9)


@pytest.mark.parametrize("auto_class", [AutoNormal, AutoDiagonalNormal])
def test_log_q_includes_jacobians(auto_class: Any) -> None:
    def model(y: torch.Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", 2):
            pyro.sample("prob", dist.Beta(2.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(0.0, scale), obs=y)

    y = torch.randn(5)
    guide = auto_class(model)
    guide(y)
    tree = to_datatree(model, guide, y, num_samples=20)
    expected = []
    for i in range(20):
        values = {n: torch.as_tensor(tree["posterior"][n].values[0, i]) for n in ("scale", "prob")}
        normal = dist.TransformedDistribution(
            dist.Normal(*_loc_scale(guide, 0)), dist.transforms.ExpTransform()
        )
        beta = dist.TransformedDistribution(
            dist.Normal(*_loc_scale(guide, 1)), dist.transforms.SigmoidTransform()
        )
        expected.append(normal.log_prob(values["scale"]) + beta.log_prob(values["prob"]).sum())
    assert_close(tree["sample_stats"]["log_q"].values[0], torch.stack(expected), rtol=1e-8)


def _loc_scale(guide: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(guide, AutoNormal):
        return guide._get_loc_and_scale(("scale", "prob")[index])
    loc, scale = guide.loc.detach(), guide.scale.detach()
    return (loc[0], scale[0]) if index == 0 else (loc[1:], scale[1:])


def test_groups_dims_coords_and_round_trip(tmp_path: Path) -> None:
    x, y = linear_data(6)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("groups", 2, dim=-2):
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        mean = (x * weight).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("first", dist.Normal(mean + offset[..., :1, :].sum(-2), sigma), obs=y)
            pyro.sample("second", dist.Poisson(mean.exp()), obs=None if y is None else y.abs().round())

    guide = AutoNormal(model)
    guide(x, y)
    tree = to_datatree(
        model,
        guide,
        {"x": x, "y": y},
        num_samples=30,
        prior_samples=10,
        dims={"weight": ["feature"]},
        coords={"feature": ["a", "b", "c"]},
        attrs={"note": "test"},
    )
    assert set(tree.children) == {
        "posterior", "posterior_predictive", "log_likelihood", "log_prior", "sample_stats", "prior",
        "prior_predictive", "observed_data", "constant_data",
    }  # fmt: skip
    assert tree["posterior"]["weight"].dims == ("chain", "draw", "feature")
    assert list(tree["posterior"].coords["feature"].values) == ["a", "b", "c"]
    assert tree["posterior"]["offset"].dims == ("chain", "draw", "groups", "offset_dim_1")
    assert tree["log_likelihood"]["second"].dims == ("chain", "draw", "data")
    assert tree["observed_data"]["first"].dims == ("data",)
    assert set(tree["constant_data"].data_vars) == {"x"}
    assert tree["constant_data"]["x"].dims == ("data", "x_dim_1")
    assert tree["prior"]["sigma"].shape == (1, 10)
    assert tree["prior_predictive"]["first"].shape == (1, 10, 6)
    assert set(tree["log_prior"].data_vars) == {"sigma", "offset", "weight"}
    assert tree.attrs["note"] == "test"
    assert tree.attrs["inference_library"] == "pyro"
    assert tree["posterior"].attrs["sample_dims"] == ["chain", "draw"]
    prior = torch.as_tensor(tree["posterior"]["sigma"].values)
    assert_close(tree["log_prior"]["sigma"].values, dist.HalfNormal(1.0).log_prob(prior))

    path = tmp_path / "tree.nc"
    tree.to_netcdf(path)
    with xr.open_datatree(path) as loaded:
        for group in tree.children:
            xr.testing.assert_allclose(loaded[group].to_dataset(), tree[group].to_dataset())
    old = az.from_netcdf(path)
    xr.testing.assert_allclose(
        old["posterior"].to_dataset() if not OLD else old.posterior, tree["posterior"].to_dataset()
    )
    data = to_inference_data(model, guide, (x, y), num_samples=30)
    data.to_netcdf(tmp_path / "data.nc")
    again = az.from_netcdf(tmp_path / "data.nc")
    xr.testing.assert_allclose(again["log_likelihood"]["first"], data["log_likelihood"]["first"])


def test_written_group_by_group(tmp_path: Path) -> None:
    x, y = linear_data(6)
    draws = {"weight": torch.randn(50, 3)}
    tree = to_datatree(linear_model, draws, (x, y))
    # the posterior group is the memory of the draws, not a copy
    assert np.shares_memory(tree["posterior"]["weight"].values, draws["weight"].numpy())
    expected = tree.copy(deep=True)
    write_tree(tree, tmp_path / "tree.nc")
    assert not tree.children
    with xr.open_datatree(tmp_path / "tree.nc") as loaded:
        assert set(loaded.children) == set(expected.children)
        for group in expected.children:
            xr.testing.assert_allclose(loaded[group].to_dataset(), expected[group].to_dataset())
        assert loaded.attrs["creation_library"] == "pyro_bnn"
    assert az.from_netcdf(tmp_path / "tree.nc").posterior.sizes["draw"] == 50


def test_lp_and_log_likelihood_under_subsampling() -> None:
    x, y = linear_data(20)
    draws = {"weight": torch.randn(7, 3)}

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 20, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal((x * weight).sum(-1), NOISE), obs=y)

    likelihood = dist.Normal(draws["weight"] @ x.T, NOISE).log_prob(y)
    prior = dist.Normal(0.0, 1.0).log_prob(draws["weight"]).sum(-1)
    full = to_datatree(linear_model, draws, (x, y))
    loader = to_datatree(model, draws, DataLoader(TensorDataset(x, y), batch_size=6))
    for tree in (full, loader):
        assert_close(tree["log_likelihood"]["obs"].values[0], likelihood, rtol=1e-10)
        assert_close(tree["sample_stats"]["lp"].values[0], prior + likelihood.sum(-1), rtol=1e-10)
    part = to_datatree(model, draws, (x[:5], y[:5]))
    assert_close(part["log_likelihood"]["obs"].values[0], likelihood[:, :5], rtol=1e-10)
    assert_close(part["sample_stats"]["lp"].values[0], prior + 4 * likelihood[:, :5].sum(-1), rtol=1e-10)


def test_chains() -> None:
    x, y = linear_data(10)
    guides = []
    for seed in range(3):
        pyro.set_rng_seed(seed)
        guides.append(AutoNormal(linear_model))
        fit(linear_model, guides[-1], (x, y), num_steps=5, optim=0.1, progress_bar=False)
    ensemble = to_datatree(linear_model, guides, (x, y), num_samples=60)
    assert ensemble["posterior"]["weight"].shape == (3, 20, 3)
    for chain, guide in enumerate(guides):
        loc = guide.median()["weight"]
        found = ensemble["posterior"]["weight"].values[chain].mean(0)
        assert_close(found, loc, atol=0.15, rtol=0)

    mcmc = MCMC(NUTS(linear_model), num_samples=30, warmup_steps=30, disable_progbar=True)
    mcmc.run(x, y)
    tree = to_datatree(linear_model, mcmc, (x, y))
    assert tree["posterior"]["weight"].shape == (1, 30, 3)
    assert tree["sample_stats"]["diverging"].dtype == bool
    assert_close(tree["posterior"]["weight"].values[0], mcmc.get_samples()["weight"])
    with pytest.raises(ValueError, match="num_chains=3"):
        to_datatree(linear_model, {"weight": torch.zeros(10, 3)}, (x, y), num_chains=3)


def test_guides_of_stock_svi() -> None:
    """An autoguide and a function, whose parameters live in the store; a second autoguide of the same name beside."""
    x, y = linear_data(20)

    def function(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("weight", dist.Normal(loc, 0.1).to_event(1))

    other = AutoNormal(linear_model)
    fit(linear_model, other, (x, -y), num_steps=100, optim=0.1, progress_bar=False)
    auto = AutoNormal(linear_model)
    for guide in (auto, function):
        svi = SVI(linear_model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(300):
            svi.step(x, y)
    mean, _ = linear_posterior(x, y)
    for guide, expected in ((auto, mean), (function, mean), (other, linear_posterior(x, -y)[0])):
        tree = to_datatree(linear_model, guide, (x, y), num_samples=200)
        assert_close(tree["posterior"]["weight"].mean(("chain", "draw")).values, expected, atol=0.25, rtol=0)
        assert "log_q" in tree["sample_stats"]


def test_weights_are_opt_in() -> None:
    x, y = linear_data(10)
    net = TextbookNet()

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        pyro.sample("sigma", dist.HalfNormal(1.0))
        net(x, y)

    guide = AutoNormal(model)
    guide(x, y)
    tree = to_datatree(model, guide, (x, y), num_samples=8)
    assert set(tree["posterior"].data_vars) == {"sigma"}
    assert tree.attrs["left_out"] == ["linear.bias", "linear.weight"]
    assert set(tree["log_prior"].data_vars) == {"sigma", "linear.bias", "linear.weight"}
    tree = to_datatree(model, guide, (x, y), num_samples=8, weights=True, thin=4)
    assert tree["posterior"]["linear.weight"].shape == (1, 2, 1, 3)
    assert tree["log_likelihood"]["obs"].shape == (1, 8, 10)
    with pytest.raises(ValueError, match=r"\['nothing'\]"):
        to_datatree(model, guide, (x, y), num_samples=8, var_names=["nothing"])


def test_point_masses_have_no_density() -> None:
    x, y = linear_data(5)
    guide = AutoDelta(linear_model)
    guide(x, y)
    tree = to_datatree(linear_model, guide, (x, y), num_samples=4)
    assert set(tree["sample_stats"].data_vars) == {"lp"}


def test_missing_observation() -> None:
    with pytest.raises(ValueError, match="observes nothing"):
        to_datatree(linear_model, {"weight": torch.zeros(4, 3)}, (torch.zeros(5, 3),))


def test_independent_fits_have_the_density_of_their_mixture() -> None:
    x, y = linear_data(10)
    guides = []
    for shift in (0.0, 0.3):
        guides.append(AutoNormal(linear_model))
        guides[-1](x, y)
        with torch.no_grad():
            guides[-1].get_parameter("locs.weight_unconstrained").add_(shift)
    tree = to_datatree(linear_model, guides, (x, y), num_samples=40)
    weight = torch.as_tensor(tree["posterior"]["weight"].values)
    parts = []
    for guide in guides:
        loc, scale = guide._get_loc_and_scale("weight")
        parts.append(dist.Normal(loc, scale).log_prob(weight).sum(-1))
    expected = torch.logsumexp(torch.stack(parts), 0) - np.log(2)
    assert_close(tree["sample_stats"]["log_q"].values, expected.detach(), rtol=1e-9)


def test_packed_weights_have_their_names() -> None:
    """One flat site in the model, named tensors in the tree; opt-in, as all weights."""
    x, y = linear_data(10)

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            layers = [torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)]
            self.net = bayesian_(torch.nn.Sequential(*layers), packed=True)
            self.sigma = PyroSample(dist.LogNormal(0.0, 1.0))

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
            mean = self.net(x).squeeze(-1)
            sigma = self.sigma
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(mean, sigma), obs=y)

    model = Model()
    draws = {"net.packed": torch.randn(6, 21), "sigma": torch.rand(6)}
    tree = to_datatree(model, draws, (x, y), prior_samples=2)
    assert set(tree["posterior"].data_vars) == set(tree["prior"].data_vars) == {"sigma"}
    tree = to_datatree(model, draws, (x, y), weights=True, prior_samples=2)
    found = tree["posterior"]["net.2.weight"]
    assert found.dims == ("chain", "draw", "net.2.weight_dim_0", "net.2.weight_dim_1")
    assert_close(found.values[0], draws["net.packed"][:, 16:20].reshape(6, 1, 4))
    assert tree["prior"]["net.0.weight"].shape == (1, 2, 4, 3)
    tree = to_datatree(model, draws, (x, y), var_names=["net.0.bias"])
    assert_close(tree["posterior"]["net.0.bias"].values[0], draws["net.packed"][:, 12:16])
    guide = AutoNormal(model)
    guide(x, y)
    sites, _ = log_weights(model, guide, (x, y), num_samples=5)
    assert {name: tuple(value.shape) for name, value in sites.items()} == {
        "net.packed": (5, 21),
        "sigma": (5,),
    }


def test_constant_data_of_a_loader_are_left_out() -> None:
    """The first batch would be a fragment, with its observations among the constants."""
    x, y = linear_data(20)
    draws = exact_draws(x, y, 5)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    assert "constant_data" not in to_datatree(linear_model, draws, loader).children
    for batch_size in (None, 8):
        tree = to_datatree(linear_model, draws, (x, y), batch_size=batch_size)
        assert_close(tree["constant_data"]["x"].values, x)
        assert set(tree["constant_data"].data_vars) == {"x"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": {"wait": ["a"]}}, r"dims: \['wait'\].*'weight'"),
        ({"dims": {"weight": ["a", "b"]}}, "'weight': 1 names expected"),
        ({"coords": {"feature": [1, 2, 3]}}, r"coords.*\['feature'\]"),
        (
            {"dims": {"weight": ["feature"]}, "coords": {"feature": [1, 2]}},
            "'feature': 2 values for a size of 3",
        ),
        ({"thin": 0}, "thin"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    x, y = linear_data(10)
    with pytest.raises(ValueError, match=message):
        to_datatree(linear_model, exact_draws(x, y, 4), (x, y), **options)


def test_model_without_latents() -> None:
    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x[:, 0], 1.0), obs=y)

    with pytest.raises(ValueError, match="no latent site"):
        to_datatree(model, lambda *args: None, linear_data(5), num_samples=3)


def test_mcmc_with_a_recording_kernel() -> None:
    """Pyro's own MCMC keeps neither warm-up nor energies; the kernel does."""
    x, y = linear_data(10)
    mcmc = MCMC(RecordingNUTS(linear_model), num_samples=20, warmup_steps=10, disable_progbar=True)
    mcmc.run(x, y)
    tree = to_datatree(linear_model, mcmc, (x, y))
    stats = tree["sample_stats"]
    assert {"energy", "tree_depth", "step_size", "acceptance_rate", "diverging", "lp"} <= set(stats.data_vars)
    assert tree["warmup_posterior"]["weight"].shape == (1, 10, 3)
    assert tree["warmup_sample_stats"]["energy"].shape == (1, 10)
    # energy is potential + kinetic > 0, the potential that of the state before the transition
    before = np.concatenate(
        [tree["warmup_posterior"]["weight"].values[0, -1:], tree["posterior"]["weight"].values[0]]
    )
    potential = [
        -float(dist.Normal(0.0, 1.0).log_prob(w).sum() + dist.Normal(x @ w, NOISE).log_prob(y).sum())
        for w in torch.as_tensor(before[:-1])
    ]
    assert (stats["energy"].values[0] > potential).all()
    assert_close(stats["lp"].values[0, :-1], -torch.tensor(potential[1:]), rtol=1e-9)


def with_deterministic_sites(x: torch.Tensor, y: torch.Tensor | None = None, *, mixing: float = 0.0) -> None:
    """Values of every shape and type: with and without a plate, of a plate left of another one, without draws."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.deterministic("precision", scale**-2)
    pyro.deterministic("log", weight.log())  # NaN where it is negative
    pyro.deterministic("positive", weight > 0)
    pyro.deterministic("constant", torch.tensor([1.0, 2.0]))
    function = pyro.deterministic("function", (x * weight).sum(-1))
    if mixing:
        pyro.deterministic("mixed", mixing * (function - function.mean()))
        pyro.deterministic("log_mixed", (function - function.mean()).log())
    with pyro.plate("data", len(x), dim=-1):
        pyro.deterministic("double", 2 * function)
        pyro.deterministic("ones", torch.ones(len(x)))
        pyro.deterministic("terms", x * weight, event_dim=1)
        pyro.deterministic("global", weight + 1)
        with pyro.plate("outer", 2, dim=-2):
            pyro.deterministic("triple", 3 * function)
            pyro.deterministic("both", function + torch.arange(2.0)[:, None])
        pyro.sample("obs", dist.Normal(function, scale), obs=y)


DETERMINISTIC_DIMS = {
    "precision": (),
    "log": ("log_dim_0",),
    "positive": ("positive_dim_0",),
    "constant": ("constant_dim_0",),
    "function": ("function_dim_0",),
    "double": ("data",),
    "ones": ("data",),
    "terms": ("data", "terms_dim_1"),
    "global": ("global_dim_0",),
    "triple": ("data",),
    "both": ("outer", "data"),
}


@pytest.mark.parametrize(
    "how", ["at once", "one by one", "mixing", "small", "loader", "equal batches", "blocks"]
)
def test_deterministic_sites_are_in_the_posterior(how: str, tmp_path: Path) -> None:
    n = 8 if how == "equal batches" else 7
    x, y = linear_data(n)
    torch.manual_seed(0)
    draws = {"scale": torch.rand(12) + 0.5, "weight": torch.randn(12, 3)}
    mixing = {"mixing": 1.0, "small": 1e-4}.get(how, 0.0)
    model: Any = functools.partial(with_deterministic_sites, mixing=mixing)
    data: Any = DataLoader(TensorDataset(x, y), 4) if how in ("loader", "equal batches") else (x, y)
    options: dict[str, Any] = {"path": tmp_path / "t.nc", "block_size": 2} if how == "blocks" else {}
    vectorize = False if how == "one by one" else (None if mixing else True)
    options |= {"num_chains": 2, "thin": 2, "prior_samples": 3, "vectorize": vectorize}
    tree = to_datatree(model, draws, data, **options)
    posterior = tree["posterior"]
    function = draws["weight"] @ x.T
    expected = {
        "precision": draws["scale"] ** -2,
        "log": draws["weight"].log(),
        "positive": draws["weight"] > 0,
        "constant": torch.tensor([1.0, 2.0]).expand(12, 2),
        "function": function,
        "double": 2 * function,
        "ones": torch.ones(12, n),
        "terms": x * draws["weight"][:, None],
        "global": draws["weight"] + 1,
        "triple": 3 * function,
        "both": function[:, None] + torch.arange(2.0)[:, None],
    }
    if mixing:
        centred = function - function.mean(-1, keepdim=True)
        expected |= {"mixed": mixing * centred, "log_mixed": centred.log()}
    assert set(posterior.data_vars) == {*draws, *expected}
    for name, value in expected.items():
        np.testing.assert_allclose(posterior[name], value.unflatten(0, (2, 6))[:, ::2], rtol=1e-9, atol=1e-12)
    for name, dims in DETERMINISTIC_DIMS.items():
        assert posterior[name].dims == ("chain", "draw", *dims)
    prior = tree["prior"]
    for name in ("precision", "double", "terms", "global"):
        assert prior[name].dims == posterior[name].dims
    np.testing.assert_allclose(prior["precision"], prior["scale"].values ** -2, rtol=1e-12)
    np.testing.assert_allclose(prior["global"], prior["weight"].values + 1, rtol=1e-12)
    assert set(tree["log_likelihood"].data_vars) == {"obs"}
    tree.close()


def test_deterministic_sites_that_depend_on_the_batch_are_left_out() -> None:
    x, y = linear_data(7)
    draws = {"weight": torch.randn(6, 3)}

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        function = (x * weight).sum(-1)
        pyro.deterministic("mean", function.mean(-1))
        pyro.deterministic("sum", weight.sum(-1))
        if len(x) > 1:
            pyro.deterministic("spread", function.std(-1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(function, 1.0), obs=y)

    with pytest.warns(UserWarning, match=r"\['mean', 'spread'\] are left out"):
        tree = to_datatree(model, draws, DataLoader(TensorDataset(x, y), 3))
    assert set(tree["posterior"].data_vars) == {"weight", "sum"}
    np.testing.assert_allclose(tree["posterior"]["sum"][0], draws["weight"].sum(-1))
    whole = to_datatree(model, draws, (x, y))["posterior"]
    np.testing.assert_allclose(whole["mean"][0], (draws["weight"] @ x.T).mean(-1))
    np.testing.assert_allclose(whole["spread"][0], (draws["weight"] @ x.T).std(-1))


def test_reparametrised_sites_are_latent_and_masked_ones_are_not() -> None:
    y = torch.tensor([2.8, 0.8, -0.3, 0.7])

    def model(y: torch.Tensor | None = None) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("schools", 4):
            with pyro.poutine.reparam(config={"theta": LocScaleReparam(0.0)}):
                theta = pyro.sample("theta", dist.Normal(mean, 2.0))
            pyro.sample(
                "obs", dist.Normal(theta, 1.0), obs=y, obs_mask=torch.tensor([True, True, True, False])
            )

    torch.manual_seed(0)
    draws = {
        "mean": torch.randn(8),
        "theta_decentered": torch.randn(8, 4),
        "obs_unobserved": torch.zeros(8, 4),
    }
    tree = to_datatree(model, draws, (y,), vectorize=True)
    assert set(tree["posterior"].data_vars) == {*draws, "theta"}
    theta = draws["mean"][:, None] + 2 * draws["theta_decentered"]
    np.testing.assert_allclose(tree["posterior"]["theta"][0], theta)
    assert tree["posterior"]["theta"].dims == ("chain", "draw", "schools")
    expected = dist.Normal(theta, 1.0).log_prob(y)[
        :, :3
    ]  # an observation that does not count has no likelihood
    assert set(tree["log_likelihood"].data_vars) == {"obs_observed"}
    np.testing.assert_allclose(tree["log_likelihood"]["obs_observed"][0], expected, rtol=1e-9)
    np.testing.assert_array_equal(tree["log_likelihood"]["obs_observed_kept"], [0, 1, 2])
    np.testing.assert_array_equal(tree["constant_data"]["obs_observed_mask"], [True, True, True, False])


def test_deterministic_sites_by_name() -> None:
    x, y = linear_data(5)
    draws = {"scale": torch.ones(4), "weight": torch.randn(4, 3)}
    tree = to_datatree(with_deterministic_sites, draws, (x, y), var_names=["double", "scale"])
    assert set(tree["posterior"].data_vars) == {"double", "scale"}
    assert sorted(tree["posterior"].attrs["left_out"]) == sorted({"weight", *DETERMINISTIC_DIMS} - {"double"})
    with pytest.raises(ValueError, match=r"\['treble'\] are not latent or deterministic sites"):
        to_datatree(with_deterministic_sites, draws, (x, y), var_names=["treble"])


def test_sites_that_are_there_for_some_numbers_of_rows_only() -> None:
    x, y = linear_data(7)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if len(x) > 1:
            pyro.deterministic("spread", (x * weight).sum(-1).std(-1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * weight).sum(-1), 1.0), obs=y)

    batches = list(zip(x.split((3, 1, 3)), y.split((3, 1, 3)), strict=True))
    with pytest.warns(UserWarning, match=r"\['spread'\] are left out"):
        tree = to_datatree(model, {"weight": torch.randn(6, 3)}, batches)
    assert tree["log_likelihood"]["obs"].shape == (1, 6, 7)
