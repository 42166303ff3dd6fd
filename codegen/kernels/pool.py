"""Pooling over height and width, channels last.

    Y[n, y, x, c] = max or mean of X[n, y', x', c] over the window of (y, x)
    X, Y   NHWC, any float, dense; computed in float32
    window  y' = y stride - pad + k dilation, cut to the image; adaptive, from floor(y H / OH) to ceil((y + 1) H / OH)
    mean    over the cut window, or with count_include_pad over the window cut to the padded image, as PyTorch has it
    limit: one load and one operation for each vector of each window; memory is read about (kernel / stride)^2 times,
           mostly from L1

Where a window holds a NaN, max gives the window's largest number or the NaN, depending on where it stands.
Source: PyTorch's documentation of max_pool2d, avg_pool2d and adaptive_avg_pool2d, for the windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernels.emit import FLOATS, load, loop, prim_func, splat, spread, store
from graphopt.codegen.kernels.rows import PARALLEL_ELEMENTS
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.errors import Decline
from graphopt.targets.target import Target

Expr = Any
MOST_VECTORS = 8  # channels in registers at once, in vectors


@dataclass(frozen=True)
class Axis:
    """The windows along height or width."""

    size: int
    outputs: int
    kernel: int = 0  # 0: adaptive
    stride: int = 1
    dilation: int = 1
    before: int = 0  # padding
    after: int = 0

    def window(self, at: Expr) -> tuple[Expr, Expr, Expr]:
        """First element, number of elements, and number of elements with padding, of one output's window."""
        if not self.kernel:
            first = at * self.size // self.outputs
            count = ((at + 1) * self.size + self.outputs - 1) // self.outputs - first
            return first, count, count
        start = at * self.stride - self.before
        # Taps before the image are left out, and those behind it.
        skipped = tirx.max(0, (self.dilation - 1 - start) // self.dilation) if self.before else 0
        end = tirx.min(self.kernel, (self.size - 1 - start) // self.dilation + 1)
        padded = tirx.min(self.kernel, (self.size + self.after - 1 - start) // self.dilation + 1)
        return start + skipped * self.dilation, end - skipped, padded


@dataclass(frozen=True)
class Shape:
    """What is pooled."""

    batch: int
    rows: Axis
    columns: Axis
    channels: int
    dtype: str
    largest: bool
    count_padding: bool = False


class Pool(Template):
    """Max, average and adaptive average pooling, and means over height and width; see the module."""

    name: ClassVar[str] = "pool"
    anchors: ClassVar[tuple[str, ...]] = (
        "relax.nn.max_pool2d",
        "relax.nn.avg_pool2d",
        "relax.nn.adaptive_avg_pool2d",
        "relax.mean",
    )

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take a pooling operator whose layout is NHWC."""
        found = _shape(binding)
        if isinstance(found, Decline):
            return found
        which = "max_pool" if found.largest else "avg_pool"
        return KernelCall(
            name=f"{found.dtype}_{which}_{found.rows.kernel}x{found.columns.kernel}__{target.isa.name}".replace(
                "-", "_"
            ),
            key=("pool", found, target.spec),
            kernel=build(found, target),
            output=binding.var,
            covers=(binding.var,),
            inputs=(binding.value.args[0],),
        )


def _shape(binding: relax.VarBinding) -> Shape | Decline:
    call, where, op = binding.value, binding.var.name, op_of(binding.value)
    source, dtype = shape_of(call.args[0]), dtype_of(call)
    if dtype not in FLOATS or dtype == "float64":
        return Decline(where, f"pooling in {dtype}")
    if op == "relax.mean":
        axes = sorted(int(a) % len(source) for a in call.attrs.axis or ())
        if len(source) != 4 or axes != [1, 2]:
            return Decline(where, f"a mean over axes {axes} of {len(source)}, not height and width before channels")
        n, h, w, c = source
        return Shape(n, Axis(h, 1), Axis(w, 1), c, dtype, largest=False)
    if call.attrs.layout != "NHWC" or call.attrs.out_layout not in ("NHWC", ""):
        return Decline(where, f"pooling in layout {call.attrs.layout}, not NHWC")
    n, h, w, c = source
    _, oh, ow, _ = shape_of(call)
    if op == "relax.nn.adaptive_avg_pool2d":
        return Shape(n, Axis(h, oh), Axis(w, ow), c, dtype, largest=False)
    (kh, kw), (sh, sw), (dh, dw) = (
        [int(x) for x in field] for field in (call.attrs.pool_size, call.attrs.strides, call.attrs.dilation)
    )
    top, left, bottom, right = (int(p) for p in call.attrs.padding)
    rows, columns = Axis(h, oh, kh, sh, dh, top, bottom), Axis(w, ow, kw, sw, dw, left, right)
    largest = op == "relax.nn.max_pool2d"
    return Shape(n, rows, columns, c, dtype, largest, not largest and bool(call.attrs.count_include_pad))


def build(shape: Shape, target: Target) -> PrimFunc:
    """The kernel: x, y."""
    rows, columns, channels = shape.rows, shape.columns, shape.channels
    lanes = target.isa.lanes(32)
    vectors = min(MOST_VECTORS, target.isa.vector_registers // 2)
    work = shape.batch * rows.outputs * columns.outputs * channels * max(1, rows.kernel * columns.kernel)
    start = -math.inf if shape.largest else 0.0

    def body(x: Any, y: Any) -> None:
        def window(n: Expr, at: Expr, across: Expr, c: Expr, count: int, width: int) -> None:
            """`count` vectors of channels of one output."""
            with T.sblock("window"):
                sums = T.sblock_alloc_buffer((count * width,), "float32", scope="global")
                for u in range(count):
                    store(sums, u * width, splat(start, width, "float32"), width, "float32")
                first_y, count_y, padded_y = (T.bind(tirx.convert(v)) for v in rows.window(at))
                first_x, count_x, padded_x = (T.bind(tirx.convert(v)) for v in columns.window(across))
                with T.serial(0, count_y) as ky, T.serial(0, count_x) as kx:
                    pixel = (n * rows.size + first_y + ky * rows.dilation) * columns.size
                    source = (pixel + first_x + kx * columns.dilation) * channels + c
                    for u in range(count):
                        value = load(x, source + u * width, width, "float32")
                        held = load(sums, u * width, width, "float32")
                        merged = tirx.max(held, value) if shape.largest else held + value
                        store(sums, u * width, merged, width, "float32")
                to = ((n * rows.outputs + at) * columns.outputs + across) * channels + c
                number = padded_y * padded_x if shape.count_padding else count_y * count_x
                share = None if shape.largest else T.bind(tirx.const(1.0, "float32") / number.astype("float32"))
                for u in range(count):
                    result = load(sums, u * width, width, "float32")
                    result = result if share is None else result * spread(share, width)
                    store(y, to + u * width, result, width, "float32")

        parallel = target.threads and work >= PARALLEL_ELEMENTS
        with loop(shape.batch * rows.outputs, parallel) as line, T.serial(0, columns.outputs) as across:
            n, at = line // rows.outputs, line % rows.outputs
            whole, left = divmod(channels // lanes, vectors)
            if whole:
                with T.serial(0, whole) as block:
                    window(n, at, across, block * (vectors * lanes), vectors, lanes)
            if left:
                window(n, at, across, whole * vectors * lanes, left, lanes)
            if channels % lanes:
                with T.serial(0, channels % lanes) as c:
                    window(n, at, across, channels // lanes * lanes + c, 1, 1)

    size = shape.batch * channels
    return prim_func(
        [
            ("x", size * rows.size * columns.size, shape.dtype),
            ("y", size * rows.outputs * columns.outputs, shape.dtype),
        ],
        body,
    )


def reference(x: np.ndarray, shape: Shape) -> np.ndarray:
    """What the kernel computes, on [n, h, w, c]."""
    rows, columns = shape.rows, shape.columns
    y = np.empty((shape.batch, rows.outputs, columns.outputs, shape.channels))
    for at in range(rows.outputs):
        for across in range(columns.outputs):
            ys, wide_y = _taps(rows, at)
            xs, wide_x = _taps(columns, across)
            picked = x[:, ys][:, :, xs]
            number = wide_y * wide_x if shape.count_padding else len(ys) * len(xs)
            y[:, at, across] = picked.max((1, 2)) if shape.largest else picked.sum((1, 2)) / number
    return y


def _taps(axis: Axis, at: int) -> tuple[list[int], int]:
    if not axis.kernel:
        taps = list(range(at * axis.size // axis.outputs, -(-(at + 1) * axis.size // axis.outputs)))
        return taps, len(taps)
    taps = [at * axis.stride - axis.before + k * axis.dilation for k in range(axis.kernel)]
    return [t for t in taps if 0 <= t < axis.size], sum(t < axis.size + axis.after for t in taps)
