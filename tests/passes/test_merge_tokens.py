"""Token Merging equals its formulas; what is the same is merged without loss."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from graphopt.cut import Kept
from graphopt.passes.tokens.reducers import REDUCERS, Bipartite
from graphopt.passes.tokens.view import View
from tests.passes.tokens.vision import PATCHES, Dense, Pooled, after, image_of, model_of
from tests.tome import MergedVisionTransformer


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("counts", [(12, 9, 7), (8, 8, 4), (16, 11, 11)])
def test_merge_tokens_is_token_merging(batch: int, counts: tuple[int, ...]) -> None:
    """The pass equals ToMe with proportional attention over several layers; a count that stays merges nothing."""
    model, x = model_of(1), image_of(2, batch)
    removed = [before - now for before, now in zip((PATCHES, *counts), counts, strict=False)]
    with torch.no_grad():
        wanted = MergedVisionTransformer(model, removed)(x)
    torch.testing.assert_close(after(model, x, "merge-tokens", counts=counts)[1], wanted, atol=2e-5, rtol=1e-4)


@dataclass(frozen=True)
class Shuffled(Bipartite):
    """The same merges; new tokens in another order."""

    def __call__(self, view: View, scores: Tensor | None, count: int) -> Kept:
        kept = super().__call__(view, scores, count)
        order = torch.tensor(random.Random(0).sample(range(count), count))
        return replace(
            kept, index=kept.index[:, order], slots=torch.argsort(order)[kept.slots], size=kept.size[:, order]
        )


def test_order_of_merged_tokens_does_not_matter_to_the_class_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """ToMe leaves those that were not merged in front; any other order gives the same. One place: pairs of the next
    would be of other halves."""
    model, x = model_of(1), image_of(2, 2)
    options = {"counts": (9,), "sites": (0,)}
    one = after(model, x, "merge-tokens", **options)[1]
    monkeypatch.setitem(REDUCERS, "bipartite", Shuffled)
    two = after(model, x, "merge-tokens", **options)[1]
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("reducer", ["bipartite", "cluster", "transform:tau=0.001,spread=1"])
def test_duplicates_are_merged_without_loss(reducer: str) -> None:
    """Patches that come in equal pairs: merging each pair, counted twice by attention, changes nothing (ToMe)."""
    model, x = model_of(7), image_of(8, 2)
    with torch.no_grad():
        model.position[:, 2::2] = model.position[:, 1::2]
        x = x.view(2, 3, 4, 8, 2, 2, 8)
        x[:, :, :, :, :, 1] = x[:, :, :, :, :, 0]
        x = x.reshape(2, 3, 32, 32)
        wanted = model(x)
    score = "uniform"  # in bit-reversed order: the first half are every other token
    got = after(model, x, "prune-tokens", reducer=reducer, score=score, counts=(8,), sites=(0,))[1]
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("reducer", ["bipartite", "cluster"])
@pytest.mark.parametrize("where", ["attention", "block"])
def test_a_mean_counts_each_token_that_was_merged(reducer: str, where: str) -> None:
    """A head that pools by the mean has what the mean of all tokens is when they are back, at several places."""
    x = image_of(2, 2)
    options = {"counts": (11, 7), "sites": (0, 1), "reducer": reducer, "where": where}
    pooled = after(model_of(1, Pooled), x, "merge-tokens", **options)[1]
    dense = after(model_of(1, Dense), x, "merge-tokens", **options)[1]
    assert dense.shape[1] == PATCHES + 1
    torch.testing.assert_close(pooled, dense.mean(1), atol=2e-5, rtol=1e-4)
