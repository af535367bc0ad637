# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Inference: fitting, bounds, guides, predictions."""

from pyro_bnn.curvature.accumulate import NotAMinimumError
from pyro_bnn.infer.mixture.check import ComponentLoopWarning
from pyro_bnn.infer.mixture.elbo import Mixture_ELBO
from pyro_bnn.infer.mixture.presets import Rank1Preset, default_preset, dusenberry2020
from pyro_bnn.infer.mixture.schedules import CosineAnnealing, CyclicalAnnealing, LinearAnnealing
from pyro_bnn.infer.predict.draws import posterior_draws
from pyro_bnn.infer.predict.moments import PredictiveMoments, SiteMoments, predictive_moments
from pyro_bnn.infer.predict.predictive import PosteriorPredictive, SitePrediction, posterior_predictive
from pyro_bnn.infer.refine.forward_kl import ForwardKLResult, RefinementWarning, forward_kl
from pyro_bnn.infer.refine.importance import ImportanceWarning, ImportanceWeights, importance_weights
from pyro_bnn.infer.refine.stacking import Stacking, stack, stacking_gap, stacking_weights
from pyro_bnn.infer.sample.evaluation import ChangedModelError
from pyro_bnn.infer.sample.log_density import LogDensity, log_density
from pyro_bnn.infer.sample.mclmc import mclmc
from pyro_bnn.infer.sample.nuts import nuts
from pyro_bnn.infer.sample.result import ChainResult, NUTSResult
from pyro_bnn.infer.sample.sgmcmc import sgmcmc
from pyro_bnn.infer.sample.steps import CyclicalSteps, PolynomialSteps, StepSchedule
from pyro_bnn.infer.train.checkpoint import Checkpoint
from pyro_bnn.infer.train.loop import fit
from pyro_bnn.infer.train.persist import load_guide, save_guide
from pyro_bnn.infer.train.state import FitResult, FitState, NonFiniteLossError
from pyro_bnn.infer.train.stopping import ConvergenceTest, EarlyStopping
from pyro_bnn.model.networks import network_at
from pyro_bnn.ops.stochastic_lbfgs import StochasticLBFGS

__all__ = [
    "ChainResult",
    "ChangedModelError",
    "Checkpoint",
    "ComponentLoopWarning",
    "ConvergenceTest",
    "CosineAnnealing",
    "CyclicalAnnealing",
    "CyclicalSteps",
    "EarlyStopping",
    "FitResult",
    "FitState",
    "ForwardKLResult",
    "ImportanceWarning",
    "ImportanceWeights",
    "LinearAnnealing",
    "LogDensity",
    "Mixture_ELBO",
    "NUTSResult",
    "NonFiniteLossError",
    "NotAMinimumError",
    "PolynomialSteps",
    "PosteriorPredictive",
    "PredictiveMoments",
    "Rank1Preset",
    "RefinementWarning",
    "SiteMoments",
    "SitePrediction",
    "Stacking",
    "StepSchedule",
    "StochasticLBFGS",
    "default_preset",
    "dusenberry2020",
    "fit",
    "forward_kl",
    "importance_weights",
    "load_guide",
    "log_density",
    "mclmc",
    "network_at",
    "nuts",
    "posterior_draws",
    "posterior_predictive",
    "predictive_moments",
    "save_guide",
    "sgmcmc",
    "stack",
    "stacking_gap",
    "stacking_weights",
]
