"""The emitted CUDA C of whole models: run on the CPU it computes what PyTorch computes, and it keeps a GPU's limits."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.codegen.cuda.emulate import FORWARD, REVERSE, SHUFFLED, Emulator
from graphopt.targets.cuda import GPUS
from tests.codegen.cuda.conftest import Compiled, as_float, compiled

TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 4e-2}
CASES = [
    ("mlp", "float32", "sm_90"),
    ("cnn", "float32", "sm_80"),
    ("cnn", "float16", "sm_80"),
    ("block", "float32", "sm_80"),
    ("block", "float16", "sm_90"),
    ("block", "bfloat16", "sm_80"),
]


@pytest.mark.parametrize(("name", "dtype", "arch"), CASES)
def test_models_agree_with_pytorch_and_keep_the_limits(name, dtype, arch):
    """Every order of threads gives the same bytes, PyTorch's result; no spills, no local arrays, enough occupancy."""
    made = compiled(name, dtype, f"cuda:{arch}")
    agrees(made, TOLERANCE[dtype])
    keeps_limits(made, arch)


def agrees(made: Compiled, tolerance: float) -> None:
    with Emulator(made.artefact.cuda_source) as emulator:
        results = [emulator.run(made.artefact, made.inputs, order) for order in (FORWARD, REVERSE, SHUFFLED + 5)]
    for result in results:
        for got, first, want in zip(result, results[0], made.want, strict=True):
            assert got.tobytes() == first.tobytes()
            assert np.abs(as_float(got) - want).max() <= tolerance * np.abs(want).max()


def keeps_limits(made: Compiled, arch: str) -> None:
    gpu = GPUS[arch]
    threads = {launch.kernel: launch.block[0] * launch.block[1] * launch.block[2] for launch in made.artefact.launches}
    assert {usage.kernel for usage in made.artefact.usage} == set(threads)
    for usage in made.artefact.usage:
        assert not usage.spills, usage
        assert usage.stack_bytes == 0, usage
        assert usage.shared_bytes <= gpu.static_shared_bytes, usage
        assert 2 * usage.registers * threads[usage.kernel] <= gpu.registers_per_sm, usage
        assert threads[usage.kernel] <= gpu.threads_per_block


def test_products_take_the_tile_and_windows_a_thread():
    """What each operator is scheduled as: convolutions as products, depthwise ones and pooling a thread per element."""
    artefact = compiled("cnn").artefact
    rules = {info.where: info.template for info in artefact.kernels}
    assert sorted(rules.values()).count("tvm-product") == 2
    assert [rule for where, rule in rules.items() if "max_pool" in where] == ["tvm-window"]
