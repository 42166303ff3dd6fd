"""Heads that want a grid of tokens: all of them come back in front of it; windows are left alone with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.passes import PREPARE, make
from graphopt.passes.base import run_passes
from graphopt.program import Program
from tests.token_models import Segmenter, random
from tests.tome import MergedVisionTransformer, merge
from tests.transformer_nets import Swin

PATCHES = 16


def segmenter() -> Segmenter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return random(Segmenter())


def image_of(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def after(model: Any, x: Tensor, name: str, **options: Any) -> Program:
    return make(name, **options)(run_passes(graphopt.capture(model, (x,)), PREPARE))


def entered(model: Segmenter, x: Tensor) -> Tensor:
    x = model.patch(x).flatten(2).transpose(1, 2)
    return torch.cat([model.cls.expand(x.shape[0], -1, -1), x], 1) + model.position


def pruned(model: Segmenter, x: Tensor, counts: list[int]) -> Tensor:
    """Class attention, between attention and MLP; a dropped token stays as it was when it left."""
    whole = entered(model, x)
    index = torch.arange(PATCHES + 1).expand(len(x), -1)
    few = whole
    for block, count in zip(model.blocks, counts, strict=True):
        attention = block.attention
        q, k, _ = attention.project[0](block.norm1(few)).unflatten(-1, (3, attention.heads, -1)).unbind(2)
        row = (torch.einsum("bhd,bkhd->bhk", q[:, 0], k) * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 1:]
        few = few + attention(block.norm1(few))
        whole = torch.stack([old.index_copy(0, i, new) for old, i, new in zip(whole, index, few, strict=True)])
        stay = torch.cat([torch.zeros(len(x), 1).long(), row.topk(count).indices.sort().values + 1], 1)
        index = index.gather(1, stay)
        few = torch.stack([own[i] for own, i in zip(few, stay, strict=True)])
        few = few + block.mlp(block.norm2(few))
    whole = torch.stack([old.index_copy(0, i, new) for old, i, new in zip(whole, index, few, strict=True)])
    return model.dense(whole)


def merged(model: Segmenter, x: Tensor, counts: list[int]) -> Tensor:
    """ToMe; every token comes back as what it was merged into."""
    few = entered(model, x)
    size, source = None, torch.eye(PATCHES + 1).expand(len(x), -1, -1)  # which of the first tokens are in each
    for block, count in zip(model.blocks, counts, strict=True):
        attended, metric = MergedVisionTransformer._attention(block.attention, block.norm1(few), size)
        few = few + attended
        gone = few.shape[1] - 1 - count
        if gone:
            source, _ = merge(source, metric, gone, None)
            few, size = merge(few, metric, gone, size)
        few = few + block.mlp(block.norm2(few))
    return model.dense((source > 0).float().transpose(1, 2) @ few)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("counts", [[12, 9, 9], [16, 10, 6]])
def test_dropped_tokens_come_back_as_they_were_in_front_of_the_grid(batch: int, counts: list[int]) -> None:
    """Pruning: the head has every token, those that went as they were where they left."""
    model, x = segmenter(), image_of(batch)
    small = after(model, x, "prune-tokens", counts=tuple(counts))
    with torch.no_grad():
        torch.testing.assert_close(small.run({"x": x})["output"], pruned(model, x, counts), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("counts", [[12, 9, 6], [16, 10, 10]])
def test_merged_tokens_come_back_in_all_their_places(batch: int, counts: list[int]) -> None:
    """Merging: every place of a merged token has its value, through several layers of merging."""
    model, x = segmenter(), image_of(batch)
    small = after(model, x, "merge-tokens", counts=tuple(counts))
    with torch.no_grad():
        torch.testing.assert_close(small.run({"x": x})["output"], merged(model, x, counts), atol=1e-4, rtol=1e-3)


class Flat(Segmenter):
    """A head on the features of all tokens in one row, which is no form in which single tokens come back."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Linear((PATCHES + 1) * 32, 5)

    def dense(self, x: Tensor) -> Tensor:
        return self.row(self.norm(x).flatten(1))


@pytest.mark.parametrize("name", ["prune-tokens", "merge-tokens"])
def test_tokens_come_back_in_the_stream_where_they_are_put_in_a_row(name: str) -> None:
    """Dropped or merged, in front of a layer with a weight for each place; what lies between is computed for all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, counts = random(Flat()), image_of(2), [12, 9, 9]
    small = after(model, x, name, counts=tuple(counts))
    with torch.no_grad():
        wanted = (merged if name == "merge-tokens" else pruned)(model, x, counts)
        torch.testing.assert_close(small.run({"x": x})["output"], wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["prune-tokens", "merge-tokens"])
def test_keeping_all_changes_no_bit(name: str) -> None:
    model, x = segmenter(), image_of(2)
    same = after(model, x, name, counts=(PATCHES,) * 3)
    assert torch.equal(same.run({"x": x})["output"], graphopt.capture(model, (x,)).run({"x": x})["output"])


@pytest.mark.parametrize("name", ["prune-tokens", "merge-tokens"])
def test_the_grid_is_named_where_tokens_come_back(name: str) -> None:
    """What has all tokens again is listed, with the reason."""
    small = after(segmenter(), image_of(1), name, counts=(12, 9, 9))
    reasons = [str(each.reason) for each in small.records[-1].declined]
    assert any("it makes a grid of the tokens" in reason for reason in reasons)


@pytest.mark.parametrize("name", ["prune-tokens", "merge-tokens"])
def test_windows_are_left_alone_with_a_reason(name: str) -> None:
    """Swin: a window has all its tokens or none; nothing is reduced, and the place says why."""
    swin = Swin(dim=16, heads=2, grid=8, window=4, layers=2, patch=4, classes=5).eval()
    small = after(swin, image_of(1), name, keep=0.5)
    assert not small.records[-1].changed
    assert any("windows" in str(each.reason) and "blocks" in each.where for each in small.records[-1].declined)
