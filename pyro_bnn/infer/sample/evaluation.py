# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""
A log joint density and its gradient, from a recording of the model's operations where that can be trusted.

A recording is made of one run. It is used if no value of the latents decides what is computed, if nothing is random or
changed in place, and if it agrees with runs of the model at several other latents. After that it is compared with a run again
and again, in ever larger distances up to a thousand calls, since a model may change without a word.
"""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyro_bnn.infer.sample.joint import Joint, Share, Tensors
from pyro_bnn.model.data import is_dense
from pyro_bnn.model.plates import close, first_line
from pyro_bnn.ops.notice import logger
from pyro_bnn.ops.replay import DATA, Bound, Replay, StaleError, UnrecordableError
from pyro_bnn.ops.tape import record

#: The most calls between two comparisons with the model, and the units in the last place by which these may differ.
_RARELY, _UNITS = 1024, 1e4


class ChangedModelError(RuntimeError):
    """
    A model computes something else than when its log density was made.

    Example::

        >>> import pyro.distributions as dist
        >>> from pyro_bnn.infer import log_density
        >>> scale = [1.0]
        >>> density = log_density(lambda: pyro.sample("z", dist.Normal(0.0, scale[0])), ())
        >>> _ = [density(torch.zeros(1)) for _ in range(3)]
        >>> scale[0] = 2.0
        >>> try:
        ...     _ = [density(torch.zeros(1)) for _ in range(10)]  # compared with the model now and then
        ... except ChangedModelError:
        ...     print("the model has changed")
        the model has changed
    """


def form(value: Any) -> Hashable:
    """All but the numbers in the tensors of a batch: one recording serves batches of one form."""
    if isinstance(value, Tensor) and is_dense(value):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, PackedSequence):
        return form(value.data), tuple(value.batch_sizes.tolist())
    if isinstance(value, Mapping):
        return tuple((key, form(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(form, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(form(getattr(value, f.name)) for f in dataclasses.fields(value))
    return (type(value), value) if isinstance(value, (bool, int, float, str)) else id(value)


class _Recorded:
    """
    A recording at work.

    :ivar calls: how often it was replayed.
    :ivar due: the number of the call after which it is compared with the model.
    :ivar audits: how often it was compared with the model since.
    :ivar own: whether it holds for the batch only with which it was made.
    """

    def __init__(self, replay: Replay, joint: Joint, own: bool) -> None:
        self.replay, self.own = replay, own
        self.calls, self.due, self.audits = 0, 1, 0
        held = {id(x) for x in replay.outside}
        self._members = [
            (module, name, x)
            for module in dict.fromkeys(part for m in joint.packed.modules for part in m.modules())
            for name, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if id(x) in held
        ]
        self._statements = {n: x for n, x in _statements().items() if id(x) in held}

    @property
    def is_current(self) -> bool:
        """Whether the parameters of the model are still the same tensors; their values may be others."""
        if any(getattr(module, name, None) is not x for module, name, x in self._members):
            return False
        if not self._statements:
            return True
        now = _statements()
        return all(now.get(name) is x for name, x in self._statements.items())


def _statements() -> dict[str, Tensor]:
    """The unconstrained parameters of :func:`pyro.param` statements."""
    return pyro.get_param_store().get_state()["params"]


def _distance(a: Tensors, b: Tensors) -> float:
    """The largest difference of finite entries."""
    return max(float((x - y).abs().nan_to_num(0, 0, 0).max()) for x, y in zip(a, b, strict=True))


class Evaluator:
    """
    Values and gradients of a log joint density at one vector or several at once.

    :param Joint joint: the density, by runs of the model.
    :param anchors: packed vectors at which recordings are compared with runs, shape ``(A, p)``.
    :ivar str reason: why the model runs in every evaluation, or for every chain; empty if it does not.
    """

    def __init__(self, joint: Joint, anchors: Tensor) -> None:
        self.joint, self.anchors, self.reason = joint, anchors, ""
        self._recorded: dict[Hashable, _Recorded | None] = {}
        self._bound: dict[Hashable, tuple[_Recorded, Bound]] = {}

    def plain(self, u: Tensor, share: Share, factor: Tensor | None = None) -> Tensors:
        """By runs of the model, one per vector."""
        if u.dim() == 1:
            return self.joint.evaluate(u, share, factor)
        rows = [self.joint.evaluate(row, share, factor) for row in u]
        return torch.stack([v for v, _ in rows]), torch.stack([g for _, g in rows])

    def __call__(
        self, u: Tensor, share: Share, factor: Tensor | None = None, *, keep: Hashable = None
    ) -> Tensors:
        """
        The log density and its gradient.

        :param u: packed vectors, ``(p,)`` or ``(C, p)``.
        :param share: what is evaluated.
        :param factor: of the likelihood, a float64 scalar.
        :param keep: a name for the share, if it comes again.
        :return: float64, ``()`` or ``(C,)``, and the shape of ``u``.
        """
        if not len(u):
            return u.new_zeros(0, dtype=torch.float64), u.clone()
        if u.dim() == 2 and len(u) == 1:
            value, gradient = self(u[0], share, factor, keep=keep)
            return value[None], gradient[None]
        found = self._find(u, share, keep)
        if found is None:
            return self._by_rows(u, share, factor, keep) if u.dim() == 2 else self.plain(u, share, factor)
        recorded, bound = found
        try:
            result = bound(u) if factor is None else bound(u, factor)
        except torch.linalg.LinAlgError:
            return self._by_rows(u, share, factor, keep) if u.dim() == 2 else self.plain(u, share, factor)
        except StaleError:
            self._forget(recorded)
            return self(u, share, factor, keep=keep)
        recorded.calls += 1
        if recorded.calls < recorded.due:
            return result
        recorded.due = min(2 * recorded.due, recorded.due + _RARELY)
        return self._audit(recorded, u, share, factor, result)

    def _by_rows(self, u: Tensor, share: Share, factor: Tensor | None, keep: Hashable) -> Tensors:
        rows = [self(row, share, factor, keep=keep) for row in u]
        return torch.stack([v for v, _ in rows]), torch.stack([g for _, g in rows])

    def _find(self, u: Tensor, share: Share, keep: Hashable) -> tuple[_Recorded, Bound] | None:
        """The recording for vectors of this shape and a share, made if there is none; ``None`` if there cannot be."""
        at = (keep, u.shape)
        found = self._bound.get(at) if keep is not None else None
        if found is not None and found[0].is_current:
            return found
        key = (form(share.batch), share.left_out, share.prior, share.scaled, share.once, u.shape)
        recorded = self._recorded.get((key, keep)) or self._recorded.get(key)
        if recorded is not None and not recorded.is_current:
            self._forget(recorded)
            recorded = None
        if recorded is None:
            if key in self._recorded:
                return None
            recorded = self._record(u, share, keep)
            self._recorded[(key, keep) if recorded is not None and recorded.own else key] = recorded
        if recorded is None:
            return None
        found = recorded, Bound(recorded.replay, share.tensors)
        if keep is not None:
            self._bound[at] = found
        return found

    def _forget(self, recorded: _Recorded) -> None:
        self._recorded = {k: r for k, r in self._recorded.items() if r is not recorded}
        self._bound = {k: pair for k, pair in self._bound.items() if pair[0] is not recorded}

    # ------------------------------------------------------------ trust

    def _points(self, like: Tensor, turn: int = 0) -> Tensor:
        """Anchors in the shape of some vectors."""
        anchors = self.anchors.roll(turn, 0)
        return anchors[0] if like.dim() == 1 else anchors[torch.arange(len(like)) % len(anchors)]

    def _record(self, u: Tensor, share: Share, keep: Hashable) -> _Recorded | None:
        try:
            recorded = self._make(self._points(u), share, keep is not None)
            self._compare(recorded, u, share)
        except UnrecordableError as error:
            self._give_up(str(error), u)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # batching refuses what it does not know in many ways
            self._give_up(f"{type(error).__name__}: {first_line(error)}", u)
        else:
            return recorded
        return None

    def _make(self, u: Tensor, share: Share, stays: bool) -> _Recorded:
        factor = (torch.ones((), dtype=torch.float64, device=u.device),) if share.scaled else ()
        self.plain(self.anchors[0], share, *factor)  # a first run makes the parameters of the model

        def compute(u: Tensor, *rest: Tensor) -> Tensors:
            return self.joint.value_and_gradient(u, share, rest[len(factor) :], *rest[: len(factor)])

        with torch.inference_mode(False):
            try:
                return _Recorded(record(compute, (u, *factor), share.tensors), self.joint, False)
            except UnrecordableError as error:
                if error.level != DATA or not stays:
                    raise
            # values of the data decide what is computed: it holds for these alone
            return _Recorded(record(compute, (u, *factor), share.tensors, data_stay=True), self.joint, True)

    def _compare(self, recorded: _Recorded, u: Tensor, share: Share) -> None:
        """Raises if a recording differs from runs of the model at several latents, or cannot be told from them at any."""
        factor = torch.tensor(1.5, dtype=torch.float64, device=u.device) if share.scaled else None
        bound, finite = Bound(recorded.replay, share.tensors), False
        for turn in range(len(self.anchors)):
            points = self._points(u, turn)
            found = bound(points) if factor is None else bound(points, factor)
            expected = self._plain_at_anchors(points, share, factor)
            moved = points * self._nudge
            if not self._agree(found, expected) and not self._agree(
                found, expected, _distance(self._plain_at_anchors(moved, share, factor), expected)
            ):
                raise UnrecordableError("a recording of it gives other numbers at other latents")
            finite = finite or bool(expected[0].isfinite().any())
            if u.dim() == 2 and turn:
                break
        if not finite:
            raise UnrecordableError(
                "it is not finite at the latents at which a recording was compared with it"
            )

    def _plain_at_anchors(self, points: Tensor, share: Share, factor: Tensor | None) -> Tensors:
        """:meth:`plain` at :meth:`_points`, which come again: one run for each of them, however many chains there are."""
        if points.dim() == 1:
            return self.plain(points, share, factor)
        turn = torch.arange(len(points), device=points.device) % len(self.anchors)
        value, gradient = self.plain(points[: len(self.anchors)], share, factor)
        return value[turn], gradient[turn]

    @property
    def _nudge(self) -> float:
        """By what vectors are multiplied to see how large rounding errors are."""
        return 1 + 8 * torch.finfo(self.anchors.dtype).eps

    def _agree(self, found: Tensors, expected: Tensors, rounding: float = 0.0) -> bool:
        """
        Whether values and gradients differ by rounding errors: some units in the last place of the largest, or a hundred times what a
        nudge does.
        """
        slack = 100 * rounding
        eps = torch.finfo(self.anchors.dtype).eps
        size = float(expected[1].abs().nan_to_num(0, 0, 0).max()) if expected[1].numel() else 0.0
        return all(
            close(e, f, tolerance=_UNITS * eps, floor=max(floor, slack / (_UNITS * eps)))
            for f, e, floor in zip(found, expected, (max(size, 1.0), size), strict=True)
        )

    def _give_up(self, reason: str, u: Tensor) -> None:
        how = (
            "every chain has a recording of its own" if u.dim() == 2 else "the model runs in every evaluation"
        )
        if not self.reason or u.dim() == 1:
            self.reason = f"{how}: {reason}"
            logger.info("log_density: %s", self.reason)

    def _audit(
        self, recorded: _Recorded, u: Tensor, share: Share, factor: Tensor | None, result: Tensors
    ) -> Tensors:
        """Compares a replay with a run of the model, which is what counts."""
        row, mine = u, result
        if u.dim() == 2:
            at = recorded.audits % len(u)  # the numbers of calls are powers of two, and would skip chains
            recorded.audits += 1
            row, mine = u[at], tuple(x[at] for x in result)
        expected = self.plain(row, share, factor)
        if self._agree(mine, expected):
            return result
        if self._agree(mine, expected, _distance(self.plain(row * self._nudge, share, factor), expected)):
            return result
        if recorded.calls <= 2 and not recorded.own:  # what came before was compared, or from the same batch
            self._give_up("values decide what it computes in a way that torch does not show", u)
            self._recorded |= {k: None for k, r in self._recorded.items() if r is recorded}
            self._bound = {k: pair for k, pair in self._bound.items() if pair[0] is not recorded}
            return self.plain(u, share, factor)
        raise ChangedModelError(
            "the model computes something else than a recording of it: a number or a tensor that it reads has been replaced by another "
            "one since its log density was made, or a value decides in a way that torch does not show (through numpy, for "
            "example). Call log_density again after such changes; write decisions by torch operations."
        )
