# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""ArviZ export, metrics and plots."""

from pyro_bnn.diagnostics import metrics, plots
from pyro_bnn.diagnostics.arviz import datatree_to_inference_data, to_datatree, to_inference_data
from pyro_bnn.diagnostics.diversity import DiversityReport, diversity
from pyro_bnn.diagnostics.functional import prediction_diagnostics, prediction_draws
from pyro_bnn.diagnostics.metrics import evaluate, table
from pyro_bnn.diagnostics.mixing import MixingReport, mixing
from pyro_bnn.diagnostics.ood import functional_variance, mutual_information, predictive_entropy
from pyro_bnn.diagnostics.quality import (
    compare_with_nuts,
    elbo_gap,
    functional_k,
    log_weights,
    pareto_k,
    simulation_based_calibration,
)
from pyro_bnn.diagnostics.storage import write_tree

__all__ = [
    "DiversityReport",
    "MixingReport",
    "compare_with_nuts",
    "datatree_to_inference_data",
    "diversity",
    "elbo_gap",
    "evaluate",
    "functional_k",
    "functional_variance",
    "log_weights",
    "metrics",
    "mixing",
    "mutual_information",
    "pareto_k",
    "plots",
    "prediction_diagnostics",
    "prediction_draws",
    "predictive_entropy",
    "simulation_based_calibration",
    "table",
    "to_datatree",
    "to_inference_data",
    "write_tree",
]
