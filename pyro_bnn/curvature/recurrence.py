# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The recurrences of torch's LSTM, GRU and RNN in elementary operations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def unrolled(
    name: str,
    x: Tensor,
    hx: Any,
    params: Any,
    has_biases: bool,
    layers: int,
    directions: int,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """The result of ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``: output and final states."""
    if batch_first:
        x = x.transpose(0, 1)
    step = len(params) // (layers * directions)
    states = (hx[0], hx[1]) if name == "lstm" else (hx,)
    finals: list[tuple[Tensor, ...]] = []
    for _ in range(layers):
        sides = []
        for side in range(directions):
            at = len(finals)
            w_ih, w_hh, *rest = params[at * step : (at + 1) * step]
            b_ih, b_hh = rest[:2] if has_biases else (None, None)
            projection = rest[2 * has_biases :]  # of an LSTM with proj_size
            state = tuple(s[at] for s in states)
            inputs, hidden = F.linear(x, w_ih, b_ih).unbind(0), []
            for i in reversed(inputs) if side else inputs:
                state = _cell(name, i, F.linear(state[0], w_hh, b_hh), state)
                if projection:
                    state = (F.linear(state[0], projection[0]), state[1])
                hidden.append(state[0])
            sides.append(torch.stack(hidden[::-1] if side else hidden))
            finals.append(state)
        x = torch.cat(sides, -1)
    result = x.transpose(0, 1) if batch_first else x
    return (result, *(torch.stack(final) for final in zip(*finals, strict=True)))


def _cell(name: str, i: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if name == "gru":
        (ir, iz, new), (hr, hz, hn) = i.chunk(3, -1), h.chunk(3, -1)
        reset, update = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        candidate = torch.tanh(new + reset * hn)
        return (candidate + update * (state[0] - candidate),)
    if name == "lstm":
        a, forget, cell, out = (i + h).chunk(4, -1)
        memory = torch.sigmoid(forget) * state[1] + torch.sigmoid(a) * torch.tanh(cell)
        return torch.sigmoid(out) * torch.tanh(memory), memory
    return (torch.relu(i + h) if name == "rnn_relu" else torch.tanh(i + h),)
