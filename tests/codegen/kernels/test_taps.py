"""Vectors of columns as a tap sees them: from the image, shifted at its edges, or from padded planes."""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.tirx.script import builder as T

from graphopt.codegen.kernels.conv2d import Window
from graphopt.codegen.kernels.emit import prim_func, splat, store
from graphopt.codegen.kernels.planes import Planes, emit_planes
from graphopt.codegen.kernels.taps import CopiedTaps, ImageTaps, each, readable
from tests.codegen.kernels.dense import QUICK
from tests.codegen.kernels.harness import Library, fenced
from tests.codegen.kernels.test_planes import padded, tap


def writes_taps(g: Window, lanes: int, copied: bool, fill: float, pairs: bool) -> tuple:
    """A kernel that writes what each tap sees, (kh, kw, height, width), a few rows at a time, as depthwise does."""
    planes = Planes(g, direct=False, fill=fill)
    height, width = g.out
    rows = min(2, height)
    size = g.kernel[0] * g.kernel[1] * height * width
    buffers = [("x", g.height * g.width, "float32"), ("y", size, "float32"), ("scratch", planes.image, "float32")]

    def body(x, y, scratch) -> None:
        if copied:
            emit_planes(planes, x, scratch, lanes, False)
            source = CopiedTaps(planes, scratch, 0, lanes)
        else:
            source = ImageTaps(g, x, 0, lanes, fill, pairs)

        def tile(top, left) -> None:
            for line, users in source.lines(rows):
                for j in range(g.kernel[1]):
                    value = source.load(top, line, left, j)
                    value = splat(fill, lanes, "float32") if value is None else T.Bind(value)
                    for r, i in users:
                        to = ((i * g.kernel[1] + j) * height + top + r) * width + left
                        store(y, to, value, lanes, "float32")

        def across(top) -> None:
            each(width, lanes, lambda left: source.inside(1, left, lanes), lambda left: tile(top, left))

        each(height, rows, lambda top: source.inside(0, top, rows), across)

    return prim_func(buffers, body), planes.image


def check(cases: list[tuple[Window, int, bool, float]], pairs: bool = False) -> None:
    """Build all into one library; every pixel of every tap is written, with what the padded image has there."""
    built = [writes_taps(*case, pairs) for case in cases]
    with TemporaryDirectory() as folder:
        library = Library({f"k{n}": kernel for n, (kernel, _) in enumerate(built)}, Path(folder))
    for n, (g, lanes, copied, fill) in enumerate(cases):
        x, _ = fenced(np.random.default_rng(n).normal(size=(1, 1, g.height, g.width)).astype(np.float32))
        y, intact = fenced(np.full((*g.kernel, *g.out), np.nan, np.float32))
        scratch, _ = fenced(np.full(built[n][1], np.nan, np.float32))
        library(f"k{n}", x, y, scratch)
        assert intact()
        around = padded(g, x, fill)
        for i, j in np.ndindex(*g.kernel):
            np.testing.assert_array_equal(y[i, j], tap(g, around, i, j)[0, 0], err_msg=f"{i} {j} {g} {lanes} {copied}")


def small(strides: tuple[int, ...], kernels: tuple[int, ...], widths: range) -> list[tuple[Window, int]]:
    """All geometries of one row of tap rows: kernel, dilation, stride, paddings left and right, width, lanes."""
    found = []
    for stride, kernel, dilation, width in itertools.product(strides, kernels, (1, 2), widths):
        for left, right, lanes in itertools.product(range(4), range(4), (1, 2, 4)):
            if (dilation > 1 and kernel == 1) or max(left, right) > kernel * dilation:
                continue
            g = Window(1, 3, width, 1, (2, kernel), (1, stride), (1, dilation), (1, left, 0, right))
            if g.out[1] >= lanes:
                found.append((g, lanes))
    return found


@pytest.mark.parametrize("stride", [1, 2])
def test_small_geometries_in_place(stride):
    """Every geometry that is read in place, at the sizes where edges meet; each in turn one of the values around."""
    cases = [(g, lanes) for g, lanes in small((stride,), (1, 2, 3, 5), range(1, 13)) if readable(g, lanes)]
    assert len(cases) > 100
    step = max(1, len(cases) // 80)
    check([(g, lanes, False, (0.0, -np.inf)[n % 2]) for n, (g, lanes) in enumerate(cases[stride::step])])


def test_small_geometries_in_pairs():
    """Every second column, from a load that gives both: the same, in place at the edges too."""
    cases = [(g, lanes) for g, lanes in small((2,), (1, 2, 3, 5), range(1, 17)) if lanes > 1 and readable(g, lanes)]
    assert len(cases) > 50
    step = max(1, len(cases) // 80)
    check([(g, lanes, False, (0.0, -np.inf)[n % 2]) for n, (g, lanes) in enumerate(cases[::step])], pairs=True)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Window, int]:
    """Any geometry of one channel, and lanes that its results fill."""
    kernel = draw(st.sampled_from([(3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (2, 2)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]))
    padding = tuple(draw(st.lists(st.integers(0, 4), min_size=4, max_size=4)))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    low = [max(1, s - padding[i] - padding[i + 2]) for i, s in enumerate(span)]
    size = draw(st.integers(low[0], low[0] + 9)), draw(st.integers(low[1], low[1] + 36))
    strides = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (1, 2), (3, 3)]))
    g = Window(1, *size, 1, kernel, strides, dilation, padding)
    return g, min(draw(st.sampled_from([4, 8, 16])), 1 << (g.out[1].bit_length() - 1))


@settings(QUICK, max_examples=2)
@given(st.lists(windows(), min_size=24, max_size=24))
def test_random_geometries(cases):
    """From the image where that can be read, from planes always."""
    copied = [(g, lanes, True, (0.0, -np.inf)[n % 2]) for n, (g, lanes) in enumerate(cases)]
    check(copied + [(g, lanes, False, 0.0) for g, lanes in cases if readable(g, lanes)])


def test_usual_layers_are_read_in_place():
    """3 x 3 with padding 1, strides 1 and 2, and 5 x 5, at the sizes of mobile networks."""
    for size, kernel, stride in ((112, 3, 1), (112, 3, 2), (14, 3, 1), (28, 5, 1)):
        pad = kernel // 2
        g = Window(1, size, size, 8, (kernel, kernel), (stride, stride), (1, 1), (pad, pad, pad, pad))
        assert readable(g, 8)
    assert not readable(Window(1, 7, 7, 8, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)), 8)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.sets(st.integers(0, 60)))
def test_each_visits_every_start(size, step, outside):
    """In steps, the last one overlapping; what `inside` denies is never a loop variable."""
    step = min(step, size)
    wanted = [min(n, size - step) for n in range(0, size, step)]
    numbers, loops = [], []

    def visit(start) -> None:
        (numbers if isinstance(start, int) else loops).append(start)

    prim_func([("x", 1, "float32")], lambda x: each(size, step, lambda start: start not in outside, visit))
    assert len(loops) <= 1
    assert set(numbers) <= set(wanted)
    looped = [start for start in wanted if start not in numbers]
    assert not set(looped) & outside
    assert not looped or (len(looped) > 1 and looped == list(range(looped[0], looped[-1] + 1, step)))
    assert bool(looped) == bool(loops)
