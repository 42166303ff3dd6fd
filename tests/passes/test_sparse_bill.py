"""What a program costs by what stays of its weights: counts exactly, latency as estimated."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.cost import latency_model, summary
from graphopt.cost.sparse_product import sparse_seconds
from graphopt.edit import Edit
from graphopt.errors import BudgetUnreachable, NothingToCut
from graphopt.passes import make
from graphopt.passes.sparse_bill import Bill, bill
from graphopt.passes.sparse_layers import sparse_layers
from graphopt.program import Program
from graphopt.sparsity import parse_format
from graphopt.targets import resolve
from tests.passes.reducing import prepared
from tests.passes.sparsifying import convnet, details, nonzeros

WASM = resolve("wasm")


def bill_of(program: Program, kind: str, form: str = "4x1") -> tuple[Bill, np.ndarray]:
    """The costs of a program, and the sizes of its layers."""
    edit = Edit(program)
    layers = sparse_layers(edit, "test", (), ())
    sizes = np.array([float(layer.size) for layer in layers])
    return bill(edit, Budget(kind, 0.5), layers, parse_format(form), WASM), sizes


@pytest.mark.parametrize("kind", ["flops", "macs", "params", "latency"])
def test_nothing_zero_is_the_whole(kind: str) -> None:
    """With all elements it costs what the program does, and less with fewer."""
    program = convnet()
    found, sizes = bill_of(program, kind)
    total = summary(program).total
    whole = latency_model(infer(program), WASM)() if kind == "latency" else getattr(total, kind)
    assert found.whole == pytest.approx(whole)
    assert found.of(sizes) == pytest.approx(whole)
    costs = [found.of(sizes * keep) for keep in (0.0, 0.2, 0.4)]
    assert 0 < costs[0] < costs[1] < costs[2] < whole


def test_low_blocks_save_less() -> None:
    """Of the same share; and sparse kernels are never taken to be slower than dense ones."""
    times = [sparse_seconds(1.0, 0.3, rows) for rows in (1, 2, 4, 8, 16)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[1] > times[2] > times[3] == times[4] == pytest.approx(0.3)
    assert [sparse_seconds(2.0, share, 1) for share in (0.0, 0.9, 1.0)] == [0.0, 2.0, 2.0]


@pytest.mark.parametrize("target", [WASM, "wasm"], ids=["target", "name"])
def test_a_latency_is_met(target: object) -> None:
    """As much stays as the estimate allows."""
    before = prepared("resnet18")
    after = make("sparsify-blocks", format="4x1", budget=Budget("latency", 0.8), target=target)(before)
    assert any("an estimate" in note for note in after.records[-1].notes)
    found, sizes = bill_of(before, "latency")
    rows = details(after)
    edit = Edit(before)
    kept = np.array([rows[layer.name]["keep"] for layer in sparse_layers(edit, "test", (), ())]) * sizes
    assert 0.79 < found.of(kept) / found.whole < 0.801
    seconds = 0.8 * found.whole
    absolute = make("sparsify-blocks", format="4x1", budget=Budget("latency", seconds, absolute=True), target=target)
    assert nonzeros(absolute(before)) == nonzeros(after)


def test_latencies_that_cannot_be_met() -> None:
    """The least is named; without layers that is said."""
    before = prepared("resnet18")
    with pytest.raises(BudgetUnreachable, match="--latency"):
        make("sparsify-blocks", budget=Budget("latency", 1e-9), target=WASM)(before)
    with pytest.raises(NothingToCut, match="no layer to be made sparse"):
        make("sparsify-blocks", budget=Budget("latency", 0.5), target=WASM, exclude=("*",))(before)
