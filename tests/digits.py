"""Two networks trained on scikit-learn's handwritten digits: what accuracy a pass costs is measured on these.

The checkpoints are in `data/`; `python -m tests.digits` trains them again, in about a minute on one core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from graphopt.program import Program
from tests.convnets import conv_bn
from tests.transformer_nets import VisionTransformer

DATA = Path(__file__).parent / "data"
HELD_OUT = 360
RIGHT = {"cnn": 358, "vit": 348}  # of the held-out images, as the checkpoints in data/ answer them


class Residual(nn.Module):
    """Two convolutions around which the signal passes, through a third where its size changes."""

    def __init__(self, i: int, middle: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(i, middle, 3, stride), conv_bn(middle, o, 3, act=None))
        self.shortcut = nn.Identity() if stride == 1 and i == o else conv_bn(i, o, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Cnn(nn.Module):
    """(n, 1, 8, 8) in [0, 1] to (n, 10): three residual blocks with batch norms between a convolution and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 16, 3)
        self.blocks = nn.Sequential(Residual(16, 20, 16), Residual(16, 36, 32, 2), Residual(32, 40, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Vit(VisionTransformer):
    """(n, 1, 8, 8) in [0, 1] to (n, 10): 16 patches and a class token, three blocks of five heads."""

    def __init__(self) -> None:
        super().__init__(dim=40, heads=5, layers=3, image=8, patch=2, classes=10)
        self.patch = nn.Conv2d(1, 40, 2, 2)


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": Cnn, "vit": Vit}


def _load(name: str) -> Any:
    model = MODELS[name]()
    model.load_state_dict(torch.load(DATA / f"digits_{name}.pt", weights_only=True))
    return model.eval().requires_grad_(False)


def load_cnn() -> Cnn:
    """The trained convolutional network, in eval mode."""
    return _load("cnn")


def load_vit() -> Vit:
    """The trained transformer, in eval mode."""
    return _load("vit")


@cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1437, 1, 8, 8) in [0, 1] and labels, then the 360 held-out ones; always the same split."""
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    images, labels = images[order], labels[order]
    return images[:-HELD_OUT], labels[:-HELD_OUT], images[-HELD_OUT:], labels[-HELD_OUT:]


def accuracy(model: Program | nn.Module | Callable[[Tensor], Any], batch_size: int | None = None) -> float:
    """The share of held-out images that it answers rightly.

    Args:
        model: whatever takes images and gives logits, a bundle too.
        batch_size: images at once; by default all, and for a program as many as it was captured for.
    """
    _, _, images, labels = data()
    size = batch_size or (model.inputs[0].shape[0] if isinstance(model, Program) else len(images))
    right = 0
    with torch.inference_mode():
        for batch, wanted in zip(images.split(size), labels.split(size), strict=True):
            padded = torch.cat([batch, batch.new_zeros(size - len(batch), *batch.shape[1:])])
            logits = torch.as_tensor(model(padded))[: len(batch)]
            right += int((logits.argmax(1) == wanted).sum())
    return right / len(images)


def _moved(images: Tensor) -> Tensor:
    """Each image moved by up to one pixel each way, as no two people place their digits the same."""
    padded = F.pad(images, (1, 1, 1, 1))
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # (n, 1, 3, 3, 8, 8)
    down, across = torch.randint(0, 3, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, across]


def train(name: str, epochs: int, rate: float) -> nn.Module:
    """A model after its last epoch; the held-out images have no say in anything."""
    torch.manual_seed(0)
    images, labels, _, _ = data()
    model = MODELS[name]().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            logits = model(_moved(images[batch]))
            F.cross_entropy(logits, labels[batch], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> int:
    """Train both, write the checkpoints, say how many held-out images they answer rightly."""
    torch.set_num_threads(1)
    DATA.mkdir(exist_ok=True)
    for name, epochs, rate in (("cnn", 25, 1e-2), ("vit", 60, 3e-3)):
        started = time.perf_counter()
        model = train(name, epochs, rate)
        path = DATA / f"digits_{name}.pt"
        torch.save(model.state_dict(), path)
        right = round(HELD_OUT * accuracy(model))
        print(
            f"{name}: {right} of {HELD_OUT} ({right / HELD_OUT:.2%}), {path.stat().st_size:,} bytes, "
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {time.perf_counter() - started:.0f} s"
        )
        if right != RIGHT[name]:
            print(f"RIGHT in {__file__} says {RIGHT[name]}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
