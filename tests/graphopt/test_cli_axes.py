"""What `graphopt inspect --axes` and `--pinned` print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.bundle import Bundle
from graphopt.errors import Exit

Cli = Callable[..., tuple[int, str, str]]


class Net(nn.Module):
    """Two layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


class Unknown(Net):
    """With an operator that has no rule."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.linalg.matrix_exp(self.first(x[:1].expand(8, 6))))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Both as .pt2."""
    found = {}
    for make in (Net, Unknown):
        found[make.__name__] = tmp_path / f"{make.__name__.lower()}.pt2"
        torch.export.save(torch.export.export(make().eval(), (torch.randn(2, 6),)), found[make.__name__])
    return found


def test_axes(cli: Cli, files: dict[str, Path]) -> None:
    """A line per tensor, then a table of axes: what each is, where, and whether it may shrink."""
    code, out, err = cli("inspect", files["Net"], "--axes")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "linear aten.linear [!a0=2, e0=8]" in lines
    assert "p_second_weight second.weight [!n1=3, e0=8]" in lines
    assert "e0 8 embedding first.weight[0] yes norm" in lines[-5:] or any(
        line.startswith("e0 8 embedding first.weight[0] yes norm") for line in lines
    )
    assert any(line.startswith("n1 3 neuron second.weight[0] no: program output") for line in lines)
    assert lines[-1] == "4 axes, 1 of them may shrink"


def test_pinned_says_why(cli: Cli, files: dict[str, Path]) -> None:
    """Only what must not shrink; operators without a rule are listed."""
    code, out, _ = cli("inspect", files["Unknown"], "--pinned")
    assert code == 0
    assert "aten.linear" not in out
    assert "aten.linalg_matrix_exp has no rule" in out
    assert "no rule at" in out.splitlines()[-1]


def test_json(cli: Cli, files: dict[str, Path]) -> None:
    """The same as data."""
    data = json.loads(cli("inspect", files["Net"], "--axes", "--json")[1])
    (free,) = [axis for axis in data["axes"] if axis["free"]]
    assert (free["label"], free["extent"], free["role"]) == ("e0", 8, "embedding")
    assert {"name": "second.weight", "dim": 1, "summed": True} in free["tensors"]
    assert len(free["statistics"]) == 1
    assert data["unknown"] == []
    assert data["rows"]
    data = json.loads(cli("inspect", files["Unknown"], "--pinned", "--json")[1])
    assert all(axis["pinned"] for axis in data["axes"])
    assert data["unknown"][0]["reason"].startswith("aten.linalg_matrix_exp: no rule for this operator")


def test_a_bundle_has_no_axes(cli: Cli, small_bundle: Bundle) -> None:
    """Refused, with what to inspect instead."""
    code, _, err = cli("inspect", small_bundle.path, "--axes")
    assert code == Exit.BAD_INPUT
    assert "inspect the model that it was made from" in err
