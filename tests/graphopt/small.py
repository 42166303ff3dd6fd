"""Modules of a few lines, importable by name: factories and pickles need that."""

from __future__ import annotations

from pathlib import Path

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


def write_files(folder: Path) -> Path:
    """One small model in every kind of file, written once per test run. Returns the folder."""
    if folder.exists():
        return folder
    folder.mkdir()
    torch.manual_seed(0)
    net = Net().eval()
    torch.export.save(torch.export.export(net, (X,)), folder / "net.pt2")
    (folder / "exported.pt").write_bytes((folder / "net.pt2").read_bytes())
    torch.save(net, folder / "module.pt")
    torch.save(net.state_dict(), folder / "weights.pt")
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, folder / "checkpoint.pth")
    torch.save(net.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(net, folder / "legacy_module.pt", _use_new_zipfile_serialization=False)
    torch.save([1, 2], folder / "list.pt")
    torch.jit.save(torch.jit.trace(net, X), folder / "script.pt")
    return folder
