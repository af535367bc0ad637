# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Chains of samples: the log density of a model on its packed latents, and the samplers that run on it."""
