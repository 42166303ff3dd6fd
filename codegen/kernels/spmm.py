"""Products of a constant matrix, sparse or not, with rows of pixels or tokens: channels in front.

    Y[b, o, p] = epilogue(sum_i W[o, i] * X_i[b, p])
linear layers    W (O, I) constant, X (I, tokens)
convolutions     NCHW with OIHW weights, groups, strides, dilation: an input i is a channel and a tap, whose pixels are
                 a shifted plane of the padded image (`planes.py`); only kept inputs cost anything
    limit: multiply-adds of kept blocks at the register tile's rate (`spmm_tile.py`)

Rows of X that do not begin at vectors' boundaries are copied to ones that do, where that pays: each load would touch
two cache lines.

Blocks are packed (`spmm_pack.py`) at the height whose estimate is lowest (`spmm_plan.py`); a dense matrix is one whose
blocks are all kept. Where a row of pixels is shorter than a vector, whole images are computed with the gaps between
their rows, and moved together when a block row is done.
Source: Elsen et al., "Fast Sparse ConvNets", CVPR 2020, arXiv:1911.09723.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernels.conv2d import Window
from graphopt.codegen.kernels.emit import Buffer, Expr, load, loop, prim_func, store
from graphopt.codegen.kernels.epilogue import Absorbed, Epilogue, absorb
from graphopt.codegen.kernels.planes import Planes, emit_planes, window_of
from graphopt.codegen.kernels.spmm_pack import AHEAD, pack
from graphopt.codegen.kernels.spmm_plan import Plan, plan_of
from graphopt.codegen.kernels.spmm_tile import Panels, Sums, Weights, emit_block_row
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.kernels.tile import FLOPS_PER_TASK, TASKS
from graphopt.errors import Decline
from graphopt.targets.target import Isa, Target


@dataclass(frozen=True)
class Shape:
    """What the code depends on of a section."""

    height: int
    block_rows: int
    blocks: int  # as `roomy` rounds them: layers that differ in little else share a kernel
    chunks: tuple[int, ...]  # for each group of panels: runs of block rows that are tasks of their own


@dataclass(frozen=True)
class Spmm:
    """Everything that determines the kernel."""

    planes: Planes
    outputs: int
    lanes: int
    isa: Isa
    panels: tuple[Panels, ...]
    gaps: bool  # panels run over rows with their gaps, and results are moved together
    runs: int  # of inputs; from one to the next, sums lie in scratch memory
    prefetch: bool
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
        is_linear = op_of(call) == "relax.matmul"
        operands = linear(flow, call) if is_linear else convolution(flow, call)
        if isinstance(operands, str):
            return Decline(where, operands)
        matrix, window, x = operands
        plan = plan_of(matrix, window, target)
        after = absorb(flow, binding.var, 1 if is_linear else 2)
        name = "linear" if is_linear else "conv" + "x".join(map(str, window.kernel))
        return _call(name, plan, matrix, x, after, target)

    def reference(self, matrix: Array, rows: Array, after: Epilogue, operands: list[Array]) -> Array:
        """epilogue(W X) in float64, X as (inputs, pixels)."""
        return after.reference(np.asarray(matrix, np.float64) @ np.asarray(rows, np.float64), operands)


Operands = tuple[Array, Window, relax.Expr]


def tokens_as_image(inputs: int, tokens: int) -> Window:
    """A linear layer is a 1 x 1 convolution over an image of one row."""
    return Window(1, 1, tokens, inputs, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0))


def linear(flow: Dataflow, call: relax.Call) -> Operands | str:
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
    return matrix, tokens_as_image(inputs, tokens), x


def convolution(flow: Dataflow, call: relax.Call) -> Operands | str:
    """conv2d in NCHW with constant weights."""
    window = window_of(flow, call)
    if isinstance(window, str):
        return window
    weight = flow.constant(call.args[1])
    assert weight is not None, "window_of() has seen that it is constant"
    return _ungrouped(weight, int(call.attrs.groups)).reshape(weight.shape[0], -1), window, call.args[0]


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


def _call(name: str, plan: Plan, matrix: Array, x: relax.Expr, after: Absorbed, target: Target) -> KernelCall:
    planes, window = plan.planes, plan.planes.window
    sections = pack(matrix, planes.offsets(), plan.height, runs=plan.runs)
    pixels = math.prod(window.out)
    blocks = sum(section.blocks * section.height for section in sections)
    parallel = target.threads and 2 * blocks * pixels * window.batch >= 2 * FLOPS_PER_TASK
    shapes = []
    for section in sections:
        tasks = [window.batch * (1 if plan.gaps else group.count) for group in plan.panels]
        chunks = [min(section.block_rows, -(-TASKS // count)) if parallel else 1 for count in tasks]
        shapes.append(Shape(section.height, section.block_rows, roomy(section.blocks), tuple(chunks)))
    spmm = Spmm(
        planes=planes,
        outputs=len(matrix),
        lanes=plan.lanes,
        isa=target.isa,
        panels=plan.panels,
        gaps=plan.gaps,
        runs=plan.runs,
        prefetch=plan.prefetch,
        sections=tuple(shapes),
        parallel=parallel,
        epilogue=after.epilogue,
    )
    constants: list[Array] = []
    for section, shape in zip(sections, shapes, strict=True):
        constants += section.constants(*dict.fromkeys(shape.chunks))
    scratch = [] if planes.direct else [window.batch * planes.image * 4]
    if plan.gaps:
        scratch.append(_tile(spmm) * _slots(spmm) * 4)
    if plan.runs > 1:
        scratch.append(_sums(spmm) * _panels(spmm) * 4)
    widest = max(len(group.places) for group in plan.panels)
    symbol = f"f32_spmm_{name}{after.epilogue.name}_{plan.height}x{widest * plan.lanes}__{target.isa.name}"
    return KernelCall(
        name=symbol.replace("-", "_"),
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
            "runs": plan.runs,
            "prefetch": plan.prefetch,
            "kept": f"{blocks / matrix.size:.3f}",
            "cycles": round(plan.cycles),
        },
    )


def _tile(spmm: Spmm) -> int:
    """Elements that a block row's results take with the gaps between rows."""
    highest = max(section.height for section in spmm.sections)
    return highest * -(-spmm.planes.window.out[0] * spmm.planes.pitch // spmm.lanes) * spmm.lanes


def _slots(spmm: Spmm) -> int:
    """Tasks that need a tile of their own."""
    return spmm.planes.window.batch * max(chunks for section in spmm.sections for chunks in section.chunks)


def _sums(spmm: Spmm) -> int:
    """Elements that the sums of all outputs for one panel take."""
    return spmm.outputs * max(len(group.places) for group in spmm.panels) * spmm.lanes


def _panels(spmm: Spmm) -> int:
    """Panels that may be computed at the same time."""
    return spmm.planes.window.batch * max(group.count for group in spmm.panels) if spmm.parallel else 1


def roomy(size: int) -> int:
    """A size for a parameter's declaration, so that layers with a few blocks more or less share their code."""
    return 1 << max(size - 1, 1).bit_length()


def build(spmm: Spmm) -> PrimFunc:
    """The kernel as TIR."""
    planes, after = spmm.planes, spmm.epilogue
    g = planes.window
    params = [("x", g.batch * g.channels * g.height * g.width, "float32"), *after.buffers(False)]
    for number, section in enumerate(spmm.sections):
        params += [
            (f"values{number}", roomy(section.blocks * section.height), "float32"),
            (f"offsets{number}", roomy(section.blocks) + AHEAD, "int32"),
            (f"ends{number}", spmm.runs * (section.block_rows + 1), "int32"),
            (f"outputs{number}", section.block_rows, "int32"),
        ]
        params += [(f"bounds{number}_{chunks}", chunks + 1, "int32") for chunks in dict.fromkeys(section.chunks)]
    params += [*after.buffers(True), ("y", g.batch * spmm.outputs * math.prod(g.out), "float32")]
    if not planes.direct:
        params.append(("planes", g.batch * planes.image, "float32"))
    if spmm.gaps:
        params.append(("tile", _tile(spmm) * _slots(spmm), "float32"))
    if spmm.runs > 1:
        params.append(("sums", _sums(spmm) * _panels(spmm), "float32"))

    def body(*buffers: Buffer) -> None:
        named = {name: buffer for (name, _, _), buffer in zip(params, buffers, strict=True)}
        x = named["x"]
        if not planes.direct:
            emit_planes(planes, x, named["planes"], spmm.lanes, spmm.parallel)
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
        spmm, planes = self.spmm, self.spmm.planes
        with loop(planes.window.batch * group.count * chunks, spmm.parallel) as task:
            image = T.Bind(tirx.floordiv(task, group.count * chunks)) if planes.window.batch > 1 else 0
            panel = T.Bind(tirx.floormod(tirx.floordiv(task, chunks), group.count)) if group.count > 1 else 0
            chunk = T.Bind(tirx.floormod(task, chunks)) if chunks > 1 else 0
            start = T.Bind(panel * group.source_step + image * planes.image)
            target = T.Bind(panel * group.target_step)

            starts = [(start + place.source, place.elements) for place in group.places]
            slot = T.Bind(tirx.floordiv(task, chunks) * _sums(spmm)) if spmm.parallel and spmm.runs > 1 else 0

            def block_rows(run: Expr) -> None:
                with self.block_rows(number, chunk, chunks) as row:
                    output = T.Bind(tirx.BufferLoad(self.named[f"outputs{number}"], [row]))

                    def finish(o: int, v: int, value: Expr) -> None:
                        place = group.places[v]
                        self.store(image, output + o, target + place.target, value, place.elements)

                    sums = None
                    if spmm.runs > 1:
                        # In the order of computing, which is not that of outputs: what comes next is fetched ahead.
                        at = T.Bind(slot + row * (_sums(spmm) // spmm.outputs * section.height))
                        sums = Sums(self.named["sums"], at, run, spmm.runs)
                    self.block_row(number, section, run * (section.block_rows + 1) + row, starts, finish, sums)

            if spmm.runs == 1:
                block_rows(0)
            else:
                with T.serial(0, spmm.runs) as run:
                    block_rows(run)

    def with_gaps(self, number: int, section: Shape) -> None:
        """Each block row for all panels, then its rows of pixels moved together."""
        spmm, planes = self.spmm, self.spmm.planes
        chunks = max(section.chunks)
        span = -(-planes.window.out[0] * planes.pitch // spmm.lanes) * spmm.lanes
        narrow = min(spmm.lanes, 1 << (planes.window.out[1].bit_length() - 1))
        tile = self.named["tile"]
        with loop(planes.window.batch * chunks, spmm.parallel) as task:
            image = T.Bind(tirx.floordiv(task, chunks)) if planes.window.batch > 1 else 0
            chunk = T.Bind(tirx.floormod(task, chunks)) if chunks > 1 else 0
            slot = T.Bind(task * _tile(spmm)) if planes.window.batch * chunks > 1 else 0
            with self.block_rows(number, chunk, chunks) as row:
                output = T.Bind(tirx.BufferLoad(self.named[f"outputs{number}"], [row]))
                for group in spmm.panels:
                    with T.serial(0, group.count) as panel:
                        start = T.Bind(panel * group.source_step)
                        starts = [(start + s + image * planes.image, spmm.lanes) for s, _, _ in group.places]

                        def keep(o: int, v: int, value: Expr, start: Expr = start, group: Panels = group) -> None:
                            store(tile, slot + o * span + start + group.places[v].source, value, spmm.lanes, "float32")

                        self.block_row(number, section, row, starts, keep)
                for o in range(section.height):
                    with T.serial(0, planes.window.out[0]) as y:
                        for x in range(0, planes.window.out[1], narrow):
                            at = min(x, planes.window.out[1] - narrow)
                            value = T.Bind(load(tile, slot + o * span + y * planes.pitch + at, narrow, "float32"))
                            self.store(image, output + o, y * planes.window.out[1] + at, value, narrow)

    def block_rows(self, number: int, chunk: Expr, chunks: int) -> BlockRows:
        """A loop over the block rows of a chunk."""
        bounds = self.named[f"bounds{number}_{chunks}"]
        return BlockRows(bounds, chunk)

    def block_row(
        self,
        number: int,
        section: Shape,
        row: Expr,
        starts: list[tuple[Expr, int]],
        finish: Callable[[int, int, Expr], None],
        sums: Sums | None = None,
    ) -> None:
        """One block row for one panel; `row` is its place in `ends`."""
        values, offsets, ends = (self.named[f"{name}{number}"] for name in ("values", "offsets", "ends"))
        weights = Weights(values, offsets, ends, row)
        tile = (section.height, self.spmm.lanes, self.spmm.isa)
        emit_block_row(self.x, weights, tile, starts, finish, sums, AHEAD if self.spmm.prefetch else 0)

    def store(self, image: Expr, output: Expr, pixel: Expr, value: Expr, lanes: int) -> None:
        """A vector of results of one output, through the epilogue."""
        spmm = self.spmm
        row = output + image * spmm.outputs
        value = spmm.epilogue.apply(value, self.extra, row, pixel, lanes, "float32")
        store(self.named["y"], row * math.prod(spmm.planes.window.out) + pixel, value, lanes, "float32")


class BlockRows:
    """`with` gives the number of a block row."""

    def __init__(self, bounds: Buffer, chunk: Expr) -> None:
        self.first = T.Bind(tirx.BufferLoad(bounds, [chunk]))
        self.loop = T.serial(0, tirx.BufferLoad(bounds, [chunk + 1]) - self.first)

    def __enter__(self) -> Expr:
        return T.Bind(self.first + self.loop.__enter__())

    def __exit__(self, *error: object) -> None:
        self.loop.__exit__(*error)
