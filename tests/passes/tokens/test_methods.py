"""Each method equals its own formulas, written directly in PyTorch, on random vision transformers and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.budget import Budget
from graphopt.passes import PREPARE, make
from graphopt.passes.base import run_passes
from graphopt.program import Program
from tests.passes.tokens import reference
from tests.tome import MergedVisionTransformer
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


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("counts", [(12, 9, 7), (8, 8, 4), (16, 11, 11)])
def test_merge_tokens_is_token_merging(batch: int, counts: tuple[int, ...]) -> None:
    """The pass equals ToMe with proportional attention over several layers; a count that stays merges nothing."""
    model, x = model_of(1), image_of(2, batch)
    removed = [before - now for before, now in zip((PATCHES, *counts), counts, strict=False)]
    with torch.no_grad():
        wanted = MergedVisionTransformer(model, removed)(x)
    torch.testing.assert_close(after(model, x, "merge-tokens", counts=counts)[1], wanted, atol=2e-5, rtol=1e-4)


CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("prune-tokens", {"counts": (12, 9, 7)}, reference.top_k([12, 9, 7])),
    (
        "diffrate",
        {"counts": (10, 7, 5), "reducer": "prune-merge:through=(13,9,5)"},
        reference.prune_merge([13, 9, 5], [10, 7, 5]),
    ),
    ("transform-tokens", {"counts": (10, 7, 5), "sites": (0, 1, 2)}, reference.transform([10, 7, 5], 0.1, 0.95)),
    (
        "transform-tokens",
        {"counts": (8, 4, 4), "sites": (0, 1, 2), "reducer": "transform:tau=0.5,spread=0.3"},
        reference.transform([8, 4, 4], 0.5, 0.3),
    ),
    (
        "prune-tokens",
        {"counts": (9,), "sites": (0,), "reducer": "contextual:context=4"},
        reference.contextual(9, 4, "mean"),
    ),
    (
        "prune-tokens",
        {"counts": (9,), "sites": (0,), "reducer": "contextual:context=4,rule=add"},
        reference.contextual(9, 4, "add"),
    ),
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("name", "options", "step"), CASES)
def test_method_equals_its_formulas(name: str, options: dict[str, Any], step: reference.Step, batch: int) -> None:
    """DiffRate, Token Transforming, VisionDrop's contextual tokens, top-k by class attention."""
    model, x = model_of(3), image_of(4, batch)
    proportional = name not in ("prune-tokens",)
    with torch.no_grad():
        wanted = reference.reduced(model, x, step, proportional)
    torch.testing.assert_close(after(model, x, name, **options)[1], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("reducer", ["top-k", "bipartite", "prune-merge", "transform", "contextual", "cluster", "pool"])
def test_keeping_all_changes_no_bit(reducer: str) -> None:
    """Counts that keep every token leave the program as it is, and its output bit by bit."""
    model, x = model_of(5), image_of(6, 2)
    small, got = after(model, x, "prune-tokens", reducer=reducer, counts=(PATCHES,) * LAYERS)
    with torch.no_grad():
        wanted = graphopt.capture(model, (x,)).run({"x": x})["output"]
    assert torch.equal(got, wanted)
    assert not small.records[-1].changed


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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("merge-tokens", {"counts": (12, 9, 7)}),
        ("prune-tokens", {"counts": (12, 9, 7)}),
        ("diffrate", {"counts": (10, 10, 5)}),
        ("transform-tokens", {"counts": (10, 7, 5), "sites": (0, 1, 2)}),
        ("prune-tokens", {"counts": (9, 4), "where": "block"}),
        ("prune-tokens", {"counts": (5,), "where": "input", "score": "norm"}),
    ],
)
def test_flops_are_those_of_the_polynomial(name: str, options: dict[str, Any]) -> None:
    """FLOPs after = the polynomial at the kept counts + what choosing and folding costs, exactly."""
    small, _ = after(model_of(12), image_of(13, 2), name, **options)
    record = small.records[-1]
    cost = record.details[-1]
    assert record.flops_after == cost["model_flops"] + cost["reduction_flops"]
    assert cost["reduction_flops"] > 0


@pytest.mark.parametrize("name", ["merge-tokens", "prune-tokens", "diffrate", "transform-tokens"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "ratio"])
def test_budget_is_met_closely(name: str, schedule: str) -> None:
    """FLOPs end at or just below the budget, whatever the schedule; counts never rise."""
    small, _ = after(
        model_of(14), image_of(15, 1), name, budget=Budget("flops", 0.75), schedule=schedule, sites=(0, 1, 2)
    )
    record = small.records[-1]
    share = record.flops_after / record.flops_before
    assert 0.62 < share <= 0.75
    counts = [row["kept"] for row in record.details if "kept" in row]
    assert counts == sorted(counts, reverse=True)
