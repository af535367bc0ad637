# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The recurrences of torch's LSTM, GRU and RNN written out."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: A state, ``(h,)`` or for an LSTM ``(h, c)``.
State = tuple[Tensor, ...]
#: Applies the weight and bias of ``"ih"``, ``"hh"`` or, for projected states, ``"hr"`` in a layer and direction.
Affine = Callable[[Tensor, str], Tensor]


def recurrent_step(kind: str, from_input: Tensor, from_state: Tensor, state: State) -> State:
    """
    The next state, by the equations of :class:`torch.nn.LSTM`, :class:`torch.nn.GRU` and :class:`torch.nn.RNN`.

    :param kind: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
    :param from_input: the affine map of the input, shape ``(N, gates * units)``.
    :param from_state: that of the state.
    """
    if kind == "lstm":
        a, forget, cell, out = (from_input + from_state).chunk(4, -1)
        memory = torch.sigmoid(forget) * state[1] + torch.sigmoid(a) * torch.tanh(cell)
        return torch.sigmoid(out) * torch.tanh(memory), memory
    if kind == "gru":
        (reset_x, update_x, new_x), (reset_h, update_h, new_h) = (
            from_input.chunk(3, -1),
            from_state.chunk(3, -1),
        )
        reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
        candidate = torch.tanh(new_x + reset * new_h)
        return (candidate + update * (state[0] - candidate),)
    total = from_input + from_state
    return (torch.relu(total) if kind == "rnn_relu" else torch.tanh(total),)


def unrolled(
    kind: str,
    x: Tensor,
    state: State,
    maps: Sequence[Affine],
    directions: int,
    *,
    projects: bool = False,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, State]:
    """
    All layers and directions, step by step.

    :param x: shape ``(T, N, inputs)``.
    :param state: shapes ``(layers * directions, N, units)``.
    :param maps: of every layer and direction.
    :param projects: whether states of an LSTM are projected.
    :param lengths: of the sequences if they differ, shape ``(N,)``.
    :param dropout: probability of dropping an output of a layer but the last.
    :return: the outputs, shape ``(T, N, directions * units)``, and the final state.
    """
    finals: list[State] = []
    for at in range(0, len(maps), directions):
        if dropout and at:
            x = F.dropout(x, dropout)
        sides = []
        for back, affine in enumerate(maps[at : at + directions]):
            start = tuple(part[at + back] for part in state)
            inputs = affine(_reversed(x, lengths) if back else x, "ih")
            output, final = _scan(kind, inputs, start, affine, projects, lengths)
            sides.append(_reversed(output, lengths) if back else output)
            finals.append(final)
        x = torch.cat(sides, -1)
    return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def _scan(
    kind: str, inputs: Tensor, state: State, affine: Affine, projects: bool, lengths: Tensor | None
) -> tuple[Tensor, State]:
    """One layer in one direction."""
    outputs = []
    for t, from_input in enumerate(inputs.unbind(0)):
        new = recurrent_step(kind, from_input, affine(state[0], "hh"), state)
        if projects:
            new = (affine(new[0], "hr"), *new[1:])
        if lengths is not None:  # a sequence that has ended keeps its state
            going = (t < lengths).unsqueeze(-1)
            new = tuple(torch.where(going, a, b) for a, b in zip(new, state, strict=True))
        state = new
        outputs.append(state[0])
    return torch.stack(outputs), state


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverses ``(T, N, d)`` in time, each sequence within its length."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(len(x), device=x.device).unsqueeze(-1)
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, index.unsqueeze(-1).expand_as(x))
