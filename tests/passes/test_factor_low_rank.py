"""factor-low-rank: full rank is the layer itself, the data decides what is lost, budgets are met."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.cost import summary
from graphopt.errors import BadOption, BudgetUnreachable
from graphopt.passes.factor_low_rank import FactorLowRank
from graphopt.passes.sizes import amount
from graphopt.shrink import shrink
from tests.programs import assert_same, ops, program_of, tiny


@pytest.fixture(autouse=True)
def _seeded():
    """Layers are made with the same weights in every run."""
    torch.manual_seed(0)


def mlp(ins=24, hidden=96, outs=24, tokens=5, decay=0.85, bias=True):
    """Linear, GELU, linear; singular values that fall by `decay`."""
    generator = torch.Generator().manual_seed(1)
    first, second = nn.Linear(ins, hidden, bias=bias), nn.Linear(hidden, outs, bias=bias)
    with torch.no_grad():
        for layer in (first, second):
            u, s, vh = torch.linalg.svd(torch.randn(layer.weight.shape, generator=generator), full_matrices=False)
            layer.weight.copy_(u * decay ** torch.arange(len(s)) @ vh)
    x = torch.randn(tokens, ins, generator=generator)
    return program_of(lambda s, x: s.b(torch.nn.functional.gelu(s.a(x))), x, a=first, b=second)


def weights(program) -> dict[str, torch.Tensor]:
    specs = program.exported.graph_signature.input_specs
    return {spec.target: program.tensors[spec.arg.name] for spec in specs if spec.arg.name in program.tensors}


def test_one_layer_becomes_two():
    """The picture: two thin linear layers under the user's names, the bias behind."""
    before = mlp()
    after = FactorLowRank(rank=4, include=("a",))(before)
    assert ops(after) == ["linear", "linear", "gelu", "linear"]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(after).items()}
    assert shapes == {
        "a.bias": (96,), "b.weight": (24, 96), "b.bias": (24,),
        "a.front.weight": (4, 24), "a.back.weight": (96, 4),
    }  # fmt: skip
    assert after.records[-1].changed == {"linear": 1}
    assert after.records[-1].params_after == summary(after).total.params


def test_singular_values_that_are_zero_cost_nothing():
    """A layer of rank 3 is the same layer at rank 3, and no longer at rank 2."""
    before = mlp(decay=1.0)
    low = nn.Linear(24, 40)
    with torch.no_grad():
        low.weight.copy_(torch.randn(40, 3) @ torch.randn(3, 24))
    before = program_of(lambda s, x: s.low(x), torch.randn(5, 24), low=low)
    same = FactorLowRank(rank=3, include=("*",))(before)
    assert_same(before, same, tolerance=1e-4)
    with pytest.raises(AssertionError):
        assert_same(before, FactorLowRank(rank=2, include=("*",))(before), tolerance=1e-2)


def test_truncation_is_the_nearest_matrix():
    """What is lost is the squared sum of the dropped singular values (Eckart and Young)."""
    before = mlp()
    after = FactorLowRank(rank=6, include=("a",))(before)
    dense, found = weights(before)["a.weight"], weights(after)
    product = found["a.back.weight"] @ found["a.front.weight"]
    expected = torch.linalg.svdvals(dense.double())[6:].square().sum()
    torch.testing.assert_close((dense - product).double().square().sum(), expected, rtol=1e-4, atol=1e-6)


def test_data_decides_what_is_lost():
    """On inputs from a subspace the factors are exact there; without data they are not, and with it never worse."""
    layer = nn.Linear(32, 32)
    x = torch.randn(64, 5) @ torch.randn(5, 32) + 3.0
    before = program_of(lambda s, x: s.layer(x), x, layer=layer)
    name = before.inputs[0].name
    blind = FactorLowRank(rank=5, include=("*",))(before)
    aware = FactorLowRank(rank=5, include=("*",), calibration=[{name: x}])(before)
    wanted = before(x)
    assert (aware(x) - wanted).abs().max() < 1e-4
    assert (blind(x) - wanted).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["flops", "params", "macs", "bytes"])
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_budgets_are_met(kind, share):
    """Within two per cent from below, on the whole program."""
    before = mlp(ins=128, hidden=512, outs=128)
    after = FactorLowRank(Budget(kind, share))(before)
    got = amount(after, kind) / amount(before, kind)
    assert share - 0.02 <= got <= share


def test_energy_decides_where():
    """Of two equal layers the one whose singular values fall faster gets the lower rank."""
    steep, flat = nn.Linear(64, 64), nn.Linear(64, 64)
    with torch.no_grad():
        for layer, decay in ((steep, 0.7), (flat, 0.95)):
            u, _, vh = torch.linalg.svd(torch.randn(64, 64))
            layer.weight.copy_(u * decay ** torch.arange(64) @ vh)
    before = program_of(lambda s, x: s.flat(s.steep(x).relu()), torch.randn(5, 64), steep=steep, flat=flat)
    found = weights(FactorLowRank(Budget("params", 0.6), step=4)(before))
    assert len(found["steep.front.weight"]) < 16 < len(found.get("flat.front.weight", torch.empty(64, 64)))
    assert all(len(tensor) % 4 == 0 for name, tensor in found.items() if "front" in name)


def test_which_layers():
    """Feed-forward layers by default; patterns for others; the first network may stay dense."""
    before = tiny("deit_s")
    names = {name.removesuffix(".front.weight") for name in weights(FactorLowRank(rank=8)(before)) if "front" in name}
    assert names == {f"blocks.{n}.mlp.{m}" for n in (0, 1) for m in (0, 2)}
    later = FactorLowRank(rank=8, dense_first=True, exclude=("*.2",))(before)
    assert {name for name in weights(later) if "front" in name} == {"blocks.1.mlp.0.front.weight"}
    other = FactorLowRank(rank=8, include=("*.attention.out",))(before)
    assert other.records[-1].changed == {"linear": 2}


@pytest.mark.parametrize("layer", [
    nn.Conv2d(6, 20, 1), nn.Conv2d(6, 20, 3, stride=2, padding=1), nn.Conv2d(6, 20, (3, 5), padding=(2, 1)),
    nn.Conv2d(6, 20, 3, padding=2, dilation=2, bias=False),
])  # fmt: skip
@pytest.mark.parametrize("split", ["channel", "space"])
def test_convolutions_of_low_rank_are_kept(layer, split):
    """A convolution that is two thin ones is found to be that, whatever its stride, padding and dilation."""
    outs, ins, high, wide = layer.weight.shape
    with torch.no_grad():
        if split == "space":
            front, back = torch.randn(2, ins, high), torch.randn(outs, 2, wide)
            layer.weight.copy_(torch.einsum("riy,orx->oiyx", front, back))
        else:
            layer.weight.copy_((torch.randn(outs, 2) @ torch.randn(2, ins * high * wide)).view_as(layer.weight))
    before = program_of(lambda s, x: s.layer(x), torch.randn(2, 6, 9, 12), layer=layer)
    name = before.inputs[0].name
    for data in (None, [{name: torch.randn(2, 6, 9, 12)}]):
        after = FactorLowRank(rank=2, include=("*",), split=split, calibration=data)(before)
        assert ops(after) == ["conv2d", "conv2d"]
        assert_same(before, after, tolerance=1e-3)
        assert summary(after).total.macs < summary(before).total.macs


def test_data_of_convolutions():
    """At full output rank on patches, what comes out on the data is what came out."""
    x = torch.randn(1, 4, 3, 3)
    before = program_of(lambda s, x: s.layer(x), x, layer=nn.Conv2d(4, 64, 3, stride=2, padding=1))
    after = FactorLowRank(rank=3, include=("*",), calibration=[{before.inputs[0].name: x}])(before)
    torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-4)  # four positions less their mean: rank 3


def test_the_new_axis_shrinks():
    """Axis inference finds the rank as a free axis, and a shrink of it is a lower rank."""
    before = mlp()
    eight = FactorLowRank(rank=8)(before)
    axes = infer(eight)
    ranks = [axis for axis in axes.free() if axis.extent == 8]
    assert len(ranks) == 2
    four = shrink(axes, {axis: range(4) for axis in ranks})
    assert_same(FactorLowRank(rank=4)(before), four, tolerance=1e-5)


def test_left_alone():
    """No gain, a shared weight, a weight made at run time: each is said."""
    small = nn.Linear(8, 8)
    before = program_of(lambda s, x: s.small(x), torch.randn(2, 8), small=small)
    after = FactorLowRank(rank=4, include=("*",))(before)
    assert ops(after) == ["linear"]
    assert "stays dense" in after.records[-1].declined[0].reason
    twice = program_of(lambda s, x: s.a(s.a(x).relu()), torch.randn(2, 32), a=nn.Linear(32, 32))
    declined = FactorLowRank(rank=4, include=("*",))(twice).records[-1].declined
    assert {item.reason for item in declined} == {"its weight is used more than once"}


def test_bad_options():
    """None or two amounts, a budget that cannot be met, one that has to be measured."""
    for options in ({}, {"rank": 3, "keep": 0.5}):
        with pytest.raises(BadOption, match="one of budget, keep and rank"):
            FactorLowRank(**options)(mlp())
    with pytest.raises(BudgetUnreachable, match="the least reachable is 0"):
        FactorLowRank(Budget("flops", 0.01))(mlp())
    with pytest.raises(BadOption, match="latency"):
        FactorLowRank(Budget("latency", 0.5))(mlp())


def test_compiled():
    """A factored vision transformer compiles and agrees with PyTorch."""
    after = FactorLowRank(keep=0.5)(tiny("deit_s"))
    with graphopt.compile(after) as bundle:
        assert bundle.manifest.verification.passed
