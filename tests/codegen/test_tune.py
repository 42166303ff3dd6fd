"""Choices by measured times: what is measured, within which time, and that records decide."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from graphopt.codegen.kernel_times import SIDES, KernelTimes, Layer, Side, Times, program_names
from graphopt.codegen.layout import MEASURED_GAIN
from graphopt.codegen.prepare import prepare
from graphopt.codegen.select import select
from graphopt.codegen.sparse_weights import SparseWeight
from graphopt.codegen.tune import alone, built, run, tune
from graphopt.cost import LatencyTable
from graphopt.program import Program
from graphopt.targets import resolve
from graphopt.targets.timing import timing_runner
from tests.codegen.test_layout_choice import convnet, linear, mlp
from tests.programs import program_of

CPU, WASM = resolve("cpu"), resolve("wasm")


def table_of(program: Program, **seconds: float) -> LatencyTable:
    """Records of all kernels that the program's choices depend on: `dense` and `sparse` seconds, the same for all."""
    table = LatencyTable("wasm", machine="made up")
    tune(program, WASM, _unnetted(table), seconds=1e6, clock=lambda name, _: seconds[side_of(name)])
    return table


def side_of(name: str) -> str:
    """The side of a record: of a layer's kernel, or of a program."""
    return "dense" if name.endswith(" dense") else "sparse"


def _unnetted(table: LatencyTable) -> LatencyTable:
    """The table, with nothing to be taken off of what a clock gives."""
    table.__dict__["_empty_seconds"] = 0.0
    return table


def entries(program: Program, table: LatencyTable) -> dict[str, SparseWeight]:
    """What was weighed, by weight."""
    return {entry.weight: entry for entry in prepare(program, WASM, KernelTimes(WASM, table.records))[1]}


def test_records_decide_about_linear_layers() -> None:
    """A layer that estimates would have sparse is dense where it was measured to be faster so, and back."""
    program = mlp(0.1)
    assert prepare(program, WASM)[1][0].picked
    slow = entries(program, table_of(program, dense=1e-5, sparse=2e-5))["a.weight"]
    assert not slow.picked
    assert slow.reason == "dense is faster, as measured"
    assert (slow.dense_measured_us, slow.sparse_measured_us) == (10.0, 20.0)
    assert slow.dense_us is not None
    assert slow.sparse_us is not None
    assert slow.sparse_us < slow.dense_us
    fast = entries(program, table_of(program, dense=1e-5, sparse=MEASURED_GAIN * 0.99e-5))["a.weight"]
    assert fast.picked
    assert fast.reason == "1.04 times as fast, as measured"


def test_records_decide_about_images() -> None:
    """The whole network lies as its layers together were measured to be faster."""
    program = convnet(0.05)
    for sparse in (2e-5, 0.5e-5):
        found = entries(program, table_of(program, dense=1e-5, sparse=sparse))
        assert [entry.picked for entry in found.values()] == [sparse < 1e-5] * 2
        layout = "NCHW: 20 us beats 40 us" if sparse < 1e-5 else "NHWC: 40 us beats 80 us"
        assert {entry.reason for entry in found.values()} == {f"the network's images are {layout}, as measured"}


def test_the_program_as_a_whole_has_the_last_word() -> None:
    """Where it is slower with the sparse kernels that its layers would have, it gets dense ones, and says so."""
    for program in (mlp(0.1), convnet(0.05)):
        table = table_of(program, dense=1e-5, sparse=0.5e-5)
        assert all(entry.picked for entry in entries(program, table).values())
        for name in table.records:
            if name.startswith("program ") and side_of(name) == "sparse":
                table.records[name] = 2e-5
        found = entries(program, table)
        assert found
        assert not any(entry.picked for entry in found.values())
        reason = "the program as a whole is slower with sparse kernels: 20 us to 10 us, as measured"
        assert {entry.reason for entry in found.values()} == {reason}
        dense = prepare(program, WASM, KernelTimes(WASM, table.records))[0]
        assert "spmm" not in {chosen.template for chosen in select(dense, WASM).calls.values()}


def test_records_of_another_program_do_not_count() -> None:
    """Other weights, or other layers picked, are another program."""
    first, second = mlp(0.1), mlp(0.2)
    assert program_names(first, ["a.weight"]) == program_names(mlp(0.1), ["a.weight"])
    assert not set(program_names(first, ["a.weight"])) & set(program_names(second, ["a.weight"]))
    sparse, dense = zip(*(program_names(first, names) for names in (["a.weight"], ["b.weight"])), strict=True)
    assert len(set(sparse)) == 2
    assert len(set(dense)) == 1


def test_layers_without_records_count_as_the_others_are_off() -> None:
    """Estimates of what was not measured are scaled by what the measured ones differ from theirs."""
    program = convnet(0.05)
    table = table_of(program, dense=1e-5, sparse=0.5e-5)
    dropped = next(name for name in table.records if "[float32:128x64x1x1]" in name)
    del table.records[dropped]
    found = entries(program, table)
    assert found["one.weight"].dense_measured_us is None
    assert found["two.weight"].dense_measured_us == 10.0
    assert found["two.weight"].reason.endswith(", 3 of 4 layers as measured")


def test_without_records_nothing_changes() -> None:
    """Empty records leave every entry and the module as without any."""
    for program in (mlp(0.1), convnet(0.1)):
        (plain, own), (module, found) = prepare(program, WASM), prepare(program, WASM, KernelTimes(WASM, {}))
        assert own == found
        assert plain.script() == module.script()


def test_each_kernel_is_timed_once() -> None:
    """Equal layers share records, equal shapes with other zeros share the dense one, and what is known is not timed."""
    layers = {"a": linear(64, 64, 0.1), "b": linear(64, 64, 0.1), "c": linear(64, 64, 0.5)}
    program = program_of(lambda net, x: net.c(net.b(net.a(x).relu()).relu()), torch.randn(32, 64), **layers)
    table, timed = _unnetted(LatencyTable("wasm")), list[str]()

    def clock(name: str, _: object) -> float:
        timed.append(name)
        return 1e-5 if side_of(name) == "dense" else 0.5e-5

    done = tune(program, WASM, table, seconds=1e6, clock=clock)
    assert (done.wanted, done.new, done.missing) == (5, 5, 0)
    assert len(timed) == len(set(timed)) == 5
    assert [name.partition("(")[0] for name in timed[:3]] == ["linear"] * 3
    assert sum(name.endswith(" dense") for name in timed[:3]) == 1
    assert all(name.startswith("program ") for name in timed[3:])
    assert tune(program, WASM, table, seconds=1e6, clock=clock).new == 0
    assert len(timed) == 5


def test_the_budget_of_time_holds() -> None:
    """What matters most comes first, and nothing is started that would not be done in time."""
    program = convnet(0.05)
    table, timed = _unnetted(LatencyTable("wasm")), list[str]()

    def clock(name: str, _: object) -> float:
        timed.append(name)
        time.sleep(0.4)
        return 1e-5

    prepare(program, WASM)  # what is slow only the first time
    done = tune(program, WASM, table, seconds=1.5, clock=clock)
    assert len(timed) <= 4  # none starts behind 1.5 s, and each takes 0.4, however slow the machine
    assert 0 < done.new < done.wanted
    assert done.missing == done.wanted - done.new
    assert all("[float32:64x128x3x3]" in name for name in timed[:2])


def test_what_is_annotated_dense_is_not_timed_sparse() -> None:
    """A linear layer that is to be dense is no choice; of a convolution only the dense kernel matters."""
    assert not table_of(graphopt.annotate(mlp(0.1), {"a.weight": "dense"}), dense=1e-5, sparse=1e-5).records
    program = graphopt.annotate(convnet(0.05), {"two.weight": "dense"})
    names = table_of(program, dense=1e-5, sparse=1e-5).records
    assert [name.rpartition(" ")[2] for name in names if "[float32:64x128x3x3]" in name] == ["dense"]


@pytest.mark.parametrize(
    ("kind", "side", "template"),
    [
        ("linear", "dense", "gemm"),
        ("linear", "sparse", "spmm"),
        ("conv", "dense", "conv2d"),
        ("conv", "sparse", "spmm"),
    ],
)
def test_layers_alone_run_on_the_kernel_in_question(kind: str, side: Side, template: str) -> None:
    """With the template of the whole program; images without transposes, turned linear layers with both."""
    times = KernelTimes(WASM)
    prepare(mlp(0.1) if kind == "linear" else convnet(0.1, sparse=("two",)), WASM, times)
    layer = max((w for w in times.wanted.values() if w.side == side), key=lambda w: w.cycles).layer
    module = alone(layer, side)
    assert [chosen.template for chosen in select(module, WASM).calls.values()].count(template) == 1
    assert module.script().count("permute_dims") == (2 if (kind, side) == ("linear", "sparse") else 0)


@pytest.mark.parametrize("target", [CPU, WASM], ids=str)
def test_kernels_are_timed_where_they_run(target: graphopt.targets.Target) -> None:
    """Both kernels of a layer with hardly any blocks: the sparse one takes less."""
    assert timing_runner(target)
    weight = np.zeros((512, 512), np.float32)
    weight[:, :16] = 1.0
    layer = Layer((64, 512), weight, 16 / 512, "8x1")
    dense, sparse = (run("", partial(built, layer, side), target=target) for side in SIDES)
    assert 0 < sparse < dense


def test_names_tell_layers_apart() -> None:
    """Shapes, arguments, format and share are in the name; what does not matter to a kernel is not."""
    weight = np.zeros((8, 4), np.float32)
    layer = Layer((3, 8), weight, 0.1234, "4x1")
    assert layer.name("dense") == "linear(float32:3x8, [float32:8x4]) dense"
    assert layer.name("sparse") == "linear(float32:3x8, [float32:8x4]) sparse 4x1 0.12 kept"
    assert Layer((3, 8), weight, 0.5).name("sparse").endswith(" sparse unstructured 0.5 kept")
    times = KernelTimes(WASM)
    prepare(convnet(0.1), WASM, times)
    assert any("strides=1x1, padding=1x1x1x1, dilation=1x1, groups=64) dense" in name for name in times.wanted)


def test_records_are_in_seconds_and_times_in_cycles() -> None:
    """A record of one microsecond is 3000 cycles at the 3 GHz that estimates go by; half a record is none."""
    layer, estimate = Layer((3, 8), np.zeros((8, 4), np.float32), 0.1), Times(1.0, 2.0)
    names = [layer.name(side) for side in SIDES]
    assert KernelTimes(WASM, dict.fromkeys(names, 1e-6)).of(layer, estimate) == Times(3000.0, 3000.0)
    half = KernelTimes(WASM, {names[0]: 1e-6})
    assert half.of(layer, estimate) is None
    assert half.of(layer, estimate, ("dense",)) == Times(3000.0, 2.0)
    assert list(half.wanted) == names


def test_a_model_without_zeros_has_nothing_to_time() -> None:
    """Neither linear layers nor images are looked at."""
    program = program_of(lambda net, x: net.a(x), torch.randn(1, 3, 8, 8), a=nn.Conv2d(3, 4, 3))
    assert tune(program, WASM, LatencyTable("wasm"), seconds=10).wanted == 0
