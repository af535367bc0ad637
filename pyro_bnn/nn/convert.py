# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""In-place conversion of torch networks that keeps their trained weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from pyro_bnn.nn.attention import Rank1MultiheadAttention
from pyro_bnn.nn.bayesian import BayesianLinear
from pyro_bnn.nn.bayesian_layers import BAYESIAN_LAYERS
from pyro_bnn.nn.conv import (
    Rank1Conv1d,
    Rank1Conv2d,
    Rank1Conv3d,
    Rank1ConvTranspose1d,
    Rank1ConvTranspose2d,
    Rank1ConvTranspose3d,
)
from pyro_bnn.nn.convertible import Selector, all_or_nothing, convertible, join_path, torch_class
from pyro_bnn.nn.embedding import Rank1Embedding
from pyro_bnn.nn.folding import Folding
from pyro_bnn.nn.normalization import COMPONENT_BATCHNORM
from pyro_bnn.nn.packed import PackedSite
from pyro_bnn.nn.priors import FanInNormal, PriorLike, check_keys
from pyro_bnn.nn.pyro_class import become, to_pyro_
from pyro_bnn.nn.rank1 import Rank1Linear
from pyro_bnn.nn.rank1_options import Rank1Options, check_rank1_keys
from pyro_bnn.nn.recurrent import Rank1GRU, Rank1GRUCell, Rank1LSTM, Rank1LSTMCell, Rank1RNN, Rank1RNNCell
from pyro_bnn.nn.silent import silence_
from pyro_bnn.nn.sites import SiteModule, describe_module
from pyro_bnn.nn.subclassed import holder_class, subclass_layer


def rank1_(
    net: nn.Module,
    *,
    only: Selector | Iterable[Selector] | None = None,
    skip: Selector | Iterable[Selector] = (),
    freeze_base: bool = False,
    batchnorm: str = "shared",
    num_components: int | None = None,
    batch_dim: int = 0,
    fold: bool = True,
    **options: Any,
) -> Any:
    """
    Converts the layers of a network into rank-1 layers, in place, keeping its weights.

    The network becomes a :class:`~pyro.nn.PyroModule`; its code does not change. With all multiplicative factors at
    1 and the biases at their trained values it computes what it computed before. Sample dimensions are folded into
    the batch dimension (:class:`~pyro_bnn.nn.folding.Folding`), so that any forward works, provided that it keeps
    the batch in the first dimension; others run their samples one after the other. Linear, convolution, transposed
    convolution, embedding, recurrent and attention layers are converted, and subclasses of layers with one weight, whose
    forward then runs with the weight of every sample; normalisation layers stay shared, as in the paper. Matrices that
    modules hold beside such layers (class tokens, adapters) stay as they are, and a warning names them.

    :param net: any network.
    :param only: convert only these modules: a path or paths, classes, or ``callable(name, module)``.
    :param skip: leave these modules as they are; paths of parameters keep the warning from naming them.
    :param bool freeze_base: do not train any of the network's own parameters, only the factors and biases: for
        pretrained networks. The running statistics of batch normalisation still follow the data, unless the network is
        in evaluation mode (``net.eval()``) while it is fitted.
    :param str batchnorm: ``"shared"`` by all components, as in the paper, or ``"component"``, which needs
        ``num_components`` and the warning of :class:`~pyro_bnn.nn.normalization.ComponentBatchNormMixin`.
    :param int num_components: number of components, for ``batchnorm="component"`` only.
    :param int batch_dim: the batch dimension of the network's arguments, 0 or 1.
    :param bool fold: ``False`` leaves sample dimensions to broadcasting, which lets networks of linear layers take
        inputs that have sample dimensions themselves.
    :param options: see :class:`~pyro_bnn.nn.Rank1Options`; names in priors are ``"path.r"`` and ``"path.s"``.
    :return: ``net``.
    :raises ValueError: if no layer can be converted, or a key of a prior or a selector names nothing.

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> _ = rank1_(net, skip="2")
        >>> type(net[0]).__name__, isinstance(net[2], Rank1Linear)
        ('Rank1Linear', False)
    """
    made = Rank1Options(**options)
    if freeze_base and made.weight_prior is not None:
        raise ValueError(
            "freeze_base keeps the weights as they are, so that they cannot have a weight_prior."
        )
    if batchnorm not in ("shared", "component"):
        raise ValueError(f"batchnorm must be 'shared' or 'component', found {batchnorm!r}.")
    if (batchnorm == "component") != (num_components is not None):
        raise ValueError("num_components goes with batchnorm='component' and nothing else.")
    layers = convertible(net, only, skip, _RANK1, _subclassed(_RANK1))
    with all_or_nothing(net):
        to_pyro_(net)
        if freeze_base:
            net.requires_grad_(False)
        check_rank1_keys(made, _make_layers(layers))
        ties = _Ties(net)
        for name, layer, _ in layers:
            ties.redirect(name, layer)
            layer._make_rank1(made, join_path(name, ""))
        ties.check()
        if num_components is not None:
            _component_batchnorm(net, num_components)
        _finish(net, fold, batch_dim)
    return net


def bayesian_(
    net: nn.Module,
    *,
    prior: PriorLike | None = None,
    packed: bool = False,
    only: Selector | Iterable[Selector] | None = None,
    skip: Selector | Iterable[Selector] = (),
    keep_frozen: bool = False,
    batch_dim: int = 0,
    fold: bool = True,
) -> Any:
    """
    Makes the weights of a network random, in place. The trained weights are remembered, and guides that are built
    with ``init_loc_fn=pyro_bnn.nn.init_to_trained`` start there.

    :param net: any network. Its normalisation layers keep their parameters.
    :param prior: prior of the parameters in one of the three forms of
        :func:`~pyro_bnn.nn.priors.resolve_prior`, by names such as ``"0.weight"`` or ``"weight"``;
        :class:`~pyro_bnn.nn.priors.FanInNormal` by default.
    :param bool packed: draw all weights as one flat site ``"packed"`` of which the layers use views. Pyro's cost
        per site dominates the training of small networks. All priors must then be Normal.
    :param only: convert only these modules: a path or paths, classes, or ``callable(name, module)``.
    :param skip: leave these modules as they are; paths of parameters keep the warning from naming them.
    :param bool keep_frozen: whether parameters that are frozen (``requires_grad=False``) stay what they are, instead of
        becoming random.
    :param int batch_dim: the batch dimension of the network's arguments, 0 or 1.
    :param bool fold: ``False`` leaves sample dimensions to broadcasting.
    :return: ``net``.
    :raises ValueError: if no layer can be converted, or a key of the prior or a selector names nothing.

    Example::

        >>> import torch
        >>> net = bayesian_(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
        >>> net(torch.zeros(3, 4)).shape
        torch.Size([3, 1])
    """
    layers = convertible(net, only, skip, _BAYESIAN, _subclassed(_BAYESIAN))
    for name, layer, _ in layers:
        if parametrize.is_parametrized(layer):
            raise ValueError(
                f"{describe_module(layer, name)} computes its weight from other parameters (a parametrization), so "
                "that the weight has no prior of its own: call parametrize.remove_parametrizations, or skip the layer."
            )
    with all_or_nothing(net):
        to_pyro_(net)
        check_keys(prior, _make_layers(layers))
        prior = FanInNormal() if prior is None else prior
        ties = _Ties(net)
        for name, layer, _ in layers:
            ties.redirect(name, layer)
            layer._make_bayesian(prior, join_path(name, ""), keep_frozen)
        ties.check()
        if packed:
            PackedSite(net, [(name, layer) for name, layer, _ in layers])
        _finish(net, fold, batch_dim)
    return net


def _make_layers(layers: list[tuple[str, Any, type]]) -> list[str]:
    """Gives modules the classes of layers; returns the names that priors may use."""
    for _, layer, cls in layers:
        become(layer, cls)
        layer._prepare()
    return [join_path(name, key) for name, layer, _ in layers for key in layer._site_keys()]


class _Ties:
    """Keeps tied parameters tied in a network whose parameters are not random yet."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.owners: dict[nn.Parameter, tuple[str, Any, str]] = {}

    def redirect(self, path: str, layer: Any) -> None:
        """Lets a layer read those of its parameters that an earlier layer made random from there."""
        for key, value in layer._own_parameters().items():
            if value in self.owners:
                _, owner, name = self.owners[value]
                if name in owner._sites:
                    layer._redirect_site(key, owner, name)
            else:
                self.owners[value] = path, layer, key

    def check(self) -> None:
        """
        Refuses a parameter that became random in one place and stayed what it is in another, but for modules that hold
        one of a layer in them: these read it there.
        """
        for path, module in list(self.net.named_modules()):
            for key, value in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                owner_path, owner, name = self.owners.get(value, ("", None, ""))
                if owner is None or name not in owner._sites:
                    continue
                if owner not in set(module.modules()):
                    raise ValueError(
                        f"{join_path(owner_path, name)!r} would become random, but {join_path(path, key)!r} is the same "
                        "parameter and would not: convert both layers, or leave this parameter out by a dictionary of "
                        "priors."
                    )
                become(module, holder_class(torch_class(module)))
                cast(SiteModule, module)._redirect_site(key, owner, name)


class _FrozenParameters:
    """Keeps parameters frozen that are so when a network is called: Pyro's parameter store, which it enters, unfreezes them."""

    def __init__(self, net: nn.Module) -> None:
        self.parameters = [p for p in net.parameters() if not p.requires_grad]
        self.frozen: list[nn.Parameter] = []
        if self.parameters:
            net.register_forward_pre_hook(self.before)
            net.register_forward_hook(self.after, always_call=True)

    def before(self, module: nn.Module, args: Any) -> None:
        """The hook before the forward."""
        self.frozen = [p for p in self.parameters if not p.requires_grad]

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook after the forward."""
        for p in self.frozen:
            p.requires_grad_(False)


def _component_batchnorm(net: Any, num_components: int) -> None:
    first = None
    for name, module in net.named_modules():
        made = COMPONENT_BATCHNORM.get(torch_class(module))
        if made is not None:
            become(module, made)
            first = first or module
            module._make_component(num_components, first)
        elif isinstance(module, _BatchNorm):
            raise ValueError(
                f"{describe_module(module, name)} has no version with statistics per component; those that have are "
                f"{sorted(cls.__name__ for cls in COMPONENT_BATCHNORM)}."
            )
    if first is None:
        raise ValueError("batchnorm='component', but the network holds no batch normalisation.")


def _finish(net: Any, fold: bool, batch_dim: int) -> None:
    for module in net.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            # the fused inference kernel reads the weights behind the layers' backs
            module.activation_relu_or_gelu = 0
            for part in module.modules():
                if isinstance(part, SiteModule):
                    part._axis = 0 if module.self_attn.batch_first else 1
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    if fold:
        Folding(net, batch_dim)
    silence_(net)
    _FrozenParameters(net)


def _subclassed(table: Mapping[type, type]) -> Callable[[nn.Module], type | None]:
    return lambda module: subclass_layer(module, torch_class(module), table)


_RANK1: dict[type, type] = {
    nn.Linear: Rank1Linear,
    nn.Conv1d: Rank1Conv1d,
    nn.Conv2d: Rank1Conv2d,
    nn.Conv3d: Rank1Conv3d,
    nn.ConvTranspose1d: Rank1ConvTranspose1d,
    nn.ConvTranspose2d: Rank1ConvTranspose2d,
    nn.ConvTranspose3d: Rank1ConvTranspose3d,
    nn.Embedding: Rank1Embedding,
    nn.RNN: Rank1RNN,
    nn.GRU: Rank1GRU,
    nn.LSTM: Rank1LSTM,
    nn.RNNCell: Rank1RNNCell,
    nn.GRUCell: Rank1GRUCell,
    nn.LSTMCell: Rank1LSTMCell,
    nn.MultiheadAttention: Rank1MultiheadAttention,
}
_BAYESIAN: dict[type, type] = {nn.Linear: BayesianLinear, **BAYESIAN_LAYERS}
