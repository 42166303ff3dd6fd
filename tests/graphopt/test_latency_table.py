"""Measured latency: exact where something was measured, interpolated between; equal files; bounded in time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.axes import infer
from graphopt.capture import capture
from graphopt.cost import LatencyModel, LatencyTable, Polynomial, latency_model, summary
from graphopt.cost.latency import Grid
from graphopt.cost.latency_table import layers
from graphopt.passes.remove_noops import RemoveNoops
from graphopt.program import Program
from graphopt.targets import resolve
from tests.programs import program_of, tiny

HASWELL = resolve("cpu:haswell")


def model_of(program: Program) -> LatencyModel:
    return latency_model(infer(RemoveNoops()(program)), HASWELL)


def by_macs(program: Program) -> float:
    """A clock without a machine: a second per multiply-add."""
    return float(summary(program).total.macs)


def test_interpolation():
    """Exact at the points, linear in each coordinate between them, and as at the nearest beyond."""
    a = Polynomial(1)
    values = np.array([[x * y + 3.0 * x for y in (4, 6, 16)] for x in (2, 8)])
    grid = Grid((a, a), ((2, 8), (4, 6, 16)), values)
    for x, y in itertools.product((2, 3, 5, 8), (4, 5, 6, 9, 16)):
        assert grid.at([x, y]) == pytest.approx(x * y + 3 * x)
    assert grid.at([1, 20]) == grid.at([2, 16])
    assert Grid((a,), ((7,),), np.array([5.0])).at([3]) == 5.0
    assert Grid((), (), np.array(5.0)).at([]) == 5.0


def test_layers_of_a_whole_model():
    """With a clock that counts multiply-adds, which are linear in each extent, every size in reach comes out exact."""
    model = model_of(tiny("deit_s"))
    table = LatencyTable("cpu:haswell")
    products = [work for work in model.works if work.kind in ("product", "conv", "attention")]
    shares = (0.25, 1.0)
    new = table.measure(model, seconds=1000, shares=shares, clock=by_macs)
    assert new == len(table.records) > 0
    assert table.measure(model, seconds=1000, shares=shares, clock=by_macs) == 0
    measured = table.apply(model, shares)
    own = [work for work in measured.works if work in products and work.node in measured.measured]
    assert own
    cost = {row.node: row for row in model.cost.rows}
    free = model.cost.axes.free()
    for share in (1.0, 0.8, 0.51):
        sizes = {axis: max(1, round(axis.extent * share)) for axis in free}
        rows = dict(measured.rows(sizes))
        for work in own:
            assert rows[work] == pytest.approx(cost[work.node].at(sizes).macs), work.node


def test_equal_layers_are_measured_once():
    """Two blocks of the same sizes share their records; layers of other sizes and strides have their own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)), nn.Conv2d(8, 8, 3, stride=2))

        def forward(self, x):
            return self.body(x)

    model = model_of(capture(Net(), (torch.ones(1, 8, 8, 8),)))
    found = layers(model)
    assert sorted(len(layer.works) for layer in found) == [1, 1, 3]  # the first, the strided one, those between
    names = {name for layer in found for name in [layer.name([p[-1] for p in layer.points((1.0,))])]}
    conv = "conv2d(float32:1x8x8x8, [float32:8x8x3x3], [float32:8], [1, 1], [1, 1], groups=1)"
    assert conv in names
    assert len(names) == 2


def test_time_is_bounded():
    """No measurement starts after the time; what is not measured stays an estimate, scaled as the others are off."""
    model = model_of(tiny("deit_s"))
    table = LatencyTable("cpu:haswell")
    assert table.measure(model, seconds=0, clock=by_macs) == 0
    assert table.apply(model)() == model()
    first = layers(model)[0]
    for point in first.grid((0.25, 0.5, 1.0)):
        table.records[first.name(point)] = first.seconds * 3
    assert table.apply(model)() == pytest.approx(model() * 3)
    assert table.apply(model).corrected(1.0)() == pytest.approx(1.0)


def test_files(tmp_path):
    """Equal records give equal bytes, whatever their order; anything else is refused by name."""
    table = LatencyTable("cpu", 2, {"b": 1.23456e-5, "a": 2.0})
    table.save(tmp_path / "one.json")
    again = LatencyTable.load(tmp_path / "one.json")
    assert again == LatencyTable("cpu", 2, {"a": 2.0, "b": 1.235e-5})
    LatencyTable("cpu", 2, dict(sorted(again.records.items()))).save(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    for text in ("", "[]", "{}", '{"format": 2}', '{"format": 1, "target": "cpu", "threads": 1, "records": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json is no table of latencies"):
            LatencyTable.load(tmp_path / "bad.json")


def test_measured_here():
    """On this machine: a linear layer of two sizes, compiled and timed; positive, and the larger one not for free."""
    program = program_of(
        lambda s, x: s.b(s.a(x)), torch.ones(64, 256), a=nn.Linear(256, 256), b=nn.Linear(256, 16, bias=False)
    )
    axes = infer(program)
    model = latency_model(axes, resolve("cpu"))
    table = LatencyTable("cpu")
    assert table.measure(model, seconds=300, shares=(0.25, 1.0)) == 4
    measured = table.apply(model, (0.25, 1.0))
    (n,) = axes.free()
    assert 0 < measured({n: 64}) < measured() < 0.1
