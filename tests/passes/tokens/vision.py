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


def model_of(seed: int) -> VisionTransformer:
    """A small vision transformer of 16 patches whose attention is not flat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(dim=32, heads=4, layers=LAYERS, image=32, patch=8, classes=10)
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
