"""Build kernels for this machine, call them on numpy arrays, and count instructions in what other targets get."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import relax
from tvm.tirx import PrimFunc

from graphopt.codegen.build import build_llvm, build_object
from graphopt.codegen.dataflow import Dataflow
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.errors import Decline
from graphopt.targets.target import AVX2, KIB, MIB, NEON, SIMD128, Target

HOST = Target(
    spec="test-x86",
    kind="cpu",
    llvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
    zig="x86_64-linux-gnu",
    zig_cpu="x86_64_v3",
    isa=AVX2,
    l1d_bytes=32 * KIB,
    l2_bytes=512 * KIB,
    source="tests",
)
ARM = Target(
    spec="test-arm",
    kind="arm",
    llvm={"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76", "mattr": ["+neon"]},
    zig="aarch64-linux-gnu",
    zig_cpu="cortex_a76",
    isa=NEON,
    l1d_bytes=64 * KIB,
    l2_bytes=512 * KIB,
    source="tests",
)
WASM = Target(
    spec="test-wasm",
    kind="wasm",
    llvm={"kind": "llvm", "mtriple": "wasm32-unknown-unknown", "mattr": ["+simd128"]},
    zig="wasm32-freestanding",
    zig_cpu="generic+simd128",
    isa=SIMD128,
    l1d_bytes=32 * KIB,
    l2_bytes=MIB,
    source="tests",
    threads=False,
)

RUNTIME = """
#include <stdint.h>
#include <stdlib.h>
#include <pthread.h>
typedef struct { void *sync; int32_t tasks; } Env;
typedef int (*Body)(int, void *, void *);
/* Three tasks, one after the other: enough to show a race in the split of the work, and repeatable. */
int TVMBackendParallelLaunch(Body body, void *data, int tasks) {
    int n = tasks > 0 ? tasks : TASKS;
    Env env = {0, n};
    for (int i = 0; i < n; i++) { int e = body(i, &env, data); if (e) return e; }
    return 0;
}
int TVMFFIEnvModRegisterSystemLibSymbol(const char *name, void *symbol) { return 0; }
"""


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at a 64-byte boundary: kernels load whole vectors."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


FENCE = 256  # bytes on both sides of a fenced array


def fenced(array: np.ndarray) -> tuple[np.ndarray, Callable[[], bool]]:
    """A copy as `aligned` makes it, between bytes that are NaN as floats; and whether those still are."""
    raw = np.full(array.nbytes + 2 * FENCE + 64, 0xFF, np.uint8)
    start = FENCE + -(raw.ctypes.data + FENCE) % 64
    end = start + array.nbytes
    copy = raw[start:end].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy, lambda: bool((raw[:start] == 0xFF).all() and (raw[end:] == 0xFF).all())


class Library:
    """Kernels of this machine as Python functions over arrays; the last argument of a kernel is what it writes."""

    def __init__(self, kernels: Mapping[str, PrimFunc], folder: Path, tasks: int = 3) -> None:
        objects = folder / "kernels.o"
        build_object(kernels, HOST, objects)
        (folder / "runtime.c").write_text(RUNTIME)
        shared = folder / "kernels.so"
        command = [sys.executable, "-m", "ziglang", "cc", "-O2", "-shared", "-fPIC", f"-DTASKS={tasks}"]
        linked = subprocess.run(
            [*command, str(folder / "runtime.c"), str(objects), "-lm", "-o", str(shared)],
            capture_output=True,
            text=True,
        )
        assert linked.returncode == 0, linked.stderr
        self.library = ctypes.CDLL(str(shared))

    def __call__(self, name: str, *arrays: np.ndarray) -> None:
        """Call a kernel; arrays are aligned and contiguous already, and may be written."""
        function = self.library[name]
        function.restype = ctypes.c_int32
        for array in arrays:
            assert array.ctypes.data % 64 == 0, "kernels want 64-byte alignment"
            assert array.flags.c_contiguous
        assert function(*(ctypes.c_void_p(a.ctypes.data) for a in arrays)) == 0


def relax_main(build: Callable[[relax.BlockBuilder], Any], params: Sequence[relax.Var]) -> Dataflow:
    """A function of one dataflow block; `build` emits into the builder and returns the output."""
    builder = relax.BlockBuilder()
    with builder.function("main", list(params)):
        with builder.dataflow():
            output = builder.emit_output(build(builder))
        builder.emit_func_output(output)
    return Dataflow(builder.get()["main"])


def match(flow: Dataflow, template: Template, target: Target = HOST) -> KernelCall | Decline:
    """What the template makes of the first of its anchors that it takes; else its last refusal."""
    from graphopt.codegen.dataflow import op_of

    result: KernelCall | Decline = Decline("main", "no anchor")
    for binding in flow.bindings:
        if op_of(binding.value) in template.anchors:
            result = template.match(flow, binding, target)
            if isinstance(result, KernelCall):
                return result
    return result


def assembly(kernel: PrimFunc, target: Target) -> str:
    """Assembly of one kernel."""
    return build_llvm({"kernel": kernel}, target).inspect_source("asm")


@pytest.fixture
def library(tmp_path: Path) -> Callable[[Mapping[str, PrimFunc]], Library]:
    """Builds kernels into a library in the test's folder."""
    return lambda kernels: Library(kernels, tmp_path)
