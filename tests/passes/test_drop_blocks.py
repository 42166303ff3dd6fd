"""drop-blocks: what is a residual branch, that dropping it is adding nothing, and which goes first."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter

import graphopt
from graphopt.budget import Budget
from graphopt.cost import summary
from graphopt.edit import Edit
from graphopt.errors import BadOption, BudgetUnreachable
from graphopt.exported import arguments, user_output_places
from graphopt.passes.drop_blocks import DropBlocks, remove
from graphopt.passes.residual import branches
from graphopt.passes.sizes import amount
from tests.programs import hard, ops, program_of, tiny


@pytest.fixture(autouse=True)
def _seeded():
    """Layers are made with the same weights in every run."""
    torch.manual_seed(0)


def run_without(program, gone, inputs) -> list[Tensor]:
    """The reference: the program itself, with zeros for what the branches add."""
    names = {branch.branch.name for branch in gone}

    class Zeroed(Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            return torch.zeros_like(value) if node.name in names else value

    with torch.inference_mode():
        results = Zeroed(program.exported.graph_module).run(*arguments(program.exported, inputs))
    return [results[place] for place in user_output_places(program.exported)]


_TINY = ("resnet18", "deit_s", "bert", "llama", "swin", "mobilenet_v2")
_HARD = ("yolo", "mobilenet_v3", "video", "super_resolution", "mha_einsum", "dit", "t5", "moe_gather", "mamba")
FAMILIES = dict.fromkeys(_TINY, tiny) | dict.fromkeys(_HARD, hard)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropping_is_adding_zero(name):
    """Each branch alone, and all at once: what is left computes the program with zeros in their place, exactly."""
    program = FAMILIES[name](name)
    found, _ = branches(program)
    assert found
    for gone in [*([branch] for branch in found[:3]), found]:
        edit = Edit(program)
        remove(edit, gone)
        after = program.replace(exported=edit.finish())
        wanted = run_without(program, gone, program.example_inputs)
        for right, got in zip(wanted, after.run(program.example_inputs).values(), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert summary(after).total.flops < summary(program).total.flops
        dead = [node.name for node in after.graph.nodes if node.op == "call_function" and not node.users]
        assert len(dead) <= sum(node.op == "call_function" and not node.users for node in program.graph.nodes)


def names_of(program) -> list[str]:
    return [branch.name for branch in branches(program)[0]]


def test_what_is_a_branch():
    """Halves of transformer layers, bodies of residual networks; not position tables, rotary embeddings or skips."""
    assert names_of(tiny("deit_s")) == [f"blocks.{n}.{part}" for n in (0, 1) for part in ("attention", "mlp")]
    assert [branch.unit for branch in branches(tiny("llama"))[0]] == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    assert names_of(hard("densenet")) == names_of(hard("unet_upsample")) == names_of(hard("gru")) == []
    found, declined = branches(tiny("resnet18"))
    assert [branch.name for branch in found] == ["stages.0.0.body"]
    assert {item.reason for item in declined} == {
        "both sides of the sum have layers of their own: no shortcut is left without one"
    }


@pytest.mark.parametrize(("add", "count"), [
    (lambda s, x: x + s.a(x), 1),
    (lambda s, x: s.a(x) + x, 1),
    (lambda s, x: x - s.a(x), 1),
    (lambda s, x: 0.5 * x + s.a(x), 1),
    (lambda s, x: torch.add(x, s.a(x), alpha=0.3), 1),
    (lambda s, x: x + torch.sigmoid(s.b(x)) * s.a(x), 1),
    (lambda s, x: x + nn.functional.dropout(s.a(x), 0.1, training=True), 1),
    (lambda s, x: x + s.a(x + s.b(x)), 2),  # nested
    (lambda s, x: x + s.a(x.relu()) + s.b(x.relu()), 2),  # in parallel
    (lambda s, x: x + (s.a(x.relu()) + s.b(x.relu())), 1),
    (lambda s, x: s.a(x) - x, 0),  # without the branch the sign is left
    (lambda s, x: s.a(x) + s.b(x), 0),
    (lambda s, x: x + x.relu(), 0),  # no layer
    (lambda s, x: x[:, :1] + s.a(x), 0),  # another shape
])  # fmt: skip
def test_forms(add, count):
    """Written in any way, with gates, scales, nesting."""
    before = program_of(lambda s, x: add(s, x).tanh(), torch.randn(3, 8), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    found, _ = branches(before)
    assert len(found) == count
    if count:
        after = DropBlocks(drop=count)(before)
        assert "linear" not in ops(after)
        assert len(after.tensors) == 0


@cache
def stack(layers=6, width=16):
    """Residual layers; the contribution of each is its number from the end, squared, over ten."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        with torch.no_grad():
            for n, part in enumerate(parts):
                part.weight.mul_((layers - n) ** 2 / 10)

        def forward(s, x):
            for part in s.parts:
                x = x + part(x.tanh())
            return x

        return program_of(forward, torch.randn(7, width), parts=parts)


@pytest.mark.parametrize("criterion", ["output", "cosine"])
@pytest.mark.parametrize("remeasure", [False, True])
def test_least_important_first(criterion, remeasure):
    """The small ones go, in order, and the record says what each mattered."""
    after = DropBlocks(drop=3, criterion=criterion, remeasure=remeasure)(stack())
    assert names_of(after) == ["parts.0", "parts.1", "parts.2"]
    rows = after.records[-1].details
    assert rows[0]["block"] == "parts.5"
    assert [row["score"] for row in rows] == sorted(row["score"] for row in rows)
    assert after.records[-1].changed == {"block": 3}


def test_remeasuring_sees_what_was_made_up_for():
    """Two branches that cancel matter when either goes, and not once one is gone."""
    a, b, c = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        c.weight.mul_(0.5)
        b.weight.copy_(-a.weight)

    def forward(s, x):
        y = x + s.a(x.tanh())
        z = y + s.b(x.tanh()) + 0 * y
        return z + s.c(z.tanh())

    before = program_of(forward, torch.randn(5, 8), a=a, b=b, c=c)
    gone = lambda **options: {row["block"] for row in DropBlocks(drop=2, **options)(before).records[-1].details}  # noqa: E731
    assert "c" in gone()
    assert len(gone(remeasure=True)) == 2


@pytest.mark.parametrize("kind", ["flops", "params"])
def test_budgets_are_met(kind):
    """Blocks go until the budget is met, and no block more."""
    before = stack()
    after = DropBlocks(Budget(kind, 0.55))(before)
    share = amount(after, kind) / amount(before, kind)
    assert 0.45 < share <= 0.55
    assert len(names_of(after)) == 3
    assert len(names_of(DropBlocks(keep=0.5)(before))) == 3


def test_layers():
    """Attention and feed-forward network go together; patterns hold blocks back."""
    before = tiny("deit_s")
    after = DropBlocks(drop=1, unit="layer", exclude=("blocks.0",))(before)
    assert names_of(after) == ["blocks.0.attention", "blocks.0.mlp"]
    after = DropBlocks(keep=0.5, include=("*.mlp",))(before)
    assert sum(name.endswith("mlp") for name in names_of(after)) == 1
    assert sum(name.endswith("attention") for name in names_of(after)) == 2
    with graphopt.compile(after) as bundle:
        assert bundle.manifest.verification.passed


def test_neighbours_go_in_any_order():
    """Dropping one and then the next behind it, or in front of it, is dropping both."""
    program = tiny("deit_s")
    found, _ = branches(program)
    wanted = run_without(program, found, program.example_inputs)
    for order in (found, found[::-1], found[1:] + found[:1]):
        edit = Edit(program)
        for branch in order:
            remove(edit, [branch])
        got = program.replace(exported=edit.finish()).run(program.example_inputs)
        torch.testing.assert_close(next(iter(got.values())), wanted[0], rtol=1e-5, atol=1e-5)


def test_nested_blocks_go_with_the_outer_one():
    """Dropping the outer branch takes the inner one along, whichever goes first."""
    before = program_of(
        lambda s, x: (x + s.a(x.relu() + s.b(x.relu()))).tanh(), torch.randn(3, 8), a=nn.Linear(8, 8), b=nn.Linear(8, 8)
    )
    found, _ = branches(before)
    for order in (found, found[::-1]):
        edit = Edit(before)
        remove(edit, order)
        assert ops(before.replace(exported=edit.finish())) == ["tanh"]
    for criterion in ("output", "cosine"):
        assert ops(DropBlocks(drop=2, criterion=criterion, remeasure=True)(before)) == ["tanh"]


def test_the_sum_is_the_output():
    """A program that is one block becomes its input."""
    before = program_of(lambda s, x: x + s.a(x), torch.randn(3, 8), a=nn.Linear(8, 8))
    after = DropBlocks(drop=1)(before)
    x = torch.randn(3, 8)
    torch.testing.assert_close(after(x), x)


def test_bad_options():
    """None or two amounts; a budget out of reach; nothing to drop is said."""
    with pytest.raises(BadOption, match="one of budget, keep and drop"):
        DropBlocks()(stack())
    with pytest.raises(BudgetUnreachable):
        DropBlocks(Budget("flops", 0.001))(tiny("deit_s"))
    plain = program_of(lambda s, x: s.a(x), torch.randn(3, 8), a=nn.Linear(8, 8))
    assert "no residual block" in DropBlocks(drop=1)(plain).records[-1].declined[-1].reason
