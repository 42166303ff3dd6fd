"""Images with channels in front, laid out so that every tap of a convolution is a shift of the same plane.

A convolution's result at pixel (y, x) reads, for tap (i, j) of a channel, the padded image's element
(y sy + i dy, x sx + j dx). The padded image is split into sy * sx phases, planes of every sy-th row and sx-th column;
then the tap's elements for all pixels are one plane, shifted by whole rows and columns:

    phase ((i dy) mod sy, (j dx) mod sx), from element ((i dy) div sy) * pitch + (j dx) div sx on

and pixel (y, x) is element y * pitch + x of it. A 1 x 1 convolution without strides reads the image itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tvm import relax, tirx
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Dataflow, dtype_of, shape_of
from graphopt.codegen.kernels.conv2d import Window
from graphopt.codegen.kernels.emit import Buffer, Expr, copy_run, load, loop, store

SLACK = 16  # elements behind a channel's planes: the longest vector that begins inside


@dataclass(frozen=True)
class Planes:
    """How the source of a convolution lies; sizes in elements of one channel."""

    window: Window
    direct: bool  # taps are shifts of the image as it is, and nothing is copied
    fill: float = 0.0  # what lies around the image

    @cached_property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """The phases that some tap reads."""
        g = self.window
        return tuple(
            sorted(
                {
                    ((i * g.dilation[0]) % g.strides[0], (j * g.dilation[1]) % g.strides[1])
                    for i in range(g.kernel[0])
                    for j in range(g.kernel[1])
                }
            )
        )

    @cached_property
    def _reach(self) -> tuple[int, int]:
        g = self.window
        return tuple((k - 1) * d // s for k, d, s in zip(g.kernel, g.dilation, g.strides, strict=True))  # type: ignore[return-value]

    @cached_property
    def pitch(self) -> int:
        """Elements from a row of a plane to the next. Zeros right of a row may serve as those left of the next."""
        g = self.window
        if self.direct:
            return g.width
        shared = min(g.padding[1], g.padding[3], self._reach[1]) if g.strides[1] == 1 else 0
        return g.out[1] + self._reach[1] - shared

    @property
    def contiguous(self) -> bool:
        """Whether the pixels of a tap lie without gaps between rows."""
        return self.pitch == self.window.out[1]

    @cached_property
    def rows(self) -> int:
        """Rows of a plane."""
        return self.window.height if self.direct else self.window.out[0] + self._reach[0]

    @cached_property
    def plane(self) -> int:
        """Elements of a phase's plane."""
        return self.rows * self.pitch

    @cached_property
    def channel(self) -> int:
        """Elements of a channel's planes."""
        if self.direct:
            return self.plane
        return -(-(len(self.phases) * self.plane + self._reach[1] + SLACK) // 16) * 16

    def offset(self, i: int, j: int) -> int:
        """Where tap (i, j) of channel 0 begins."""
        g = self.window
        (row, py), (column, px) = divmod(i * g.dilation[0], g.strides[0]), divmod(j * g.dilation[1], g.strides[1])
        return self.phases.index((py, px)) * self.plane + row * self.pitch + column

    @property
    def image(self) -> int:
        """Elements of all channels of one image."""
        return self.window.channels * self.channel

    def offsets(self) -> np.ndarray:
        """Where each input (channel, tap row, tap column) begins, in the order of OIHW weights."""
        g = self.window
        taps = [self.offset(i, j) for i in range(g.kernel[0]) for j in range(g.kernel[1])]
        return (np.arange(g.channels)[:, None] * self.channel + np.array(taps)).reshape(-1)

    def emit_fill(self, planes: Buffer, to: Expr, lanes: int) -> None:
        """Fill the planes of one channel, where anything around the image is read."""
        if any(self.window.padding):
            copy_run(planes, to, None, 0, self.channel, lanes, self.fill)

    def emit_copy(self, source: Buffer, start: Expr, planes: Buffer, to: Expr, lanes: int) -> None:
        """Copy one channel that begins at `start` into its planes at `to`; what is around the image stays."""
        g = self.window
        (top, left), (sy, sx) = g.padding[:2], g.strides
        if self.plane == g.height * g.width and len(self.phases) == 1 and not any(g.padding):
            copy_run(planes, to, source, start, self.plane, lanes)
            return
        for number, (py, px) in enumerate(self.phases):
            # Of the phase's rows and columns those that lie in the image: r sy + py - top in [0, height).
            first, last = (max(0, -(-(before - p) // s)) for before, p, s in ((top, py, sy), (left, px, sx)))
            rows = min(self.rows, (g.height - 1 + top - py) // sy + 1) - first
            columns = min(self.pitch, (g.width - 1 + left - px) // sx + 1) - last
            if rows <= 0 or columns <= 0:
                continue
            with T.serial(0, rows) as n:
                y = (n + first) * sy + (py - top)
                row = T.Bind(to + (number * self.plane + (n + first) * self.pitch + last))
                x = T.Bind(start + y * g.width + (last * sx + px - left))
                _copy_strided(planes, row, source, x, columns, sx, lanes)


def _copy_strided(target: Buffer, to: Expr, source: Buffer, start: Expr, count: int, stride: int, lanes: int) -> None:
    """target[to + n] = source[start + n * stride] for n < count."""
    if stride == 1:
        copy_run(target, to, source, start, count, lanes)
        return
    done, half = 0, min(lanes, 1 << (count.bit_length() - 1))
    if stride == 2 and half > 1:
        # Even elements of a pair of vectors; the second of them ends one element behind the last that is wanted.
        whole = (2 * count - 1) // (2 * half)

        def move(n: Expr) -> None:
            pair = [T.Bind(load(source, start + n * 2 + k * half, half, "float32")) for k in (0, 1)]
            even = tirx.Shuffle(pair, [tirx.IntImm("int32", 2 * k) for k in range(half)])
            store(target, to + n, even, half, "float32")

        if whole:
            with T.serial(0, whole) as n:
                move(n * half)
            done = whole * half
            if done < count - 1:
                move(count - 1 - half)
                done = count - 1
    if count > done:
        with T.serial(0, count - done) as n:
            value = load(source, start + (n + done) * stride, 1, "float32")
            store(target, to + n + done, value, 1, "float32")


def window_of(flow: Dataflow, call: relax.Call) -> Window | str:
    """The geometry of a conv2d in NCHW with constant weights, in float32; or why it is not one for the kernels here."""
    attrs, x = call.attrs, call.args[0]
    if (attrs.data_layout, attrs.kernel_layout, attrs.out_layout or "NCHW") != ("NCHW", "OIHW", "NCHW"):
        return f"layout {attrs.data_layout}, {attrs.kernel_layout}"
    weight = flow.constant(call.args[1])
    if weight is None or flow.constant(x) is not None:
        return "the weights are not constant, or the input is"
    if dtype_of(x) != "float32" or str(weight.dtype) != "float32":
        return f"{weight.dtype} times {dtype_of(x)}"
    batch, channels, height, width = shape_of(x)
    pads = [int(p) for p in attrs.padding]
    top, left, bottom, right = (pads if len(pads) == 4 else pads * 4)[:4]
    if min(top, left, bottom, right) < 0 or 0 in (batch, *weight.shape, channels):
        return "negative padding, or nothing to compute"
    (sy, sx), (dy, dx) = ([int(v) for v in (*value, *value)][:2] for value in (attrs.strides, attrs.dilation))
    kernel = (weight.shape[2], weight.shape[3])
    window = Window(batch, height, width, channels, kernel, (sy, sx), (dy, dx), (top, left, bottom, right))
    return window if min(window.out) >= 1 else "the result is empty"


def layouts(window: Window, lanes: int) -> list[Planes]:
    """How the source of a convolution whose kernel computes `lanes` pixels at a time may lie."""
    found = [Planes(window, direct=False)]
    if not any(window.padding) and window.strides == (1, 1) and (window.kernel == (1, 1) or window.out[1] >= lanes):
        found.append(Planes(window, direct=True))
    return found


def emit_planes(planes: Planes, source: Buffer, scratch: Buffer, lanes: int, parallel: bool) -> None:
    """Copy all channels of all images."""
    g = planes.window
    with loop(g.batch * g.channels, parallel) as c:
        planes.emit_fill(scratch, c * planes.channel, lanes)
        planes.emit_copy(source, c * (g.height * g.width), scratch, c * planes.channel, lanes)
