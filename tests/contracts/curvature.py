# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A curvature is that of the definition, and batches of data add up to it."""

from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.common import assert_close


def negative_log_joint(model: Any, guide: Any, latent: Tensor, *args: Any) -> Tensor:
    """The definition, without the package: trace of the model at transformed values, plus the log Jacobian."""
    values = guide.packed.space.unpack(latent)
    trace = pyro.poutine.trace(pyro.condition(model, data=values)).get_trace(*args)
    return -trace.log_prob_sum() - guide.packed.space.log_abs_det_jacobian(latent)


def assert_equals_dense_hessian(
    model: Any, guide: Any, *args: Any, rtol: float = 1e-10, atol: float = 1e-10
) -> Tensor:
    """
    The precision of a fitted guide is autograd's dense Hessian of the definition: for exact Hessians, and for the GGN
    of models whose GGN is the Hessian (generalised linear models with their canonical link).

    :return: the Hessian.
    """
    expected = torch.autograd.functional.hessian(
        lambda u: negative_log_joint(model, guide, u, *args), guide.loc.detach()
    )
    assert_close(guide.precision, expected, rtol=rtol, atol=atol)
    return expected


def assert_batches_add_up(guide: Any, x: Tensor, y: Tensor, batch_size: int = 7) -> None:
    """Curvature that is accumulated over a loader is that of all data at once."""
    whole = guide.laplace_approximation((x, y)).precision
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size)
    assert_close(guide.laplace_approximation(loader).precision, whole, rtol=1e-11, atol=1e-12)
