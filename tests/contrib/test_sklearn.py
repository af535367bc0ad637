# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import inspect
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from scipy import integrate, optimize, stats
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import validate_data

from pyro_bnn.contrib.estimators import validation
from pyro_bnn.contrib.sklearn import BayesianClassifier, BayesianRegressor

joblib = pytest.importorskip("joblib")  # scikit-learn has it
METHODS = ["laplace", "mixture_of_laplace", "rank1", "ensemble", "hfl"]
#: of a fit that takes a tenth of a second
SMALL = {"hidden": (2,), "max_iter": 1, "n_members": 2, "n_samples": 20, "n_steps": 40, "random_state": 0}

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:method='ensemble'"),
]


@parametrize_with_checks(
    [BayesianRegressor(**SMALL, prior_scale=1.0, noise=0.5), BayesianClassifier(**SMALL, prior_scale=1.0)]
)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def curve(n=40, seed=0):
    rng = np.random.RandomState(seed)
    x = np.sort(rng.uniform(-2, 2, n))
    return x[:, None], 3 + 10 * np.sin(2 * x) + rng.randn(n)


def linear_posterior(X, Y, noise, gain, at, weights=None):
    """Mean and standard deviation of Bayesian linear regression on standardised data, by its normal equations."""
    w = np.ones(len(X)) if weights is None else weights
    mean, y_mean = np.average(X, 0, w), np.average(Y, 0, w)
    scale = np.sqrt(np.average((X - mean) ** 2, 0, w))
    y_scale = np.sqrt(np.average((Y - y_mean) ** 2, 0, w))
    A, B = (np.c_[(x - mean) / scale, np.ones(len(x))] for x in (X, at))
    prior = np.r_[np.full(X.shape[1], X.shape[1] / gain**2), 1 / gain**2]
    found = []
    for y, m, s, e in zip(Y.T, y_mean, y_scale, noise, strict=True):
        precision = (A.T * w) @ A * (s / e) ** 2 + np.diag(prior)
        weight = np.linalg.solve(precision, (A.T * w) @ ((y - m) / s) * (s / e) ** 2)
        found.append((m + s * (B @ weight), s * np.sqrt(np.sum(B * np.linalg.solve(precision, B.T).T, 1))))
    return tuple(np.stack(parts, 1) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("method", ["laplace", "hfl", "mixture_of_laplace"])
def test_a_linear_network_is_bayesian_linear_regression(method):
    rng = np.random.RandomState(1)
    X, at = rng.randn(30, 3) * [1.0, 10.0, 0.1] + 5, rng.randn(7, 3)
    Y = X @ rng.randn(3, 2) * [1.0, 30.0] + rng.randn(30, 2)
    noise, weights = [0.5, 2.0], rng.randint(1, 4, 30)
    reg = BayesianRegressor((), method=method, prior_scale=2.0, noise=noise, n_members=2, random_state=0)
    reg.fit(X, Y, sample_weight=weights)
    mean, sd = linear_posterior(X, Y, noise, 2.0, at, weights)
    found, found_sd = reg.predict(at, return_std="epistemic")
    np.testing.assert_allclose(found, mean, rtol=1e-6)
    np.testing.assert_allclose(found_sd, sd, rtol=1e-6)
    total = reg.predict(at, return_std=True)[1]
    np.testing.assert_allclose(total, np.sqrt(sd**2 + np.square(noise)), rtol=1e-6)
    lower, upper = reg.predict_interval(at, 0.8)
    np.testing.assert_allclose(lower, stats.norm(mean, total).ppf(0.1), rtol=1e-6)
    np.testing.assert_allclose(upper, stats.norm(mean, total).ppf(0.9), rtol=1e-6)
    # and with these precisions a ridge regression
    scaler = StandardScaler().fit(X, sample_weight=weights)
    y = Y[:, 0] - np.average(Y[:, 0], weights=weights)
    spread = np.sqrt(np.average(y**2, weights=weights))
    ridge = Ridge(alpha=3 / 4 * (0.5 / spread) ** 2, fit_intercept=False)
    ridge.fit(scaler.transform(X), y, sample_weight=weights)
    expected = np.average(Y[:, 0], weights=weights) + ridge.predict(scaler.transform(at))
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)


def test_evidence_is_at_its_fixed_point():
    """Noise and scales at which the closed-form evidence of the linear model is stationary."""
    rng = np.random.RandomState(2)
    X = rng.randn(60, 4)
    y = X @ [1.0, -1.0, 0.5, 0.2] + 0.5 + 0.7 * rng.randn(60)
    reg = BayesianRegressor((), tol=0.0, max_iter=200, random_state=0).fit(X, y)
    mean, spread = y.mean(), y.std()
    A = np.c_[(X - X.mean(0)) / X.std(0), np.ones(60)]

    def evidence(logs):
        noise, weight, bias = np.exp(logs)
        prior = np.r_[np.full(4, weight), bias] ** 2
        covariance = noise**2 * np.eye(60) + spread**2 * (A * prior) @ A.T
        return stats.multivariate_normal(np.full(60, mean), covariance).logpdf(y)

    scales = reg.prior_scales_
    logs = np.log([reg.noise_, scales["0.weight"], scales["0.bias"]])
    best = optimize.minimize(
        lambda v: -evidence([*v, logs[2]]), logs[:2]
    )  # the bias is zero: its scale runs off
    assert reg.log_evidence_ == pytest.approx(evidence(logs), abs=1e-6)
    np.testing.assert_allclose(best.x, logs[:2], atol=1e-3)


@pytest.mark.parametrize("method", ["ensemble", "mixture_of_laplace", "rank1"])
def test_intervals_are_quantiles_of_mixtures(method):
    X, y = curve()
    reg = BayesianRegressor(**SMALL | {"method": method, "hidden": (5,)}).fit(X, y)
    at = np.array([[-3.0], [0.3], [4.0]])
    weights, normals = reg.posterior_.normals(torch.tensor(at))
    parts, weights = stats.norm(normals.mean.numpy(), normals.stddev.numpy()), weights.numpy()
    assert len(weights) > 1
    for level in (0.5, 0.95):
        for limit, q in zip(reg.predict_interval(at, level), [(1 - level) / 2, (1 + level) / 2], strict=True):
            np.testing.assert_allclose(weights @ parts.cdf(limit), q, atol=1e-9)
    mean, sd = reg.predict(at, return_std=True)
    np.testing.assert_allclose(mean, weights @ parts.mean(), rtol=1e-12)
    second = weights @ (parts.var() + parts.mean() ** 2)
    np.testing.assert_allclose(sd, np.sqrt(second - mean**2), rtol=1e-9)
    np.testing.assert_allclose(mean, reg.predict(at), rtol=1e-12)


def test_hessian_free_laplace_has_the_variances_of_laplace():
    X, y = curve()
    options = SMALL | {"hidden": (5,)}
    at = np.linspace(-4, 4, 20)[:, None]
    mean, sd = BayesianRegressor(**options).fit(X, y).predict(at, return_std="epistemic")
    hfl, hfl_sd = (
        BayesianRegressor(**options | {"method": "hfl"}).fit(X, y).predict(at, return_std="epistemic")
    )
    np.testing.assert_allclose(hfl, mean, rtol=1e-12)
    np.testing.assert_allclose(hfl_sd, sd, rtol=1e-6)


def test_draws_have_the_moments_of_the_predictive():
    X, y = curve()
    at = np.array([[-3.0], [0.0], [0.01]])
    for method in METHODS:
        reg = BayesianRegressor(**SMALL | {"method": method}).fit(X, y)
        draws = reg.sample_y(at, 4000, random_state=1)
        assert draws.shape == (3, 4000)
        mean, sd = reg.predict(at, return_std=True)
        assert (np.abs(draws.mean(1) - mean) < 4 * sd / 4000**0.5).all(), method
        np.testing.assert_allclose(draws.std(1), sd, rtol=0.08)
        # one function for all rows: neighbours share it
        epistemic = reg.predict(at, return_std="epistemic")[1]
        expected = (epistemic[1] / sd[1]) ** 2
        assert np.corrcoef(draws[1], draws[2])[0, 1] == pytest.approx(expected, abs=0.06), method


def logistic_error(n):
    """The largest error of probabilities of a two-parameter model of n rows, by quadrature over its posterior."""
    rng = np.random.RandomState(0)
    x = rng.randn(n)
    y = (rng.rand(n) < 1 / (1 + np.exp(-2 * x))).astype(int)
    clf = BayesianClassifier((), prior_scale=1.5, random_state=0).fit(x[:, None], y)
    at = np.array([-3.0, -0.4, 0.2, 1.0, 6.0])
    A, B = (np.c_[(v - x.mean()) / x.std(), np.ones(len(v))] for v in (x, at))

    def energy(w):
        f = A @ w
        return np.sum(np.logaddexp(0, f) - y * f) + 0.5 * w @ w / 1.5**2

    mode = optimize.minimize(energy, np.zeros(2), tol=1e-12).x
    p = 1 / (1 + np.exp(-A @ mode))
    covariance = np.linalg.inv((A.T * p * (1 - p)) @ A + np.eye(2) / 1.5**2)
    variance = np.sum(B @ covariance * B, 1)
    probit = 1 / (1 + np.exp(-(B @ mode) / np.sqrt(1 + np.pi / 8 * variance)))
    found = clf.predict_proba(at[:, None])
    np.testing.assert_allclose(found[:, 1], probit, rtol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    grid = np.linspace(-8, 8, 81)
    W = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1) * np.sqrt(covariance.diagonal()) + mode
    density = np.exp(energy(mode) - np.apply_along_axis(energy, -1, W))
    values = density[..., None] / (1 + np.exp(-W @ B.T))
    total = integrate.simpson(integrate.simpson(density))
    return np.abs(found[:, 1] - integrate.simpson(integrate.simpson(values, axis=0), axis=0) / total).max()


def test_probabilities_of_a_logistic_model():
    """The probit formula of a Laplace approximation by hand; the approximation's own error falls with 1 / n."""
    few, many = logistic_error(50), logistic_error(1000)
    assert few < 0.02
    assert many < few / 10


@pytest.mark.parametrize("method", METHODS)
def test_classifiers_with_text_for_labels(method):
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    clf = BayesianClassifier(**SMALL | {"method": method, "n_steps": 300}).fit(X, names)
    p = clf.predict_proba(X[::5])
    assert p.shape == (30, 3)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)
    assert list(clf.predict(X[::5])) == list(clf.classes_[p.argmax(1)])
    assert clf.score(X, names) > 0.9
    draws = clf.sample_y(X[:1], 2000)
    assert np.mean(draws == "setosa") == pytest.approx(p[0, 0], abs=0.05)


def test_columns_of_a_frame_pipelines_and_searches():
    pd = pytest.importorskip("pandas")
    X, y = curve()
    frame = pd.DataFrame({"a": X[:, 0], "b": 2 + 0 * X[:, 0]})  # a constant column too
    reg = BayesianRegressor(**SMALL).fit(frame, pd.Series(y))
    assert list(reg.feature_names_in_) == ["a", "b"]
    with pytest.raises(ValueError, match="feature names"):
        reg.predict(frame.rename(columns={"a": "c"}))
    pipe = make_pipeline(StandardScaler().set_output(transform="pandas"), BayesianRegressor(**SMALL))
    pipe.fit(frame, y)
    assert list(pipe[-1].feature_names_in_) == ["a", "b"]
    # standardising twice is standardising once
    np.testing.assert_allclose(pipe.predict(frame), reg.predict(frame), rtol=1e-6)
    with joblib.parallel_config("threading"):
        scores = cross_val_score(BayesianRegressor(**SMALL), X, y, cv=2, n_jobs=2)
    again = cross_val_score(BayesianRegressor(**SMALL), X, y, cv=2)
    np.testing.assert_allclose(scores, again, rtol=1e-9)
    search = GridSearchCV(pipe, {"bayesianregressor__method": ["laplace", "ensemble"]}, cv=2).fit(frame, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def answers(reg):
    at = np.array([[0.5], [3.0]])
    return np.array([*reg.predict(at, return_std=True), *reg.predict_interval(at), reg.sample_y(at)[:, 0]])


def test_pickles_in_a_fresh_process(tmp_path):
    X, y = curve()
    fitted = [BayesianRegressor(**SMALL | {"method": method}).fit(X, y) for method in METHODS]
    (tmp_path / "reg.pkl").write_bytes(pickle.dumps(fitted))
    code = f"""
import joblib, numpy as np, pickle
{inspect.getsource(answers)}
fitted = pickle.load(open("reg.pkl", "rb"))
joblib.dump(fitted, "reg.joblib")
np.save("found.npy", [answers(reg) for reg in fitted])
"""
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=os.environ | path)
    for reg, found in zip(fitted, np.load(tmp_path / "found.npy"), strict=True):
        np.testing.assert_allclose(
            found, answers(reg), rtol=1e-9
        )  # under torch's own default of single precision
    for reg, other in zip(fitted, joblib.load(tmp_path / "reg.joblib"), strict=True):
        np.testing.assert_array_equal(answers(other), answers(reg))


def test_nothing_global_changes():
    X, y = curve()
    pyro.get_param_store().clear()
    pyro.param("mine", torch.ones(2))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_default_dtype()  # noqa: NPY002
    for method in METHODS:
        for cls, target in ((BayesianRegressor, y), (BayesianClassifier, y > 3)):
            est = clone(cls(**SMALL | {"method": method})).set_params(n_steps=10).fit(X, target)
            est.sample_y(X, 2, random_state=3)
            est.score(X, target)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert torch.get_default_dtype() == states[2]
    assert list(pyro.get_param_store()) == ["mine"]
    pyro.get_param_store().clear()


def test_seeds_and_threads():
    X, y = curve()
    options = SMALL | {"method": "rank1"}
    alone = BayesianRegressor(**options).fit(X, y).predict(X)
    torch.manual_seed(5)
    np.testing.assert_array_equal(BayesianRegressor(**options).fit(X, y).predict(X), alone)
    assert not np.allclose(BayesianRegressor(**options | {"random_state": 1}).fit(X, y).predict(X), alone)
    found = {}

    def work(k):
        found[k] = BayesianRegressor(**options).fit(X, y).predict(X)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        np.testing.assert_array_equal(found[k], alone)


def test_export():
    X, y = curve()
    for method in METHODS:
        reg = BayesianRegressor(**SMALL | {"method": method}).fit(X, y)
        number = None if method in ("rank1", "ensemble") else 20
        tree = reg.to_datatree(X[:5], y[:5], num_samples=number, weights=True)
        np.testing.assert_allclose(tree["observed_data"]["obs"], y[:5])
        assert tree["log_likelihood"]["obs"].shape[-1] == 5
        assert tree["posterior"]["net.0.weight"].shape[-2:] == (2, 1)
        if method == "hfl":
            with pytest.raises(ValueError, match="pass X"):
                reg.to_datatree()
        else:
            draws = reg.to_datatree(num_samples=number, weights=True)
            assert list(draws.children) == ["posterior"]
    clf = BayesianClassifier(**SMALL).fit(X, np.where(y > 3, "high", "low"))
    assert (
        clf.to_datatree(X[:4], ["low"] * 4, num_samples=5)["observed_data"]["obs"].values.tolist() == [1] * 4
    )
    with pytest.raises(ValueError, match=r"labels .*'middle'"):
        clf.to_datatree(X[:1], ["middle"])


class Residual(torch.nn.Module):
    """A network of one's own, with a skip."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.skip, self.first = torch.nn.Linear(inputs, outputs), torch.nn.Linear(inputs, 4)
        self.last = torch.nn.Linear(4, outputs)

    def forward(self, x):
        return self.skip(x) + self.last(torch.tanh(self.first(x)))


class Centred(torch.nn.Linear):
    """A network whose outputs depend on the other rows."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


def normalised(inputs, outputs):
    return torch.nn.Sequential(torch.nn.Linear(inputs, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, outputs))


def test_networks_of_ones_own():
    X, y = curve()
    reg = BayesianRegressor(network=Residual, max_iter=5, random_state=0).fit(X, y)
    assert reg.score(X, y) > 0.9
    assert set(reg.prior_scales_) == {
        f"{m}.{n}" for m in ("skip", "first", "last") for n in ("weight", "bias")
    }
    shared = Residual(1, 1).float()  # returned at every call, and left as it is
    other = BayesianRegressor(network=lambda *_: shared, max_iter=5, random_state=0).fit(X, y)
    assert other.log_evidence_ == pytest.approx(reg.log_evidence_)
    assert next(shared.parameters()).dtype == torch.float32
    batches = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1, affine=False))
    with pytest.raises(ValueError, match=r"its layers \['1'\] normalise batches"):
        BayesianRegressor(network=lambda *_: batches).fit(X, y)
    with pytest.raises(ValueError, match="other outputs for a row alone than beside another one"):
        BayesianRegressor(network=Centred).fit(X, y)
    with pytest.raises(ValueError, match=r"\['1.weight', '1.bias'\] are in layers that have no priors"):
        BayesianRegressor(network=normalised).fit(X, y)
    with pytest.raises(ValueError, match=r"network\(1, 1\) gives outputs of shape \(2, 3\) for 2 rows"):
        BayesianRegressor(network=lambda inputs, _: torch.nn.Linear(inputs, 3)).fit(X, y)
    with pytest.raises(TypeError, match=r"must return a torch\.nn\.Module, found NoneType"):
        BayesianRegressor(network=lambda inputs, outputs: None).fit(X, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "map"}, "unknown method 'map'"),
        ({"structure": "dense"}, "unknown structure"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"hidden": 5}, r"hidden must hold the units of each hidden layer, such as \(50,\) .* found 5"),
        ({"hidden": (3.5,)}, "hidden must be a whole number of at least 1, found 3.5"),
        ({"prior_scale": np.ones(2)}, "prior_scale must be a number above 0"),
        (
            {"method": "rank1", "early_stopping": True, "validation_fraction": 0.99},
            "of 40 rows leaves none to fit",
        ),
        ({"noise": 0.0}, "noise must be positive"),
        ({"noise": "auto"}, "noise must be 'evidence' or positive"),
        ({"prior_scale": -1.0}, "prior_scale must be a number above 0"),
        ({"n_members": 0}, "n_members must be a whole number"),
        ({"early_stopping": True, "validation_fraction": 1.5}, "validation_fraction"),
    ],
)
def test_arguments_are_refused_by_name(options, message):
    X, y = curve()
    with pytest.raises(ValueError, match=message):
        BayesianRegressor(**SMALL | options).fit(X, y)


def test_data_are_refused_by_name():
    X, y = curve(10)
    reg = BayesianRegressor(**SMALL).fit(X, y)
    with pytest.raises(ValueError, match="sample_weight must be finite and not negative"):
        reg.fit(X, y, sample_weight=-np.ones(10))
    with pytest.raises(ValueError, match="level must be a number above 0 and below 1, found 95"):
        reg.predict_interval(X, 95)
    with pytest.raises(ValueError, match="return_std must be False, True or 'epistemic'"):
        reg.predict(X, return_std="total")
    with pytest.raises(ValueError, match="1 class"):
        BayesianClassifier(**SMALL).fit(X, np.zeros(10))


@pytest.mark.parametrize("answer", [np.True_, True])
def test_flags_of_numpy_are_flags(answer):
    X, y = curve()
    reg = BayesianRegressor(**SMALL).fit(X, y)
    total = reg.predict(X, return_std=answer)[1]
    epistemic = reg.predict(X, return_std="epistemic")[1]
    np.testing.assert_allclose(total**2, epistemic**2 + reg.noise_**2, rtol=1e-12)
    np.testing.assert_array_equal(reg.predict(X, return_std=not answer), reg.predict(X))
    for unclear in (1, None, "noise"):
        with pytest.raises(ValueError, match="return_std must be False, True or 'epistemic'"):
            reg.predict(X, return_std=unclear)


@pytest.mark.parametrize("unit", [1e-200, 1e-8, 1e8, 1e200])
def test_units_do_not_matter(unit):
    X, y = curve()
    mean, sd = BayesianRegressor(**SMALL).fit(X, y).predict(X, return_std=True)
    found = BayesianRegressor(**SMALL).fit(X * unit, y).predict(X * unit, return_std=True)
    np.testing.assert_allclose(found, [mean, sd], rtol=1e-6)
    if 1e-100 < unit < 1e100:
        found = BayesianRegressor(**SMALL).fit(X, y * unit).predict(X, return_std=True)
        np.testing.assert_allclose(found, [mean * unit, sd * unit], rtol=1e-6)
    else:
        with pytest.raises(ValueError, match=r"y has the standard deviation .* pass y in other units"):
            BayesianRegressor(**SMALL).fit(X, y * unit)


def test_fits_in_inference_mode():
    X, y = curve()
    expected = BayesianRegressor(**SMALL).fit(X, y).predict(X, return_std=True)
    with torch.inference_mode():
        found = BayesianRegressor(**SMALL).fit(X, y).predict(X, return_std=True)
    np.testing.assert_array_equal(found, expected)


def test_an_ensemble_of_one_mode_says_so():
    X, y = curve()
    with pytest.warns(UserWarning, match="the 2 members are the same function"):
        reg = BayesianRegressor(**SMALL | {"method": "ensemble", "hidden": ()}).fit(X, y)
    np.testing.assert_allclose(reg.predict(X, return_std="epistemic")[1], 0, atol=1e-6)


def test_a_fit_cut_short_says_so_and_rows_held_out_stop_the_bound():
    X, y = curve()
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        BayesianRegressor(**SMALL | {"tol": 0.0}).fit(X, y)
    options = SMALL | {"method": "rank1", "early_stopping": True, "validation_fraction": 0.25, "n_steps": 100}
    reg = BayesianRegressor(**options).fit(X, y)
    assert np.isfinite(reg.predict(X)).all()


def test_older_versions_check_alike():
    """What stands in for the checks of scikit-learn 1.6 does what they do."""
    pd = pytest.importorskip("pandas")
    frame, y = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [0, 1, 0]}), [1, 2, 3]
    refused = [
        {"X": frame.rename(columns={"b": "c"})},
        {"X": frame[["a"]]},
        {"X": frame * np.nan},
        {"X": frame, "y": None, "reset": True},
        {"X": frame, "y": [1, 2], "reset": True},
    ]
    for check in (validate_data, validation.validate_data):
        reg = BayesianRegressor()
        X, targets = check(reg, frame, y, dtype=np.float64, multi_output=True, y_numeric=True)
        assert X.dtype == np.float64
        assert list(targets) == y
        assert (reg.n_features_in_, list(reg.feature_names_in_)) == (2, ["a", "b"])
        np.testing.assert_array_equal(check(reg, frame, reset=False), frame.to_numpy())
        for arguments in refused:
            with pytest.raises(ValueError, match=r"feature|NaN|requires y|inconsistent"):
                check(reg, **{"reset": False, **arguments})


def test_programs_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "source" / "sklearn.rst").read_text()
    programs = re.findall(r"code-block:: python\n\n((?: {4}.*\n|\n)+)", page)
    names = {}
    for program in programs:
        small = textwrap.dedent(program).replace("split(X, y,", "split(X.iloc[:60, :4], y[:60],")
        small = small.replace("cv=3", "cv=2")
        small = small.replace("X_test, y_test)", "X_test, y_test, num_samples=20)")
        exec(
            re.sub(r"(Regressor|Classifier)\((hidden=\(20,\), )?", r"\1(hidden=(2,), max_iter=1, ", small),
            names,
        )
    assert names["draws"].shape == (15, 10)
    assert (names["total"] > names["function"]).all()
    counts = [sum(map(bool, program.split("\n"))) for program in programs[:2]]
    assert re.findall(r"     - (\d+)\n     - \d+:", page) == list(map(str, counts))


@pytest.mark.parametrize("method", ["laplace", "rank1"])
def test_rows_that_come_twice_are_rows_of_weight_two(method: str) -> None:
    rng = np.random.RandomState(0)
    X = rng.randn(12, 2)
    y, counts = np.sin(X[:, 0]), rng.randint(1, 4, 12)
    order = rng.permutation(counts.sum())
    options = {
        "hidden": (3,),
        "method": method,
        "n_steps": 5,
        "max_iter": 2,
        "tol": 10.0,
        "n_members": 2,
        "random_state": 0,
    }
    repeated = BayesianRegressor(**options).fit(np.repeat(X, counts, 0)[order], np.repeat(y, counts)[order])
    weighted = BayesianRegressor(**options).fit(X, y, sample_weight=counts)
    single = BayesianRegressor(**options).fit(X, y)
    for found, expected in zip(*(e.predict(X, return_std=True) for e in (repeated, weighted)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not np.allclose(single.predict(X), weighted.predict(X))
