# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Bayesian deep learning as a native extension of Pyro."""

from pyro_bnn._version import __version__

__all__ = ["__version__"]
