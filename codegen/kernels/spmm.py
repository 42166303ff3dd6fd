"""Products of a constant matrix, sparse or not, with rows of pixels or tokens: channels in front.

    Y[b, o, p] = epilogue(sum_i W[o, i] * X_i[b, p])
linear layers    W (O, I) constant, X (I, tokens)
convolutions     NCHW with OIHW weights, groups, strides, dilation: an input i is a channel and a tap, whose pixels are
                 a shifted plane of the padded image (`planes.py`); only kept inputs cost anything
    limit: multiply-adds of kept blocks at the register tile's rate (`spmm_tile.py`)

Blocks are packed (`spmm_pack.py`) at the height whose estimate is lowest; a dense matrix is one whose blocks are all
kept. Where a row of pixels is shorter than a vector, whole images are computed with the gaps between their rows, and
moved together when a block row is done.
Source: Elsen et al., "Fast Sparse ConvNets", CVPR 2020, arXiv:1911.09723.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernels.emit import Buffer, Expr, load, loop, prim_func, store
from graphopt.codegen.kernels.epilogue import Absorbed, Epilogue, absorb
from graphopt.codegen.kernels.planes import Planes, emit_planes, planes_of, window_of
from graphopt.codegen.kernels.spmm_pack import Section, blocks_of, pack
from graphopt.codegen.kernels.spmm_tile import (
    HEIGHTS,
    Panels,
    emit_block_row,
    most_vectors,
    product_cycles,
    rows_of_pixels,
)
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.kernels.tile import FLOPS_PER_TASK
from graphopt.errors import Decline
from graphopt.targets.target import Target

TASKS = 16  # as many as there may be threads


@dataclass(frozen=True)
class Source:
    """Where the rows of X lie, and the pixels of Y: images of `height` rows of `width`."""

    batch: int
    rows: int  # of X in one image: channels, or features
    size: int  # elements of one image of the input
    height: int
    width: int
    planes: Planes | None  # None for linear layers: X is read in place

    @property
    def pixels(self) -> int:
        """Elements of a row of Y."""
        return self.height * self.width

    @property
    def pitch(self) -> int:
        """Elements of X from a row of pixels to the next."""
        return self.width if self.planes is None else self.planes.pitch

    @property
    def copied(self) -> bool:
        """Whether X is a copy in scratch memory."""
        return self.planes is not None and not self.planes.direct

    @property
    def image(self) -> int:
        """Elements of one image as the product reads it."""
        return self.rows * self.planes.channel if self.planes is not None and self.copied else self.size


@dataclass(frozen=True)
class Shape:
    """What the code depends on of a section."""

    height: int
    block_rows: int
    blocks: int
    chunks: tuple[int, ...]  # for each group of panels: runs of block rows that are tasks of their own


@dataclass(frozen=True)
class Spmm:
    """Everything that determines the kernel."""

    source: Source
    outputs: int
    lanes: int
    panels: tuple[Panels, ...]
    gaps: bool  # panels run over rows with their gaps, and results are moved together
    sections: tuple[Shape, ...]
    parallel: bool
    epilogue: Epilogue


class SparseProduct(Template):
    """Y = epilogue(W X)."""

    name: ClassVar[str] = "spmm"
    anchors: ClassVar[tuple[str, ...]] = ("relax.matmul", "relax.nn.conv2d")

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take products of a constant matrix with run-time rows, and NCHW convolutions, in float32."""
        call, where = binding.value, binding.var.name
        operands = _linear(flow, call) if op_of(call) == "relax.matmul" else convolution(flow, call, target)
        if isinstance(operands, str):
            return Decline(where, operands)
        matrix, offsets, x, source = operands
        plan = plan_of(matrix, source, target)
        after = absorb(flow, binding.var, 1 if source.planes is None else 2)
        return _call(plan, pack(matrix, offsets, plan.height), len(matrix), source, x, after, target)

    def reference(self, matrix: Array, rows: Array, after: Epilogue, operands: list[Array]) -> Array:
        """epilogue(W X) in float64, X as (inputs, pixels)."""
        return after.reference(np.asarray(matrix, np.float64) @ np.asarray(rows, np.float64), operands)


@dataclass(frozen=True)
class Plan:
    """How a product is computed, and the estimate."""

    height: int
    lanes: int
    panels: tuple[Panels, ...]
    gaps: bool
    cycles: float


def plan_of(matrix: Array, source: Source, target: Target) -> Plan:
    """The height of blocks and the width of panels with the lowest estimate."""
    lanes = min(target.isa.lanes(), 1 << (source.pixels.bit_length() - 1))
    gaps = source.pitch != source.width and source.width < lanes
    inputs = int((matrix != 0).any(0).sum())
    plans = []
    for height in [h for h in HEIGHTS if h == 1 or h <= len(matrix)]:
        blocks, block_rows = blocks_of(matrix, height), -(-len(matrix) // height)
        for most in range(1, most_vectors(height, target.isa) + 1):
            if gaps:
                span = -(-source.height * source.pitch // lanes) * lanes
                panels = rows_of_pixels(1, span, span, lanes, most)
            else:
                panels = rows_of_pixels(source.height, source.width, source.pitch, lanes, most)
            cycles = product_cycles(block_rows, blocks, height, panels, inputs, target)
            plans.append(Plan(height, lanes, panels, gaps, source.batch * cycles))
    return min(plans, key=lambda plan: (plan.cycles, -plan.height))


Operands = tuple[Array, Array, relax.Expr, Source]


def _linear(flow: Dataflow, call: relax.Call) -> Operands | str:
    """matmul(W, X) with a constant W."""
    matrix, x = flow.constant(call.args[0]), call.args[1]
    if matrix is None or flow.constant(x) is not None:
        return "the first factor is no constant matrix"
    if matrix.ndim != 2 or len(shape_of(x)) < 2 or math.prod(shape_of(x)[:-2]) != 1:
        return "not a product of two matrices"
    if dtype_of(x) != "float32" or str(matrix.dtype) != "float32":
        return f"{matrix.dtype} times {dtype_of(x)}"
    inputs, tokens = shape_of(x)[-2:]
    if 0 in (*matrix.shape, tokens):
        return "an operand has no elements"
    return matrix, np.arange(inputs) * tokens, x, Source(1, inputs, inputs * tokens, 1, tokens, None)


def convolution(flow: Dataflow, call: relax.Call, target: Target) -> Operands | str:
    """conv2d in NCHW with constant weights."""
    window = window_of(flow, call)
    if isinstance(window, str):
        return window
    x, weight = call.args[0], flow.constant(call.args[1])
    assert weight is not None, "window_of() has seen that it is constant"
    channels, height, width = window.channels, window.height, window.width
    planes = planes_of(window, min(target.isa.lanes(), 1 << (math.prod(window.out).bit_length() - 1)))
    taps = [planes.offset(i, j) for i in range(window.kernel[0]) for j in range(window.kernel[1])]
    matrix = _ungrouped(weight, int(call.attrs.groups)).reshape(weight.shape[0], -1)
    offsets = (np.arange(channels)[:, None] * planes.channel + np.array(taps)).reshape(-1)
    source = Source(window.batch, channels, channels * height * width, *window.out, planes)
    return matrix, offsets, x, source


def _ungrouped(weight: Array, groups: int) -> Array:
    """(O, I, kh, kw) over all inputs, zeros between groups."""
    if groups == 1:
        return weight
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    whole = np.zeros((weight.shape[0], inputs * groups, *weight.shape[2:]), weight.dtype)
    for g in range(groups):
        rows = slice(g * outputs, (g + 1) * outputs)
        whole[rows, g * inputs : (g + 1) * inputs] = weight[rows]
    return whole


def _call(
    plan: Plan,
    sections: Sequence[Section],
    outputs: int,
    source: Source,
    x: relax.Expr,
    after: Absorbed,
    target: Target,
) -> KernelCall:
    blocks = sum(section.blocks * section.height for section in sections)
    parallel = target.threads and 2 * blocks * source.pixels * source.batch >= 2 * FLOPS_PER_TASK
    shapes = []
    for section in sections:
        tasks = [source.batch * (1 if plan.gaps else group.count) for group in plan.panels]
        chunks = [min(section.block_rows, -(-TASKS // count)) if parallel else 1 for count in tasks]
        shapes.append(Shape(section.height, section.block_rows, section.blocks, tuple(chunks)))
    spmm = Spmm(source, outputs, plan.lanes, plan.panels, plan.gaps, tuple(shapes), parallel, after.epilogue)
    constants: list[Array] = []
    for section, shape in zip(sections, shapes, strict=True):
        runs = [section.bounds(chunks) for chunks in dict.fromkeys(shape.chunks)]
        arrays = (section.values, section.offsets, section.ends, section.outputs, *runs)
        constants += [array if len(array) else np.zeros(1, array.dtype) for array in arrays]
    density = blocks / (outputs * source.rows * (math.prod(_kernel(source))))
    scratch = [source.batch * source.image * 4] if source.copied else []
    if plan.gaps:
        scratch.append(_tile(spmm) * _slots(spmm) * 4)
    widest = max(len(group.places) for group in plan.panels)
    family = "linear" if source.planes is None else "conv" + "x".join(map(str, _kernel(source)))
    name = f"f32_spmm_{family}{after.epilogue.name}_{plan.height}x{widest * plan.lanes}__{target.isa.name}"
    return KernelCall(
        name=name.replace("-", "_"),
        key=(spmm, target.spec),
        kernel=build(spmm),
        output=after.output,
        covers=after.covers,
        inputs=(x, *after.inputs),
        constants=(*constants, *after.constants),
        scratch_bytes=tuple(scratch),
        parameters={
            "height": plan.height,
            "vectors": widest,
            "kept": f"{density:.3f}",
            "cycles": round(plan.cycles),
        },
    )


def _kernel(source: Source) -> tuple[int, int]:
    return (1, 1) if source.planes is None else source.planes.window.kernel


def _tile(spmm: Spmm) -> int:
    """Elements that a block row's results take with the gaps between rows."""
    highest = max(section.height for section in spmm.sections)
    return highest * -(-spmm.source.height * spmm.source.pitch // spmm.lanes) * spmm.lanes


def _slots(spmm: Spmm) -> int:
    """Tasks that need a tile of their own."""
    return spmm.source.batch * max(chunks for section in spmm.sections for chunks in section.chunks)


def _roomy(size: int) -> int:
    """A size for a parameter's declaration, so that layers with a few blocks more or less share their code."""
    return 1 << max(size - 1, 1).bit_length()


def build(spmm: Spmm) -> PrimFunc:
    """The kernel as TIR."""
    source, after = spmm.source, spmm.epilogue
    params = [("x", source.batch * source.size, "float32"), *after.buffers(False)]
    for number, section in enumerate(spmm.sections):
        params += [
            (f"values{number}", _roomy(section.blocks * section.height), "float32"),
            (f"offsets{number}", _roomy(section.blocks), "int32"),
            (f"ends{number}", section.block_rows + 1, "int32"),
            (f"outputs{number}", section.block_rows, "int32"),
        ]
        params += [(f"bounds{number}_{chunks}", chunks + 1, "int32") for chunks in dict.fromkeys(section.chunks)]
    params += [*after.buffers(True), ("y", source.batch * spmm.outputs * source.pixels, "float32")]
    if source.copied:
        params.append(("planes", source.batch * source.image, "float32"))
    if spmm.gaps:
        params.append(("tile", _tile(spmm) * _slots(spmm), "float32"))

    def body(*buffers: Buffer) -> None:
        named = {name: buffer for (name, _, _), buffer in zip(params, buffers, strict=True)}
        x = named["x"]
        if source.copied:
            assert source.planes is not None
            emit_planes(source.planes, x, named["planes"], spmm.lanes, spmm.parallel)
            x = named["planes"]
        writer = _Writer(spmm, named, x, after.bind(named))
        for number, section in enumerate(spmm.sections):
            if spmm.gaps:
                writer.with_gaps(number, section)
            else:
                for group, chunks in zip(spmm.panels, section.chunks, strict=True):
                    writer.panels(number, section, group, chunks)

    return prim_func(params, body)


@dataclass(frozen=True)
class _Writer:
    """Writes the loops over tasks, block rows and panels."""

    spmm: Spmm
    named: dict[str, Buffer]
    x: Buffer
    extra: list[Buffer]

    def panels(self, number: int, section: Shape, group: Panels, chunks: int) -> None:
        """All block rows of a section for each panel of a group."""
        spmm, source = self.spmm, self.spmm.source
        with loop(source.batch * group.count * chunks, spmm.parallel) as task:
            image = T.Bind(tirx.floordiv(task, group.count * chunks)) if source.batch > 1 else 0
            panel = T.Bind(tirx.floormod(tirx.floordiv(task, chunks), group.count)) if group.count > 1 else 0
            chunk = T.Bind(tirx.floormod(task, chunks)) if chunks > 1 else 0
            start = T.Bind(panel * group.source_step + image * source.image)
            target = T.Bind(panel * group.target_step)

            def finish(output: Expr, o: int, v: int, value: Expr) -> None:
                self.store(image, output + o, target + group.places[v][1], value, spmm.lanes)

            with self.block_rows(number, chunk, chunks) as row:
                output = T.Bind(tirx.BufferLoad(self.named[f"outputs{number}"], [row]))
                self.block_row(
                    number,
                    section,
                    row,
                    [start + s for s, _ in group.places],
                    lambda o, v, value: finish(output, o, v, value),
                )

    def with_gaps(self, number: int, section: Shape) -> None:
        """Each block row for all panels, then its rows of pixels moved together."""
        spmm, source = self.spmm, self.spmm.source
        chunks = max(section.chunks)
        span = -(-source.height * source.pitch // spmm.lanes) * spmm.lanes
        narrow = min(spmm.lanes, 1 << (source.width.bit_length() - 1))
        tile = self.named["tile"]
        with loop(source.batch * chunks, spmm.parallel) as task:
            image = T.Bind(tirx.floordiv(task, chunks)) if source.batch > 1 else 0
            chunk = T.Bind(tirx.floormod(task, chunks)) if chunks > 1 else 0
            slot = T.Bind(task * _tile(spmm)) if source.batch * chunks > 1 else 0
            with self.block_rows(number, chunk, chunks) as row:
                output = T.Bind(tirx.BufferLoad(self.named[f"outputs{number}"], [row]))
                for group in spmm.panels:
                    with T.serial(0, group.count) as panel:
                        start = T.Bind(panel * group.source_step)
                        starts = [start + s + image * source.image for s, _ in group.places]

                        def keep(o: int, v: int, value: Expr, start: Expr = start, group: Panels = group) -> None:
                            store(tile, slot + o * span + start + group.places[v][0], value, spmm.lanes, "float32")

                        self.block_row(number, section, row, starts, keep)
                for o in range(section.height):
                    with T.serial(0, source.height) as y:
                        for x in range(0, source.width, narrow):
                            at = min(x, source.width - narrow)
                            value = T.Bind(load(tile, slot + o * span + y * source.pitch + at, narrow, "float32"))
                            self.store(image, output + o, y * source.width + at, value, narrow)

    def block_rows(self, number: int, chunk: Expr, chunks: int) -> _BlockRows:
        """A loop over the block rows of a chunk."""
        bounds = self.named[f"bounds{number}_{chunks}"]
        return _BlockRows(bounds, chunk)

    def block_row(self, number: int, section: Shape, row: Expr, starts: list[Expr], finish: object) -> None:
        """One block row for one panel."""
        values, offsets, ends = (self.named[f"{name}{number}"] for name in ("values", "offsets", "ends"))
        emit_block_row(
            self.x, values, offsets, ends, row, section.height, self.spmm.lanes, starts, finish  # type: ignore[arg-type]
        )  # fmt: skip

    def store(self, image: Expr, output: Expr, pixel: Expr, value: Expr, lanes: int) -> None:
        """A vector of results of one output, through the epilogue."""
        spmm = self.spmm
        row = output + image * spmm.outputs
        value = spmm.epilogue.apply(value, self.extra, row, pixel, lanes, "float32")
        store(self.named["y"], row * spmm.source.pixels + pixel, value, lanes, "float32")


class _BlockRows:
    """`with` gives the number of a block row."""

    def __init__(self, bounds: Buffer, chunk: Expr) -> None:
        self.first = T.Bind(tirx.BufferLoad(bounds, [chunk]))
        self.loop = T.serial(0, tirx.BufferLoad(bounds, [chunk + 1]) - self.first)

    def __enter__(self) -> Expr:
        return T.Bind(self.first + self.loop.__enter__())

    def __exit__(self, *error: object) -> None:
        self.loop.__exit__(*error)
