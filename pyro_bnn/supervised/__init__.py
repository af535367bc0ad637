# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

"""Supervised learning with a network: its model."""

from pyro_bnn.supervised.model import SupervisedModel

__all__ = ["SupervisedModel"]
