"""A small convolutional network on handwritten digits: trained in seconds, cut in half, compiled, compared.

`make demo` runs this. It fails where a bundle disagrees with PyTorch on any of the held-out images, or where half the
FLOPs cost more than LOST of the accuracy.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt

CHECKPOINT = Path(__file__).parent.parent / "build" / "demo" / "digits.pt"
HELD_OUT = 360
SHARE = 0.5  # of the FLOPs that stays
LOST = 0.05
EPOCHS = 12


class Digits(nn.Module):
    """8 x 8 grey images to ten classes: two convolutions with batch norm, a residual, pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 8, 8) in [0, 1] to (n, 10) logits."""
        x = self.stem(x)
        return self.head(self.down(x + self.block(x)))


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then the held-out ones."""
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:-HELD_OUT], labels[:-HELD_OUT], images[-HELD_OUT:], labels[-HELD_OUT:]


def train(images: Tensor, labels: Tensor) -> Digits:
    """The trained model, from the checkpoint of an earlier run where there is one."""
    torch.manual_seed(0)
    model = Digits()
    if CHECKPOINT.is_file():
        model.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), CHECKPOINT)
    return model.eval()


def median_ms(run: Callable[[], object], repeats: int = 200) -> float:
    """Median milliseconds of a call, after a few that are not counted."""
    times = []
    for turn in range(repeats + 20):
        start = time.perf_counter()
        run()
        if turn >= 20:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def kilobytes(size: int) -> str:
    """Bytes for the table."""
    return f"{size / 1e3:,.1f} kB"


def main() -> int:
    """Train, cut, compile both for cpu and wasm, run all on the held-out digits, print the table."""
    torch.set_num_threads(1)
    train_images, train_labels, images, labels = data()
    started = time.perf_counter()
    model = train(train_images, train_labels)
    print(f"trained on {len(train_images)} digits in {time.perf_counter() - started:.1f} s", file=sys.stderr)

    example = images[:1]
    program = graphopt.capture(model, (example,), name="digits")
    started = time.perf_counter()
    # Training images without their labels: what is left is fitted to give what the whole network gave.
    half = graphopt.optimize(program, flops=SHARE, criterion="taylor", calibration=train_images[:256])
    print(f"cut to {SHARE:.0%} of the FLOPs in {time.perf_counter() - started:.1f} s", file=sys.stderr)

    table = Table(title=f"{HELD_OUT} held-out digits, one at a time, one thread")
    table.add_column("")
    for heading in ("accuracy", "agrees with PyTorch", "latency", "size"):
        table.add_column(heading, justify="right")
    right = labels.numpy()
    agreed, accuracies = True, []
    with tempfile.TemporaryDirectory() as folder:
        for label, item in (("", program), (f", {SHARE:.0%} of the FLOPs", half)):
            expected = torch.cat([item(image) for image in images.split(1)]).argmax(1).numpy()  # type: ignore[arg-type]
            accuracies.append((expected == right).mean())
            latency = median_ms(lambda item=item: item(example))  # type: ignore[misc]
            size = f"{kilobytes(item.parameters_bytes)} (weights)"
            table.add_row(f"PyTorch{label}", f"{accuracies[-1]:.2%}", "", f"{latency:.3f} ms", size)
            for target in ("cpu", "wasm"):
                started = time.perf_counter()
                path = Path(folder) / f"{target}.bundle"
                graphopt.compile(item, target=target, output=path)
                print(f"compiled for {target}{label} in {time.perf_counter() - started:.1f} s", file=sys.stderr)
                with graphopt.load(path, threads=1) as bundle:
                    logits = np.concatenate([np.asarray(bundle(image)) for image in images.split(1)])
                    name = bundle.manifest.inputs[0].name
                    times = [1e3 * taken for taken in bundle.time({name: example}, seconds=0.5)]
                    answers = logits.argmax(1)
                    same = int((answers == expected).sum())
                    agreed = agreed and same == len(expected)
                    table.add_row(
                        f"graphopt {target}{label}",
                        f"{(answers == right).mean():.2%}",
                        f"{same} of {len(expected)}",
                        f"{statistics.median(times):.3f} ms",
                        kilobytes(bundle.total_bytes),
                    )
    # Overheads count for models as small as this one, so it must be said which of them are in the numbers.
    table.caption = "latency: PyTorch's with its calls from Python, a bundle's inside its runner"
    Console(width=100).print(table)
    if not agreed:
        print("a bundle disagrees with PyTorch", file=sys.stderr)
    if lost := accuracies[1] < accuracies[0] - LOST:
        print(f"{SHARE:.0%} of the FLOPs cost more than {LOST:.0%} of the accuracy", file=sys.stderr)
    return 0 if agreed and not lost else 1


if __name__ == "__main__":
    sys.exit(main())
