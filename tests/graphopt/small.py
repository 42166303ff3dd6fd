"""Modules of a few lines, importable by name: factories and pickles need that."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, width), nn.Dropout(), nn.ReLU(inplace=True))
        self.head = nn.Linear(width, 2)

    def forward(self, x, bias=None):
        y = self.head(self.body(x))
        return y if bias is None else y + bias


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, ids, mask):
        return self.table(ids) * mask[..., None]


def wide() -> nn.Module:
    return Net(8)


def no_module() -> int:
    return 3


X = torch.arange(6.0).view(2, 3)
