# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A Laplace guide that saves and exports itself."""

from os import PathLike
from typing import TYPE_CHECKING, Any, Self

from pyro_bnn.diagnostics import to_datatree
from pyro_bnn.infer import load_guide, save_guide
from pyro_bnn.infer.autoguide import AutoLaplace

if TYPE_CHECKING:
    import xarray as xr


class AutoNetworkLaplace(AutoLaplace):
    r"""
    What :func:`~pyro_bnn.supervised.laplace` returns: an :class:`~pyro_bnn.infer.autoguide.AutoLaplace` of a
    :class:`~pyro_bnn.supervised.SupervisedModel`, with the functions that need both as methods.

    Example::

        >>> import torch
        >>> from pyro_bnn import laplace
        >>> x = torch.linspace(-1, 1, 20).unsqueeze(-1)
        >>> data = (x, x + 0.1 * torch.sin(50 * x))
        >>> guide = laplace(torch.nn.Linear(1, 1), data, likelihood="regression", polish=True)
        >>> guide.to_datatree(data, num_samples=10).posterior["net.weight"].shape
        (1, 10, 1, 1)
    """

    def save(self, path: str | PathLike[str]) -> None:
        """
        Writes the posterior and the network's tensors to a file; see :func:`~pyro_bnn.infer.save_guide`.

        :param path: the file.
        """
        save_guide(self, path)

    def load(self, path: str | PathLike[str]) -> Self:
        """
        Reads what :meth:`save` wrote, into a guide that ``laplace(net, likelihood=...)`` built without data.

        :param path: the file.
        :return: the guide.
        :raises ValueError: see :func:`~pyro_bnn.infer.load_guide`.
        """
        load_guide(self, path)
        return self

    def to_datatree(self, data: Any = None, **options: Any) -> "xr.DataTree":
        """
        The posterior, and what it predicts for data, for ArviZ; see :func:`~pyro_bnn.diagnostics.to_datatree`.

        :param data: inputs and targets, one batch or several.
        :param options: of that function.
        :return: the groups ``posterior``, ``posterior_predictive``, ``log_likelihood``, ...
        """
        return to_datatree(self.model, self, data, **options)
