"""Depthwise convolution in NCHW: each channel with its own filter, pixels in the vector.

    Y[b, c, y, x] = epilogue(sum_{i, j} X[b, c, y*sy + i*dy - top, x*sx + j*dx - left] * W[c, i, j])
    X  (B, C, H, W); a channel at a time is laid out as padded planes (`planes.py`) in the first-level cache
    W  (C, kh * kw)
    limit: kh * kw multiply-adds and loads per vector of results

It stands between sparse products (`spmm.py`), which want channels in front. A filter's weights stay in registers while
its channel is computed.
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
from graphopt.codegen.kernels.planes import Planes, planes_of, window_of
from graphopt.codegen.kernels.spmm_tile import rows_of_pixels
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.kernels.tile import FLOPS_PER_TASK
from graphopt.errors import Decline
from graphopt.targets.target import Target

TASKS = 16  # as many as there may be threads
VECTORS = 4  # in flight at once
# Larger filters would not fit the registers, nor their code the instruction cache.
MAX_TAPS = 49


@dataclass(frozen=True)
class Depthwise:
    """Everything that determines the kernel."""

    planes: Planes
    lanes: int
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
        planes = planes_of(window, lanes)
        after = absorb(flow, binding.var, 2)
        flops = 2 * taps * window.out[0] * window.out[1] * channels * window.batch
        parallel = target.threads and flops >= 2 * FLOPS_PER_TASK
        tasks = min(TASKS, window.batch * channels) if parallel else 1
        conv = Depthwise(planes, lanes, tasks, after.epilogue)
        family = f"dw{window.kernel[0]}x{window.kernel[1]}s{window.strides[1]}"
        return KernelCall(
            name=f"f32_{family}{after.epilogue.name}_{lanes}__{target.isa.name}".replace("-", "_"),
            key=(conv, target.spec),
            kernel=build(conv),
            output=after.output,
            covers=after.covers,
            inputs=(call.args[0], *after.inputs),
            constants=(np.ascontiguousarray(weight).reshape(-1), *after.constants),
            scratch_bytes=() if planes.direct else (tasks * planes.channel * 4,),
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
    planes, after, lanes = conv.planes, conv.epilogue, conv.lanes
    g = planes.window
    count, taps, pixels = g.batch * g.channels, g.kernel[0] * g.kernel[1], g.out[0] * g.out[1]
    params = [("x", count * g.height * g.width, "float32"), *after.buffers(False)]
    params += [("w", g.channels * taps, "float32"), *after.buffers(True), ("y", count * pixels, "float32")]
    if not planes.direct:
        params.append(("planes", conv.tasks * planes.channel, "float32"))
    shifts = [planes.offset(i, j) for i in range(g.kernel[0]) for j in range(g.kernel[1])]
    panels = rows_of_pixels(*g.out, planes.pitch, lanes, VECTORS)

    def body(*buffers: Buffer) -> None:
        named = {name: buffer for (name, _, _), buffer in zip(params, buffers, strict=True)}
        x, w, y, extra = named["x"], named["w"], named["y"], after.bind(named)

        def channel(c: Expr, source: Buffer, start: Expr) -> None:
            filter_of = tirx.floormod(c, g.channels) * taps if g.batch > 1 else c * taps
            weights = [T.Bind(spread(load(w, filter_of + t, 1, "float32"), lanes)) for t in range(taps)]
            for group in panels:
                with T.serial(0, group.count) as n:
                    acc = Registers(len(group.places), lanes, "float32")
                    at = T.Bind(start + n * group.source_step)
                    for t in range(taps):
                        for v, (place, _) in enumerate(group.places):
                            acc[v] = acc[v] + weights[t] * load(source, at + place + shifts[t], lanes, "float32")
                    for v, (_, place) in enumerate(group.places):
                        pixel = n * group.target_step + place
                        value = after.apply(acc[v], extra, c, pixel, lanes, "float32")
                        store(y, c * pixels + pixel, value, lanes, "float32")

        with loop(conv.tasks, conv.tasks > 1) as task:
            if not planes.direct:
                own = T.Bind(task * planes.channel)
                planes.emit_zeros(named["planes"], own, lanes)
            first = T.Bind(tirx.floordiv(task * count, conv.tasks))
            with T.serial(0, tirx.floordiv((task + 1) * count, conv.tasks) - first) as n:
                c = T.Bind(first + n)
                if planes.direct:
                    channel(c, x, c * (g.height * g.width))
                else:
                    planes.emit_copy(x, c * (g.height * g.width), named["planes"], own, lanes)
                    channel(c, named["planes"], own)

    return prim_func(params, body)
