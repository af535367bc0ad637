# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Bayesian deep learning as a native extension of Pyro."""

from pyro_bnn._version import __version__
from pyro_bnn.diagnostics import (
    diversity,
    evaluate,
    metrics,
    plots,
    prediction_diagnostics,
    prediction_draws,
    table,
    to_datatree,
    to_inference_data,
)
from pyro_bnn.infer import (
    Checkpoint,
    Mixture_ELBO,
    fit,
    hfl,
    load_guide,
    nuts,
    posterior_draws,
    posterior_predictive,
    predictive_moments,
    save_guide,
)
from pyro_bnn.infer.autoguide import AutoHessianFreeLaplace, AutoLaplace, AutoLaplaceMixture, AutoMixture
from pyro_bnn.nn import FanInNormal, Rank1Linear, bayesian_, init_to_trained, rank1_
from pyro_bnn.supervised import laplace

__all__ = [
    "AutoHessianFreeLaplace",
    "AutoLaplace",
    "AutoLaplaceMixture",
    "AutoMixture",
    "Checkpoint",
    "FanInNormal",
    "Mixture_ELBO",
    "Rank1Linear",
    "__version__",
    "bayesian_",
    "diversity",
    "evaluate",
    "fit",
    "hfl",
    "init_to_trained",
    "laplace",
    "load_guide",
    "metrics",
    "nuts",
    "plots",
    "posterior_draws",
    "posterior_predictive",
    "prediction_diagnostics",
    "prediction_draws",
    "predictive_moments",
    "rank1_",
    "save_guide",
    "table",
    "to_datatree",
    "to_inference_data",
]
