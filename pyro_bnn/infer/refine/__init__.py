# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Refinement of guides: importance weights, weights of several posteriors, the forward divergence."""
