# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""What a resumed run says, refuses, and takes from its checkpoint."""

import logging
import math
import os
import random
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.infer import Checkpoint, ConvergenceTest, EarlyStopping, FitState, Mixture_ELBO, fit
from pyro_bnn.infer.autoguide import AutoLaplace, AutoMixture
from pyro_bnn.infer.train.state import FitResult, NonFiniteLossError
from pyro_bnn.nn import rank1_
from tests.infer.models import linear_data, linear_model

quiet = partial(fit, progress_bar=False)


def train(path: Path, **options: Any) -> tuple[FitResult, Any]:
    model = options.pop("model", linear_model)
    pyro.set_rng_seed(4)
    guide = AutoNormal(model)
    options = {"num_steps": 5, "optim": 0.1} | options
    return quiet(model, guide, linear_data(), checkpoint=path, **options), guide


def prior_of(scale: float) -> Callable[..., None]:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * weight).sum(-1), 0.3), obs=y)

    return model


def print_step(state: FitState) -> None:
    """A callback without a state."""


EARLY = EarlyStopping(linear_data(), every=2)
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "learning rate": ({"optim": 0.1}, {"optim": 0.01}, r"optimizer lr 0.1 in the file, 0.01 here"),
    "weight decay": (
        {"optim": partial(torch.optim.AdamW, lr=0.1)},
        {"optim": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3)},
        r"optimizer weight_decay 0.01 in the file, 0.3 here",
    ),
    "momentum": (
        {"optim": partial(torch.optim.SGD, lr=1e-4, momentum=0.9)},
        {"optim": partial(torch.optim.SGD, lr=1e-4)},
        r"optimizer momentum 0.9 in the file, 0 here",
    ),
    "prior": (
        {"model": prior_of(1.0)},
        {"model": prior_of(2.0)},
        r"prior of 'weight' 'Normal\(loc=0, scale=1\)' in the file, 'Normal\(loc=0, scale=2\)' here",
    ),
    "particles": ({}, {"elbo": Trace_ELBO(num_particles=3)}, r"elbo num_particles 1 in the file, 3 here"),
    "bound": (
        {},
        {"elbo": TraceMeanField_ELBO()},
        r"elbo 'Trace_ELBO' in the file, 'TraceMeanField_ELBO' here",
    ),
    "kl scale": ({}, {"kl_scale": 0.5}, r"kl_scale None in the file, 0.5 here"),
    "clipping": ({"clip_grad_norm": 1.0}, {}, r"clip_grad_norm 1.0 in the file, None here"),
    "new callback": ({}, {"callbacks": print_step}, r"callbacks '' in the file, 'print_step' here"),
    "missing callback": ({"callbacks": [EARLY, print_step]}, {"callbacks": print_step}, r"callbacks .EarlyStopping\("),
    "patience": (
        {"callbacks": EarlyStopping(linear_data(), patience=4)},
        {"callbacks": EarlyStopping(linear_data(), patience=9)},
        r"callbacks .*patience=4.* in the file, .*patience=9.* here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_are_said(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    first, second, message = DIFFERENCES[name]
    train(tmp_path / "run", **first)
    train(tmp_path / "run", **first, num_steps=8)  # the same settings say nothing
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=rf"run was made with other settings.*passed here: {message}"
    ) as caught:
        result, _ = train(tmp_path / "run", **second, num_steps=10)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert result.num_steps == 10


def test_the_new_learning_rate_counts(tmp_path: Path) -> None:
    train(tmp_path / "run", optim=0.1)
    before = torch.load(tmp_path / "run")["tensors"]
    with pytest.warns(UserWarning, match="lr 0.1 in the file, 0.0 here"):
        train(tmp_path / "run", optim=0.0, num_steps=8)
    after = torch.load(tmp_path / "run")["tensors"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_scheduler_continues(tmp_path: Path) -> None:
    def schedule(steps: int) -> Callable[[Any], Any]:
        return lambda optimizer: CosineAnnealingLR(optimizer, steps)

    train(tmp_path / "run", scheduler=schedule(20))
    with pytest.warns(
        UserWarning,
        match=r"governs goes on as in the file: optimizer lr 0.1 .*0.3 here; scheduler T_max 20 .*, 40 here\.",
    ):
        train(tmp_path / "run", scheduler=schedule(40), optim=0.3, num_steps=20)
    group = torch.load(tmp_path / "run")["optimizer"]["param_groups"][0]
    assert abs(group["lr"]) < 1e-12


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {},
            {"optim": partial(torch.optim.SGD, lr=1e-4, momentum=0.9)},
            "optimizer Adam in the file, SGD here",
        ),
        ({}, {"scheduler": lambda o: StepLR(o, 3)}, "scheduler missing in the file, StepLR here"),
        ({"scheduler": lambda o: StepLR(o, 3)}, {}, "scheduler StepLR in the file, missing here"),
        (
            {"scheduler": lambda o: StepLR(o, 3)},
            {"scheduler": lambda o: CosineAnnealingLR(o, 3)},
            "scheduler StepLR in the file, CosineAnnealingLR here",
        ),
        (
            {},
            {"optim": lambda ps: torch.optim.Adam([{"params": ps[:1]}, {"params": ps[1:]}], lr=0.1)},
            "an optimizer whose groups hold other parameters",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused(
    first: dict[str, Any], second: dict[str, Any], message: str, tmp_path: Path
) -> None:
    train(tmp_path / "run", **first)
    with pytest.raises(ValueError, match=f"run cannot be continued with {message}.*resume=False"):
        train(tmp_path / "run", **second, num_steps=8)
    again, _ = train(Checkpoint(tmp_path / "run", resume=False), **second, num_steps=8)  # type: ignore[arg-type]
    assert again.num_steps == 8


def test_callbacks_are_found_by_name(tmp_path: Path) -> None:
    """A callback that is new, in front of an old one, leaves the state of the old one to it."""

    def stopping() -> EarlyStopping:
        return EarlyStopping(linear_data(), every=2)

    train(tmp_path / "run", callbacks=[print_step, stopping()], num_steps=4)
    second = stopping()
    with pytest.warns(UserWarning, match="callbacks"):
        train(tmp_path / "run", callbacks=[ConvergenceTest(100), second], num_steps=8)
    assert [step for step, _ in second.history] == [2, 4, 6, 8]


def test_loader_with_a_generator(tmp_path: Path) -> None:
    def loader(generator: torch.Generator | None) -> Any:
        return DataLoader(TensorDataset(*linear_data(20)), batch_size=5, shuffle=True, generator=generator)

    quiet(linear_model, AutoNormal(linear_model), loader(None), num_steps=6, checkpoint=tmp_path / "run")
    with pytest.warns(UserWarning, match="random generators of the loader 0 in the file, 1 here"):
        quiet(
            linear_model,
            AutoNormal(linear_model),
            loader(torch.Generator().manual_seed(0)),
            num_steps=9,
            checkpoint=tmp_path / "run",
        )


def test_flat_priors(tmp_path: Path) -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        weight = pyro.sample("weight", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * weight).sum(-1), 0.3), obs=y)

    for steps in (3, 6):
        guide = AutoLaplace(model)
        result = quiet(model, guide, linear_data(), num_steps=steps, checkpoint=tmp_path / "run")
    assert result.num_steps == 6


def test_resuming_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "run")
    assert not caplog.records
    train(tmp_path / "run", num_steps=9)
    assert [r.getMessage() for r in caplog.records if r.name == "pyro_bnn.infer.train.checkpoint"] == [
        f"fit: resuming from step 5 of {tmp_path / 'run'}"
    ]
    assert caplog.records[0].levelno == logging.WARNING  # shown without any set-up


# ---------------------------------------------------------------------------- networks


def network(kind: str) -> tuple[torch.nn.Module, Any, Any]:
    """A model with batch normalisation and dropout, its guide and bound."""
    torch.manual_seed(1)
    net: Any = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1)
    )
    frozen = torch.nn.Linear(3, 3)
    if kind == "rank1":
        rank1_(net)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        f = net(frozen(x)).squeeze(-1)
        with pyro.plate("data", 40, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(f, scale), obs=y)

    if kind == "module":

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net, self.frozen = net, frozen

            def forward(self, *args: Any) -> None:
                model(*args)

        module = Model()
        return module, AutoMixture(module, 2), Mixture_ELBO()
    guide = AutoMixture(model, 2) if kind == "rank1" else AutoNormal(model)
    elbo = {
        "rank1": Mixture_ELBO(),
        "closure": Trace_ELBO(),
        "particles": Trace_ELBO(num_particles=2, vectorize_particles=False),
        "enumeration": TraceEnum_ELBO(),
    }[kind]
    return torch.nn.ModuleList([net, frozen]), (model, guide), elbo


@pytest.mark.filterwarnings("ignore:.*TraceEnum_ELBO found no sample sites:UserWarning")
@pytest.mark.parametrize("kind", ["rank1", "closure", "module", "particles", "enumeration"])
def test_batch_statistics_after_two_resumptions(kind: str, tmp_path: Path) -> None:
    """All tensors of the network, bit by bit."""
    x, y = linear_data(40)

    def run(stops: list[int], path: Path | None) -> dict[str, torch.Tensor]:
        net: Any = None
        for stop in stops:
            pyro.set_rng_seed(3)
            net, guide, elbo = network(kind)
            model, guide = (net, guide) if kind == "module" else guide
            loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
            with torch.no_grad():
                if path is not None and path.exists():  # a fresh process may have other weights
                    next(net.parameters()).add_(1.0)
            quiet(model, guide, loader, num_steps=stop, elbo=elbo, optim=0.02, checkpoint=path)
        return {**net.state_dict(), **{f"guide {n}": v.clone() for n, v in guide.state_dict().items()}}

    whole, resumed = run([23], None), run([7, 12, 23], tmp_path / "run")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


class Counter(torch.nn.Module):
    """Puts a new tensor in the place of its buffer in every call."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls = self.calls + 1
        return x


def test_buffers_that_are_replaced(tmp_path: Path) -> None:
    counter = Counter()

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        linear_model(counter(x), y)

    for steps in (3, 8):
        quiet(model, AutoNormal(model), linear_data(), num_steps=steps, checkpoint=tmp_path / "run")
        assert int(counter.calls) == steps
        counter = Counter()


def test_first_look_leaves_the_statistics(tmp_path: Path) -> None:
    """One step of training is one update of the statistics, by hand."""
    x, y = linear_data(40)
    _, (model, guide), elbo = network("closure")
    batch_norm = torch.nn.BatchNorm1d(4)
    called: list[torch.Tensor] = []
    net = next(c.cell_contents for c in model.__closure__ if isinstance(c.cell_contents, torch.nn.Sequential))
    quiet(model, guide, (x, y), num_steps=1, elbo=elbo)
    net[1].register_forward_pre_hook(lambda _, inputs: called.append(inputs[0]))
    model(x, y)
    batch_norm(called[0])
    # the model has just made the second update with the same batch
    momentum = 0.1
    expected = called[0].mean(0) * (1 - (1 - momentum) ** 2)
    torch.testing.assert_close(net[1].running_mean, expected)
    assert int(net[1].num_batches_tracked) == 2


# ---------------------------------------------------------------------------- files


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(path)
    whole = path.read_bytes()
    chance = random.Random(1)
    for bit in [8 * len(whole) - 1 - i for i in range(0, 384, 9)] + [
        chance.randrange(8 * len(whole)) for _ in range(100)
    ]:
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"run (is damaged|cannot be read)") as caught:
            train(path, num_steps=8)
        assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    path.write_bytes(whole)
    assert train(path, num_steps=8)[0].num_steps == 8


def old_checkpoint(path: Path) -> None:
    """Rewrites a checkpoint as versions before format 2 wrote it."""
    state = torch.load(path, weights_only=True)
    for name in ("settings", "callback_names"):
        del state[name]
    torch.save({**state, "format": 1}, path)


def test_old_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "run"
    held_out = linear_data()
    first, again = (EarlyStopping(held_out, every=2) for _ in range(2))
    expected, _ = train(tmp_path / "whole", num_steps=9, callbacks=EarlyStopping(held_out, every=2))
    train(path, callbacks=[print_step, first])
    old_checkpoint(path)
    result, _ = train(path, num_steps=9, callbacks=[print_step, again])
    assert torch.equal(result.losses, expected.losses)
    assert [step for step, _ in again.history] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": partial(torch.optim.SGD, lr=0.1)}, "another optimizer: .*momentum"),
        ({"scheduler": lambda o: StepLR(o, 3)}, "scheduler missing in the file, StepLR here"),
    ],
)
def test_old_checkpoints_of_other_runs(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    train(tmp_path / "run")
    old_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match=f"run cannot be continued with {message}"):
        train(tmp_path / "run", **options, num_steps=8)


def test_permissions_links_and_left_overs(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    left = tmp_path / ".target.abcdefgh.tmp"
    left.mkdir()
    (left / "target").write_bytes(b"half")
    old = os.umask(0o026)
    try:
        train(link)
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "target"]
    assert train(link, num_steps=8)[0].num_steps == 8


# ---------------------------------------------------------------------------- what is shown


def test_result_is_short(tmp_path: Path) -> None:
    result, _ = train(tmp_path / "run", num_steps=300)
    assert len(repr(result)) < 150
    assert "num_steps=300" in repr(result)
    assert f"{float(result.losses[-1]):.6g}" in repr(result)


def test_progress_bar_is_for_terminals(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> str:
        fit(linear_model, AutoNormal(linear_model), linear_data(), num_steps=3)
        return capfd.readouterr().err

    assert shown() == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert "fit" in shown()


def test_statistics_go_back_to_the_last_good_state() -> None:
    net, (model, guide), elbo = network("closure")
    x, y = linear_data(40)
    quiet(model, guide, (x, y), num_steps=3, elbo=elbo)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    steps: list[int] = []
    net[1].register_forward_hook(lambda _, inputs, output: output * math.nan if len(steps) > 1 else output)
    with pytest.raises(NonFiniteLossError):
        quiet(model, guide, (x, y), num_steps=9, elbo=elbo, callbacks=lambda state: steps.append(state.step))
    assert len(steps) == 2
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_autocast_is_checked_without_a_trace(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    x, y = linear_data(40)

    def run(stops: list[int], path: Path) -> torch.Tensor:
        for stop in stops:
            pyro.set_rng_seed(3)
            net, (model, guide), elbo = network("closure")
            quiet(model, guide, (x, y), num_steps=stop, elbo=elbo, autocast=torch.bfloat16, checkpoint=path)
        return net[0][1].running_mean  # type: ignore[no-any-return,union-attr,index]

    assert torch.equal(run([9], tmp_path / "whole"), run([3, 5, 9], tmp_path / "run"))


def test_nothing_is_written_to_a_file_of_messages(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fit(linear_model, AutoMixture(linear_model, 2), linear_data(), num_steps=3)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
