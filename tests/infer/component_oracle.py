# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The bound of a mixture of points by definition: a loop over components, the network that was never converted."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_bnn.infer import Mixture_ELBO
from pyro_bnn.infer.autoguide import AutoMixture


def with_factors(plain: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the plain network: weights times factors, written by hand, and all sites that are parameters."""
    made = {}
    for path, module in plain.named_modules():
        prefix = f"{path}." if path else ""
        if f"{prefix}r" in values or f"{prefix}s" in values:
            weight = module.weight
            inputs_first = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
            r, s = (values.get(f"{prefix}{name}") for name in "rs")
            r = torch.ones(weight.shape[1 if inputs_first else 0]) if r is None else r
            s = torch.ones(weight.shape[0 if inputs_first else 1]) if s is None else s
            outer = torch.outer(s, r) if inputs_first else torch.outer(r, s)
            if getattr(module, "groups", 1) > 1:  # each group of outputs sees inputs of its own
                own = s.reshape(module.groups, -1).repeat_interleave(module.out_channels // module.groups, 0)
                outer = r[:, None] * own
            made[f"{prefix}weight"] = weight * outer.reshape(*outer.shape, *(1,) * (weight.dim() - 2))
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                table = made[f"{prefix}weight"].clone()
                table[module.padding_idx] = weight[module.padding_idx]
                made[f"{prefix}weight"] = table
        for name in dict(module.named_parameters(recurse=False)):
            if prefix + name in values:
                made[prefix + name] = values[prefix + name]
    return made


def expected_bound(
    plain: nn.Module,
    guide: AutoMixture,
    log_likelihood: Callable[[Callable[..., Any]], Tensor],
    priors: Callable[[str], Any],
) -> Tensor:
    """The mean over components of the log joint density; the components are points."""
    K = guide.num_components
    draws = guide.sample_posterior((K,), by_component=True)
    total = torch.zeros(())
    for k in range(K):
        values = {name: value[k] for name, value in draws.items()}
        parameters = with_factors(plain, values)
        tied = not any(name.endswith(".r") for name in values)  # the factors of tied weights are their own
        total = total + log_likelihood(
            lambda *a, p=parameters, t=tied, **kw: functional_call(plain, p, a, kw, tie_weights=t)
        )
        total = total + sum(priors(name).log_prob(value).sum() for name, value in values.items())
    return total / K


def check_bound(
    plain: nn.Module,
    convert: Callable[[nn.Module], Any],
    model_of: Callable[[Any], Callable[..., Any]],
    log_likelihood: Callable[[Callable[..., Any]], Tensor],
    args: tuple[Any, ...],
    priors: Callable[[str], Any],
    K: int = 3,
    spread: float = 0.3,
    rtol: float = 1e-10,
) -> Mixture_ELBO:
    """
    Converts a copy of a network, and compares the bound of K points around their initial values with the oracle: in an
    evaluation without gradients, in one with, and in a later one.
    """
    net = convert(copy.deepcopy(plain))
    model = model_of(net)
    guide = AutoMixture(model, K, component="delta").initialize(*args)
    guide.loc.data += spread * torch.randn_like(guide.loc)
    plain.eval()
    net.eval()
    expected = expected_bound(plain, guide, log_likelihood, priors)
    elbo = Mixture_ELBO()
    for _ in range(2):
        loss = elbo.differentiable_loss(model, guide, *args)
        torch.testing.assert_close(-loss.detach(), expected.detach(), rtol=rtol, atol=0.0)
    return elbo


def standard_priors(name: str) -> Any:
    """Those of factors and biases that ``rank1_`` gives by default."""
    return dist.Normal(1.0, 0.1) if name.rpartition(".")[2] in ("r", "s") else dist.Normal(0.0, 1.0)


def classifier(net: Any, logits: Callable[..., Tensor]) -> Callable[..., Any]:
    """A model whose logits a function makes of the network and the inputs."""

    def model(*args: Any) -> None:
        *inputs, y = args
        f = logits(net, *inputs)
        with pyro.plate("data", len(y), dim=-1):
            pyro.sample("obs", dist.Categorical(logits=f), obs=y)

    return model
