"""Products with stored operands give their axes the role that a linear layer gives them, however they are written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.axes import infer
from graphopt.axes.rules_math import _neurons
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.passes.prune_neurons import PruneNeurons
from tests.passes.reducing import shapes
from tests.programs import hard, program_of

X = torch.randn(2, 3, 8)


class Pair(nn.Module):
    """Two stored operands."""

    def __init__(self, up: tuple[int, ...], down: tuple[int, ...]) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))


MATRICES, STACKS = ((8, 20), (20, 8)), ((2, 8, 20), (2, 20, 8))
WAYS = {
    "einsum": (MATRICES, lambda m, x: torch.einsum("btf,fd->btd", torch.einsum("btd,df->btf", x, m.up).relu(), m.down)),
    "einsum, dots": (MATRICES, lambda m, x: torch.einsum("...f,fd", torch.einsum("...d,df", x, m.up).relu(), m.down)),
    "einsum, stacks": (
        STACKS,
        lambda m, x: torch.einsum("btef,efd->btd", torch.einsum("btd,edf->btef", x, m.up).relu(), m.down),
    ),
    "matmul": (MATRICES, lambda m, x: (x @ m.up).relu() @ m.down),
    "matmul, stacks": (STACKS, lambda m, x: (x @ m.up).relu() @ m.down),
    "matmul, turned": (((20, 8), (20, 8)), lambda m, x: (x @ m.up.T).relu() @ m.down),
    "bmm": (STACKS, lambda m, x: torch.bmm(torch.bmm(x, m.up).relu(), m.down)),
    "addmm": (MATRICES, lambda m, x: torch.addmm(x[0, 0], torch.addmm(x[0, 0, :1], x[0], m.up).relu(), m.down)),
    "baddbmm": (STACKS, lambda m, x: torch.baddbmm(x, torch.bmm(x, m.up).relu(), m.down)),
}


@pytest.mark.parametrize("name", WAYS)
def test_hidden_axes_are_neurons(name: str) -> None:
    """What one product brings in and the next sums over: prune-neurons takes it."""
    sizes, function = WAYS[name]
    before = program_of(lambda s, x: function(s.m, x), X, m=Pair(*sizes))
    axes = infer(before)
    assert {axis.extent for axis in axes.free("neuron")} - {2} == {20}  # a sum over stacks as well is one over both
    after = PruneNeurons(keep=0.5, step=1, include=(axes.free("neuron")[-1].label,))(before)
    assert all(10 in shape and 20 not in shape for shape in shapes(after).values())


def test_a_batch_of_matrices_is_none_of_neurons() -> None:
    """What both operands and the result have is for others to name; so is what only the computed one brings in."""
    assert _neurons("gdf", ["gtd"], "gtf") == ["d", "f"]
    assert _neurons("gdf", ["td"], "gtf") == ["g", "d", "f"]
    assert _neurons("d", ["btd"], "btd") == []


def test_products_of_what_is_computed_say_nothing() -> None:
    """Neither operand is stored: an inner product of features is no layer."""
    axes = infer(program_of(lambda s, x: torch.einsum("btf,bsf->bts", s.a(x), s.a(x)), X, a=nn.LayerNorm(8)))
    assert not [axis for axis in axes.atoms if axes.role(axis) == "neuron"]


@pytest.mark.parametrize("name", ["mha_einsum", "gqa_einsum", "gqa_matmul", "mha_bmm"])
def test_heads_stay_heads(name: str) -> None:
    """However attention is written: what it says of its axes comes before what projections say."""
    axes = infer(run_passes(hard(name), PREPARE, check=False))
    roles = {axes.role(axis) for axis in axes.free()}
    assert {"head", "head_dim"} <= roles
    assert ("query_group" in roles) == name.startswith("gqa")
    for axis in axes.free("head", "query_group"):
        assert axes.tensor_name(axes.stored_in(axis)[0][0]).startswith("blocks.")
    hidden = {axis.extent for axis in axes.free("neuron")}
    assert hidden <= {44, 45, 50, 51}
