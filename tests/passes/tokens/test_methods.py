"""Each method equals its own formulas, written directly in PyTorch; FLOPs and budgets of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt.budget import Budget
from tests.passes.tokens import reference
from tests.passes.tokens.vision import after, image_of, model_of

CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("prune-tokens", {"counts": (12, 9, 7)}, reference.top_k([12, 9, 7])),
    (
        "diffrate",
        {"counts": (10, 7, 5), "reducer": "prune-merge:through=(13,9,5)"},
        reference.prune_merge([13, 9, 5], [10, 7, 5]),
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
