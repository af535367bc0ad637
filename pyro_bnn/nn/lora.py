# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters beside the frozen weights of a pretrained network, random in whole or in their components."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from math import inf
from typing import Any, NamedTuple

from pyro.nn import PyroModule
from torch import Tensor, nn
from typing_extensions import override

from pyro_bnn.nn.convert import bayesian_, rank1_
from pyro_bnn.nn.convertible import Selector, all_or_nothing, convertible, join_path, torch_class
from pyro_bnn.nn.pyro_class import become, pyro_class, to_pyro_
from pyro_bnn.nn.rank1 import Rank1Mixin
from pyro_bnn.nn.rank1_options import Rank1Options
from pyro_bnn.nn.sites import SiteModule, describe_module, module_path
from pyro_bnn.nn.subclassed import Made, is_inputs_first
from pyro_bnn.ops.notice import warn_user

_Linear: Any = PyroModule[nn.Linear]
FAMILIES = ("full", "rank1")


def lora_(
    net: nn.Module,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    family: str = "full",
    prior: Any = None,
    only: Selector | Iterable[Selector] | None = None,
    skip: Selector | Iterable[Selector] = (),
    batch_dim: int = 0,
    fold: bool = True,
    **options: Any,
) -> Any:
    r"""
    Puts low-rank adapters [1] beside the linear layers of a pretrained network, in place, and makes them random:

    .. math:: y = W_0 x + b_0 + \frac{\alpha}{r}\, B\, A\, x, \qquad A \in \mathbb R^{r\times n},\ B \in \mathbb R^{m\times r}.

    Everything that the network held before is frozen. At the start :math:`B = 0`, so that the network computes what it
    did. Products are taken from the right: neither :math:`BA` nor :math:`W_0 + BA` is ever formed, and with K components
    of a mixture there is one :math:`W_0`, and :math:`K r (m + n)` numbers.

    ==========  ==========================================================================================================
    family      what is random
    ==========  ==========================================================================================================
    ``full``    the sites ``<path>.lora_A.weight`` and ``<path>.lora_B.weight``, for every guide: under ``AutoLaplace``
                this is Laplace-LoRA [2]
    ``rank1``   :math:`W_0 + \frac{\alpha}{r} B \operatorname{diag}(s) A` with the site ``<path>.lora_A.r`` of r entries
                for :math:`s`, which multiplies the outputs of A as the factor of a rank-1 layer does [3, 4]; A and B are
                parameters that all components of a mixture share
    ==========  ==========================================================================================================

    Linear layers are adapted, subclasses of them, and linear layers with the inputs in the first dimension of their
    weight, as the Conv1D of GPT-2; torch's :class:`~torch.nn.MultiheadAttention` reads its weights itself, and is left
    out with a warning. What else shall be random or trained is converted or unfrozen afterwards, e.g. a new head by
    ``bayesian_(net, only="classifier")``.

    A network of :func:`peft.get_peft_model` has its adapters already. They become the sites (of the active adapter, in
    layers of any type), with the rank, the scale and the trained values that they have, and PEFT's choice of what is
    frozen stays. Variants whose forward is another (DoRA and the like) are refused.

    :param net: any network, not converted yet.
    :param int rank: :math:`r`, 8 by default.
    :param float alpha: :math:`\alpha`; by default :math:`r`, so that the scale is 1.
    :param str family: see the table.
    :param prior: prior of the adapters in one of the three forms of :func:`~pyro_bnn.nn.priors.resolve_prior`, where a
        dictionary may have the keys ``"lora_A"`` and ``"lora_B"`` (without one of them, that matrix is an ordinary
        parameter); by default :class:`~pyro_bnn.nn.FanInNormal`, :math:`A_{ij}\sim N(0, 1/n)` and
        :math:`B_{ij}\sim N(0, 1/r)`. For ``"rank1"`` that of the factors, :math:`N(1, 0.1^2)`.
    :param only: adapt only these modules: a path or paths, classes, or ``callable(name, module)``.
    :param skip: leave these modules as they are.
    :param int batch_dim: the batch dimension of the network's arguments, 0 or 1.
    :param bool fold: ``False`` leaves sample dimensions to broadcasting.
    :param options: for ``"rank1"``, ``weight_prior``, ``clip`` and ``apply`` of :class:`~pyro_bnn.nn.Rank1Options`.
    :return: ``net``.
    :raises ValueError: if no layer can be adapted, an option does not go with the family or the network, or a selector or
        a key of a prior names nothing.

    **References**

    [1] Hu et al., *LoRA: Low-rank adaptation of large language models*, ICLR 2022.

    [2] Yang, Robeyns, Wang, Aitchison, *Bayesian low-rank adaptation for large language models*, ICLR 2024.

    [3] Samplawski et al., *Scalable Bayesian low-rank adaptation of large language models via stochastic variational
    subspace inference*, 2025 (arXiv 2506.21408).

    [4] Low-rank variational dropout, arXiv 2506.22809, 2025.

    Example::

        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> _ = lora_(net, rank=2, only="0")
        >>> net[0]
        LoraLinear(
          in_features=4, out_features=8, bias=True, rank=2, scale=1
          (lora_A): BayesianLinear(4, 2, sites=['weight'])
          (lora_B): BayesianLinear(2, 8, sites=['weight'])
        )
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {list(FAMILIES)}, found {family!r}.")
    _check_options(family, options)
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is a {type(net).__name__}; expected a torch.nn.Module.")
    selected = only if only is not None else _everything
    with all_or_nothing(net):
        if any(is_peft(module) for module in net.modules()):
            adapters = _of_peft(net, selected, skip, rank, alpha)
        else:
            adapters = _attach(net, selected, skip, 8 if rank is None else rank, alpha)
        paths = {join_path(a.path, name) for a in adapters for name in a.names}
        chosen: Any = {"only": sorted(paths), "batch_dim": batch_dim, "fold": fold}
        if family == "full":
            bayesian_(net, prior=_full_prior(prior, adapters), **chosen)
        else:
            rank1_(net, prior=_factor_prior(prior, adapters), **chosen, **options)
    return net


def merged_weights(net: nn.Module, latents: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    r"""
    The weights of the layers with adapters merged into them, :math:`W_0 + \frac{\alpha}{r} B \operatorname{diag}(s) A`, for
    ``load_state_dict(..., strict=False)`` or :func:`torch.func.functional_call` of the network as it was before
    :func:`lora_` or PEFT.

    :param net: a network with adapters.
    :param latents: values of the adapters' sites by full name, e.g. ``guide.median()`` or draws, with any leading
        dimensions; by default the values that the sites had before they became random.
    :return: by name of the weight in the network without adapters, shape ``(*leading, *weight.shape)``.
    :raises ValueError: if the network has no adapters, a site has no value, or no single weight does what an adapted layer
        does.

    Example::

        >>> import torch
        >>> net = lora_(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), rank=2)
        >>> draws = {"0.lora_A.weight": torch.ones(5, 2, 4), "0.lora_B.weight": torch.ones(5, 8, 2)}
        >>> {name: tuple(w.shape) for name, w in merged_weights(net[:1], draws).items()}
        {'0.weight': (5, 8, 4)}
    """
    merged: dict[str, Tensor] = {}
    for adapter in adapters_of(net):
        _require_mergeable(adapter)
        base, key = adapter.base, join_path(adapter.path.removeprefix("base_model.model."), "weight")
        A, B = (_value(module, "weight", latents) for module in adapter.matrices)
        factor = _factor_value(adapter.matrices[0], latents)
        change = adapter.scale * (B @ (A if factor is None else factor.unsqueeze(-1) * A))
        weight = merged.get(key, base.weight)  # PEFT may have several adapters of a layer active
        merged[key] = weight + (change.mT if is_inputs_first(base) else change)
    if not merged:
        raise ValueError("the network has no adapters: call lora_ first.")
    return merged


def _require_mergeable(adapter: "Adapter") -> None:
    base = adapter.base
    plain: Any = base.plain_class if isinstance(base, _Adapted) else torch_class(base)
    reason = "has a forward method of its own"
    if plain.forward is nn.Linear.forward or is_inputs_first(base):
        bias = {"bias"} & {
            *getattr(adapter.matrices[1], "_sites", ()),
            *dict(adapter.matrices[1].named_parameters()),
        }
        reason = "has an adapter with a bias" if bias else ""
    if reason:
        raise ValueError(
            f"{describe_module(base, adapter.path)} {reason}, so that no weight does what it does with its adapter: keep the "
            "adapter."
        )


# ---------------------------------------------------------------------- adapters of this package and of PEFT


class Adapter(NamedTuple):
    """
    An adapter of a layer.

    :ivar path: the path of the layer with its adapter.
    :ivar names: the paths below it of A and of B.
    :ivar matrices: their modules.
    :ivar base: the module that holds the frozen weight.
    :ivar scale: the factor of the product.
    """

    path: str
    names: tuple[str, str]
    matrices: tuple[Any, Any]
    base: Any
    scale: float


class _Adapted(Made):
    """A linear layer with a low-rank adapter, two layers of their own."""

    lora_scale: float

    @property
    def plain_class(self) -> Any:
        """The class of the layer without its adapter."""
        return self._recipe[1]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Takes and returns what the layer without its adapter does."""
        return super().forward(x, *args, **kwargs) + self.lora_scale * self.lora_B(self.lora_A(x))

    @override
    def extra_repr(self) -> str:
        given = super().extra_repr()
        return f"{given}{', ' * bool(given)}rank={self.lora_A.out_features}, scale={self.lora_scale:g}"


@cache
def _adapted(cls: type) -> type:
    base = pyro_class(cls)
    attributes = {"_recipe": (_adapted, cls), "__module__": __name__}
    return type(base)(f"Lora{cls.__name__}", (_Adapted, base), attributes)


def _adaptable(module: nn.Module) -> type | None:
    """The class of a layer with an adapter in place of a linear one."""
    cls = torch_class(module)
    linear = issubclass(cls, nn.Linear) or is_inputs_first(module)
    return _adapted(cls) if linear and not isinstance(module, SiteModule) else None


def is_peft(module: nn.Module) -> bool:
    """Whether a module is a layer with adapters of PEFT, which need not be installed."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, "base_layer")


def adapters_of(net: nn.Module) -> Iterator[Adapter]:
    """The adapters in a network, those of PEFT the active ones."""
    for path, module in net.named_modules():
        if isinstance(module, _Adapted):
            yield Adapter(
                path, ("lora_A", "lora_B"), (module.lora_A, module.lora_B), module, module.lora_scale
            )
        elif is_peft(module):
            yield from _active(path, module)


def _active(path: str, module: Any) -> Iterator[Adapter]:
    for key in module.active_adapters:
        if key in module.lora_A:
            names = f"lora_A.{key}", f"lora_B.{key}"
            matrices = module.lora_A[key], module.lora_B[key]
            yield Adapter(path, names, matrices, module.base_layer, module.scaling[key])


def _attach(net: nn.Module, only: Any, skip: Any, rank: int, alpha: float | None) -> list[Adapter]:
    """Freezes a network and gives its linear layers adapters that change nothing yet."""
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, found {rank!r}.")
    if alpha is not None and not 0 < alpha < inf:
        raise ValueError(
            f"alpha must be a positive number, found {alpha!r}: the scale of the adapters is alpha / rank."
        )
    refused = [skip] if isinstance(skip, (str, type)) or callable(skip) else list(skip)
    layers = convertible(
        net, only, [*refused, nn.MultiheadAttention], {nn.Linear: _adapted(nn.Linear)}, _adaptable
    )
    _warn_of_attention(net, only, refused)
    earlier = {p for adapter in adapters_of(net) for m in adapter.matrices for p in m.parameters()}
    to_pyro_(net)
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter in earlier)
    for _, layer, cls in layers:
        like = next(layer.parameters())
        inputs, outputs = _sizes(layer)
        become(layer, cls)
        layer.lora_scale = (rank if alpha is None else float(alpha)) / rank
        place = {"bias": False, "device": like.device, "dtype": like.dtype}
        layer.lora_A, layer.lora_B = _Linear(inputs, rank, **place), _Linear(rank, outputs, **place)
        nn.init.zeros_(layer.lora_B.weight)
    attached = {layer for _, layer, _ in layers}
    return [adapter for adapter in adapters_of(net) if adapter.base in attached]


def _sizes(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else layer.weight.shape


def _of_peft(net: nn.Module, only: Any, skip: Any, rank: Any, alpha: Any) -> list[Adapter]:
    """The adapters that PEFT made, if lora_ means the same by them."""
    if rank is not None or alpha is not None:
        raise ValueError(
            "the network has adapters of PEFT, whose rank and scale are set: leave out rank= and alpha=."
        )
    layers = convertible(net, only, skip, {}, lambda module: type(module) if is_peft(module) else None)
    for path, layer, _ in layers:
        reason = _other_adapter(layer)
        if reason:
            raise ValueError(f"{describe_module(layer, path)} {reason}, or leave the layer out by skip=.")
    return [adapter for path, layer, _ in layers for adapter in _active(path, layer)]


def _other_adapter(layer: Any) -> str:
    """What speaks against a layer of PEFT, and what to do; empty for a plain adapter."""
    if layer.merged or layer.disable_adapters:
        return "has its adapters merged or disabled, so that they have no effect: unmerge and enable them"
    variants = [
        type(layer.lora_variant[key]).__name__ for key in layer.active_adapters if key in layer.lora_variant
    ]
    if variants:
        return f"has the variants {variants} of LoRA, whose forward is not that of W + BA: use plain LoRA"
    if not any(key in layer.lora_A for key in layer.active_adapters):
        return "has no matrices A and B of an active adapter (those of embeddings are no layers): adapt linear layers"
    return ""


def _warn_of_attention(net: nn.Module, only: Any, skip: list[Selector]) -> None:
    if only is not _everything or nn.MultiheadAttention in skip:
        return
    left = [
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.MultiheadAttention) and name not in skip
    ]
    if left:
        warn_user(
            f"lora_ leaves out {left[:10]}{' and more' if len(left) > 10 else ''}: torch's MultiheadAttention reads its "
            "weights itself, without the linear layers that adapters go beside. Name it in skip= if that is intended.",
        )


def _everything(name: str, module: nn.Module) -> bool:
    return True


# ---------------------------------------------------------------------- options, priors, values


def _check_options(family: str, options: Mapping[str, Any]) -> None:
    allowed = {"weight_prior", "clip", "apply"} if family == "rank1" else set()
    if wrong := sorted(set(options) - allowed):
        raise TypeError(
            f"lora_ takes no {wrong} with family={family!r}; its further options are {sorted(allowed)}."
        )
    Rank1Options(**options)


def _full_prior(prior: Any, adapters: list[Adapter]) -> Any:
    """A prior of matrices; a dictionary by ``"lora_A"`` and ``"lora_B"`` as one by full names."""
    if not isinstance(prior, Mapping):
        return prior
    named = {
        join_path(a.path, f"{name}.weight"): prior[name.partition(".")[0]]
        for a in adapters
        for name in a.names
        if name.partition(".")[0] in prior
    }
    return {key: value for key, value in prior.items() if key not in ("lora_A", "lora_B")} | named


def _factor_prior(prior: Any, adapters: list[Adapter]) -> Any:
    """The prior of the factors of the components, as one of all factors of rank-1 layers."""
    prior = Rank1Options().factor_prior() if prior is None else prior
    given = prior if isinstance(prior, Mapping) else {"r": prior}
    named = {join_path(a.path, f"{a.names[0]}.r"): given["r"] for a in adapters if "r" in given}
    return {key: value for key, value in given.items() if key != "r"} | named


def _value(module: Any, name: str, latents: Mapping[str, Tensor] | None) -> Tensor:
    """The value of a parameter or site of a matrix."""
    sites = getattr(module, "_sites", {})
    if name not in sites:
        return module.read(name) if isinstance(module, SiteModule) else getattr(module, name)
    full = join_path(module_path(module), name)
    if latents is None:
        return sites[name].init
    if full not in latents:
        raise ValueError(f"latents have no value of site {full!r}; they have {sorted(latents)[:20]}.")
    return latents[full]


def _factor_value(module: Any, latents: Mapping[str, Tensor] | None) -> Tensor | None:
    """The factor of the components, as it is applied."""
    if latents is None or not isinstance(module, Rank1Mixin) or "r" not in module._sites:
        return None  # a factor starts at 1
    value, clip = _value(module, "r", latents), module._clips["r"]
    return value if clip is None else value.clamp(-clip, clip)
