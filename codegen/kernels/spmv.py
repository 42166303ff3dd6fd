"""Products of a constant matrix with zeros and one vector: a token at decoding, an image of one pixel.

    y[o] = epilogue(sum_i W[o, i] * x[i])
    W  packed in blocks of outputs x 1 input (`spmm_pack.py`); a block is one vector
    limit: the time to stream the kept blocks: 4 + 4 / height bytes for each element of them

With one pixel there is nothing to vectorise over but outputs: each block is loaded as a vector and multiplied with one
element of x. Blocks of height 1 are a dot product, in scalars. Several sums are in flight at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow, op_of, shape_of
from graphopt.codegen.kernels.emit import Buffer, Expr, Registers, load, loop, prim_func, spread, store
from graphopt.codegen.kernels.epilogue import Epilogue, absorb
from graphopt.codegen.kernels.spmm import BlockRows, convolution, linear, roomy
from graphopt.codegen.kernels.spmm_pack import blocks_of, pack
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.kernels.tile import FLOPS_PER_TASK, TASKS
from graphopt.errors import Decline
from graphopt.targets.target import Target

SUMS = 4  # in flight
# Cycles for a block of short vectors, and for a row. Measured on Zen 5, weights in the third-level cache.
BLOCK_CYCLES, ROW_CYCLES = 1.15, 12.0
BLOCK_BYTES_PER_CYCLE = 16


@dataclass(frozen=True)
class Spmv:
    """Everything that determines the kernel."""

    inputs: int
    outputs: int
    sections: tuple[tuple[int, int, int], ...]  # height, block rows, blocks as `roomy` rounds them
    chunks: int
    epilogue: Epilogue


class SparseVector(Template):
    """y = epilogue(W x)."""

    name: ClassVar[str] = "spmv"
    anchors: ClassVar[tuple[str, ...]] = ("relax.matmul", "relax.nn.conv2d")

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take products of a constant matrix with one run-time vector, and convolutions that are such, in float32."""
        call, where = binding.value, binding.var.name
        operands = linear(flow, call) if op_of(call) == "relax.matmul" else convolution(flow, call)
        if isinstance(operands, str):
            return Decline(where, operands)
        matrix, window, x = operands
        if (window.batch, window.height, window.width, window.kernel) != (1, 1, 1, (1, 1)) or any(window.padding):
            return Decline(where, "more than one pixel or token")
        height, _ = height_of(matrix, target)
        sections = pack(matrix, np.arange(window.channels), height, rest=1)
        # Outputs are the columns: all that is behind the batch.
        after = absorb(flow, binding.var, len(shape_of(binding.var)))
        kept = sum(section.blocks * section.height for section in sections)
        chunks = TASKS if target.threads and 2 * kept >= 2 * FLOPS_PER_TASK else 1
        shapes = tuple((section.height, section.block_rows, roomy(section.blocks)) for section in sections)
        spmv = Spmv(window.channels, len(matrix), shapes, chunks, after.epilogue)
        constants = [array for section in sections for array in section.constants(chunks)]
        return KernelCall(
            name=f"f32_spmv{after.epilogue.name}_{height}__{target.isa.name}".replace("-", "_"),
            key=(spmv, target.spec),
            kernel=build(spmv),
            output=after.output,
            covers=after.covers,
            inputs=(x, *after.inputs),
            constants=(*constants, *after.constants),
            parameters={"height": height, "kept": f"{kept / matrix.size:.3f}"},
        )

    def reference(self, matrix: Array, x: Array, after: Epilogue, operands: list[Array]) -> Array:
        """epilogue(W x) in float64, as one row."""
        return after.reference((np.asarray(matrix, np.float64) @ np.asarray(x, np.float64))[None], operands)


def height_of(matrix: Array, target: Target) -> tuple[int, float]:
    """The height of blocks with the lowest estimate, and that in cycles."""
    best = (1, float("inf"))
    height = 1
    while height <= min(target.isa.lanes(), len(matrix)):
        whole = len(matrix) // height * height
        blocks = blocks_of(matrix[:whole], height) + int(np.count_nonzero(matrix[whole:]))
        each = max(BLOCK_CYCLES, (4 * height + 4) / BLOCK_BYTES_PER_CYCLE)
        cycles = blocks * each + (whole // height + len(matrix) - whole) * ROW_CYCLES
        if cycles <= best[1]:
            best = (height, cycles)
        height *= 2
    return best


def build(spmv: Spmv) -> PrimFunc:
    """The kernel as TIR."""
    after = spmv.epilogue
    params = [("x", spmv.inputs, "float32"), *after.buffers(False)]
    for number, (height, block_rows, blocks) in enumerate(spmv.sections):
        params += [
            (f"values{number}", roomy(blocks * height), "float32"),
            (f"offsets{number}", roomy(blocks), "int32"),
            (f"ends{number}", block_rows + 1, "int32"),
            (f"outputs{number}", block_rows, "int32"),
            (f"bounds{number}", spmv.chunks + 1, "int32"),
        ]
    params += [*after.buffers(True), ("y", spmv.outputs, "float32")]

    def body(*buffers: Buffer) -> None:
        named = {name: buffer for (name, _, _), buffer in zip(params, buffers, strict=True)}
        extra = after.bind(named)

        def block_row(number: int, height: int, row: Expr) -> None:
            values, offsets, ends = (named[f"{name}{number}"] for name in ("values", "offsets", "ends"))
            sums = Registers(SUMS, height, "float32")
            first = T.Bind(tirx.BufferLoad(ends, [row]))
            count = T.Bind(tirx.BufferLoad(ends, [row + 1]) - first)
            whole = T.Bind(tirx.truncdiv(count, SUMS) * SUMS)

            def add(block: Expr, into: int) -> None:
                element = load(named["x"], T.Bind(tirx.BufferLoad(offsets, [block])), 1, "float32")
                sums[into] = sums[into] + load(values, block * height, height, "float32") * spread(element, height)

            with T.serial(0, tirx.truncdiv(count, SUMS)) as n:
                for u in range(SUMS):
                    add(T.Bind(first + n * SUMS + u), u)
            with T.serial(0, count - whole) as n:
                add(T.Bind(first + whole + n), 0)
            total = (sums[0] + sums[1]) + (sums[2] + sums[3])
            output = T.Bind(tirx.BufferLoad(named[f"outputs{number}"], [row]))
            value = after.apply(total, extra, 0, output, height, "float32")
            store(named["y"], output, value, height, "float32")

        for number, (height, _, _) in enumerate(spmv.sections):
            with (
                loop(spmv.chunks, spmv.chunks > 1) as chunk,
                BlockRows(named[f"bounds{number}"], chunk) as row,
            ):
                block_row(number, height, row)

    return prim_func(params, body)
