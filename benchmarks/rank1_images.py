# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Images, corruptions and scores of the rank-1 benchmarks."""

import itertools
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bnn.diagnostics.metrics import accuracy, brier, ece

DATA = Path(os.environ.get("PYRO_BNN_DATA", Path(__file__).parents[1] / "../shared/data")) / "images"
MEAN, SD = 0.2860, 0.3530  # of the Fashion-MNIST training set
CORRUPTIONS = ("noise", "blur", "contrast", "rotation")
SEVERITIES = (1, 2, 3, 4, 5)
#: the last training images are for choices and never for training
VALIDATION = slice(50_000, 53_000)


def load(name: str) -> dict[str, np.ndarray]:
    path = DATA / name
    if not path.exists():
        print(
            f"{path} is missing: set PYRO_BNN_DATA to the folder that holds images/{name}.", file=sys.stderr
        )
        sys.exit(2)
    return dict(np.load(path))


def pixels(images: np.ndarray) -> Tensor:
    """Images with values in [0, 1], shape (n, 28, 28)."""
    return torch.from_numpy(images).float() / 255.0


def scaled(images: Tensor) -> Tensor:
    """Flattened images with the mean and standard deviation of the Fashion-MNIST training set removed."""
    return (images.flatten(1) - MEAN) / SD


class Batches:
    """Shuffled batches of tensors in memory."""

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self.x, self.y, self.size = x, y, size

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x))
        for i in range(len(self)):
            index = order[i * self.size : (i + 1) * self.size]
            yield self.x[index], self.y[index]


def corrupt(images: Tensor, kind: str, severity: int, generator: torch.Generator) -> Tensor:
    """Corrupts images with values in [0, 1], shape (n, 28, 28); severities 1 to 5."""
    level = severity - 1
    if kind == "noise":
        sd = (0.04, 0.08, 0.12, 0.18, 0.26)[level]
        return (images + sd * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    if kind == "contrast":
        c = (0.75, 0.6, 0.45, 0.3, 0.15)[level]
        mean = images.mean((1, 2), keepdim=True)
        return mean + c * (images - mean)
    if kind == "blur":
        sd = (0.5, 0.8, 1.1, 1.5, 2.0)[level]
        t = torch.arange(-6, 7).float()
        kernel = torch.exp(-0.5 * (t / sd) ** 2)
        kernel = kernel / kernel.sum()
        y = F.conv2d(images[:, None], kernel.view(1, 1, 1, -1), padding=(0, 6))
        return F.conv2d(y, kernel.view(1, 1, -1, 1), padding=(6, 0))[:, 0]
    angle = math.radians((8, 16, 24, 35, 50)[level])
    theta = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    grid = F.affine_grid(theta.expand(len(images), 2, 3), [len(images), 1, 28, 28], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def scores(log_probs: Tensor, y: Tensor) -> dict[str, float]:
    """NLL, accuracy, ECE with 15 bins and Brier score of log probabilities, shape (n, classes)."""
    probs = log_probs.exp()
    return {
        "nll": float(-log_probs.gather(1, y[:, None]).mean()),
        "accuracy": accuracy(probs, y),
        "ece": ece(probs, y),
        "brier": brier(probs, y),
    }


@dataclass
class Images:
    """Training set, test set (or validation set), other data sets and corrupted test images, all standardised."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    others: dict[str, Tensor]
    corrupted: dict[tuple[str, int], Tensor]

    @classmethod
    def read(cls, train: int, test: int, small: int, validation: bool = False) -> "Images":
        """
        Reads the first ``train`` training images. With ``validation`` held-out training images take the place of the
        test set, and there is nothing else. ``small`` is the number of images per corruption and severity, and twice
        that many are taken from every other data set.
        """
        fashion = load("fashion_mnist.npz")
        x = scaled(pixels(fashion["x_train"][:train]))
        y = torch.from_numpy(fashion["y_train"][:train]).long()
        if validation:
            x_test, y_test = fashion["x_train"][VALIDATION], fashion["y_train"][VALIDATION]
            return cls(x, y, scaled(pixels(x_test)), torch.from_numpy(y_test).long(), {}, {})
        x_test, y_test = pixels(fashion["x_test"][:test]), torch.from_numpy(fashion["y_test"][:test]).long()
        others = {
            name: scaled(pixels(load(f"{file}.npz")["x_test"][: 2 * small]))
            for name, file in (("mnist", "mnist"), ("notmnist", "notmnist_test"))
        }
        generator = torch.Generator().manual_seed(0)
        corrupted = {
            (kind, severity): scaled(corrupt(x_test[:small], kind, severity, generator))
            for kind, severity in itertools.product(CORRUPTIONS, SEVERITIES)
        }
        return cls(x, y, scaled(x_test), y_test, others, corrupted)
