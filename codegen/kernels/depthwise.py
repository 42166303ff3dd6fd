"""Depthwise convolution in NHWC: each channel with its own filter, channels in the vector.

    Y[b, y, x, c] = epilogue(sum_{i, j} X[b, y*sy + i*dy - top, x*sx + j*dx - left, c] * W[i, j, c])
    X  (B, H, W, C), read in place: taps outside the image are never computed, so no padded copy is made
    W  (kh * kw, C)
    limit: bytes of X and Y once for large images; 2 * kh * kw FLOPs per result from the first-level cache otherwise

A strip of neighbouring results stays in registers. Each input vector is loaded once per kernel row and used for every
result of the strip that it belongs to. The first and the last strip of a row drop the taps that fall off the image when
the kernel is written; rows at the upper and lower border shorten the loop over kernel rows.
Source: Zhang et al., "High Performance Depthwise and Pointwise Convolutions on Mobile Devices", AAAI 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow, dtype_of
from graphopt.codegen.kernels.conv2d import Window, window
from graphopt.codegen.kernels.emit import Buffer, Expr, Registers, accumulator, load, loop, prim_func, store
from graphopt.codegen.kernels.epilogue import Epilogue, absorb
from graphopt.codegen.kernels.gemm import SHORT
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.kernels.tile import FLOPS_PER_TASK
from graphopt.cost.register_tile import registers
from graphopt.errors import Decline
from graphopt.targets.target import Isa, Target

# Kernel rows times columns whose code is written out; larger ones would not fit the instruction cache.
MAX_TAPS_PER_ROW = 16


@dataclass(frozen=True)
class Depthwise:
    """Everything that determines the kernel."""

    geometry: Window
    strip: int
    lanes: int
    parallel: bool
    dtype: str
    out_dtype: str
    epilogue: Epilogue


def strip_length(width: int, g: Window, isa: Isa) -> int:
    """Results per strip: accumulators, one kernel row and an input vector in registers, and few strips per row."""
    room = registers(isa) - 1 - min(g.kernel[1], registers(isa) // 4) - (0 if isa.has_fma else 1)
    longest = max(1, min(room, 12, width))
    loads = g.kernel[1]

    def cost(strip: int) -> float:
        # Per strip: its weights, its inputs, and latency that few accumulators cannot hide.
        work = max(strip * g.kernel[1] / 2, 4.0 * g.kernel[1] / 2)
        inputs = min(strip * g.kernel[1], (strip - 1) * g.strides[1] + g.kernel[1])
        return -(-width // strip) * (max(work, (loads + inputs) / 2) + 1.0)

    return min(range(1, longest + 1), key=lambda s: (cost(s), -s))


class DepthwiseConv2d(Template):
    """Y = epilogue(conv2d(X, W)) with as many groups as channels."""

    name: ClassVar[str] = "depthwise"
    anchors: ClassVar[tuple[str, ...]] = ("relax.nn.conv2d",)

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take conv2d in NHWC with one input and one output channel per group."""
        call, where = binding.value, binding.var.name
        g = window(flow, call)
        if isinstance(g, str):
            return Decline(where, g)
        weight = flow.constant(call.args[1])
        assert weight is not None, "window() has seen that it is constant"
        if int(call.attrs.groups) != g.channels or weight.shape[0] != g.channels:
            return Decline(where, f"{g.channels} channels to {weight.shape[0]} in {int(call.attrs.groups)} groups")
        if g.kernel[1] > MAX_TAPS_PER_ROW:
            return Decline(where, f"a kernel of {g.kernel[1]} columns")
        after = absorb(flow, binding.var)
        dtype = dtype_of(call.args[0])
        kind = accumulator(dtype)
        lanes = min(target.isa.lanes(64 if kind == "float64" else 32), 1 << (g.channels.bit_length() - 1))
        strip = strip_length(g.out[1], g, target.isa)
        taps = g.kernel[0] * g.kernel[1]
        flops = 2 * taps * g.batch * g.out[0] * g.out[1] * g.channels
        parallel = target.threads and flops >= 2 * FLOPS_PER_TASK
        conv = Depthwise(g, strip, lanes, parallel, dtype, dtype_of(binding.var), after.epilogue)
        packed = np.ascontiguousarray(weight.reshape(g.channels, taps).T.astype(kind)).reshape(-1)
        family = f"dw{g.kernel[0]}x{g.kernel[1]}s{g.strides[1]}"
        return KernelCall(
            name=f"{SHORT[dtype]}_{family}{after.epilogue.name}_{strip}x{lanes}__{target.isa.name.replace('-', '_')}",
            key=(conv, target.spec),
            kernel=build(conv),
            output=after.output,
            covers=after.covers,
            inputs=(call.args[0], *after.inputs),
            constants=(packed, *after.constants),
            parameters={"strip": strip, "lanes": lanes},
        )

    def reference(self, x: Array, weight: Array, g: Window, after: Epilogue, operands: list[Array]) -> Array:
        """Tap by tap, in float64; `weight` as (channels, kh, kw, 1)."""
        top, left, bottom, right = g.padding
        x = np.pad(np.asarray(x, np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
        out = np.zeros((g.batch, *g.out, g.channels))
        for i in range(g.kernel[0]):
            for j in range(g.kernel[1]):
                ys = i * g.dilation[0] + g.strides[0] * np.arange(g.out[0])
                xs = j * g.dilation[1] + g.strides[1] * np.arange(g.out[1])
                out += x[:, ys][:, :, xs] * weight[:, i, j, 0].astype(np.float64)
        return after.reference(out.reshape(-1, g.channels), operands)


def build(conv: Depthwise) -> PrimFunc:
    """The kernel as TIR."""
    g, after, dtype = conv.geometry, conv.epilogue, accumulator(conv.dtype)
    inputs = [("x", g.batch * g.height * g.width * g.channels, conv.dtype), *after.buffers(False)]
    constants = [("w", g.kernel[0] * g.kernel[1] * g.channels, dtype), *after.buffers(True)]
    pixels = g.batch * g.out[0] * g.out[1]
    params = [*inputs, *constants, ("y", pixels * g.channels, conv.out_dtype)]

    def body(*buffers: Buffer) -> None:
        named = {name: buffer for (name, _, _), buffer in zip(params, buffers, strict=True)}
        extra = after.bind(named)
        width, strip = g.out[1], conv.strip
        edge_left, edge_right = _edges(g)
        with loop(g.batch * g.out[0], conv.parallel) as row:
            y = T.Bind(tirx.floormod(row, g.out[0])) if g.batch > 1 else row
            image = T.Bind(tirx.floordiv(row, g.out[0]) * (g.height * g.width * g.channels)) if g.batch > 1 else 0
            top = T.Bind(y * g.strides[0] - g.padding[0])
            strips = _Strips(conv, named, extra, row, image, top)
            # Strips that meet a border are written out; those between are a loop.
            starts = [min(s, width - strip) for s in range(0, width, strip)]
            first = next((n for n, s in enumerate(starts) if s >= edge_left), len(starts))
            last = next((n for n, s in enumerate(starts) if s + strip > edge_right), len(starts))
            if last <= first:
                first = last = len(starts)
            for start in starts[:first]:
                strips.emit(start)
            if last > first:
                with T.serial(0, last - first) as s:
                    strips.emit(T.Bind((s + first) * strip), inside=True)
            for start in starts[last:]:
                strips.emit(start)

    return prim_func(params, body)


def _edges(g: Window) -> tuple[int, int]:
    """The first result of a row whose taps all lie in the image, and one past the last."""
    span = g.dilation[1] * (g.kernel[1] - 1)
    left = -(-g.padding[1] // g.strides[1])
    right = (g.width - 1 - span + g.padding[1]) // g.strides[1] + 1
    return left, min(right, g.out[1])


@dataclass(frozen=True)
class _Strips:
    """Writes strips of one row of results."""

    conv: Depthwise
    named: dict[str, Buffer]
    extra: list[Buffer]
    row: Expr
    image: Expr
    top: Expr

    def emit(self, start: Expr, inside: bool = False) -> None:
        """All channels of the strip at column `start`; `inside` says that no tap leaves the image."""
        lanes, channels = self.conv.lanes, self.conv.geometry.channels
        with T.serial(0, -(-channels // lanes)) as i:
            self._block(start, T.Bind(tirx.min(i * lanes, channels - lanes)), inside)

    def _block(self, start: Expr, channel: Expr, inside: bool) -> None:
        conv, g = self.conv, self.conv.geometry
        dtype, lanes, strip = accumulator(conv.dtype), conv.lanes, conv.strip
        acc = Registers(strip, lanes, dtype)
        left = start * g.strides[1] - g.padding[1]
        uses: dict[int, list[tuple[int, int]]] = {}  # input column behind `left` to (result, kernel column)
        for s in range(strip):
            for j in range(g.kernel[1]):
                column = s * g.strides[1] + j * g.dilation[1]
                if inside or 0 <= left + column < g.width:
                    uses.setdefault(column, []).append((s, j))

        def kernel_row(i: Expr) -> None:
            line = self.image + (self.top + i * g.dilation[0]) * (g.width * g.channels) + channel
            weights = {
                j: load(self.named["w"], (i * g.kernel[1] + j) * g.channels + channel, lanes, dtype)
                for j in range(g.kernel[1])
            }
            for column in sorted(uses):
                value = load(self.named["x"], line + (left + column) * g.channels, lanes, dtype)
                for s, j in uses[column]:
                    acc[s] = acc[s] + value * weights[j]

        if g.padding[0] or g.padding[2]:
            # Kernel rows inside the image: low <= i < high.
            d = g.dilation[0]
            low = T.Bind(tirx.max(0, tirx.floordiv(d - 1 - self.top, d)))
            high = T.Bind(tirx.min(g.kernel[0], tirx.floordiv(g.height - self.top + d - 1, d)))
            with T.serial(0, tirx.max(high - low, 0)) as i:
                kernel_row(low + i)
        else:
            with T.serial(0, g.kernel[0]) as i:
                kernel_row(i)

        for s in range(strip):
            pixel = self.row * g.out[1] + start + s
            value = conv.epilogue.apply(acc[s], self.extra, pixel, channel, lanes, dtype)
            store(self.named["y"], pixel * g.channels + channel, value, lanes, dtype)
