"""What `graphopt inspect --tokens` prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from graphopt.errors import Exit
from tests.passes.tokens.vision import image_of, model_of
from tests.vision_language import example, llava

Cli = Callable[..., tuple[int, str, str]]


def saved(model: nn.Module, inputs: dict[str, torch.Tensor], file: Path) -> Path:
    """As .pt2."""
    torch.export.save(torch.export.export(model, (), inputs), file)
    return file


def test_blocks_have_the_numbers_that_sites_take(cli: Cli, tmp_path: Path) -> None:
    """A vision transformer: one sequence, its blocks from 0, all but the class token may go."""
    file = saved(model_of(1), {"x": image_of(2, 1)}, tmp_path / "vit.pt2")
    code, out, err = cli("inspect", file, "--tokens")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "stream 0: 17 tokens in front of its first block; 1:17 may go where tokens= names none"
    assert lines[1:4] == ["block 0 blocks.0", "block 1 blocks.1", "block 2 blocks.2"]


def test_every_sequence_is_listed(cli: Cli, tmp_path: Path) -> None:
    """A tower and a decoder, as stream= numbers them, and in JSON."""
    model, inputs = llava(), example()
    code, out, _ = cli("inspect", saved(model, inputs, tmp_path / "vlm.pt2"), "--tokens", "--json")
    streams = json.loads(out)["streams"]
    assert code == 0
    assert [(row["stream"], row["tokens"], row["blocks"][0]) for row in streams] == [
        (0, 17, "tower.0"),
        (1, 24, "decoder.blocks.0"),
    ]
    assert all(row["may_go"] for row in streams)


def test_without_attention_there_is_no_sequence(cli: Cli, tmp_path: Path) -> None:
    """That is said; of a bundle it cannot be asked."""
    file = saved(nn.Sequential(nn.Linear(4, 4)).eval(), {"input": torch.randn(2, 4)}, tmp_path / "mlp.pt2")
    code, out, _ = cli("inspect", file, "--tokens")
    assert code == 0
    assert "no sequence of tokens" in out
    code, _, err = cli("inspect", tmp_path, "--tokens")
    assert code == Exit.BAD_INPUT
    assert "neither axes nor blocks" in err
