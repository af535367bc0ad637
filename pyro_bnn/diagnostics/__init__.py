# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""ArviZ export, metrics and plots."""

from pyro_bnn.diagnostics import metrics, plots
from pyro_bnn.diagnostics.arviz import datatree_to_inference_data, to_datatree, to_inference_data
from pyro_bnn.diagnostics.metrics import evaluate, table

__all__ = [
    "datatree_to_inference_data",
    "evaluate",
    "metrics",
    "plots",
    "table",
    "to_datatree",
    "to_inference_data",
]
