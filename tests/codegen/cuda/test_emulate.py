"""The emulator models what kernels rely on, and notices what a GPU would not."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tvm import te

from graphopt.codegen.cuda.artefact import KernelLaunch
from graphopt.codegen.cuda.emulate import FORWARD, REVERSE, SHUFFLED, EmulationFailed, Emulator, host_source
from graphopt.codegen.cuda.kernels import generate
from graphopt.codegen.cuda.schedule import as_module, schedule
from graphopt.targets import resolve

TARGET = resolve("cuda:sm_80")


def test_a_missing_barrier_is_noticed():
    """Each __syncthreads of a matrix product, left out, changes the result in some order of threads."""
    m, n, k = 33, 70, 61
    a, b = te.placeholder((m, k), name="a"), te.placeholder((n, k), name="b")
    axis = te.reduce_axis((0, k), name="k")
    c = te.compute((m, n), lambda i, j: te.sum(a[i, axis] * b[j, axis], axis=axis), name="c")
    rule, func = schedule("product", te.create_prim_func([a, b, c]), TARGET)
    assert rule == "product"
    made = generate(as_module({"product": func}), TARGET)
    (launch,) = made.launches["product"]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, np.float32) for shape in ((m, k), (n, k), (m, n))]
    want = arrays[0] @ arrays[1].T
    given = KernelLaunch(launch.kernel, launch.grid, launch.block, launch.dynamic_shared_bytes, ())

    def wrong_orders(source: str) -> int:
        count = 0
        with Emulator(source) as emulator:
            for order in (FORWARD, REVERSE, SHUFFLED):
                arrays[2][:] = np.nan
                emulator.launch(given, [arrays[i].ctypes.data for i in launch.arguments], order)
                count += not np.allclose(arrays[2], want, atol=1e-4)
        return count

    assert wrong_orders(made.source) == 0
    barriers = [found.start() for found in re.finditer(r"__syncthreads\(\);", made.source)]
    assert len(barriers) == 2
    for at in barriers:
        assert wrong_orders(made.source[:at] + ";" + made.source[at + len("__syncthreads();") :]) > 0, made.source[at:]


HEAD = 'extern "C" __global__ void __launch_bounds__(64) '


def run_kernel(body: str, *arrays: np.ndarray, threads: int = 64, order: int = FORWARD) -> None:
    names = ", ".join(f"{t} x{i}" for i, t in enumerate(["float*", "float*"][: len(arrays)]))
    source = f"{HEAD}k({names}) {{\n{body}\n}}\n"
    with Emulator(source) as emulator:
        launch = KernelLaunch("k", (1, 1, 1), (threads, 1, 1), 0, ())
        emulator.launch(launch, [a.ctypes.data for a in arrays], order)


def test_shuffles_and_partial_warps():
    """A tree sum over lanes of which only some take part, by mask and by __activemask."""
    x = np.arange(64, dtype=np.float32)
    y = np.zeros(2, np.float32)
    run_kernel(
        """  float v = x0[threadIdx.x];
  if (threadIdx.x % 32 < 8) {
    unsigned mask = __activemask();
    for (int d = 4; d > 0; d >>= 1) v += __shfl_down_sync(mask, v, d, 32);
    if (threadIdx.x % 32 == 0) x1[threadIdx.x / 32] = v;
  }""",
        x,
        y,
        order=SHUFFLED,
    )
    assert y.tolist() == [x[:8].sum(), x[32:40].sum()]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("  if (threadIdx.x < 7) return;\n  __syncthreads();", "7 threads ended without reaching a barrier"),
        ("  if (threadIdx.x < 7) __syncthreads();\n  else\n __syncthreads();", "different barriers, lines 2 and 4"),
        (
            "  if (threadIdx.x < 7) x0[0] = __shfl_sync(0xffffffffu, x0[0], 0);",
            "lanes 0xffffff80 are in the mask",
        ),
        (
            "  __shared__ alignas(16) float s[4];\n  s[threadIdx.x % 5] = 0;\n  __syncthreads();",
            "past the end of its shared memory",
        ),
    ],
)
def test_broken_rules_are_reported(body, message):
    """What hangs or corrupts on a GPU is an error here, with the kernel's name."""
    with pytest.raises(EmulationFailed, match=f"^k: .*{re.escape(message)}"):
        run_kernel(body, np.zeros(64, np.float32))


def test_shared_memory_starts_as_nan():
    """What a block has not written itself is no number, in every block."""
    y = np.zeros(64, np.float32)
    run_kernel("  __shared__ float s[64];\n  x0[threadIdx.x] = s[threadIdx.x];", y)
    assert np.isnan(y).all()


def test_source_that_does_not_compile_is_an_error():
    """The compiler's message comes through."""
    with pytest.raises(EmulationFailed, match="no_such_function"):
        run_kernel("  no_such_function();", np.zeros(1, np.float32))


def test_kernels_without_barriers_run_as_loops():
    """A fiber per thread is only for those that wait."""
    text = host_source(f"{HEAD}k(float* x) {{\n  x[threadIdx.x] = 1;\n}}\n")
    assert "launch<body_k>(geometry, 0, false" in text
