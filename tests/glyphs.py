"""A transformer trained on letters drawn with the fonts that matplotlib brings along: 64 patches, many of them empty.

What token reduction costs is measured on it. The checkpoint is in `data/`; `python -m tests.glyphs` trains it again, in
two minutes on one core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from graphopt.program import Program
from tests.transformer_nets import VisionTransformer

CHECKPOINT = Path(__file__).parent / "data" / "glyphs_vit.pt"
LETTERS = "ABEHKMRSTX"
FONTS = tuple(
    f"{family}{style}.ttf"
    for family, styles in {
        "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
        "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    }.items()
    for style in styles
)
SIZE, TRAINING, HELD_OUT = 32, 6144, 512
EPOCHS, RATE, BATCH = 24, 3e-3, 64


class GlyphVit(VisionTransformer):
    """(n, 1, 32, 32) in [0, 1] to (n, 10): 64 patches and a class token, four blocks of four heads."""

    def __init__(self) -> None:
        super().__init__(dim=48, heads=4, layers=4, image=SIZE, patch=4, classes=len(LETTERS))
        self.patch = nn.Conv2d(1, 48, 4, 4)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Letters (count, 1, 32, 32) in [0, 1] and their numbers: any font, 14 to 20 pixels high, anywhere, on noise."""
    random = np.random.RandomState(seed)
    images, labels = np.zeros((count, SIZE, SIZE), np.float32), random.randint(len(LETTERS), size=count)
    for image, label in zip(images, labels, strict=True):
        font = _font(FONTS[random.randint(len(FONTS))], int(random.randint(16, 23)))
        left, top, right, bottom = font.getbbox(LETTERS[label])
        x, y = (random.randint(0, max(1, SIZE - int(extent))) for extent in (right - left, bottom - top))
        canvas = Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(canvas).text((x - left, y - top), LETTERS[label], fill=255, font=font)
        image[:] = np.asarray(canvas, np.float32) / 255
    images = np.clip(images * 0.8 + random.rand(*images.shape).astype(np.float32) * 0.2, 0, 1)
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


@cache
def held_out() -> tuple[Tensor, Tensor]:
    """The 512 images that no training saw, and their labels."""
    return drawn(HELD_OUT, seed=1)


@cache
def load() -> GlyphVit:
    """The trained transformer, in eval mode."""
    model = GlyphVit()
    model.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
    return model.eval().requires_grad_(False)


def accuracy(model: Program | nn.Module | Callable[[Tensor], Any]) -> float:
    """The share of held-out images that it answers rightly; a program takes as many at once as it was captured for."""
    images, labels = held_out()
    size = model.inputs[0].shape[0] if isinstance(model, Program) else HELD_OUT
    with torch.inference_mode():
        answers = torch.cat([torch.as_tensor(model(batch)).argmax(1) for batch in images.split(size)])
    return float((answers == labels).double().mean())


def train() -> nn.Module:
    """The model after its last epoch; the held-out images have no say in anything."""
    torch.manual_seed(0)
    images, labels = drawn(TRAINING, seed=0)
    model = GlyphVit().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = EPOCHS * (TRAINING // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINING).split(BATCH):
            optimizer.zero_grad()
            shifts = tuple(int(n) for n in torch.randint(-2, 3, (2,)))
            F.cross_entropy(model(images[batch].roll(shifts, (2, 3))), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> int:
    """Train, write the checkpoint, say how many held-out images it answers rightly."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    model = train()
    torch.save(model.state_dict(), CHECKPOINT)
    seconds = time.perf_counter() - started
    print(f"{accuracy(model):.2%} of {HELD_OUT}, {CHECKPOINT.stat().st_size:,} bytes, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
