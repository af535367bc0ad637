# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""A run that test_checkpoint.py kills and starts again: ``python resume_script.py CHECKPOINT RESULT``."""

import sys

import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn.infer import Checkpoint, EarlyStopping, fit
from tests.infer.models import linear_data, linear_model


def main(checkpoint: str, result: str) -> None:
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    x, y = linear_data(40)
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    guide = AutoNormal(linear_model)
    found = fit(
        linear_model,
        guide,
        loader,
        num_steps=300,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
        kl_scale=lambda step: min(1.0, (step + 1) / 100),
        callbacks=[EarlyStopping((x, y), every=50), lambda state: print(state.step, flush=True)],
        progress_bar=False,
        checkpoint=Checkpoint(checkpoint, every_steps=10),
    )
    torch.save({"losses": found.losses, "guide": guide.state_dict(), "random": torch.rand(3)}, result)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
