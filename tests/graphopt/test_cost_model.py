"""Cost as polynomials: equal to the cost of the shrunk program, term by term, and to arithmetic done by hand."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.axes import Axes, Axis, infer
from graphopt.capture import capture
from graphopt.cost import Compiled, CostModel, Polynomial, cost_model, summary
from graphopt.passes.remove_noops import RemoveNoops
from graphopt.program import Program
from graphopt.shrink import shrink
from tests.models import TINY
from tests.programs import program_of, tiny

HF = ("bert", "gpt2", "llama", "convnext", "swin", "vit", "deit")
TOTALS = ("flops", "macs", "params", "bytes_read", "bytes_written", "bytes", "stored_bytes")


@cache
def modelled(name: str) -> tuple[Axes, CostModel]:
    """A model of the zoo, or of transformers where its name says so."""
    if name.startswith("hf_"):
        from tests import hf_models

        program = capture(*hf_models.HF[name.removeprefix("hf_")](), name=name)
    else:
        program = tiny(name)
    axes = infer(RemoveNoops()(program))  # views become reshapes, which fit whatever attention gives
    return axes, cost_model(axes)


def draw(axes: Axes, rng: random.Random, share: float) -> dict[Axis, int]:
    """Sizes of some of the axes that can be shrunk, from 1 to all."""
    return {axis: rng.randint(1, axis.extent) for axis in axes.free() if rng.random() < share}


def shrunk(axes: Axes, sizes: dict[Axis, int], rng: random.Random) -> Program:
    """The program with so many random items of each axis."""
    return shrink(axes, {axis: rng.sample(range(axis.extent), size) for axis, size in sizes.items()})


@pytest.mark.parametrize("name", [*TINY, *(f"hf_{name}" for name in HF)])
def test_equals_the_cost_of_the_shrunk_program(name):
    """Each node and every total, of the program as it is and with random sizes of single, some and all axes."""
    axes, model = modelled(name)
    assert model.at() == summary(axes.program).total
    assert model.stored_bytes() == summary(axes.program).stored_bytes
    rng = random.Random(name)
    for share in (0.2, 0.6, 1.0):
        sizes = draw(axes, rng, share)
        program = shrunk(axes, sizes, rng)
        after = summary(program)
        assert {row.name: row.at(sizes) for row in model.rows} == {row.name: row.cost for row in after.rows}
        assert model.at(sizes) == after.total
        assert model.stored_bytes(sizes) == after.stored_bytes
        again = cost_model(infer(program))
        assert again.at() == after.total
        assert again.peak_memory() == model.peak_memory(sizes)


@pytest.mark.parametrize("name", ["resnet18", "llama", "swin", "crnn"])
def test_compiled_is_exact(name):
    """Many sizes at once, what one axis less would save, and peak memory: the same integers as one by one."""
    axes, model = modelled(name)
    rng = random.Random(name)
    many = [draw(axes, rng, 0.7) for _ in range(20)]
    compiled = model.compiled(TOTALS)
    table = np.stack([compiled.sizes(sizes) for sizes in many])
    values = [[model.total[key](sizes) for key in TOTALS] for sizes in many]
    assert compiled(table).tolist() == values
    assert compiled(table.reshape(4, 5, -1)).reshape(20, -1).tolist() == values
    peaks = model.memory.compiled(model.variables)
    assert peaks(table).tolist() == [model.peak_memory(sizes) for sizes in many]
    step = np.minimum(np.arange(len(model.variables)) % 3 + 1, compiled.full - 1)
    less = compiled.decreases(compiled.full, step)
    for place, axis in enumerate(model.variables):
        smaller = {axis: axis.extent - int(step[place])}
        assert less[place].tolist() == [model.total[key]() - model.total[key](smaller) for key in TOTALS]
    rows = model.compiled_rows("macs")
    assert rows(table).sum(axis=-1).tolist() == [model.at(sizes).macs for sizes in many]


# By hand --------------------------------------------------------------------------------------------------------------


def model_of(function, *examples, **modules) -> tuple[Axes, CostModel]:
    axes = infer(program_of(function, *examples, **modules))
    return axes, cost_model(axes)


def test_linear_layers():
    """Neurons n between 12 inputs and 5 outputs, a batch of 4."""
    axes, model = model_of(lambda s, x: s.b(s.a(x).relu()), torch.ones(4, 12), a=nn.Linear(12, 7), b=nn.Linear(7, 5))
    (n,) = axes.free()
    assert str(model.total["macs"]) == f"68 {n.label}"  # 4 * (12 + 5) n
    assert model.total["flops"] == Polynomial({(n,): 2 * 68 + 4 + 4, (): 4 * 5})  # bias and relu of n, bias of 5
    assert model.total["params"] == Polynomial({(n,): 12 + 1 + 5, (): 5})
    # Read: x, weight, bias; the hidden layer twice; weight and bias. Written: n, n, 5 for each of 4.
    read = Polynomial({(n,): 12 + 1 + 2 * 4 + 5, (): 4 * 12 + 5}) * 4
    assert model.total["bytes"] == read + Polynomial({(n,): 8, (): 20}) * 4
    assert model.total["stored_bytes"] == model.total["params"] * 4
    assert model.at({n: 3}).params == 18 * 3 + 5


def test_convolutions():
    """A plain, a grouped and a depthwise one: (o i k k) multiply-adds a pixel, less where groups keep to themselves."""
    axes, model = model_of(
        lambda s, x: s.c(s.b(s.a(x))),
        torch.ones(1, 3, 8, 8),
        a=nn.Conv2d(3, 12, 3, bias=False),
        b=nn.Conv2d(12, 12, 3, groups=12, bias=False),
        c=nn.Conv2d(12, 5, 1, stride=2, bias=False),
    )
    (c,) = axes.free()
    assert model.total["macs"] == Polynomial({(c,): 36 * 27 + 16 * 9 + 4 * 5})
    axes, model = model_of(
        lambda s, x: s.c(s.b(s.a(x))),
        torch.ones(1, 3, 4, 4),
        a=nn.Conv2d(3, 8, 1, bias=False),
        b=nn.Conv2d(8, 12, 3, groups=4, padding=1, bias=False),
        c=nn.Conv2d(12, 5, 1, bias=False),
    )
    g, i, o = axes.free()  # groups; channels into and out of each
    assert (g.extent, i.extent, o.extent) == (4, 2, 3)
    expected = Polynomial({tuple(sorted((g, i), key=id)): 16 * 3})
    expected += Polynomial({tuple(sorted((g, i, o), key=id)): 16 * 9})
    assert model.total["macs"] == expected + Polynomial({tuple(sorted((g, o), key=id)): 16 * 5})


class Attention(nn.Module):
    """Self-attention over 6 tokens of 10 channels: query heads in groups that share a head of keys and values."""

    def __init__(self, heads: int, groups: int, dim: int) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = heads, groups, dim
        self.q = nn.Linear(10, heads * groups * dim, bias=False)
        self.k, self.v = (nn.Linear(10, heads * dim, bias=False) for _ in range(2))
        self.o = nn.Linear(heads * groups * dim, 10, bias=False)

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.groups > 1)
        return self.o(y.transpose(1, 2).reshape(1, 6, -1))


@pytest.mark.parametrize(("heads", "groups"), [(3, 1), (3, 2)])
def test_attention(heads, groups):
    """Heads h, query heads for each g, dimensions of queries d and of values v; grouped or not."""
    axes = infer(capture(Attention(heads, groups, 4), (torch.ones(1, 6, 10),)))
    model = cost_model(axes)
    shapes = dict(zip([row.where for row in model.rows], model.rows, strict=True))
    assert len(shapes) == len(model.rows)
    found = {axis: axes.role(axis) for axis in axes.free()}
    sizes = {}
    for axis, role in found.items():
        sizes[axis] = {"head": 2, "query_group": 1, "head_dim": 3}[role]
    h, g = 2, 1
    d = v = 3
    macs = 6 * 10 * (h * g * d + h * d + h * v + h * g * v) + h * g * 6 * 6 * (d + v)
    assert model.at(sizes).macs == macs
    h, g, d, v = heads, groups, 4, 4
    assert model.at().macs == 6 * 10 * (h * g * d + h * d + h * v + h * g * v) + h * g * 6 * 6 * (d + v)
    assert sorted(found.values()) == sorted(["head", "head_dim", "head_dim", *["query_group"] * (groups > 1)])


def test_concatenation_adds():
    """A layer that reads a + b channels costs the sum, and each may shrink on its own."""
    axes, model = model_of(
        lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], -1)),
        torch.ones(1, 4),
        a=nn.Linear(4, 6, bias=False),
        b=nn.Linear(4, 3, bias=False),
        c=nn.Linear(9, 2, bias=False),
    )
    a, b = axes.free()
    assert model.total["macs"] == Polynomial({(a,): 6, (b,): 6})
    assert model.total["params"]({a: 2}) == 6 * 2 + 6 * 3


def test_peak_memory():
    """What is alive together, views in the memory of what they view, a branch until it is added."""
    axes, model = model_of(lambda s, x: s.b(s.a(x).relu()), torch.ones(4, 12), a=nn.Linear(12, 7), b=nn.Linear(7, 5))
    (n,) = axes.free()
    assert model.peak_memory() == 4 * 4 * (7 + 7)  # the layer and its relu, then the relu and the outputs
    assert model.peak_memory({n: 2}) == 4 * 4 * (2 + 5)
    assert [str(p) for p in model.memory.polynomials] == [f"32 {n.label}", f"16 {n.label} + 80"]
    _, model = model_of(lambda s, x: x.exp().view(2, 3).t().exp() + 1, torch.ones(6))
    assert model.peak_memory() == 2 * 6 * 4
    _, model = model_of(lambda s, x: (y := x.exp()) + y.exp().exp().sum(), torch.ones(6))
    assert model.peak_memory() == 3 * 6 * 4
    _, model = model_of(lambda s, x: x.view(2, 3), torch.ones(6))
    assert model.peak_memory() == 0


# Polynomials ----------------------------------------------------------------------------------------------------------


def test_arithmetic():
    """Sums and products with polynomials and integers; terms that cancel are gone."""
    a, b = Axis(5), Axis(7)
    x, y = Polynomial.of(a), Polynomial.of(b)
    p = (x + 2) * (y + x * 3) - 2 * y
    assert p == 3 * x * x + 6 * x + x * y
    assert p() == 3 * 25 + 30 + 35
    assert p({a: 2, b: 3}) == 12 + 12 + 6
    assert x - x == 0
    assert not x - x
    assert Polynomial(4) == 4
    assert hash(x * y) == hash(y * x)
    assert set(p.variables) == {a, b}


def test_pinned_atoms_are_numbers():
    """What cannot shrink is part of the coefficients."""
    a = Axis(5)
    a.pinned = "program input"
    assert Polynomial.of(a) == 5
    assert str(Polynomial.of(a, varies=lambda atom: True) * 2) == "2 ?"


def test_nothing_to_compile():
    """Constants, zeros and no polynomials at all."""
    a = Axis(5)
    compiled = Compiled([Polynomial(3), Polynomial(0), Polynomial.of(a)], [a])
    assert compiled([[5], [2]]).tolist() == [[3, 0, 5], [3, 0, 2]]
    assert compiled.decreases([5], 2).tolist() == [[0, 0, 2]]
    assert Compiled([], [a])([5]).tolist() == []


def test_sizes_out_of_range():
    """More than there is, or nothing, is refused; so is an axis that consists of others."""
    axes, model = model_of(lambda s, x: s.b(s.a(x)), torch.ones(1, 4), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    (n,) = axes.free()
    for size in (0, 7):
        with pytest.raises(ValueError, match=f"a size of {size} for"):
            model.at({n: size})
