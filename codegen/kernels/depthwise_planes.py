"""Depthwise convolution in NCHW: each channel with its own filter, pixels in the vector.

    Y[b, c, y, x] = epilogue(sum_{i, j} X[b, c, y*sy + i*dy - top, x*sx + j*dx - left] * W[c, i, j])
    X  (B, C, H, W), read in place where strides allow (`taps.py`), else a channel at a time as padded planes
    W  (C, kh * kw)
    limit: kh * kw multiply-adds per vector of results

It stands between sparse products (`spmm.py`), which want channels in front. A filter's weights stay in registers while
its channel is computed. Results of several rows are computed together, and what they read of the same row is loaded
once: most loads cross a cache line, and would take longer than the arithmetic.
Source: Elsen et al., "Fast Sparse ConvNets", CVPR 2020, arXiv:1911.09723.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow
from graphopt.codegen.kernels.emit import Buffer, Expr, Registers, load, loop, prim_func, spread, store
from graphopt.codegen.kernels.epilogue import Epilogue, absorb
from graphopt.codegen.kernels.planes import Planes, window_of
from graphopt.codegen.kernels.taps import ROWS, CopiedTaps, ImageTaps, Taps, each, loads_pairs, readable
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.kernels.tile import FLOPS_PER_TASK, TASKS
from graphopt.errors import Decline
from graphopt.targets.target import Target

# Larger filters would not fit the registers, nor their code the instruction cache.
MAX_TAPS = 49


@dataclass(frozen=True)
class Depthwise:
    """Everything that determines the kernel."""

    planes: Planes
    copied: bool  # a channel is laid out as planes before it is computed
    lanes: int
    pairs: bool  # see `loads_pairs`
    tasks: int
    epilogue: Epilogue


class DepthwisePlanes(Template):
    """Y = epilogue(conv2d(X, W)) with as many groups as channels, NCHW."""

    name: ClassVar[str] = "depthwise_planes"
    anchors: ClassVar[tuple[str, ...]] = ("relax.nn.conv2d",)

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take conv2d in NCHW with one input and one output channel per group, in float32."""
        call, where = binding.value, binding.var.name
        window = window_of(flow, call)
        if isinstance(window, str):
            return Decline(where, window)
        weight = flow.constant(call.args[1])
        assert weight is not None, "window_of() has seen that it is constant"
        channels, taps = window.channels, window.kernel[0] * window.kernel[1]
        if int(call.attrs.groups) != channels or weight.shape[0] != channels:
            return Decline(where, f"{channels} channels to {weight.shape[0]} in {int(call.attrs.groups)} groups")
        if taps > MAX_TAPS:
            return Decline(where, f"a filter of {taps} taps")
        lanes = min(target.isa.lanes(), 1 << (window.out[1].bit_length() - 1))
        planes = Planes(window, direct=False)
        after = absorb(flow, binding.var, 2)
        flops = 2 * taps * window.out[0] * window.out[1] * channels * window.batch
        parallel = target.threads and flops >= 2 * FLOPS_PER_TASK
        tasks = min(TASKS, window.batch * channels) if parallel else 1
        conv = Depthwise(
            planes=planes,
            copied=not readable(window, lanes),
            lanes=lanes,
            pairs=loads_pairs(lanes, target.isa),
            tasks=tasks,
            epilogue=after.epilogue,
        )
        family = f"dw{window.kernel[0]}x{window.kernel[1]}s{window.strides[1]}"
        return KernelCall(
            name=f"f32_{family}{after.epilogue.name}_{lanes}__{target.isa.name}".replace("-", "_"),
            key=(conv, target.spec),
            kernel=build(conv),
            output=after.output,
            covers=after.covers,
            inputs=(call.args[0], *after.inputs),
            constants=(np.ascontiguousarray(weight).reshape(-1), *after.constants),
            scratch_bytes=() if not conv.copied else (tasks * planes.channel * 4,),
            parameters={"lanes": lanes},
        )

    def reference(self, x: Array, weight: Array, planes: Planes, after: Epilogue, operands: list[Array]) -> Array:
        """Tap by tap, in float64; `weight` as (channels, 1, kh, kw)."""
        g = planes.window
        top, left, bottom, right = g.padding
        x = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
        out = np.zeros((g.batch, g.channels, *g.out))
        for i in range(g.kernel[0]):
            for j in range(g.kernel[1]):
                ys = i * g.dilation[0] + g.strides[0] * np.arange(g.out[0])
                xs = j * g.dilation[1] + g.strides[1] * np.arange(g.out[1])
                out += x[:, :, ys][:, :, :, xs] * weight[None, :, 0, i, j, None, None].astype(np.float64)
        return after.reference(out.reshape(g.batch * g.channels, -1), operands)


def build(conv: Depthwise) -> PrimFunc:
    """The kernel as TIR."""
    planes, after = conv.planes, conv.epilogue
    g = planes.window
    count, taps, pixels = g.batch * g.channels, g.kernel[0] * g.kernel[1], g.out[0] * g.out[1]
    params = [("x", count * g.height * g.width, "float32"), *after.buffers(False)]
    params += [("w", g.channels * taps, "float32"), *after.buffers(True), ("y", count * pixels, "float32")]
    if conv.copied:
        params.append(("planes", conv.tasks * planes.channel, "float32"))

    def body(*buffers: Buffer) -> None:
        named = {name: buffer for (name, _, _), buffer in zip(params, buffers, strict=True)}
        x, extra = named["x"], after.bind(named)
        with loop(conv.tasks, conv.tasks > 1) as task:
            if conv.copied:
                own = T.Bind(task * planes.channel)
                planes.emit_fill(named["planes"], own, conv.lanes)
            first = T.Bind(tirx.floordiv(task * count, conv.tasks))
            with T.serial(0, tirx.floordiv((task + 1) * count, conv.tasks) - first) as n:
                c = T.Bind(first + n)
                start = T.Bind(c * (g.height * g.width))
                writer = _Channel(conv, named, extra, c)
                if conv.copied:
                    planes.emit_copy(x, start, named["planes"], own, conv.lanes)
                    writer.emit(CopiedTaps(planes, named["planes"], own, conv.lanes))
                else:
                    writer.emit(ImageTaps(g, x, start, conv.lanes, pairs=conv.pairs))

    return prim_func(params, body)


@dataclass(frozen=True)
class _Channel:
    """Writes the work on one channel."""

    conv: Depthwise
    named: dict[str, Buffer]
    extra: list[Buffer]
    channel: Expr

    def emit(self, source: Taps) -> None:
        """All rows of results; what reads beyond the image is written out, what lies between is a loop."""
        g, lanes = self.conv.planes.window, self.conv.lanes
        count = g.kernel[0] * g.kernel[1]
        start = tirx.floormod(self.channel, g.channels) * count if g.batch > 1 else self.channel * count
        weights = [T.Bind(spread(load(self.named["w"], start + t, 1, "float32"), lanes)) for t in range(count)]
        height, width = g.out
        rows = min(ROWS, height)

        def across(top: Expr) -> None:
            each(
                width,
                lanes,
                lambda left: source.inside(1, left, lanes),
                lambda left: self.tile(source, weights, rows, top, left),
            )

        each(height, rows, lambda top: source.inside(0, top, rows), across)

    def tile(self, source: Taps, weights: list[Expr], rows: int, top: Expr, left: Expr) -> None:
        """Some rows of one vector of results; each vector of the image is loaded once."""
        conv, g = self.conv, self.conv.planes.window
        acc = Registers(rows, conv.lanes, "float32")
        for line, users in source.lines(rows):
            for j in range(g.kernel[1]):
                value = source.load(top, line, left, j)
                if value is not None:
                    value = T.Bind(value)
                    for r, i in users:
                        acc[r] = acc[r] + weights[i * g.kernel[1] + j] * value
        for r in range(rows):
            pixel = (top + r) * g.out[1] + left
            value = conv.epilogue.apply(acc[r], self.extra, self.channel, pixel, conv.lanes, "float32")
            store(self.named["y"], self.channel * (g.out[0] * g.out[1]) + pixel, value, conv.lanes, "float32")
