# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Log densities written by hand, which count their gradients."""

import torch

DOUBLE = torch.float64


class Density:
    """A function that gives values and gradients at points ``(C, p)``."""

    def __init__(self, value_and_gradient):
        self.function, self.gradients, self.fail_at = value_and_gradient, 0, None

    def value_and_gradient(self, position):
        self.gradients += len(position)
        if self.fail_at is not None and self.gradients > self.fail_at:
            raise ConnectionError("the machine is gone")
        return self.function(position)


def gaussian(covariance):
    """A centred Gaussian."""
    precision = torch.linalg.inv(covariance)

    def value_and_gradient(position):
        pull = position @ precision
        return -0.5 * (pull * position).sum(-1), -pull

    return value_and_gradient


def student(degrees, dim):
    """Independent Student t distributions; their variance is degrees / (degrees - 2)."""

    def value_and_gradient(position):
        inner = 1 + position.square() / degrees
        return -(degrees + 1) / 2 * inner.log().sum(-1), -(degrees + 1) / degrees * position / inner

    return value_and_gradient
