"""prune-channels: what is cut together, budgets, rounding, what is left alone, and what cannot be done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.capture import capture
from graphopt.errors import BadOption, BudgetUnreachable
from graphopt.passes.prune_channels import PruneChannels
from tests.passes.reducing import assert_is_masked, prepared, shapes, share
from tests.programs import program_of

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CONVS = ["resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2", "unet", "crnn", "convnext"]


def residual_block(channels: int = 8):
    """A stem and a block of two convolutions with a shortcut, and a classifier."""

    def forward(s, x):
        x = s.stem(x).relu()
        return s.head((x + s.b(s.a(x).relu())).mean((2, 3)))

    torch.manual_seed(0)
    convs = {name: nn.Conv2d(3 if name == "stem" else channels, channels, 3, padding=1) for name in ("stem", "a", "b")}
    return program_of(forward, X, **convs, head=nn.Linear(channels, 5))


def test_residual_branches_shrink_together():
    """Two convolutions that meet in an add lose the same channels, and their readers do."""
    before = residual_block()
    after = PruneChannels(keep=0.5, step=1)(before)
    assert shapes(after) == {
        "stem.weight": [4, 3, 3, 3],
        "a.weight": [4, 4, 3, 3],
        "b.weight": [4, 4, 3, 3],
        "head.weight": [5, 4],
    }
    assert after.records[-1].changed == {"channel axis": 2}


@pytest.mark.parametrize("name", CONVS)
def test_result_is_the_masked_program(name):
    """Half of the FLOPs: the result equals the original with the dropped channels masked."""
    reduction, before = PruneChannels(budget=Budget("flops", 0.5)), prepared(name)
    after = reduction(before)
    assert share(after, "flops") <= 0.5
    assert_is_masked(reduction, before, after)


def test_least_important_channels_go():
    """The channels with the largest weights stay."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        first.weight[[0, 2, 3, 5, 7]] *= 0.01
        second.weight[:, [0, 2, 3, 5, 7]] *= 0.01
    before = capture(nn.Sequential(first, nn.ReLU(), second), (X,))
    after = PruneChannels(budget=Budget("macs", 3 / 8), step=1)(before)
    kept = next(iter(after.tensors.values()))
    torch.testing.assert_close(kept, first.weight.detach()[[1, 4, 6]])


def test_sizes_are_multiples_of_the_step():
    """Axes keep multiples of 8; those of fewer than four eights, of the largest power of two that fits four times."""
    after = PruneChannels(budget=Budget("params", 0.5), step=8)(prepared("resnet50"))
    for row in after.records[-1].details:
        step = min(8, row["from"] // 4)
        assert row["to"] % step == 0, row


def test_pattern_chooses_axes():
    """include and exclude match the names of the weights."""
    before = prepared("resnet18")
    only = PruneChannels(keep=0.5, include=("stages.3.*",))(before)
    assert {row["where"].split(".")[1] for row in only.records[-1].details} == {"3"}
    without = PruneChannels(keep=0.5, exclude=("stages.3.*",))(before)
    assert "3" not in {row["where"].split(".")[1] for row in without.records[-1].details}
    assert any(decline.reason == "excluded" for decline in without.records[-1].declined)


def test_pinned_axes_are_declined_with_their_reason():
    """The image's channels are the program's input, and the record says so."""
    after = PruneChannels(keep=0.5)(prepared("resnet18"))
    assert [(d.where, d.reason) for d in after.records[-1].declined] == [
        ("c1 (stem.0.0.weight[1])", "axis is pinned: program input")
    ]


def test_savings_add_up():
    """What each axis buys adds up to what was saved in all, where each product has two axes."""
    record = PruneChannels(budget=Budget("flops", 0.5))(prepared("resnet18")).records[-1]
    saved = sum(row["flops_saved"] for row in record.details)
    assert saved == pytest.approx(record.flops_before - record.flops_after, rel=1e-6)
    assert all(0 < row["score_lost"] < 1 and row["to"] < row["from"] for row in record.details)


def test_nothing_is_ever_empty():
    """However small the budget, one channel of each axis stays."""
    after = PruneChannels(budget=Budget("flops", 0.08), step=1, min_keep=0.0)(prepared("resnet18"))
    assert min(min(shape) for shape in shapes(after).values()) >= 1
    assert_is_masked(PruneChannels(budget=Budget("flops", 0.08), step=1, min_keep=0.0), prepared("resnet18"), after)


def test_unreachable_budget_says_what_is_reachable():
    """Less than the floors allow is refused with the least that would do, and asking for that works."""
    before = prepared("resnet18")
    with pytest.raises(
        BudgetUnreachable, match=r"resnet18: --flops 0\.001 cannot be met; the least reachable is 0\."
    ) as e:
        PruneChannels(budget=Budget("flops", 0.001))(before)
    assert "graphopt inspect MODEL --pinned" in e.value.way_out
    least = float(str(e.value.fields["least"]))
    assert share(PruneChannels(budget=Budget("flops", least))(before), "flops") <= least


def test_without_channels_says_so():
    """A program without convolutions cannot be cut: with keep it is left alone, with a budget refused."""
    before = program_of(lambda s, x: s.a(x), torch.randn(2, 4), a=nn.Linear(4, 3))
    after = PruneChannels(keep=0.5)(before)
    assert [d.reason for d in after.records[-1].declined] == ["no free axis of role channel"]
    with pytest.raises(BudgetUnreachable, match="finds nothing to cut: no free axis of role channel"):
        PruneChannels(budget=Budget("flops", 0.5))(before)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "has no budget"),
        ({"keep": 0.5, "budget": Budget("flops", 0.5)}, "has a budget and keep"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": 0.5, "step": "eight"}, "step=eight"),
        ({"keep": 0.5, "criterion": "luck"}, "there is no criterion luck"),
        ({"budget": Budget("flops", 0.5), "allocation": "luck"}, "there is no allocation luck"),
        ({"keep": 0.5, "criterion": "l2:power=3"}, "criterion l2:power=3"),
        ({"budget": Budget("latency", 0.5)}, "no target"),
    ],
)
def test_bad_options(options, what):
    """Options that make no sense are refused with the way out."""
    with pytest.raises(BadOption, match=what):
        PruneChannels(**options)(prepared("resnet18"))


def test_same_every_time():
    """Two runs give the same bytes."""
    reduction = PruneChannels(budget=Budget("flops", 0.5))
    a, b = reduction(prepared("resnet50")), reduction(prepared("resnet50"))
    assert str(a) == str(b)
    assert all(torch.equal(x, y) for x, y in zip(a.tensors.values(), b.tensors.values(), strict=True))
    assert a.records == b.records


def test_record_travels_with_the_file(tmp_path):
    """What was cut and why is still there when the program is saved and read."""
    after = PruneChannels(budget=Budget("flops", 0.5))(prepared("resnet18"))
    after.save(tmp_path / "small.pt2")
    assert capture(tmp_path / "small.pt2").records == after.records
    assert infer(after).free("channel")
