"""A model with two inputs and two outputs, for the tests of bundles and of the command line."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """A convolution with batch norm, pooling and a linear layer; two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """(1, 3, 8, 8) and (4,) to logits (1, 4) and the best class (1,)."""
        features = torch.relu(self.norm(self.conv(image))).mean((2, 3))
        logits = self.head(features) + shift
        return {"logits": logits, "best": logits.argmax(1)}


def small() -> Small:
    """The model with seeded weights; a factory for --model as well."""
    torch.manual_seed(3)
    return Small().eval()


def small_inputs() -> tuple[Tensor, Tensor]:
    """Seeded inputs."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(1, 3, 8, 8, generator=generator), torch.randn(4, generator=generator)
