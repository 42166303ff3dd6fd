"""Padded planes: every tap of a convolution is a shift of one of them, whatever the geometry."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from graphopt.codegen.kernels.conv2d import Window
from graphopt.codegen.kernels.emit import prim_func
from graphopt.codegen.kernels.planes import Planes, emit_planes, layouts, window_of
from tests.codegen.kernels.dense import QUICK
from tests.codegen.kernels.harness import Library, fenced, relax_main


@st.composite
def windows(draw: st.DrawFn, most: int = 24) -> Window:
    """Geometries with at least one result."""
    kernel, dilation = (
        draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 3), (3, 1), (2, 2), (4, 1)])),
        draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3), (3, 1)])),
    )
    padding = tuple(draw(st.lists(st.integers(0, 4), min_size=4, max_size=4)))
    if draw(st.booleans()):
        padding = (0, 0, 0, 0)
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    low = [max(1, s - padding[i] - padding[i + 2]) for i, s in enumerate(span)]
    return Window(
        batch=draw(st.sampled_from([1, 2])),
        height=draw(st.integers(low[0], low[0] + 9)),
        width=draw(st.integers(low[1], low[1] + most)),
        channels=draw(st.integers(1, 3)),
        kernel=kernel,
        strides=draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 3), (1, 2), (2, 1)])),
        dilation=dilation,
        padding=padding,
    )


def padded(g: Window, x: np.ndarray, fill: float = 0.0) -> np.ndarray:
    """(B, C, H, W) with its padding."""
    top, left, bottom, right = g.padding
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)


def tap(g: Window, x: np.ndarray, i: int, j: int) -> np.ndarray:
    """What tap (i, j) sees of a padded image, for each pixel of the result."""
    ys = i * g.dilation[0] + g.strides[0] * np.arange(g.out[0])
    xs = j * g.dilation[1] + g.strides[1] * np.arange(g.out[1])
    return x[..., ys, :][..., xs]


@QUICK
@given(st.lists(st.tuples(windows(), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([0.0, -np.inf])), min_size=30))
def test_every_tap_is_a_shift(cases):
    """Pixel (y, x) of a tap lies at its offset + y * pitch + x, and nothing else is written."""
    kernels, planes = {}, []
    for n, (g, lanes, fill) in enumerate(cases):
        planes.append(Planes(g, direct=False, fill=fill))
        buffers = [
            ("x", g.batch * g.channels * g.height * g.width, "float32"),
            ("scratch", g.batch * planes[-1].image, "float32"),
        ]
        kernels[f"k{n}"] = prim_func(buffers, lambda x, y, n=n, v=lanes: emit_planes(planes[n], x, y, v, n % 2 == 1))
    with TemporaryDirectory() as folder:
        library = Library(kernels, Path(folder))
    for n, (p, (g, _, fill)) in enumerate(zip(planes, cases, strict=True)):
        x, _ = fenced(np.random.default_rng(n).normal(size=(g.batch, g.channels, g.height, g.width)).astype(np.float32))
        scratch, intact = fenced(np.full(g.batch * p.image, np.nan, np.float32))
        library(f"k{n}", x, scratch)
        assert intact()
        around = padded(g, x, fill)
        offsets = p.offsets().reshape(g.channels, *g.kernel)
        places = (np.arange(g.out[0]) * p.pitch)[:, None] + np.arange(g.out[1])
        for b, c, i, j in np.ndindex(g.batch, g.channels, *g.kernel):
            assert offsets[c, i, j] == c * p.channel + p.offset(i, j)
            found = scratch[b * p.image + offsets[c, i, j] + places]
            np.testing.assert_array_equal(found, tap(g, around, i, j)[b, c], err_msg=str(g))


@settings(max_examples=200, deadline=None)
@given(windows(), st.sampled_from([1, 4, 8, 16]))
def test_a_vector_from_any_pixel_stays_in_its_channel(g, lanes):
    """Also from the last pixel of the last tap, whose vector reaches over the end of the planes."""
    planes = Planes(g, direct=False)
    last = (g.out[0] - 1) * planes.pitch + g.out[1] - 1
    for i, j in np.ndindex(*g.kernel):
        assert planes.offset(i, j) + last + lanes <= planes.channel


@settings(max_examples=200, deadline=None)
@given(windows(), st.sampled_from([1, 4, 8, 16]))
def test_images_are_read_in_place_where_taps_are_shifts(g, lanes):
    """Without padding and strides an image is its own plane; rows shorter than a vector only for a 1 x 1 kernel."""
    image = np.arange(g.height * g.width).reshape(1, 1, g.height, g.width)
    direct = [p for p in layouts(g, lanes) if p.direct]
    plain = not any(g.padding) and g.strides == (1, 1)
    assert len(direct) == (plain and (g.kernel == (1, 1) or g.out[1] >= lanes))
    for p in direct:
        places = (np.arange(g.out[0]) * p.pitch)[:, None] + np.arange(g.out[1])
        for i, j in np.ndindex(*g.kernel):
            np.testing.assert_array_equal(p.offset(i, j) + places, tap(g, image, i, j)[0, 0])
            assert (p.offset(i, j) + places).max() < p.plane


def test_zeros_between_rows_are_shared():
    """Those right of a row serve as those left of the next: a padded 3 x 3 keeps one column, not two."""
    g = Window(1, 7, 7, 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    assert Planes(g, direct=False).pitch == 8
    assert Planes(Window(1, 7, 7, 1, (3, 3), (1, 1), (1, 1), (1, 0, 1, 2)), direct=False).pitch == 9
    assert Planes(Window(1, 8, 8, 1, (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), direct=False).pitch == 5


def test_what_has_no_window_says_why():
    """Other layouts and types, run-time weights, padding that cuts, empty results."""
    x, run_time = (relax.Var(n, relax.TensorType(s, "float32")) for n, s in (("x", (1, 4, 8, 8)), ("w", (4, 4, 3, 3))))
    weight, half = (relax.const(np.ones((4, 4, 3, 3), t)) for t in ("float32", "float16"))
    other = relax.const(np.ones((8, 3, 3, 4), "float32"))
    halves = relax.Var("x", relax.TensorType((1, 4, 8, 8), "float16"))
    conv = relax.op.nn.conv2d
    for build, params, reason in (
        (lambda: conv(x, run_time), [x, run_time], "not constant"),
        (lambda: conv(halves, half), [halves], "float16 times float16"),
        (lambda: conv(x, weight, padding=(-1, 0, 0, 0)), [x], "negative padding"),
        (lambda: conv(x, other, kernel_layout="OHWI"), [x], "OHWI"),
    ):  # fmt: skip
        flow = relax_main(lambda b, make=build: b.emit(make()), params)
        found = window_of(flow, flow.bindings[0].value)
        assert isinstance(found, str)
        assert reason in found
