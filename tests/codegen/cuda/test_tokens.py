"""Sorts, scatters and what else token reduction adds, as CUDA kernels on the emulated driver."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.codegen.cuda.emulate import FORWARD, SHUFFLED, Emulator
from graphopt.codegen.cuda.lower import compile_program
from graphopt.targets import resolve
from tests.codegen.token_forms import Sizes, Tokens, data

TARGET = resolve("cuda:sm_80")


@pytest.mark.parametrize("b", [1, 3])
def test_every_form_equals_pytorch(b):
    """Ties, duplicates in order, odd sizes; and no result depends on the order of threads."""
    inputs = data(Sizes(b, 41, 37, 20, 30))
    program = graphopt.capture(Tokens(), inputs)
    artefact = compile_program(program, TARGET)
    with Emulator(artefact.cuda_source) as emulator:
        first, other = (
            emulator.run(artefact, [t.numpy() for t in inputs.values()], order) for order in (FORWARD, SHUFFLED + 5)
        )
    for got, again, want in zip(first, other, Tokens()(**inputs), strict=True):
        assert got.tobytes() == again.tobytes()
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-6)


def test_rows_are_added_by_a_block_each():
    """Rows of the same index meet in one block, in their order; no kernel has atomics."""
    program = graphopt.capture(Tokens(("scatter_add",)), data(Sizes(2, 41, 300, 20, 30)))
    artefact = compile_program(program, TARGET)
    assert "atomic" not in artefact.cuda_source
    rules = [kernel.template for kernel in artefact.kernels]
    assert rules.count("tvm-given") == 1
    launch = artefact.launches[-1]
    assert (launch.grid, launch.block) == ((40, 1, 1), (256, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_other_types_are_sorted_and_added(dtype):
    """Keys of 64 bits and halves, which are widened to compare; NaN is greater than everything."""

    class Net(torch.nn.Module):
        def forward(self, x, slots):
            best, place = x.max(-1)
            rows = x.scatter_add(0, slots[:, None].expand(-1, x.shape[1]), x)
            return *x.sort(dim=-1, descending=True, stable=True), *x.topk(5), best, place, rows

    x = torch.randint(-9, 9, (7, 33)).to(dtype)
    if dtype.is_floating_point:
        x[2, 5] = x[2, 9] = torch.nan
    slots = torch.tensor([1, 1, 0, 3, 3, 3, 6])
    artefact = compile_program(graphopt.capture(Net(), {"x": x, "slots": slots}), TARGET)
    with Emulator(artefact.cuda_source) as emulator:
        results = emulator.run(artefact, [x.numpy(), slots.numpy()], FORWARD)
    values, indices, _, _, best, place, rows = results
    want = Net()(x, slots)
    for got, right in ((values, want[0]), (indices, want[1]), (best, want[4]), (place, want[5]), (rows, want[6])):
        torch.testing.assert_close(torch.from_numpy(got), right, equal_nan=True)
