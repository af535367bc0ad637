# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Export of any posterior to ArviZ, for both of its generations."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from pyro_bnn.diagnostics.export import Contents, Exporter
from pyro_bnn.diagnostics.labels import Labels
from pyro_bnn.diagnostics.storage import TreeWriter
from pyro_bnn.infer.predict.draws import Posterior
from pyro_bnn.infer.predict.runs import MAX_MEMORY
from pyro_bnn.model.evaluation import evaluation_mode
from pyro_bnn.model.parameters import local_parameters
from pyro_bnn.ops.memory import readable

if TYPE_CHECKING:
    import xarray as xr


@torch.no_grad()
def to_datatree(
    model: Callable[..., Any],
    posterior: Posterior | Sequence[Callable[..., Any]],
    data: Any = None,
    *,
    num_samples: int | None = None,
    num_chains: int = 1,
    var_names: Sequence[str] | None = None,
    weights: bool = False,
    thin: int = 1,
    prior_samples: int = 0,
    predictions: bool = True,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    vectorize: bool | None = None,
    max_memory: float = MAX_MEMORY,
    attrs: Mapping[str, Any] | None = None,
    path: str | PathLike[str] | None = None,
    block_size: int | None = None,
    max_block_memory: float = 2**28,
) -> "xr.DataTree":
    r"""
    Exports a posterior as an :class:`xarray.DataTree` in ArviZ's schema, with dims ``(chain, draw)``.

    Independent fits are chains: the components of a mixture guide (one with ``num_components``), the
    guides of a list, or the chains of an MCMC run. A single guide is one chain of independent draws.

    Groups: ``posterior`` (with ``data`` also the values of :func:`pyro.deterministic` and reparametrised sites, which the
    model computes from draws and data, also for guides that predict by the linearised model), ``log_prior`` (per site,
    summed over the site), ``sample_stats`` (``lp``, the log joint density :math:`\log p(y, z)`; for guides with a density
    also ``log_q`` and ``log_weight``, the normalised log importance weights; ``diverging`` for MCMC, and what a
    :class:`~pyro_bnn.infer.ChainResult` recorded, such as ``energy``, ``step_size`` and ``acceptance_rate``, with the warm-up of
    the latent sites in groups of its own) and, where ``data`` holds observations, ``log_likelihood`` (pointwise, nats,
    without the factor of subsampled plates), ``posterior_predictive``, ``observed_data`` and ``constant_data``. With
    ``prior_samples``, ``prior`` and ``prior_predictive``.

    ArviZ knows no weights. Chains whose weights are not equal are one chain, of draws that stand for all with equal weights
    (:meth:`~pyro_bnn.infer.predict.weighted.WeightedChains.draw_index`): summaries and comparisons are those of the weighted
    posterior, and R-hat is undefined. ``sample_stats`` then says where a draw comes from, ``source_chain`` and ``source_draw``, and
    holds the ``weights`` of the chains by ``source``. ``run.reweighted(None)`` exports the chains side by side.

    :param callable model: a Pyro model.
    :param posterior: a guide, a sequence of guides (one chain each), an :class:`~pyro.infer.MCMC` run, a
        :class:`~pyro_bnn.infer.ChainResult`, or a mapping from latent sites to draws with the draws in the first dimension.
    :param data: one batch with observations, or an iterable of batches; ``None`` exports draws alone.
    :param int num_samples: the number of draws in all chains together, which share them equally: a multiple of the number of
        chains. By default all given draws, and 1000 of a guide or the next smaller multiple.
    :param int num_chains: chains in a mapping of draws, which hold them one after the other.
    :param var_names: latent and deterministic sites to export. By default the weights and biases of layers (sites such as
        ``fc1.weight``) are left out, unless there is nothing else.
    :param bool weights: exports weights and biases too.
    :param int thin: keeps every ``thin``-th draw in the ``posterior`` group alone.
    :param int prior_samples: the number of draws from the prior.
    :param bool predictions: whether to draw from the posterior predictive.
    :param coords: coordinates by dim.
    :param dims: names of the dims of a site (batch and event dims). By default plates name batch dims and
        ``<site>_dim_k`` the others.
    :param constant_data: variables of the group ``constant_data``; by default the tensors among the arguments
        of the model that are not observations.
    :param int batch_size: splits one batch of tensors into pieces of this many rows.
    :param vectorize: see :func:`~pyro_bnn.infer.posterior_predictive`.
    :param float max_memory: see :func:`~pyro_bnn.infer.posterior_predictive`.
    :param attrs: further attributes of the tree.
    :param path: a file for posteriors that do not fit into memory: netCDF (with h5netcdf), or Zarr if the name ends in
        ``.zarr``. It appears under its name when it is complete (attribute ``complete``). Draws are made, run through the model and appended to the file block by block; only two to four numbers
        per draw (``sample_stats``) and the observations are held for all blocks.
    :param int block_size: draws of each chain in a block. By default one block without ``path``, and with it as many as
        ``max_block_memory`` allows. A guide makes its random numbers block by block, so that two exports with the same seed
        and blocks are equal to the last bit.
    :param float max_block_memory: bytes that a block may take in the file, weights that are left out included; a block
        takes the same once more while its pieces are joined, and the model ``max_memory``.
    :return: the tree; :func:`~pyro_bnn.diagnostics.write_tree` saves it. With ``path`` it reads from the file when values are used;
        close it with ``tree.close()``.
    :raises ValueError: if ``data`` is a loader that shuffles and there are several blocks, if not one draw fits into
        ``max_block_memory``, or if the model observes nothing in ``data``.
    :raises OSError: if the disk is full; a file that was at ``path`` before is unchanged.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("obs", dist.Normal(slope * x, 0.1), obs=y)
        >>> x = torch.linspace(-1, 1, 5)
        >>> guide = AutoNormal(model)
        >>> _ = guide(x, x)
        >>> tree = to_datatree(model, guide, (x, x), num_samples=50)
        >>> tree["log_likelihood"]["obs"].dims, sorted(tree["sample_stats"].data_vars)
        (('chain', 'draw', 'data'), ['log_q', 'log_weight', 'lp'])
    """
    import xarray as xr

    contents = Contents(
        var_names=var_names,
        weights=weights,
        thin=thin,
        prior_samples=prior_samples,
        predictions=predictions,
        constant_data=constant_data,
        batch_size=batch_size,
        vectorize=vectorize,
        max_memory=max_memory,
        attrs=attrs or {},
    )
    with evaluation_mode(model), local_parameters():
        exporter = Exporter(model, posterior, data, contents, num_samples, num_chains, Labels(coords, dims))
        if path is not None and block_size is None:
            block_size = _fitting_block(exporter, max_block_memory)

        blocks = map(exporter.described, exporter.blocks(block_size))
        if path is not None:
            with TreeWriter(path) as writer:
                for groups in blocks:
                    writer.append_all(groups)
                writer.append_all(exporter.described(exporter.rest))
                writer.set_attrs(exporter.attributes())
            return writer.open()
        first, *others = blocks
    if others:
        first = {name: xr.concat([first[name], *(part[name] for part in others)], "draw") for name in first}
    tree = xr.DataTree.from_dict(first | exporter.described(exporter.rest))
    tree.attrs.update(exporter.attributes())
    return tree


def _fitting_block(exporter: Exporter, max_block_memory: float) -> int:
    """As many draws of each chain as fit into memory."""
    needed = exporter.bytes_per_draw()
    if needed > max_block_memory:
        raise ValueError(
            f"max_block_memory: one draw of each chain ({exporter.chains.shape[0]}) takes {readable(needed)}, more than "
            f"{readable(max_block_memory)}; allow more."
        )
    return int(max_block_memory // needed)


def to_inference_data(model: Callable[..., Any], posterior: Any, data: Any = None, **kwargs: Any) -> Any:
    """
    Exports a posterior in the form that the installed ArviZ works with.

    :param callable model: a Pyro model.
    :param posterior: see :func:`to_datatree`.
    :param data: see :func:`to_datatree`.
    :param kwargs: see :func:`to_datatree`.
    :return: an :class:`arviz.InferenceData` under ArviZ 0.x, the :class:`xarray.DataTree` of
        :func:`to_datatree` under 1.x.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> data = to_inference_data(model, {"w": torch.randn(4)}, (x, x))
        >>> data.log_likelihood["obs"].sizes["draw"]
        4
    """
    return datatree_to_inference_data(to_datatree(model, posterior, data, **kwargs))


def datatree_to_inference_data(tree: "xr.DataTree") -> Any:
    """
    Converts a tree to the form that the installed ArviZ works with.

    :param tree: a tree made by :func:`to_datatree`.
    :return: an :class:`arviz.InferenceData` under ArviZ 0.x, the tree itself under 1.x.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> tree = to_datatree(model, {"w": torch.randn(4)}, (x, x))
        >>> datatree_to_inference_data(tree).posterior["w"].shape
        (1, 4)
    """
    # under 1.x ``arviz.InferenceData`` exists too, as another name of DataTree, so only the version tells
    if int(importlib.metadata.version("arviz").partition(".")[0]) >= 1:
        return tree
    import arviz

    groups: dict[str, Any] = {name: group.to_dataset() for name, group in tree.children.items()}
    return arviz.InferenceData(attrs=dict(tree.attrs), **groups)
