"""Cuts of weights that have blocks of zeros: whole blocks go, the format survives, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.passes import make
from graphopt.passes.reduction import Reduction
from graphopt.passes.whole_blocks import Block, in_blocks, whole_blocks
from graphopt.program import Program
from graphopt.sparsity import parse_format
from tests.passes.reducing import assert_is_masked, prepared, shapes, share
from tests.passes.sparsifying import convnet, mlp
from tests.programs import program_of


def sparse(program: Program, form: str, **options: object) -> Program:
    """The program after a pass that leaves 40 % of its blocks, or N of each M."""
    name = "sparsify-nm" if ":" in form else "sparsify-blocks"
    share = {} if ":" in form else {"keep": 0.4}
    return make(name, format=form, **share, **options)(program)


def formats(program: Program) -> dict[str, str]:
    """The formats of weights by name."""
    return {name: annotation.word for name, annotation in program.annotations.items()}


def cut(name: str, before: Program, **options: object) -> tuple[Program, Program]:
    """The program after a cut, checked against the masked one; and after the same cut without annotations."""
    reduction = make(name, **options)
    assert isinstance(reduction, Reduction)
    after = reduction(before)
    assert_is_masked(reduction, before, after)
    return after, reduction(before.replace(annotations={}))


# The picture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["4x1", "8x1", "1x4", "2x2", "2:4", "4:2:4"])
def test_formats_survive_a_cut(form: str) -> None:
    """Outputs of one layer that are inputs of the next go in whole blocks of both; items go singly where none is."""
    before = sparse(mlp(ins=24, hidden=48, outs=20), form, rearrange=False)
    assert formats(before) == {"a.weight": form, "b.weight": form}
    after, _ = cut("prune-neurons", before, keep=0.7, step=1)
    assert formats(after) == formats(before)
    found = parse_format(form)
    hidden = shapes(after)["a.weight"][0]
    assert 0 < hidden < 48
    assert hidden % found.rows == 0
    assert hidden % (found.cols * found.m) == 0
    assert not after.records[-1].notes
    assert any(f"zeros of {'a' if found.rows > 1 else 'b'}.weight are {form}" in d.reason
               for d in after.records[-1].declined)  # fmt: skip


@pytest.mark.parametrize("form", ["4x1", "2:4", "4x4"])
@pytest.mark.parametrize(("model", "name"), [("resnet18", "prune-channels"), ("mobilenet_v2", "prune-channels"),
                                             ("deit_s", "prune-heads"), ("deit_s", "prune-neurons"),
                                             ("llama", "prune"), ("swin", "prune-neurons")])  # fmt: skip
def test_formats_survive_in_whole_models(model: str, name: str, form: str) -> None:
    """A budget is met as well, weights keep the format that they had, and the result is the masked program."""
    before = sparse(prepared(model), form)
    after, _ = cut(name, before, budget=Budget("params", 0.85), min_keep=0.25)
    assert share(after, "params") <= 0.85
    survivors = {key: form for key, form in formats(before).items() if key in shapes(after)}
    assert formats(after) == survivors


# The property ---------------------------------------------------------------------------------------------------------


def test_blocks_of_axes() -> None:
    """Of each kind of axis, how many items go together: neurons of a block, heads that share one."""
    before = sparse(mlp(ins=24, hidden=48, outs=20), "4x1", rearrange=False)
    before = graphopt.annotate(before, {"b.weight": None})
    axes = infer(before)
    (hidden,) = axes.free()
    assert whole_blocks(axes, [hidden]) == {hidden: Block(4, "a.weight", parse_format("4x1"))}
    assert whole_blocks(infer(mlp()), infer(mlp()).free()) == {}
    # Heads consist of whole blocks; blocks of twice their rows need two of them.
    dense = prepared("deit_s")
    (dim,) = {axis.extent for axis in infer(dense).free("head_dim")}
    for rows, size in ((dim // 2, 1), (2 * dim, 2)):
        axes = infer(sparse(dense, f"{rows}x1", rearrange=False))
        found = {axis: block.size for axis, block in whole_blocks(axes, axes.free("head")).items()}
        assert found == ({} if size == 1 else dict.fromkeys(axes.free("head"), size))


def test_taps_that_blocks_cross() -> None:
    """Where channels are no multiple of the block, inputs cannot go in whole blocks: the cut says what it broke."""
    torch.manual_seed(0)
    layers = {"one": nn.Conv2d(3, 10, 3), "two": nn.Conv2d(10, 8, 3)}
    program = program_of(lambda s, x: s.two(s.one(x).relu()), torch.randn(1, 3, 9, 9), **layers)
    before = sparse(program, "2:4", include=("two",), rearrange=False)
    axes = infer(before)
    assert whole_blocks(axes, axes.free()) == {}
    after, _ = cut("prune-channels", before, keep=0.5, step=1)
    assert formats(after) == {"two.weight": "unstructured"}
    assert any("stand in no blocks any longer" in note for note in after.records[-1].notes)


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (9, 2), (3, 1)])
def test_scores_in_blocks(count: int, size: int) -> None:
    """The mean of each block for all of its items; the rest is worth the least, in every row."""
    scores = torch.rand(2, count, generator=torch.manual_seed(count))
    found = in_blocks(scores, size)
    assert found.shape == scores.shape
    whole = count // size * size
    for row, own in zip(found, scores, strict=True):
        for start in range(0, whole, size):
            assert torch.equal(
                row[start : start + size], own[start : start + size].double().mean().float().expand(size)
            )
        assert all(value == row[:whole].min() for value in row[whole:])


def test_a_short_last_block_goes_first() -> None:
    """Ten outputs in blocks of four: eight or four stay, and with four the better block."""
    torch.manual_seed(1)
    layers = {"a": nn.Linear(8, 10), "b": nn.Linear(10, 6)}
    layers["a"].weight.data[4:8] *= 10
    before = program_of(lambda s, x: s.b(s.a(x).relu()), torch.randn(5, 8), **layers)
    before = sparse(before, "4x1", include=("a",), rearrange=False, minimum=0.0)
    reduction = make("prune-neurons", keep=0.4, step=1)
    (kept,) = reduction.plan(infer(before)).keep.values()  # type: ignore[attr-defined]
    assert kept.tolist() == [4, 5, 6, 7]


# What is left alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["unstructured", "dense", None])
def test_other_zeros_change_nothing(form: str | None) -> None:
    """Cuts of weights without blocks are those of a program without annotations."""
    before = make("sparsify-magnitude", keep=0.4)(convnet())
    if form != "unstructured":
        before = graphopt.annotate(before, dict.fromkeys(before.annotations, form))
    after, plain = cut("prune-channels", before, keep=0.5)
    assert shapes(after) == shapes(plain)
    assert all(torch.equal(a, b) for a, b in zip(after.tensors.values(), plain.tensors.values(), strict=True))


def test_axes_that_no_block_runs_along() -> None:
    """Outputs in blocks do not bind inputs: with 4x1 the inputs of a layer go one by one."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        return s.b(s.a(x).relu())

    torch.manual_seed(0)
    before = program_of(forward, torch.randn(5, 8), a=nn.Linear(8, 12), b=nn.Linear(12, 8))
    before = sparse(before, "4x1", include=("b",))
    axes = infer(before)
    assert whole_blocks(axes, axes.free()) == {}


def test_dead_items_are_no_blocks() -> None:
    """Inputs that are zero throughout look like N of M; they go one by one all the same, and nothing changes."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(8, 16), "b": nn.Linear(16, 8)}
    dead = torch.tensor([0, 3, 5, 6, 8, 9, 12, 15])
    layers["b"].weight.data[:, dead] = 0
    before = program_of(lambda s, x: s.b(s.a(x).relu()), torch.randn(5, 8), **layers)
    assert ":" in formats(before)["b.weight"]
    axes = infer(before)
    assert whole_blocks(axes, axes.free()) == {}
