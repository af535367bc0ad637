# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The curvature of a log joint density: Jacobians example by example, sums over data, precisions and their use."""
