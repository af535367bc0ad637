# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a run of fit shows to callbacks and leaves behind, and how Ctrl-C reaches it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bnn.ops.described import Described

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(repr=False)
class FitResult(Described):
    """
    What a run of :func:`fit` leaves behind.

    :param losses: the loss of every step (negative ELBO, summed over the data), shape ``(num_steps,)``.
    :param num_steps: the number of optimisation steps, those before a resumption included.
    :param stop_reason: ``"num_steps"``, ``"num_epochs"``, ``"interrupted"``, the ``stop_reason`` of the
        callback that stopped the run (``"callback"`` if it has none), or the text of an error.
    :param wall_time: seconds, those before a resumption included.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoMixture, fit
        >>> result = fit(model, AutoMixture(model, 2), (x, x), num_steps=3, progress_bar=False)
        >>> result.num_steps, len(result.losses), result.stop_reason
        (3, 3, 'num_steps')
    """

    losses: Tensor
    num_steps: int
    stop_reason: str
    wall_time: float

    @property
    def _last_loss(self) -> str:
        return f"{float(self.losses[-1]):.6g}" if len(self.losses) else "none"

    def __repr__(self) -> str:
        return (
            f"FitResult(num_steps={self.num_steps}, stop_reason={self.stop_reason!r}, last loss={self._last_loss}, "
            f"wall_time={self.wall_time:.3g} s)"
        )

    __str__ = __repr__

    @override
    def described(self) -> tuple[str, dict[str, str]]:
        recent = self.losses[-50:]
        return f"fit: {self.num_steps} steps", {
            "stopped by": self.stop_reason,
            "first loss": f"{float(self.losses[0]):.6g}" if len(self.losses) else "none",
            "last loss": self._last_loss,
            f"mean of the last {len(recent)}": f"{float(recent.mean()):.6g}" if len(recent) else "none",
            "time": f"{self.wall_time:.3g} s",
        }

    def plot(
        self, *, smooth: int = 50, color: str = "C0", label: str | None = None, ax: "Axes | None" = None
    ) -> "Axes":
        """
        Draws the losses and their running mean.

        :param int smooth: steps in the running mean.
        :param str color: a matplotlib colour.
        :param str label: the name in the legend.
        :param ax: matplotlib axes to draw in.
        :return: the axes.
        """
        from matplotlib import pyplot

        if ax is None:
            ax = pyplot.subplots()[1]
        steps = torch.arange(1, len(self.losses) + 1)
        ax.plot(steps, self.losses, color=color, alpha=0.3, linewidth=0.8)
        width = min(smooth, len(self.losses))
        if width:
            ax.plot(steps[width - 1 :], self.losses.unfold(0, width, 1).mean(-1), color=color, label=label)
        ax.set_xlabel("step")
        ax.set_ylabel("loss")
        return ax


class NonFiniteLossError(ArithmeticError):
    """
    The loss became NaN or infinite; the parameters are back in their last good state.

    :param str message: names the step, the site or argument, and what to do.
    :param FitResult result: the run until then.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_bnn import AutoMixture, fit
        >>> def model(x):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     pyro.factor("likelihood", torch.tensor(float("inf")) * w)
        >>> try:
        ...     _ = fit(model, AutoMixture(model, 1), torch.ones(1), num_steps=1, progress_bar=False)
        ... except NonFiniteLossError:
        ...     print("the parameters are those before")
        the parameters are those before
    """

    def __init__(self, message: str, result: FitResult) -> None:
        super().__init__(message)
        self.result = result


@dataclass
class FitState:
    """
    What a callback of :func:`fit` sees after each step.

    :param step: the number of steps taken.
    :param epoch: the number of the current pass over the data, from 0.
    :param loss: the loss of this step.
    :param losses: all losses so far.
    :param model: the model.
    :param guide: the guide.
    :param elbo: the bound.
    :param loss_fn: the loss as a function of the arguments of the model.
    :param optimizer: the torch optimiser.
    :param parameters: the parameters by name.
    :param kl_scale: the argument ``kl_scale`` of :func:`fit`.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.ones(3)
        >>> from pyro_bnn import AutoMixture, fit
        >>> def stop_early(state):
        ...     return state.step == 2  # a true value stops the run
        >>> fit(model, AutoMixture(model, 2), (x, x), num_steps=9, callbacks=[stop_early], progress_bar=False).num_steps
        2
    """

    step: int
    epoch: int
    loss: float
    losses: list[float] = field(repr=False)
    model: Callable[..., Any]
    guide: Callable[..., Any]
    elbo: Any
    loss_fn: Callable[..., Tensor] = field(repr=False)
    optimizer: torch.optim.Optimizer
    parameters: dict[str, Tensor] = field(repr=False)
    kl_scale: float | Callable[[int], float] | None = None


#: Called after every step; a true return value stops the run. A callback may also have a ``stop_reason``, a method
#: ``finish(state)`` that is called at the end, and ``state_dict`` and ``load_state_dict`` for checkpoints.
Callback = Callable[[FitState], bool | None]


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag that can be asked for, so that no step is cut in half; the second interrupts."""
    pressed = False

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    old = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, old)
