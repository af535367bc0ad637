# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot
from torch import Tensor

from pyro_bnn.diagnostics.arviz import to_datatree
from pyro_bnn.diagnostics.functional import (
    plot_diversity,
    plot_prediction_ranks,
    prediction_diagnostics,
    prediction_draws,
)
from tests.common import assert_close


def symmetric(x: Tensor, y: Tensor | None = None) -> None:
    """A net of two units whose function does not change when the units swap."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((x[:, None] * weight).tanh().sum(-1), 0.1), obs=y)


def test_functions_agree_where_weights_do_not() -> None:
    import arviz

    base = torch.tensor([-1.0, 2.0]) + 0.05 * torch.randn(4, 250, 2)
    base[1::2] = base[1::2].flip(-1)  # half of the chains in the mirrored mode
    draws = {"weight": base.flatten(0, 1)}
    x = torch.linspace(-1, 1, 5)
    predictions = prediction_draws(symmetric, draws, (x,), num_chains=4)
    assert dict(predictions.sizes) == {"chain": 4, "draw": 250, "data": 5}
    expected = (x * draws["weight"][..., None]).tanh().sum(1).reshape(4, 250, 5)
    assert_close(predictions["obs"].values, expected, rtol=1e-9, atol=1e-12)

    tree = to_datatree(symmetric, draws, (x, x), num_chains=4)
    weights = arviz.rhat(tree["posterior"].to_dataset())["weight"]
    found = prediction_diagnostics(predictions)
    away = [0, 1, 3, 4]  # at x = 0 all predictions are zero
    assert float(weights.min()) > 1.5
    assert float(found["obs_r_hat"][away].max()) < 1.02
    assert float(found["obs_ess_bulk"][away].min()) > 500

    ax = plot_prediction_ranks(predictions, 0, bins=10)
    heights = np.stack([patch.get_data().values for patch in ax.patches])
    assert heights.shape == (4, 10)
    assert heights.sum() == 1000
    assert (np.abs(heights - 25) < 5 * np.sqrt(25)).all()
    line = plot_diversity(predictions).lines[0]
    assert (np.asarray(line.get_ydata()) <= np.asarray(line.get_xdata())).all()
    pyplot.close("all")


def test_single_chain_has_no_r_hat() -> None:
    draws = {"weight": torch.randn(100, 2)}
    found = prediction_diagnostics(prediction_draws(symmetric, draws, (torch.ones(3),)))
    assert np.isnan(found["obs_r_hat"].values).all()
    assert (found["obs_ess_bulk"].values > 30).all()
