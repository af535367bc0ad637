# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Mathematics without Pyro: derivatives, curvature, linear solvers."""

# the Fisher rules of the families register themselves on import
from pyro_bnn.ops import fisher_composite as fisher_composite
from pyro_bnn.ops import fisher_elementary as fisher_elementary
from pyro_bnn.ops import fisher_rules as fisher_rules
