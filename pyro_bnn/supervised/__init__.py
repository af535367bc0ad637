# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Supervised learning with a network: its model, and approximations in one call."""

from pyro_bnn.supervised.guide import AutoNetworkLaplace
from pyro_bnn.supervised.laplace import laplace
from pyro_bnn.supervised.model import SupervisedModel

__all__ = ["AutoNetworkLaplace", "SupervisedModel", "laplace"]
