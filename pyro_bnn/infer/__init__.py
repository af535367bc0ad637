# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Inference: fitting, bounds, guides, predictions."""

from pyro_bnn.infer.checkpoint import Checkpoint
from pyro_bnn.infer.component_check import ComponentLoopWarning
from pyro_bnn.infer.curvature import NotAMinimumError
from pyro_bnn.infer.draws import posterior_draws
from pyro_bnn.infer.fit import fit
from pyro_bnn.infer.fit_state import FitResult, FitState, NonFiniteLossError
from pyro_bnn.infer.mixture_elbo import Mixture_ELBO
from pyro_bnn.infer.moments import PredictiveMoments, SiteMoments, predictive_moments
from pyro_bnn.infer.nuts import NUTSResult, nuts
from pyro_bnn.infer.persist import load_guide, save_guide
from pyro_bnn.infer.predictive import PosteriorPredictive, SitePrediction, posterior_predictive
from pyro_bnn.infer.presets import Rank1Preset, default_preset, dusenberry2020
from pyro_bnn.infer.schedules import CosineAnnealing, CyclicalAnnealing, LinearAnnealing
from pyro_bnn.infer.stopping import ConvergenceTest, EarlyStopping

__all__ = [
    "Checkpoint",
    "ComponentLoopWarning",
    "ConvergenceTest",
    "CosineAnnealing",
    "CyclicalAnnealing",
    "EarlyStopping",
    "FitResult",
    "FitState",
    "LinearAnnealing",
    "Mixture_ELBO",
    "NUTSResult",
    "NonFiniteLossError",
    "NotAMinimumError",
    "PosteriorPredictive",
    "PredictiveMoments",
    "Rank1Preset",
    "SiteMoments",
    "SitePrediction",
    "default_preset",
    "dusenberry2020",
    "fit",
    "load_guide",
    "nuts",
    "posterior_draws",
    "posterior_predictive",
    "predictive_moments",
    "save_guide",
]
