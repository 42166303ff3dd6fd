"""Softmax and log softmax over the last axis.

    Y[r, c] = exp(X[r, c] - max_r) / sum_c exp(X[r, c] - max_r)           or its logarithm
    X, Y   (rows, C), any float, dense; computed in float32
    limit: one exp an element, about 15 operations a vector; memory is read once, a row stays in L1

A row of -inf alone gives NaN, as in PyTorch.
Source: the three passes of Dukhan and Ablavatski, The Two-Pass Softmax Algorithm, arXiv:2001.04438, section 2.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernels.emit import FLOATS, load, loop, prim_func, spread, store
from graphopt.codegen.kernels.nan import plain_max
from graphopt.codegen.kernels.rows import PARALLEL_ELEMENTS, each_of_row, fold_row
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.errors import Decline
from graphopt.targets.target import Target


class Softmax(Template):
    """Softmax and log softmax; see the module."""

    name: ClassVar[str] = "softmax"
    anchors: ClassVar[tuple[str, ...]] = ("relax.nn.softmax", "relax.nn.log_softmax")

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take a softmax over the last axis."""
        call, where = binding.value, binding.var.name
        shape, dtype = shape_of(call), dtype_of(call)
        if not shape or int(call.attrs.axis) % len(shape) != len(shape) - 1:
            return Decline(where, f"softmax over axis {call.attrs.axis} of {len(shape)}, which is not the last")
        if dtype not in FLOATS or dtype == "float64":
            return Decline(where, f"softmax in {dtype}")
        log = op_of(call) == "relax.nn.log_softmax"
        width = shape[-1]
        rows = math.prod(shape) // width
        which = "log_softmax" if log else "softmax"
        return KernelCall(
            name=f"{dtype}_{which}_{width}__{target.isa.name}".replace("-", "_"),
            key=(which, target.spec, dtype, rows, width),
            kernel=build(rows, width, dtype, log, target),
            output=binding.var,
            covers=(binding.var,),
            inputs=(call.args[0],),
        )


def build(rows: int, width: int, dtype: str, log: bool, target: Target) -> PrimFunc:
    """The kernel: x, y."""
    lanes = target.isa.lanes(32)

    def body(x: Any, y: Any) -> None:
        with loop(rows, target.threads and rows * width >= PARALLEL_ELEMENTS) as r, T.sblock("row"):
            at = T.bind(r * width)

            def value(c: Any, w: int) -> Any:
                return load(x, at + c, w, "float32")

            top = fold_row(width, lanes, "float32", -math.inf, value, plain_max)

            def weight(c: Any, w: int) -> Any:
                return tirx.exp(value(c, w) - spread(top, w))

            # A float32 result holds the exponentials meanwhile; shorter floats would lose bits, and log needs none.
            keeps = dtype == "float32" and not log

            def kept(c: Any, w: int) -> Any:
                if not keeps:
                    return weight(c, w)
                store(y, at + c, weight(c, w), w, "float32")
                return load(y, at + c, w, "float32")

            total = fold_row(width, lanes, "float32", 0.0, kept, lambda a, b: a + b)
            if log:
                shift = T.bind(tirx.log(total))
                each_of_row(
                    width,
                    lanes,
                    lambda c, w: store(y, at + c, value(c, w) - spread(top, w) - spread(shift, w), w, "float32"),
                )
                return
            inverse = T.bind(tirx.const(1.0, "float32") / total)

            def write(c: Any, w: int) -> None:
                result = load(y, at + c, w, "float32") if keeps else weight(c, w)
                store(y, at + c, result * spread(inverse, w), w, "float32")

            each_of_row(width, lanes, write)

    return prim_func([("x", rows * width, dtype), ("y", rows * width, dtype)], body)


def reference(x: np.ndarray, log: bool) -> np.ndarray:
    """What the kernel computes, over the last axis."""
    shifted = x - x.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True)
    return shifted - np.log(total) if log else np.exp(shifted) / total
