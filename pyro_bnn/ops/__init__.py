# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Mathematics without Pyro: derivatives, curvature, linear solvers."""
