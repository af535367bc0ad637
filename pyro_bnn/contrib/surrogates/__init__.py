# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors as models of BoTorch, one file each for what is Gaussian and what is draws."""
