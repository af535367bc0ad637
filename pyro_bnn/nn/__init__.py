# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Bayesian layers and conversions of torch networks."""

from pyro_bnn.nn.bayesian import BayesianLinear
from pyro_bnn.nn.convert import bayesian_, rank1_
from pyro_bnn.nn.packed import unpack_site
from pyro_bnn.nn.priors import FanInNormal
from pyro_bnn.nn.rank1 import Rank1Linear
from pyro_bnn.nn.sites import init_to_trained

__all__ = [
    "BayesianLinear",
    "FanInNormal",
    "Rank1Linear",
    "bayesian_",
    "init_to_trained",
    "rank1_",
    "unpack_site",
]
