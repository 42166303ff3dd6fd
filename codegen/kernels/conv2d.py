"""Dense and grouped two-dimensional convolution in NHWC, as a matrix product whose rows are output pixels.

    Y[b, y, x, o] = epilogue(sum_{i, j, c} X[b, y*sy + i*dy - top, x*sx + j*dx - left, g*cin + c] * W[o, i, j, c])
    X  (B, H, W, groups * cin), copied once into a padded buffer where there is padding
    W  packed when compiled as (groups, cout / nr, kh * kw * cin, nr)
    limit: 2 * pixels * groups * cout * kh * kw * cin FLOPs at the register tile's rate (`tile.py`)

Without dilation and groups, a kernel row's kw * cin inputs lie together, so stems with three channels have long inner
loops too.
Source: Dukhan, "The Indirect Convolution Algorithm", arXiv:1907.02129. Differs: offsets are computed, not loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, shape_of
from graphopt.codegen.kernels.emit import FLOATS, Buffer, Expr, accumulator, copy_run, loop, prim_func, store
from graphopt.codegen.kernels.epilogue import Epilogue, absorb
from graphopt.codegen.kernels.gemm import SHORT
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.kernels.tile import Nest, emit_nest, pack, plan
from graphopt.errors import Decline
from graphopt.targets.target import Target

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# A copy that takes a thread longer than waking it: about 20 microseconds at 10 GB/s.
BYTES_PER_TASK = 200_000
# Reductions up to this many steps get their number of kernel rows from memory; see `trips` of emit_nest.
SHORT_REDUCTION = 64


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution, NHWC; padding as (top, left, bottom, right)."""

    batch: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        top, left, bottom, right = self.padding
        return tuple(
            (size + pad - d * (k - 1) - 1) // s + 1
            for size, pad, d, k, s in zip(
                (self.height, self.width),
                (top + bottom, left + right),
                self.dilation,
                self.kernel,
                self.strides,
                strict=True,
            )
        )  # type: ignore[return-value]

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the input with its padding."""
        top, left, bottom, right = self.padding
        return self.height + top + bottom, self.width + left + right


def window(flow: Dataflow, call: relax.Call) -> Window | str:
    """The geometry of a conv2d call, or why it is not one for the kernels here."""
    attrs = call.attrs
    if attrs.data_layout != "NHWC" or attrs.kernel_layout != "OHWI" or attrs.out_layout not in ("NHWC", ""):
        return f"layout {attrs.data_layout}, {attrs.kernel_layout}"
    batch, height, width, channels = shape_of(call.args[0])
    shape = shape_of(call.args[1])
    pads = tuple(int(p) for p in attrs.padding)
    top, left, bottom, right = pads if len(pads) == 4 else (pads * 4)[:4]
    if min(top, left, bottom, right) < 0:
        return "negative padding"
    pair = {n: tuple(int(v) for v in getattr(attrs, n)) for n in ("strides", "dilation")}
    geometry = Window(
        batch,
        height,
        width,
        channels,
        (shape[1], shape[2]),
        (pair["strides"] * 2)[:2],  # type: ignore[arg-type]
        (pair["dilation"] * 2)[:2],  # type: ignore[arg-type]
        (top, left, bottom, right),
    )
    if min(geometry.out) < 1 or 0 in (batch, channels, *shape):
        return "the result is empty"
    if dtype_of(call.args[0]) not in FLOATS or dtype_of(call.args[1]) != dtype_of(call.args[0]):
        return f"{dtype_of(call.args[0])} with weights of {dtype_of(call.args[1])}"
    if flow.constant(call.args[1]) is None:
        return "the weights are not constant"
    if flow.constant(call.args[0]) is not None:
        return "the input is constant"
    return geometry


@dataclass(frozen=True)
class Conv:
    """Everything that determines the kernel."""

    geometry: Window
    groups: int
    nest: Nest
    dtype: str
    out_dtype: str
    epilogue: Epilogue

    @property
    def steps(self) -> int:
        """Length of the reduction."""
        return self.geometry.kernel[0] * self.geometry.kernel[1] * (self.geometry.channels // self.groups)

    @property
    def counted(self) -> bool:
        """Whether the number of kernel rows is a parameter."""
        return self.geometry.kernel[0] > 1 and self.steps <= SHORT_REDUCTION


class Conv2d(Template):
    """Y = epilogue(conv2d(X, W))."""

    name: ClassVar[str] = "conv2d"
    anchors: ClassVar[tuple[str, ...]] = ("relax.nn.conv2d",)

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take every conv2d in NHWC with constant weights, whatever its groups."""
        call, where = binding.value, binding.var.name
        g = window(flow, call)
        if isinstance(g, str):
            return Decline(where, g)
        groups, dtype = int(call.attrs.groups), dtype_of(call.args[0])
        weight = flow.constant(call.args[1])
        assert weight is not None, "window() has seen that it is constant"
        cout, (kh, kw), cin = weight.shape[0] // groups, g.kernel, g.channels // groups
        after = absorb(flow, binding.var)

        row = g.padded[1] * g.channels
        bits = 64 if dtype == "float64" else 32

        def reduction(nr: int) -> tuple[tuple[int, int, int], ...]:
            if groups == 1 and g.dilation[1] == 1:
                return ((kh, row * g.dilation[0], kw * cin * nr), (kw * cin, 1, nr))
            return (
                (kh, row * g.dilation[0], kw * cin * nr),
                (kw, g.channels * g.dilation[1], cin * nr),
                (cin, 1, nr),
            )

        m = g.batch * g.out[0] * g.out[1]
        row_bytes = g.channels * g.strides[0] * g.strides[1] * BYTES[dtype]
        nr = plan(m, cout, reduction(1), row_bytes, target, bits).tile.nr
        nest = plan(m, cout, reduction(nr), row_bytes, target, bits)
        conv = Conv(g, groups, nest, dtype, dtype_of(binding.var), after.epilogue)
        flat = weight.reshape(groups, cout, kh * kw * cin).transpose(0, 2, 1).astype(accumulator(dtype))
        packed = np.stack([pack(w, cout, nest.tile) for w in flat]).reshape(-1)
        padded = any(g.padding)
        family = f"conv{kh}x{kw}" + ("" if groups == 1 else "g")
        return KernelCall(
            name=f"{SHORT[dtype]}_{family}{after.epilogue.name}_{nest.tile}__{target.isa.name.replace('-', '_')}",
            key=(conv, target.spec),
            kernel=build(conv, target),
            output=after.output,
            covers=after.covers,
            inputs=(call.args[0], *after.inputs),
            constants=(packed, *([np.array([kh], np.int32)] if conv.counted else []), *after.constants),
            scratch_bytes=(g.batch * g.padded[0] * row * BYTES[dtype],) if padded else (),
            parameters={"mr": nest.tile.mr, "nr": nest.tile.nr, "block": nest.block},
        )

    def reference(self, x: Array, weight: Array, g: Window, after: Epilogue, operands: list[Array]) -> Array:
        """The convolution tap by tap, in float64; `weight` as (cout, kh, kw, cin)."""
        top, left, bottom, right = g.padding
        x = np.pad(np.asarray(x, np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
        height, width = g.out
        groups = g.channels // weight.shape[3]
        split = weight.astype(np.float64).reshape(groups, -1, *weight.shape[1:])
        out = np.zeros((g.batch, height, width, groups, split.shape[1]))
        for i in range(g.kernel[0]):
            for j in range(g.kernel[1]):
                ys = i * g.dilation[0] + g.strides[0] * np.arange(height)
                xs = j * g.dilation[1] + g.strides[1] * np.arange(width)
                taps = x[:, ys][:, :, xs].reshape(g.batch, height, width, groups, -1)
                out += np.einsum("bhwgc,goc->bhwgo", taps, split[:, :, i, j])
        return after.reference(out.reshape(-1, weight.shape[0]), operands)


def build(conv: Conv, target: Target) -> PrimFunc:
    """The kernel as TIR."""
    g, nest, after, dtype = conv.geometry, conv.nest, conv.epilogue, accumulator(conv.dtype)
    tile, (height, width) = nest.tile, g.out
    cout = conv.groups * nest.n
    rows, row = g.padded[0], g.padded[1] * g.channels
    steps = conv.steps
    padded = any(g.padding)
    inputs = [("x", g.batch * g.height * g.width * g.channels, conv.dtype), *after.buffers(False)]
    constants = [("w", conv.groups * nest.panels * steps * tile.nr, dtype)]
    constants += [("trips", 1, "int32")] if conv.counted else []
    constants += after.buffers(True)
    params = [*inputs, *constants, ("y", nest.m * cout, conv.out_dtype)]
    if padded:
        params.append(("scratch", g.batch * rows * row, conv.dtype))

    def a_offset(r: Expr) -> Expr:
        # Rows are never negative; saying so in the operators saves their corrections.
        line = T.Bind(tirx.truncdiv(r, width))
        pixel = line * (row * g.strides[0]) + (r - line * width) * (g.channels * g.strides[1])
        if g.batch > 1:
            pixel = pixel + tirx.truncdiv(line, height) * ((rows - height * g.strides[0]) * row)
        return T.Bind(pixel + group[0] * (g.channels // conv.groups))

    group: list[Expr] = [0]

    def body(*buffers: Buffer) -> None:
        named = {name: buffer for (name, _, _), buffer in zip(params, buffers, strict=True)}
        extra = after.bind(named)
        source = named["x"]
        if padded:
            emit_padding(g, source, named["scratch"], target, BYTES[conv.dtype])
            source = named["scratch"]

        def finish(r: Expr, col: Expr, value: Expr) -> None:
            col = col + group[0] * nest.n
            store(named["y"], r * cout + col, after.apply(value, extra, r, col, tile.lanes, dtype), tile.lanes, dtype)

        emit_nest(
            nest,
            source,
            named["w"],
            a_offset=a_offset,
            w_offset=lambda panel, _: (group[0] * nest.panels + panel) * (steps * tile.nr),
            finish=finish,
            dtype=dtype,
            outer=conv.groups,
            begin=lambda number: group.__setitem__(0, number),
            trips=tirx.BufferLoad(named["trips"], [0]) if conv.counted else None,
        )

    return prim_func(params, body)


def emit_padding(g: Window, source: Buffer, padded: Buffer, target: Target, element_bytes: int) -> None:
    """Copy an NHWC tensor into the middle of a larger one, zeros around it."""
    top, left, _, right = g.padding
    rows, row = g.padded[0], g.padded[1] * g.channels
    inside, lanes = g.width * g.channels, target.isa.lanes()
    parallel = target.threads and g.batch * rows * row * element_bytes >= 2 * BYTES_PER_TASK
    with loop(g.batch * rows, parallel) as r:
        y = T.Bind(tirx.floormod(r, rows) - top if g.batch > 1 else r - top)
        with T.If(tirx.all(y >= 0, y < g.height)):
            with T.Then():
                start = (tirx.floordiv(r, rows) * g.height + y) * inside if g.batch > 1 else y * inside
                copy_run(padded, r * row, None, 0, left * g.channels, lanes)
                copy_run(padded, r * row + left * g.channels, source, start, inside, lanes)
                copy_run(padded, r * row + left * g.channels + inside, None, 0, right * g.channels, lanes)
            with T.Else():
                copy_run(padded, r * row, None, 0, row, lanes)
