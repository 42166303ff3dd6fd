"""Products with zeros, channels in front: every format, shape, tail and register tile, and how weights are packed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from graphopt.codegen.kernels import spmm, spmm_plan
from graphopt.codegen.kernels.epilogue import absorb
from graphopt.codegen.kernels.spmm import SparseProduct
from graphopt.codegen.kernels.spmm_pack import blocks_of, pack
from graphopt.codegen.kernels.spmm_plan import plan_of
from graphopt.codegen.kernels.spmm_tile import HEIGHTS, Panels, most_vectors, rows_of_pixels, tail_of
from graphopt.errors import Decline
from graphopt.targets.target import AVX512, NEON, RELAXED_SIMD, SIMD128
from tests.codegen.kernels.channels_first import FORMATS, ROWS, TAILS, convolution, linear, mask, turned
from tests.codegen.kernels.dense import QUICK, Shape, check
from tests.codegen.kernels.harness import HOST, match, relax_main

# The tiles of other instruction sets, in this machine's instructions: LLVM cuts wider vectors in two.
TARGETS = (HOST, *(replace(HOST, isa=isa) for isa in (SIMD128, RELAXED_SIMD, NEON, AVX512)))
LEVEL4 = TARGETS[-1]

WEIGHTS = st.fixed_dictionaries(
    {
        "word": st.sampled_from(FORMATS),
        "keep": st.sampled_from([0.05, 0.3, 0.7]),
        "rows": st.sampled_from(ROWS),
        "target": st.sampled_from(TARGETS),
    }
)
TAIL = st.sampled_from(sorted(TAILS))
LINEAR = st.tuples(
    st.one_of(st.sampled_from([1, 3, 5, 7, 10, 16]), st.integers(1, 40)),
    st.integers(1, 50),
    st.one_of(st.sampled_from([1, 3, 5, 15, 16, 17, 49, 196, 197]), st.integers(1, 70)),
    TAIL,
)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Convolutions with at least one result, many of them with rows shorter than a vector."""
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (2, 2)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]))
    strides = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 3), (1, 2), (2, 1)]))
    padding = tuple(draw(st.lists(st.integers(0, 3), min_size=4, max_size=4)))
    if draw(st.booleans()):
        padding = (0, 0, 0, 0)
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    low = [max(1, s - padding[i] - padding[i + 2]) for i, s in enumerate(span)]
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    return Shape(
        size=(draw(st.integers(low[0], low[0] + 9)), low[1] + draw(st.one_of(st.integers(0, 12), st.integers(0, 40)))),
        cin=groups * draw(st.integers(1, 6)),
        cout=groups * draw(st.integers(1, 11)),
        kernel=kernel,
        strides=strides,
        dilation=dilation,
        padding=padding,
        groups=groups,
        batch=draw(st.sampled_from([1, 1, 2, 3])),
    )


@pytest.fixture(params=[True, False], ids=["threads", "one thread"])
def parallel(request, monkeypatch):
    """Whether products of any size are cut into tasks."""
    monkeypatch.setattr(spmm, "FLOPS_PER_TASK", 1 if request.param else 1 << 60)
    return request.param


@settings(QUICK, max_examples=2)
@given(st.lists(st.tuples(LINEAR, WEIGHTS), min_size=16, max_size=16))
def test_random_linear_layers(parallel, cases):
    """Any sizes, format, tail and vectors equal PyTorch in float64, cut into tasks or not."""
    check([linear(*sizes, SparseProduct(), **weight, seed=i) for i, (sizes, weight) in enumerate(cases)])


@settings(QUICK, max_examples=2)
@given(st.lists(st.tuples(shapes(), TAIL, WEIGHTS), min_size=16, max_size=16))
def test_random_convolutions(parallel, cases):
    """Any geometry too: rows shorter than a vector, groups, strides, dilation, padding, several images."""
    check([convolution(s, tail, SparseProduct(), **weight, seed=i) for i, (s, tail, weight) in enumerate(cases)])


@settings(QUICK, max_examples=2)
@given(
    st.lists(st.tuples(LINEAR, WEIGHTS), min_size=8, max_size=8),
    st.lists(st.tuples(shapes(), TAIL, WEIGHTS), min_size=8, max_size=8),
    st.integers(2, 5),
)
def test_inputs_in_runs(parallel, layers, images, runs):
    """The same where inputs are taken in runs, some of them empty, and what comes is fetched ahead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spmm_plan, "_runs", lambda *_: (runs,))
        patch.setattr(spmm_plan, "_missed", lambda *_: 1.0)
        cases = [linear(*sizes, SparseProduct(), **weight, seed=i) for i, (sizes, weight) in enumerate(layers)]
        cases += [convolution(s, tail, SparseProduct(), **weight, seed=i) for i, (s, tail, weight) in enumerate(images)]
    assert any(case.call.parameters["runs"] == runs for case in cases)
    check(cases)


def test_large_inputs_go_in_runs():
    """Unstructured zeros: X is taken so that a run's part stays in the first-level cache. Few blocks: all at once."""
    calls = {
        word: linear(256, 512, 196, "bias", SparseProduct(), word=word, keep=keep, target=LEVEL4).call.parameters
        for word, keep in (("unstructured", 0.4), ("4x1", 0.1))
    }
    assert calls["unstructured"]["runs"] > 1
    assert calls["4x1"]["runs"] == 1
    assert calls["4x1"]["prefetch"]


@pytest.mark.parametrize("rows", ROWS)
def test_every_format(rows):
    """Each format, with rows that are empty, full, and all zero; outputs that are no multiple of any block."""
    tails = sorted(TAILS)
    cases = []
    for i, word in enumerate(FORMATS):
        cases.append(linear(19, 21, 33, tails[i % len(tails)], SparseProduct(), word=word, rows=rows, seed=i))
    shape = Shape((7, 9), 6, 10, padding=(1, 1, 1, 1))
    for word in ("unstructured", "4x1", "2:4"):
        cases.append(convolution(shape, "bias_residual_relu", SparseProduct(), word=word, rows=rows))
    check(cases)


def test_every_tail():
    """Each elementwise tail is taken whole, behind linear layers and convolutions."""
    images = Shape((5, 6), 6, 10, padding=(0, 1, 1, 0), batch=2)
    cases = [linear(10, 8, 19, tail, SparseProduct(), word="2x1") for tail in TAILS]
    check(cases + [convolution(images, tail, SparseProduct(), word="2x1") for tail in TAILS])


@pytest.mark.parametrize("height", HEIGHTS)
def test_every_register_tile(height, monkeypatch):
    """Each height of blocks with each number of vectors, outputs left over, images with and without gaps."""
    monkeypatch.setattr(spmm_plan, "HEIGHTS", (height,))
    cases, most = [], most_vectors(height, HOST.isa)
    for vectors in range(1, most + 1):
        monkeypatch.setattr(spmm_plan, "most_vectors", lambda height, isa, vectors=vectors: vectors)
        outputs = height * 2 + vectors % height
        for tokens in (16 * vectors, 24 * vectors - 5):
            cases.append(linear(outputs, 9, tokens, "bias", SparseProduct(), seed=vectors))
        cases.append(convolution(Shape((5, 8 + vectors), 3, outputs), "bias", SparseProduct(), seed=vectors))
        narrow = Shape((4 + vectors, 5), 3, outputs, padding=(1, 1, 1, 1), batch=2)
        cases.append(convolution(narrow, "bias", SparseProduct(), seed=vectors))
    assert {case.call.parameters["height"] for case in cases} == {height}
    assert max(case.call.parameters["vectors"] for case in cases) == most
    check(cases)


def test_sizes_of_networks():
    """Layers of MobileNet and DeiT, in blocks and without, with threads as they are."""
    check(
        [
            convolution(Shape((14, 14), 96, 64, (1, 1)), "bias_relu6", SparseProduct(), word="4x1"),
            convolution(Shape((7, 7), 64, 96, (1, 1), batch=2), "bias_residual_relu", SparseProduct(), word="2x1"),
            convolution(Shape((56, 56), 16, 24, (1, 1)), "bias", SparseProduct()),
            convolution(Shape((33, 40), 3, 8, strides=(2, 2), padding=(0, 0, 1, 1)), "bias_relu6", SparseProduct()),
            convolution(Shape((14, 14), 32, 16, padding=(1, 1, 1, 1)), "bias", SparseProduct(), word="16x1", keep=0.2),
            linear(96, 64, 197, "gelu", SparseProduct(), word="8:2:4"),
            linear(64, 96, 128, "bias_residual_relu", SparseProduct(), word="2:4"),
        ],
    )


def test_leading_dimensions_of_one():
    """[1, 1, inputs, tokens] is a matrix; more than one is not, and says so."""
    weight = np.eye(5, 7, dtype=np.float32)
    check([turned(lambda rng: weight, (1, 1, 9), "bias", SparseProduct())])
    with pytest.raises(AssertionError, match="not a product of two matrices"):
        turned(lambda rng: weight, (2, 9), "bias", SparseProduct())


def test_what_is_no_constant_matrix_is_declined():
    """Run-time weights, other types and operands without elements have their reasons."""
    x, h = (relax.Var("x", relax.TensorType((4, 4), dtype)) for dtype in ("float32", "float16"))
    empty = relax.Var("x", relax.TensorType((4, 0), "float32"))
    four, half = (relax.const(np.ones((4, 4), dtype)) for dtype in ("float32", "float16"))
    for left, right, reason in (
        (x, x, "no constant"),
        (x, four, "no constant"),
        (half, h, "float16"),
        (four, empty, "no elements"),
    ):
        params = [v for v in (left, right) if isinstance(v, relax.Var)][:1]
        declined = match(relax_main(lambda b, a=left, c=right: b.emit(relax.op.matmul(a, c)), params), SparseProduct())
        assert isinstance(declined, Decline)
        assert reason in declined.reason


def test_like_layers_share_a_kernel():
    """Neither values nor which blocks are kept, nor a few more or less of them, make another kernel; a tail does."""
    dense = [linear(8, 16, 20, "bias", SparseProduct(), word="dense", seed=seed) for seed in (1, 2)]
    assert dense[0].call.key == dense[1].call.key
    assert not np.array_equal(dense[0].call.constants[0], dense[1].call.constants[0])
    assert dense[0].call.key != linear(8, 16, 20, "gelu", SparseProduct(), word="dense").call.key
    some = [linear(64, 64, 49, "bias", SparseProduct(), word="4x1", seed=seed) for seed in range(4)]
    assert len({case.call.constants[0].size for case in some}) > 1
    assert len({case.call.key for case in some}) == 1
    # They run as well when all are one kernel.
    check([replace(case, call=replace(case.call, kernel=some[0].call.kernel)) for case in some])


def test_reference_is_the_kernel():
    """The reference of the template, tail included, is what the kernel must compute."""
    case = linear(6, 12, 20, "bias_residual_relu", SparseProduct())
    after = absorb(case.flow, case.flow.bindings[0].var)
    matrix = case.flow.constant(case.flow.bindings[0].value.args[0])
    operands = [case.call.constants[-1], case.inputs[1]]
    out = SparseProduct().reference(matrix, case.inputs[0], after.epilogue, operands)
    np.testing.assert_allclose(out, case.expected, rtol=1e-6, atol=1e-6)


# How weights are packed and images cut -------------------------------------------------------------------------------


def unpacked(sections, offsets, outputs):
    """The matrix that packed sections stand for."""
    at = {int(offset): i for i, offset in enumerate(offsets)}
    matrix = np.zeros((outputs, len(offsets)), np.float32)
    for section in sections:
        values = section.values.reshape(-1, section.height)
        for row, output in enumerate(section.outputs):
            for ends in section.ends:
                for block in range(ends[row], ends[row + 1]):
                    matrix[output : output + section.height, at[int(section.offsets[block])]] += values[block]
    return matrix


@settings(max_examples=60, deadline=None)
@given(
    *(st.integers(1, 40), st.integers(1, 30), st.sampled_from(FORMATS), st.sampled_from(ROWS)),
    *(st.sampled_from(HEIGHTS), st.integers(1, 20), st.integers(1, 5), st.integers(0, 1000)),
)
def test_packing_loses_nothing(outputs, inputs, word, rows, height, chunks, runs, seed):
    """What is unpacked is the matrix, every output is in one block row, longer rows first, and cuts cover all rows.

    The inputs of a run come before those of the next.
    """
    rng = np.random.default_rng(seed)
    kept = mask(rng, outputs, inputs, word, 0.3, rows)
    matrix = np.where(kept, rng.standard_normal(kept.shape), 0).astype(np.float32)
    offsets = rng.permutation(inputs) * 16
    sections = pack(matrix, offsets, height, runs=runs)
    np.testing.assert_array_equal(unpacked(sections, offsets, outputs), matrix)
    covered = np.concatenate([(s.outputs[:, None] + np.arange(s.height)).reshape(-1) for s in sections])
    np.testing.assert_array_equal(np.sort(covered), np.arange(outputs))
    assert sum(section.blocks for section in sections) == blocks_of(matrix, height)
    for section in sections:
        lengths = np.diff(section.ends).sum(0)
        assert (np.diff(lengths) <= 0).all()
        number = np.argsort(offsets)[section.offsets[: section.blocks] // 16]
        parts = [number[ends[0] : ends[-1]] for ends in section.ends]
        assert sum(map(len, parts)) == section.blocks
        parts = [part for part in parts if len(part)]
        assert all(one.max() < two.min() for one, two in pairwise(parts))
        bounds = section.bounds(min(chunks, section.block_rows))
        assert bounds[0] == 0
        assert bounds[-1] == section.block_rows
        assert (np.diff(bounds) >= 0).all()
        work = np.add.reduceat(np.append(lengths + 2, 0), bounds[:-1]) * (np.diff(bounds) > 0)
        assert work.max() <= (lengths + 2).sum() / (len(bounds) - 1) + (lengths + 2).max() + 1


@st.composite
def images(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    """Height, width, pitch, lanes, most vectors and tail; rows are no shorter than a vector, or lie without gaps."""
    lanes = draw(st.sampled_from([1, 2, 4, 8, 16]))
    height, width = draw(st.integers(1, 30)), draw(st.integers(1, 80))
    gap = draw(st.sampled_from([0, 0, 1, 2, 7]))
    if gap:
        width = max(width, lanes)
    lanes = min(lanes, 1 << ((height * width).bit_length() - 1))
    tail = tail_of(width if gap else height * width, draw(st.sampled_from(HEIGHTS)), lanes)
    return height, width, width + gap, lanes, draw(st.integers(1, 8)), draw(st.sampled_from([0, tail]))


@settings(max_examples=300, deadline=None)
@given(images())
def test_panels_cover_every_pixel(image):
    """Every pixel is computed, from where it lies in X; nothing outside is written, and no panel is too wide."""
    height, width, pitch, lanes, most, tail = image
    source = np.full(height * pitch, -1)
    source.reshape(height, pitch)[:, :width] = np.arange(height * width).reshape(height, width)
    seen = np.zeros(height * width, int)
    for group in rows_of_pixels(*image):
        assert isinstance(group, Panels)
        assert 1 <= len(group.places) <= most
        for k in range(group.count):
            for begin, to, elements in group.places:
                start, target = k * group.source_step + begin, k * group.target_step + to
                assert elements in (lanes, tail)
                assert 0 <= target <= height * width - elements
                np.testing.assert_array_equal(source[start : start + elements], np.arange(target, target + elements))
                seen[target : target + elements] += 1
    assert seen.min() >= 1
    # Only last vectors overlap.
    assert (seen > 1).sum() <= (1 if pitch == width else height) * (lanes - 1)


@pytest.mark.parametrize("isa", [t.isa for t in TARGETS], ids=lambda isa: isa.name)
def test_tiles_fit_the_registers(isa):
    """Accumulators, the vectors of X where several outputs share them, and a weight."""
    for height in HEIGHTS:
        vectors = most_vectors(height, isa)
        held = vectors if height > 1 else 0
        assert height * vectors + held + 1 <= isa.vector_registers
        assert height * vectors >= 4, "too few accumulators to hide latency"


def test_the_format_decides_the_height():
    """Blocks of four rows are multiplied as such, and single elements are not multiplied by the zeros beside them."""
    heights = {}
    for word in ("unstructured", "4x1"):
        rng = np.random.default_rng(0)
        matrix = mask(rng, 256, 256, word, 0.1, "as they are").astype(np.float32)
        heights[word] = plan_of(matrix, spmm.tokens_as_image(256, 196), HOST).height
    assert heights["4x1"] >= 4
    assert heights["unstructured"] <= 2
