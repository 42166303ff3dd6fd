"""factor-block-diagonal: the graph is the matrix that the factors spell, and nearest to the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.cost import summary
from graphopt.passes.factor_block_diagonal import FactorBlockDiagonal
from graphopt.passes.sizes import amount
from graphopt.shrink import shrink
from tests.programs import assert_same, ops, program_of, tiny

FORMS = ("shuffle", "dense")


@pytest.fixture(autouse=True)
def _seeded():
    """Layers are made with the same weights in every run."""
    torch.manual_seed(0)


def one(ins=24, outs=36, tokens=(2, 5), bias=True):
    return program_of(lambda s, x: s.layer(x), torch.randn(*tokens, ins), layer=nn.Linear(ins, outs, bias=bias))


def weights(program) -> dict[str, torch.Tensor]:
    specs = program.exported.graph_signature.input_specs
    return {spec.target: program.tensors[spec.arg.name] for spec in specs if spec.arg.name in program.tensors}


def shuffle(rows: int, columns: int) -> torch.Tensor:
    """The permutation matrix of a transpose: (rows, columns) flattened to (columns, rows) flattened."""
    return torch.eye(rows * columns).view(rows, columns, -1).transpose(0, 1).reshape(rows * columns, -1)


def dense_of(program, form: str, b: int, q: int) -> torch.Tensor:
    """The matrix that the factors spell, from block-diagonal matrices and permutations."""
    found = weights(program)
    front = torch.block_diag(*found["layer.front.weight"].mT)  # (k l q) x (k i)
    if form == "dense":
        return found["layer.back.weight"] @ front
    back = torch.block_diag(*found["layer.back.weight"].mT)  # (l o) x (l k q)
    outs = len(back) // b
    between = torch.kron(shuffle(b, b), torch.eye(q))
    return shuffle(b, outs) @ back @ between @ front


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_is_the_matrix(form):
    """Reshapes, transposes and batched products compute what block_diag and permutation matrices say."""
    before = one()
    after = FactorBlockDiagonal(rank=2, form=form, blocks=3, include=("*",))(before)
    x = torch.randn(2, 5, 24)
    matrix = dense_of(after, form, 3, 2)
    torch.testing.assert_close(after(x), x @ matrix.T + weights(before)["layer.bias"], rtol=1e-5, atol=1e-5)
    assert ops(after).count("bmm") == (2 if form == "shuffle" else 1)


@pytest.mark.parametrize("form", FORMS)
def test_multiply_adds_are_as_said(form):
    """b q (i + o) and q (i + b o) for each row, by the counter; parameters likewise."""
    after = FactorBlockDiagonal(rank=2, form=form, blocks=3, include=("*",))(one(bias=False))
    each = 3 * 2 * (24 + 36) if form == "shuffle" else 2 * (24 + 3 * 36)
    assert summary(after).total.macs == 10 * each
    assert summary(after).total.params == each


def test_monarch_rank_is_the_papers():
    """With q = min(i, o) / b^2 the two factors have the sizes of BlockShuffle."""
    after = FactorBlockDiagonal(rank=2, blocks=4, include=("*",))(one(32, 64, bias=False))
    assert summary(after).total.params == 32 * 32 // 4 + 32 * 64 // 4


@pytest.mark.parametrize("form", FORMS)
def test_what_has_that_form_is_kept(form):
    """A matrix made of such factors is found again, and a lower rank is not enough."""
    made = FactorBlockDiagonal(rank=2, form=form, blocks=3, include=("*",))(one())
    layer = nn.Linear(24, 36)
    with torch.no_grad():
        layer.weight.copy_(dense_of(made, form, 3, 2))
    before = program_of(lambda s, x: s.layer(x), torch.randn(5, 24), layer=layer)
    same = FactorBlockDiagonal(rank=2, form=form, blocks=3, include=("*",))(before)
    assert_same(before, same, tolerance=1e-4)
    with pytest.raises(AssertionError):
        assert_same(before, FactorBlockDiagonal(rank=1, form=form, blocks=3, include=("*",))(before), tolerance=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_data_brings_it_nearer(form):
    """On the data the fitted factors are at least as near, and nearer where the data is uneven."""
    x = torch.randn(1, 60, 24) * torch.logspace(0, -2, 24)
    layer = nn.Linear(24, 36)
    before = program_of(lambda s, x: s.layer(x), x, layer=layer)
    options = {"rank": 2, "form": form, "blocks": 3, "include": ("*",)}
    blind = FactorBlockDiagonal(**options)(before)
    aware = FactorBlockDiagonal(**options, calibration=[x])(before)
    errors = [float((program(x) - before(x)).square().sum()) for program in (blind, aware)]
    assert errors[1] < errors[0] * 0.95


@pytest.mark.parametrize("form", FORMS)
def test_budgets_are_met(form):
    """Within two per cent from below, on the whole program."""
    mlp = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))
    before = program_of(lambda s, x: s.mlp(x), torch.randn(3, 128), mlp=mlp)
    for kind in ("flops", "params"):
        after = FactorBlockDiagonal(Budget(kind, 0.5), form=form, blocks=2)(before)
        assert 0.48 <= amount(after, kind) / amount(before, kind) <= 0.5


@pytest.mark.parametrize("form", FORMS)
def test_the_new_axis_shrinks(form):
    """Axis inference finds the rank as a free axis, and a shrink of it is a lower rank."""
    before = one(48, 64)
    axes = infer(FactorBlockDiagonal(rank=5, form=form, include=("*",))(before))
    (rank,) = (axis for axis in axes.free() if axis.extent == 5)
    low = FactorBlockDiagonal(rank=3, form=form, include=("*",))(before)
    assert_same(low, shrink(axes, {rank: range(3)}), tolerance=1e-5)


def test_left_alone():
    """Sizes that are no multiples, and ranks that do not pay, are said."""
    after = FactorBlockDiagonal(rank=2, blocks=5, include=("*",))(one())
    assert "36 x 24 is no grid of 5 x 5 blocks" in after.records[-1].declined[0].reason
    after = FactorBlockDiagonal(rank=9, include=("*",))(one())
    assert "stays dense" in after.records[-1].declined[0].reason


@pytest.mark.parametrize("form", FORMS)
def test_compiled(form):
    """A factored vision transformer compiles and agrees with PyTorch."""
    after = FactorBlockDiagonal(keep=0.5, form=form, blocks=2)(tiny("deit_s"))
    assert after.records[-1].changed == {"linear": 4}
    with graphopt.compile(after) as bundle:
        assert bundle.manifest.verification.passed
