"""Small artefacts made by hand, with real kernels, for the tests of linking and running."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
from tvm import s_tir, te
from tvm.ir import IRModule
from tvm.tirx import PrimFunc

from graphopt.codegen.artefact import Artefact, KernelInfo
from graphopt.codegen.build import build_object
from graphopt.spec import TensorSpec
from graphopt.targets import resolve
from graphopt.targets.target import Target

ROWS, COLUMNS = 37, 64

INPUTS = (TensorSpec("x", (ROWS, COLUMNS), "float32"), TensorSpec("ids", (5,), "int64"))
OUTPUTS = (
    TensorSpec("y", (ROWS, COLUMNS), "float32"),
    TensorSpec("next", (5,), "int64"),
    TensorSpec("odd", (5,), "bool"),
)


def _parallel(func: PrimFunc) -> PrimFunc:
    schedule = s_tir.Schedule(IRModule({"main": func}))
    rows, columns = schedule.get_loops(schedule.get_sblock("y"))
    schedule.parallel(rows)
    schedule.vectorize(schedule.split(columns, [None, 4])[1])
    return schedule.mod["main"]


@functools.cache
def kernels(spec: str, factor: float) -> bytes:
    """An object with `affine`, whose rows run in parallel, and `count`."""
    x = te.placeholder((ROWS, COLUMNS), name="x")
    bias = te.placeholder((COLUMNS,), name="bias")
    y = te.compute((ROWS, COLUMNS), lambda i, j: te.max(x[i, j] * factor + bias[j], 0.0), name="y")
    ids = te.placeholder((5,), "int64", name="ids")
    after = te.compute((5,), lambda i: ids[i] + 1, name="after")
    odd = te.compute((5,), lambda i: (ids[i] & 1).astype("int8"), name="odd")
    functions = {
        "affine": _parallel(te.create_prim_func([x, bias, y])),
        "count": te.create_prim_func([ids, after, odd]),
    }
    with tempfile.TemporaryDirectory() as folder:
        build_object(functions, resolve(spec), Path(folder) / "kernels.o")
        return (Path(folder) / "kernels.o").read_bytes()


_SOURCE = """
#include "NAME.h"
int32_t affine(const void *, const void *, void *);
int32_t count(const void *, void *, void *);
EXTRA
size_t NAME_workspace_bytes(void) { return 64; }
size_t NAME_weights_bytes(void) { return WEIGHTS; }
int32_t NAME_run(const void *weights, const void *const *inputs, void *const *outputs, void *workspace) {
  (void)workspace;
  BEFORE
  if (affine(inputs[0], weights, outputs[0])) return -1;
  if (count(inputs[1], outputs[1], outputs[2])) return -2;
  return 0;
}
"""
_HEADER = """
#ifndef NAME_H
#define NAME_H
#include <stddef.h>
#include <stdint.h>
#ifdef __wasm__
#define GRAPHOPT_API
#else
#define GRAPHOPT_API __attribute__((visibility("default")))
#endif
GRAPHOPT_API size_t NAME_workspace_bytes(void);
GRAPHOPT_API size_t NAME_weights_bytes(void);
GRAPHOPT_API int32_t NAME_run(const void *, const void *const *, void *const *, void *);
GRAPHOPT_API void NAME_set_threads(int32_t);
GRAPHOPT_API const void *NAME_map_weights(const char *);
GRAPHOPT_API void NAME_unmap_weights(const void *);
#endif
"""


def artefact(target: Target, *, name: str = "tiny", factor: float = 2.0, extra: str = "", before: str = "") -> Artefact:
    """y = relu(x * factor + bias), next = ids + 1, odd = ids is odd; with C text for file scope and for NAME_run."""
    weights = bias_of(factor).tobytes()
    source = _SOURCE.replace("EXTRA", extra).replace("BEFORE", before).replace("WEIGHTS", str(len(weights)))
    return Artefact(
        name=name,
        sources={f"{name}.c": source.replace("NAME", name), f"{name}.h": _HEADER.replace("NAME", name)},
        objects={"kernels.o": kernels(target.spec, factor)},
        weights=weights,
        inputs=INPUTS,
        outputs=OUTPUTS,
        workspace_bytes=64,
        kernels=(KernelInfo("affine", "tvm", "test"), KernelInfo("count", "tvm", "test")),
    )


def bias_of(factor: float) -> np.ndarray:
    """The weights."""
    return (np.arange(COLUMNS, dtype=np.float32) - 30) * np.float32(factor)


def sample() -> list[np.ndarray]:
    """Inputs."""
    x = np.random.default_rng(7).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return [x, np.array([-2, 1, 2**40, 3, 0], np.int64)]


def expected(inputs: list[np.ndarray], factor: float = 2.0) -> list[np.ndarray]:
    """What the artefact gives for `inputs`."""
    x, ids = inputs
    return [np.maximum(x * np.float32(factor) + bias_of(factor), 0), ids + 1, ids % 2 == 1]
