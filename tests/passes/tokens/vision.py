"""What tests of vision transformers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt.passes import PREPARE, make
from graphopt.passes.base import run_passes
from graphopt.program import Program
from tests.transformer_nets import VisionTransformer

PATCHES = 16


LAYERS = 3


class Pooled(VisionTransformer):
    """The mean of all tokens instead of the class token."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class Dense(VisionTransformer):
    """An output for every token."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x)))


def model_of(seed: int, kind: type[VisionTransformer] = VisionTransformer) -> VisionTransformer:
    """A small vision transformer of 16 patches whose attention is not flat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(dim=32, heads=4, layers=LAYERS, image=32, patch=8, classes=10)
        for parameter in model.parameters():
            parameter.data.mul_(3.0)
    return model.eval()


def image_of(seed: int, batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def after(model: nn.Module, x: Tensor, name: str, **options: Any) -> tuple[Program, Tensor]:
    """The program that a pass makes of a model, and what it gives."""
    program = run_passes(graphopt.capture(model, (x,)), PREPARE)
    small = make(name, **options)(program)
    return small, small.run({program.inputs[0].name: x})["output"]
