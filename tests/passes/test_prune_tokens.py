"""Top-k pruning: all kept changes nothing, the order of patches does not matter."""

from __future__ import annotations

import pytest
import torch

import graphopt
from tests.passes.tokens.vision import LAYERS, PATCHES, after, image_of, model_of


@pytest.mark.parametrize("reducer", ["top-k", "bipartite", "prune-merge", "transform", "contextual", "cluster", "pool"])
def test_keeping_all_changes_no_bit(reducer: str) -> None:
    """Counts that keep every token leave the program as it is, and its output bit by bit."""
    model, x = model_of(5), image_of(6, 2)
    small, got = after(model, x, "prune-tokens", reducer=reducer, counts=(PATCHES,) * LAYERS)
    with torch.no_grad():
        wanted = graphopt.capture(model, (x,)).run({"x": x})["output"]
    assert torch.equal(got, wanted)
    assert not small.records[-1].changed


@pytest.mark.parametrize("score", ["class-attention", "mean-attention", "norm", "distinct", "entropy", "pagerank"])
def test_order_of_patches_does_not_matter(score: str) -> None:
    """Patches in another order, positions with them: the same class output, whatever the score."""
    model, x = model_of(9), image_of(10, 2)
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(11))
    shuffled = model_of(9)
    patches = x.view(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(2, PATCHES, 3, 8, 8)[:, order]
    other = patches.reshape(2, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)
    with torch.no_grad():
        shuffled.position[:, 1:] = model.position[:, 1:][:, order]
    options = {"score": score, "counts": (11, 7, 5)}
    one, two = after(model, x, "prune-tokens", **options)[1], after(shuffled, other, "prune-tokens", **options)[1]
    torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)
