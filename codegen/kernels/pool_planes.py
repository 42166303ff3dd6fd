"""Max and average pooling in NCHW: pixels in the vector.

    Y[b, c, y, x] = max or mean over the window of X[b, c]
    X  (B, C, H, W), read in place where strides allow (`taps.py`), else a channel at a time as padded planes
    limit: bytes of X once

Averages that count a different number of pixels at the borders are left to others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernels.conv2d import Window
from graphopt.codegen.kernels.emit import Buffer, Expr, Registers, loop, prim_func, splat, store
from graphopt.codegen.kernels.planes import Planes
from graphopt.codegen.kernels.taps import ROWS, CopiedTaps, ImageTaps, Taps, each, loads_pairs, readable
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.kernels.tile import FLOPS_PER_TASK, TASKS
from graphopt.errors import Decline
from graphopt.targets.target import Target


@dataclass(frozen=True)
class Pooling:
    """Everything that determines the kernel."""

    planes: Planes
    copied: bool
    lanes: int
    pairs: bool  # see `loads_pairs`
    tasks: int
    largest: bool


class PoolPlanes(Template):
    """max_pool2d and avg_pool2d, NCHW."""

    name: ClassVar[str] = "pool_planes"
    anchors: ClassVar[tuple[str, ...]] = ("relax.nn.max_pool2d", "relax.nn.avg_pool2d")

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take NCHW pooling of float32 whose windows all count the same number of pixels."""
        call, where = binding.value, binding.var.name
        attrs, x = call.attrs, call.args[0]
        if attrs.layout != "NCHW" or dtype_of(x) != "float32" or flow.constant(x) is not None:
            return Decline(where, f"{attrs.layout}, {dtype_of(x)}")
        batch, channels, height, width = shape_of(x)
        kernel, strides, dilation = (
            (int(v[0]), int(v[1])) for v in (attrs.pool_size, attrs.strides, attrs.dilation)
        )  # fmt: skip
        top, left, bottom, right = (int(p) for p in attrs.padding)
        # Rounding up may look further than the padding says; where it does not, the result's extents tell.
        window = Window(batch, height, width, channels, kernel, strides, dilation, (top, left, bottom, right))
        if 0 in (batch, channels) or window.out != shape_of(call)[2:] or min(window.out) < 1:
            return Decline(where, "windows that look beyond the padding")
        largest = op_of(call) == "relax.nn.max_pool2d"
        if not largest and any(window.padding) and not attrs.count_include_pad:
            return Decline(where, "means over fewer pixels at the borders")
        lanes = min(target.isa.lanes(), 1 << (window.out[1].bit_length() - 1))
        planes = Planes(window, direct=False, fill=-math.inf if largest else 0.0)
        work = batch * channels * math.prod(window.out) * math.prod(kernel)
        parallel = target.threads and work >= 2 * FLOPS_PER_TASK
        tasks = min(TASKS, batch * channels) if parallel else 1
        pooling = Pooling(planes, not readable(window, lanes), lanes, loads_pairs(lanes, target.isa), tasks, largest)
        which = "max" if largest else "avg"
        return KernelCall(
            name=f"f32_{which}pool{kernel[0]}x{kernel[1]}s{strides[1]}_{lanes}__{target.isa.name}".replace("-", "_"),
            key=(pooling, target.spec),
            kernel=build(pooling),
            output=binding.var,
            covers=(binding.var,),
            inputs=(x,),
            scratch_bytes=(tasks * planes.channel * 4,) if pooling.copied else (),
            parameters={"lanes": lanes},
        )

    def reference(self, x: Array, planes: Planes, largest: bool) -> Array:
        """Tap by tap, in float64."""
        g = planes.window
        top, left, bottom, right = g.padding
        x = np.pad(
            np.asarray(x, np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=planes.fill
        )
        taps = [
            x[:, :, i * g.dilation[0] :: g.strides[0], j * g.dilation[1] :: g.strides[1]][:, :, : g.out[0], : g.out[1]]
            for i in range(g.kernel[0])
            for j in range(g.kernel[1])
        ]
        return np.max(taps, 0) if largest else np.mean(taps, 0)


def build(pooling: Pooling) -> PrimFunc:
    """The kernel as TIR."""
    planes, lanes = pooling.planes, pooling.lanes
    g = planes.window
    count, pixels = g.batch * g.channels, g.out[0] * g.out[1]
    params = [("x", count * g.height * g.width, "float32"), ("y", count * pixels, "float32")]
    if pooling.copied:
        params.append(("planes", pooling.tasks * planes.channel, "float32"))

    def body(x: Buffer, y: Buffer, scratch: Buffer = None) -> None:
        with loop(pooling.tasks, pooling.tasks > 1) as task:
            if pooling.copied:
                own = T.Bind(task * planes.channel)
                planes.emit_fill(scratch, own, lanes)
            first = T.Bind(tirx.floordiv(task * count, pooling.tasks))
            with T.serial(0, tirx.floordiv((task + 1) * count, pooling.tasks) - first) as n:
                c = T.Bind(first + n)
                start = T.Bind(c * (g.height * g.width))
                if pooling.copied:
                    planes.emit_copy(x, start, scratch, own, lanes)
                    _emit(pooling, CopiedTaps(planes, scratch, own, lanes), y, c * pixels)
                else:
                    _emit(pooling, ImageTaps(g, x, start, lanes, planes.fill, pooling.pairs), y, c * pixels)

    return prim_func(params, body)


def _emit(pooling: Pooling, source: Taps, y: Buffer, to: Expr) -> None:
    """One channel."""
    g, lanes = pooling.planes.window, pooling.lanes
    height, width = g.out
    rows = min(ROWS, height)

    def tile(top: Expr, left: Expr) -> None:
        acc = Registers(rows, lanes, "float32")
        seen: set[int] = set()
        for line, users in source.lines(rows):
            for j in range(g.kernel[1]):
                value = source.load(top, line, left, j)
                if value is None:
                    continue
                value = T.Bind(value)
                for r, _ in users:
                    if r not in seen:
                        acc[r] = value
                        seen.add(r)
                    else:
                        acc[r] = tirx.max(acc[r], value) if pooling.largest else acc[r] + value
        share = splat(1 / math.prod(g.kernel), lanes, "float32")
        for r in set(range(rows)) - seen:  # all of its window lies beyond the image
            acc[r] = splat(pooling.planes.fill, lanes, "float32")
        for r in range(rows):
            value = acc[r] if pooling.largest else acc[r] * share
            store(y, to + (top + r) * width + left, value, lanes, "float32")

    def across(top: Expr) -> None:
        each(width, lanes, lambda left: source.inside(1, left, lanes), lambda left: tile(top, left))

    each(height, rows, lambda top: source.inside(0, top, rows), across)
