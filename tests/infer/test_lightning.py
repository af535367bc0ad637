# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path
from typing import Any

import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.infer import fit, hfl
from tests.common import assert_close
from tests.infer.first_order_script import PRECISION, TARGETS, N, at_mode, data, linear, loss, reference
from tests.infer.models import TextbookNet, linear_data

lightning = pytest.importorskip("lightning")


def trainer(epochs: int, folder: Path) -> Any:
    """A trainer that writes and shows nothing."""
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, **dict.fromkeys(shown, False)
    )


@pytest.mark.filterwarnings("ignore")
def test_takes_the_steps_of_fit(tmp_path: Path) -> None:
    from pyro_bnn.infer.lightning import ElboModule

    x, y = linear_data(40)
    net = TextbookNet()
    loader = DataLoader(TensorDataset(x, y), batch_size=10)

    def build() -> AutoDelta:
        values = {"linear.weight": torch.zeros(1, 3), "linear.bias": torch.zeros(1)}
        return AutoDelta(poutine.block(net, hide=[]), init_loc_fn=init_to_value(values=values))

    guide = build()
    module = ElboModule(net, guide, optim=0.01).initialize(next(iter(loader)))
    trainer(3, tmp_path).fit(module, loader)
    other = build()
    fit(net, other, loader, num_epochs=3, optim=0.01, progress_bar=False)
    for name, value in guide.named_parameters():
        assert_close(value.detach(), dict(other.named_parameters())[name].detach(), rtol=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optim", [None, 0.01])
def test_mixed_precision_with_clipping(optim: float | None, tmp_path: Path) -> None:
    from pyro_bnn.infer.lightning import ElboModule

    torch.set_default_dtype(torch.float32)
    x, y = linear_data(40)
    net = TextbookNet()
    guide = AutoDelta(poutine.block(net, hide=[]))
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    module = ElboModule(net, guide, optim=optim).initialize(next(iter(loader)))
    before = [p.detach().clone() for p in guide.parameters()]
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader)
    assert all(not torch.equal(p, q) for p, q in zip(guide.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_first_order_runs(tmp_path: Path) -> None:
    """Hooks of an optimiser that is made within the run, and whose steps take a closure; against a dense Hessian."""
    net = at_mode(linear)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return loss(self.net, *batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return runs.attach(torch.optim.SGD(net.parameters(), lr=0.02, weight_decay=PRECISION / N))

    runs = hfl.FirstOrder(net, lambda net: net(TARGETS), scale=N, method="paired", curvature="ggn")
    module, loader = Module(), DataLoader(TensorDataset(*data()), batch_size=6, shuffle=True)
    for run in runs:
        trainer(run.epochs(2), tmp_path).fit(module, loader)
    assert_close(runs.result().covariance, reference(linear), rtol=1e-7)
