# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Bayesian deep learning as a native extension of Pyro."""

from pyro_bnn._version import __version__
from pyro_bnn.infer import Mixture_ELBO
from pyro_bnn.infer.autoguide import AutoMixture
from pyro_bnn.nn import Rank1Linear, bayesian_, rank1_
from pyro_bnn.supervised import laplace

__all__ = ["AutoMixture", "Mixture_ELBO", "Rank1Linear", "__version__", "bayesian_", "laplace", "rank1_"]
