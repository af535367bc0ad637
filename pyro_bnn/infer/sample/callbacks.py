# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Log densities as functions of arrays, for samplers that know nothing of torch."""

from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
import torch

#: Gives a log density and its gradient, shapes ``()`` or ``(C,)`` and that of its argument.
Arrays = Callable[[np.ndarray], tuple[Any, np.ndarray]]


def on_arrays(density: Any) -> Arrays:
    """What :meth:`LogDensity.numpy` returns."""
    lock = Lock()  # some samplers run their chains in threads

    def log_prob(z: np.ndarray, **_: Any) -> tuple[Any, np.ndarray]:
        given = np.asarray(z)
        u = torch.tensor(given, device=density.device)
        with lock:
            value, gradient = density.value_and_gradient(u)
        if u.dim() == 1:
            return float(value), gradient.cpu().numpy()
        return value.cpu().numpy(), gradient.cpu().numpy()

    return log_prob


def on_jax(density: Any) -> Callable[[Any], Any]:
    """What :meth:`LogDensity.jax` returns."""
    import jax

    arrays = on_arrays(density)

    def host(z: Any) -> tuple[np.ndarray, np.ndarray]:
        given = np.asarray(z)
        value, gradient = arrays(given.reshape(-1, given.shape[-1]))
        return value.reshape(given.shape[:-1]), gradient.reshape(given.shape)

    def both(z: Any) -> tuple[Any, Any]:
        shapes = (jax.ShapeDtypeStruct(z.shape[:-1], z.dtype), jax.ShapeDtypeStruct(z.shape, z.dtype))
        found: tuple[Any, Any] = jax.pure_callback(host, shapes, z, vmap_method="expand_dims")
        return found

    @jax.custom_vjp
    def log_prob(z: Any) -> Any:
        return both(z)[0]

    log_prob.defvjp(both, lambda gradient, weight: (weight[..., None] * gradient,))
    return log_prob
