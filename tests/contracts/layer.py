# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A layer with sample dimensions equals, component by component, the plain torch layer with explicit weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bnn.model.handlers import SubstituteMessenger
from tests.common import assert_close

#: Makes the plain torch layer of one component from the values of its sites.
Explicit = Callable[[Mapping[str, Tensor]], nn.Module]


def values_of(net: Any, args: Sequence[Any], batch_shape: Sequence[int]) -> dict[str, Tensor]:
    """Random values of all sample sites of a layer, with sample dimensions in front."""
    nodes = dict(poutine.trace(net).get_trace(*args).iter_stochastic_nodes())
    return {name: torch.randn(*batch_shape, *site["value"].shape) for name, site in nodes.items()}


def flat(output: Any) -> list[Tensor]:
    """The tensors of an output, which may be nested tuples with ``None`` in them."""
    if isinstance(output, Tensor):
        return [output]
    return [] if output is None else [t for part in output for t in flat(part)]


def assert_components_equal_plain_layers(
    net: Any, args: Sequence[Any], values: Mapping[str, Tensor], explicit: Explicit, *, loop: bool = True
) -> None:
    """
    All components at once give what each plain layer gives, and so does one component without sample dimensions.

    :param net: the layer under test.
    :param args: its arguments.
    :param values: values of its sites, of shape ``(K, 1) + site shape``.
    :param explicit: makes the plain layer of one component.
    :param loop: whether components are run one by one too.
    """
    with SubstituteMessenger(values):
        actual = flat(net(*args))
    for k in range(len(next(iter(values.values())))):
        component = {site: value[k, 0] for site, value in values.items()}
        expected = flat(explicit(component)(*args))
        for a, e in zip(actual, expected, strict=True):
            assert_close(a[k], e, rtol=1e-12, atol=1e-12)
        if loop:
            with SubstituteMessenger(component):
                single = flat(net(*args))
            for a, e in zip(single, expected, strict=True):
                assert_close(a, e, rtol=1e-12, atol=1e-12)
