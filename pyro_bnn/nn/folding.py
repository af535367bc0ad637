# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
Many samples of the weights through arbitrary torch code: samples folded into the batch dimension.

There are two ways. Outside of folded networks, layers *broadcast*: sites of shape ``(*samples, 1, *event)`` meet
activations of shape ``(*samples, batch, ...)``. In a folded network, which is what conversions make, activations have
the rows of all samples in their first dimension (:class:`Folding`), and layers that cannot give every row its own weight
run once per sample on its part of the rows (:mod:`pyro_bnn.nn.per_sample`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pyro_bnn.nn.sites import SiteModule, describe_module, module_path
from pyro_bnn.nn.structure import map_structure, tensors_of

_SPLIT: ContextVar[bool] = ContextVar("split_batch", default=False)
_ROWS: ContextVar[bool] = ContextVar("rows_per_example", default=True)


@contextmanager
def split_batch() -> Iterator[None]:
    """
    Within this context a folded network gives every sample its own part of the batch, ``B / F`` examples, instead of
    repeating the batch, and returns outputs without sample dimensions, shape ``(B, ...)``.
    """
    token = _SPLIT.set(True)
    try:
        yield
    finally:
        _SPLIT.reset(token)


@contextmanager
def rows_per_example(present: bool) -> Iterator[None]:
    """Within this context a site whose last batch dimension has the size of the batch has, or has not, a value per example."""
    token = _ROWS.set(present)
    try:
        yield
    finally:
        _ROWS.reset(token)


class _Loop:
    """Whether a network is running its samples one after the other."""

    running = False


#: numbers that are read and written in the time that Python takes for one more run of a network
_ONE_RUN = 2**17

_LOOP: ContextVar[_Loop | None] = ContextVar("sample_loops", default=None)


@contextmanager
def sample_loops(allowed: bool) -> Iterator[None]:
    """Within this context networks may run their samples one after the other, as nobody collects what they do, or not."""
    token = _LOOP.set(_Loop() if allowed else None)
    try:
        yield
    finally:
        _LOOP.reset(token)


def runs_samples_alone() -> bool:
    """Whether a network is running its samples one after the other."""
    loop = _LOOP.get()
    return loop is not None and loop.running


class Folding:
    r"""
    Carries sample dimensions through a network whose code knows nothing of them.

    A call of the network first draws all of its sites. If they have sample dimensions, ``F`` samples in all, the
    inputs are repeated to ``(F * B, ...)``, sample-major; the unchanged forward runs on them (``flatten(1)``,
    ``view``, batch normalisation, pooling, recurrence); every converted layer applies sample f to rows
    ``f * B, ..., (f + 1) * B - 1``; and the outputs are unfolded to ``(*samples, B, ...)``. A site of shape
    ``(*samples, 1, *event)`` has one value per sample, one of shape ``(*samples, B, *event)`` one per example.

    The first dimension of the first tensor argument is the batch; all other tensors whose first dimension has the same
    size, in nested tuples, lists and dictionaries too, are repeated, and so are the sequences of a
    :class:`~torch.nn.utils.rnn.PackedSequence`. Tensors of three dimensions with the batch in the second (the states of
    recurrent layers) are repeated and unfolded along that one; an output that is a packed sequence keeps the ``F * B``
    sequences. Networks that pack sequences themselves need ``enforce_sorted=False``.

    A forward that reduces over its batch (a mean over examples, statistics of the batch) reduces over the examples of
    all samples, as shared batch normalisation does on purpose.

    In predictions with activations larger than the weights, the forward runs for one sample after the other, whose
    weights are built beforehand: that costs less than scaling activations, and the caches see those of one sample.

    :param root: the network; calls of it are folded.
    :param int batch_dim: 0 or 1, the batch dimension of the arguments, e.g. 1 for ``(time, batch, features)``.
    """

    def __init__(self, root: nn.Module, batch_dim: int = 0) -> None:
        if batch_dim not in (0, 1):
            raise ValueError(f"batch_dim must be 0 or 1, found {batch_dim!r}.")
        self.batch_dim = batch_dim
        self.layers = [module for module in root.modules() if isinstance(module, SiteModule)]
        self.num_samples = 1
        self.batch_size = 0
        self._first = _first_layer(root) if batch_dim == 0 else None
        self.active = False
        self.split = False
        self._sample_shape = torch.Size()
        self._values: dict[tuple[int, str], Tensor] = {}
        self._varying: dict[tuple[int, str], Tensor] = {}  # the values that differ between samples
        # by layer its parameters with the samples in front, while these run one after the other, and the present one
        self._built: dict[int, dict[str, Sequence[Any]]] = {}
        self._sample = 0
        # dimensions of the batch in arguments, -1 for none, as far as calls have told them
        self._known_dims: dict[tuple[int | str, int], int] = {}
        for module in root.modules():  # one folding: a part that was folded by itself is now folded as a part
            folded = getattr(module, "_root_folding", None)
            if folded is not None:
                for handle in folded._handles:
                    handle.remove()
                del module._root_folding
        for layer in self.layers:
            layer._axis = batch_dim if layer._axis is None else layer._axis
            layer._folding = self
        root._root_folding = self  # type: ignore[assignment]
        self._handles = (
            root.register_forward_pre_hook(self.fold_inputs, with_kwargs=True),
            root.register_forward_hook(self.unfold_outputs, always_call=True, with_kwargs=True),
        )

    def fold_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """
        The hook before the forward of the root.

        :param module: the root.
        :param args: its arguments.
        :param kwargs: its keyword arguments.
        :return: the arguments, repeated if the sites have sample dimensions.
        :raises ValueError: if the batch is empty or a site has a batch shape that does not fit it.
        """
        self.active = False
        first = next(tensors_of((*args, *kwargs.values())), None)
        if isinstance(first, PackedSequence):
            self.batch_size = int(first.batch_sizes[0])
        elif first is None or (first.dim() < 2 and first.is_floating_point()):
            return None
        else:
            self.batch_size = first.shape[self.batch_dim] if first.dim() > self.batch_dim else 0
            if self.batch_size == 0:
                raise ValueError(f"the network was called with an empty batch, shape {tuple(first.shape)}.")
        self._draw()
        if not self.active:
            return None
        self.split = _SPLIT.get()
        if self.split:
            self._split()
            return None
        if not isinstance(first, PackedSequence) and self._loop_pays(module):
            self._start_loop()
            return None
        if self._first is not None and len(args) == 1 and not kwargs:
            return None  # the first layer repeats its input itself
        repeated = tuple(self._repeat_argument(i, value) for i, value in enumerate(args))
        return repeated, {key: self._repeat_argument(key, value) for key, value in kwargs.items()}

    def _split(self) -> None:
        """Gives every sample its part of the batch; a value per example is then that of the examples that it sees."""
        if self.batch_size % self.num_samples:
            raise ValueError(
                f"a batch of {self.batch_size} examples does not split over {self.num_samples} samples: use a "
                "multiple of them (drop_last=True for loaders), or repeat the batch."
            )
        self.batch_size //= self.num_samples
        F, B = self.num_samples, self.batch_size
        for key, value in self._varying.items():
            if F > 1 and value.shape[1] == F * B:
                own = value.unflatten(1, (F, B))
                self._values[key] = torch.stack([own[f, f] for f in range(F)])

    def _draw(self) -> None:
        """Reads all sites, and finds out which of their dimensions are samples and examples."""
        drawn = []
        for layer in self.layers:
            # tied parameters are drawn where they live
            packed = (n for n, (owner, _) in layer._redirects.items() if not isinstance(owner, nn.Module))
            drawn += [(layer, name, layer.read(name)) for name in (*layer._sites, *packed)]
        shapes = [value.shape[: value.dim() - layer._event_dim(name)] for layer, name, value in drawn]
        self.active = any(shapes)
        self._values, self._varying, self._built = {}, {}, {}
        if not self.active:  # one sample: the layers read their sites themselves
            self._sample_shape, self.num_samples = torch.Size(), 1
            return
        batch_shape = torch.broadcast_shapes(*set(shapes))
        per_example = _ROWS.get() and len(batch_shape) > 1 and batch_shape[-1] == self.batch_size
        has_slot = batch_shape[-1] == 1 or per_example
        slot = batch_shape[-1] if has_slot else 1
        self._sample_shape = batch_shape[:-1] if has_slot else batch_shape
        self.num_samples = self._sample_shape.numel()
        for (layer, name, value), shape in zip(drawn, shapes, strict=True):
            key, event = (id(layer), name), value.shape[len(shape) :]
            if all(n == 1 or stride == 0 for n, stride in zip(shape, value.stride(), strict=False)):
                self._values[key] = value[(0,) * len(shape)]  # shared by all samples
            else:
                mine = slot if shape[-1] == slot and slot > 1 else 1
                target = (*self._sample_shape, mine) if has_slot else batch_shape
                value = value.expand(*target, *event).reshape(self.num_samples, mine, *event)
                self._values[key] = self._varying[key] = value

    # ------------------------------------------------------------------ one sample after the other

    def _loop_pays(self, module: nn.Module) -> bool:
        """Whether weights cost less than activations, by what layers saw in an earlier call, and nobody objects."""
        costs = [layer._costs for layer in self.layers if layer._costs is not None]
        built, passed = (sum(cost) for cost in zip(*costs, strict=True)) if costs else (0.0, 0.0)
        pays = built + _ONE_RUN < self.batch_size * passed
        rows = any(value.shape[1] > 1 for value in self._varying.values())
        return pays and not rows and not module.training and _LOOP.get() is not None

    def _start_loop(self) -> None:
        """Builds the parameters of layers for all samples."""
        for layer in self.layers:
            if layer._costs is not None:
                built = layer._built()
                self._built[id(layer)] = {n: [None] if v is None else v.unbind(0) for n, v in built.items()}
        loop: Any = _LOOP.get()
        loop.running, self.num_samples = True, 1
        self._choose(0)

    def _choose(self, sample: int) -> None:
        self._sample = sample
        self._values |= {key: value[sample : sample + 1] for key, value in self._varying.items()}

    def built(self, layer: SiteModule) -> dict[str, Any] | None:
        """The parameters of a layer for the present sample, if samples run one after the other."""
        values = self._built.get(id(layer))
        if values is None:
            return None
        return {n: v[self._sample if len(v) > 1 else 0] for n, v in values.items()}

    def _finish_loop(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The samples after the first, and the outputs of all of them with the sample dimensions in front."""
        leaves = []
        try:
            for sample in range(
                0 if output is None else self._sample_shape.numel()
            ):  # None: the forward failed
                if sample:
                    self._choose(sample)
                    output = module.forward(*args, **kwargs)
                leaves.append(list(tensors_of(output)))
        finally:
            loop: Any = _LOOP.get()
            loop.running = False
        joined = iter([self._join(values) for values in zip(*leaves, strict=True)])
        return map_structure(output, lambda _: next(joined))

    def _join(self, values: Sequence[Any]) -> Tensor:
        constant = self.batch_size not in values[0].shape[:2]
        if constant and all(torch.equal(value, values[0]) for value in values[1:]):
            return values[0]
        return torch.stack(list(values)).view(*self._sample_shape, *values[0].shape)

    # ------------------------------------------------------------------ arguments and outputs

    def is_shared_input(self, layer: SiteModule, x: Tensor) -> bool:
        """
        :param layer: a layer.
        :param x: its input.
        :return: whether the input has not been repeated over the samples yet.
        """
        return (
            layer is self._first and not self.split and self.num_samples > 1 and x.shape[0] == self.batch_size
        )

    def repeat(self, value: Any) -> Any:
        """
        Repeats an argument over the samples.

        :param value: an argument of the network.
        :return: shape ``(F * B, ...)`` for a tensor of shape ``(B, ...)``; everything else unchanged.
        """
        return value if self.num_samples == 1 else map_structure(value, self._repeat, self._repeat_packed)

    def _repeat_argument(self, key: int | str, value: Any) -> Any:
        """
        Repeats an argument. Where a size agrees with that of the batch by chance, as that of a mask over as many time steps
        as there are examples, other batches tell what it is.
        """
        if self.num_samples == 1:
            return value
        places = count()

        def repeat(tensor: Tensor) -> Tensor:
            place = key, next(places)
            known = self._known_dims.get(place)
            dim = self._batch_dim_of(tensor)
            if known is not None and (tensor.dim() <= known or tensor.shape[known] in (1, self.batch_size)):
                dim = known
            elif tensor.dim() > self.batch_dim and tensor.shape[self.batch_dim] not in (1, self.batch_size):
                self._known_dims[place] = dim
            return self._repeat(tensor, dim)

        return map_structure(value, repeat, self._repeat_packed)

    def _batch_dim_of(self, value: Tensor) -> int:
        """The dimension of the batch in a tensor by its sizes, -1 if there is none."""
        B, dim = self.batch_size, self.batch_dim
        if dim == 0 and value.dim() == 3 and value.shape[0] != B and value.shape[1] == B:
            return 1  # a state of a recurrent layer
        return dim if value.dim() > dim and value.shape[dim] == B else -1

    def _repeat(self, value: Tensor, dim: int | None = None) -> Tensor:
        dim = self._batch_dim_of(value) if dim is None else dim
        if dim < 0 or value.dim() <= dim or value.shape[dim] != self.batch_size:
            return value
        return value.repeat(*(1,) * dim, self.num_samples, *(1,) * (value.dim() - dim - 1))

    def _repeat_packed(self, value: PackedSequence) -> PackedSequence:
        if int(value.batch_sizes[0]) != self.batch_size:
            return value
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        F = self.num_samples
        return pack_padded_sequence(padded.repeat(F, 1, 1), lengths.repeat(F), True, enforce_sorted=False)

    def whole(self, x: Tensor, dim: int = 0) -> Tensor:
        """
        :param x: an input of a layer.
        :param dim: its dimension of rows.
        :return: the same; a single row, which broadcasts against the batch, as indices of positions do, once for every
            example of every sample.
        """
        if self.num_samples == 1 or x.dim() <= max(dim, 1) or x.shape[dim] != 1:
            return x
        return x.expand(*x.shape[:dim], self.num_samples * self.batch_size, *x.shape[dim + 1 :])

    def check_rows(self, layer: nn.Module, shape: Sequence[int]) -> None:
        """
        :param layer: a layer with values per sample.
        :param shape: the shape of its input, rows first.
        :raises ValueError: if the rows are not those of the examples of all samples.
        """
        samples, examples = self.num_samples, self.batch_size
        if samples > 1 and shape[0] % (samples * examples):
            raise ValueError(
                f"{describe_module(layer, module_path(layer))} has an input of shape {tuple(shape)}, whose "
                f"{shape[0]} rows are no multiple of {samples} samples times {examples} examples: the network must keep the "
                "batch in the first dimension"
            )

    def unfold_outputs(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """
        The hook after the forward of the root.

        :param module: the root.
        :param args: its arguments.
        :param kwargs: its keyword arguments.
        :param output: what its forward returned.
        :return: the output with the sample dimensions in front.
        """
        if not self.active:
            return None
        try:
            if self._built:
                return self._finish_loop(module, args, kwargs, output)
            return None if self.split else map_structure(output, self._unfold)
        finally:
            self.active = False
            self._values, self._varying, self._built = {}, {}, {}

    def _unfold(self, value: Tensor) -> Tensor:
        rows = self.num_samples * self.batch_size
        in_second = self.batch_dim == 1 or self.num_samples > 1  # of time-first outputs and of states
        first = bool(value.dim()) and value.shape[0] == rows
        if value.dim() > 1 and value.shape[1] == rows and in_second and not (first and self.batch_dim == 0):
            value = value.unflatten(1, (self.num_samples, self.batch_size)).transpose(0, 1)
            return value.reshape(*self._sample_shape, *value.shape[1:])
        return value.reshape(*self._sample_shape, self.batch_size, *value.shape[1:]) if first else value

    def value(self, layer: SiteModule, name: str) -> Tensor:
        """
        The value of a site in the present call.

        :param layer: a converted layer.
        :param str name: name of the attribute.
        :return: shape ``event_shape`` if all samples share it, else ``(F, 1, *event_shape)`` or
            ``(F, B, *event_shape)``.
        """
        key = (id(layer), name)
        if key not in self._values:
            owner, owner_key = layer._redirects.get(name, (None, name))
            if isinstance(owner, SiteModule):
                return self.value(owner, owner_key)
            self._values[key] = layer.read(name)
        return self._values[key]


def _first_layer(root: nn.Module) -> SiteModule | None:
    """The first module of a plain chain, if it is a layer that can take inputs before they are repeated."""
    if not isinstance(root, nn.Sequential) or type(root).forward is not nn.Sequential.forward:
        return None
    children = list(root)
    while children and isinstance(children[0], nn.Flatten):
        children = children[1:]
    first = children[0] if children else None
    if not isinstance(first, SiteModule) or not first.takes_shared_input or first in children[1:]:
        return None
    return first


def fold_(net: Any) -> Any:
    """
    Makes a network that was composed of this package's layers carry sample dimensions by folding them into the batch
    dimension, see :class:`Folding`. Networks that were converted by :func:`~pyro_bnn.nn.rank1_` or
    :func:`~pyro_bnn.nn.bayesian_` do so already.

    :param net: a :class:`~pyro.nn.PyroModule`.
    :return: ``net``.
    :raises ValueError: if the network holds no layer of this package.

    Example::

        >>> from pyro.nn import PyroModule
        >>> from pyro_bnn.nn import Rank1Linear
        >>> net = fold_(PyroModule[nn.Sequential](Rank1Linear(6, 2), nn.Flatten()))
        >>> net(torch.zeros(3, 5, 6)).shape
        torch.Size([3, 10])
    """
    if getattr(net, "_root_folding", None) is None:
        if not any(isinstance(module, SiteModule) for module in net.modules()):
            raise ValueError(
                "fold_ found no layer of pyro_bnn in the network: convert it with rank1_ or bayesian_."
            )
        Folding(net)
    return net
