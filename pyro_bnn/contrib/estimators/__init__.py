# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Networks on tables as estimators of scikit-learn: the model, its modes, posteriors around them, and what both estimators share."""
