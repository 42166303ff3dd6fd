"""Dense matrix product: linear layers, 1 x 1 convolutions, products of two run-time tensors.

C[b, m, n] = epilogue(sum_k A[b, m, k] * B[b, k, n])
A  (M, K) row-major, leading dimensions flattened into M where B is shared by them
B  constant: packed when compiled as (N / nr, K, nr); known at run time: (K, N) row-major as it lies
limit: 2 M N K FLOPs at the register tile's rate (`tile.py`); for M = 1 the time to stream B once
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import relax
from tvm.tirx import PrimFunc

from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernels.emit import FLOATS, Buffer, Expr, accumulator, prim_func, store
from graphopt.codegen.kernels.epilogue import Absorbed, Epilogue, absorb
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.kernels.tile import Nest, emit_nest, pack, plan
from graphopt.errors import Decline
from graphopt.targets.target import Target

SHORT = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Product:
    """Everything that determines the kernel."""

    batch: int
    b_batched: bool
    k: int
    nest: Nest
    packed: bool
    a_constant: bool
    b_constant: bool
    dtype: str
    b_dtype: str
    out_dtype: str
    epilogue: Epilogue


class Gemm(Template):
    """C = epilogue(A B)."""

    name: ClassVar[str] = "gemm"
    anchors: ClassVar[tuple[str, ...]] = ("relax.matmul", "relax.nn.conv2d")

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take matmul of float tensors with at least two dimensions, and plain 1 x 1 convolutions in NHWC."""
        call, where = binding.value, binding.var.name
        a, b = call.args[0], call.args[1]
        a_shape, b_shape, dtype = shape_of(a), shape_of(b), dtype_of(a)
        if dtype not in FLOATS or dtype_of(b) != dtype:
            return Decline(where, f"{dtype} times {dtype_of(b)}")
        if 0 in (*a_shape, *b_shape):
            return Decline(where, "an operand has no elements")
        weight = flow.constant(b)
        if op_of(call) == "relax.nn.conv2d":
            refusal = _not_pointwise(call, a_shape, b_shape)
            if refusal:
                return Decline(where, refusal)
            if weight is None:
                return Decline(where, "the weights are not constant")
            weight = weight.reshape(b_shape[0], b_shape[3]).T
            b_shape = weight.shape
        if len(a_shape) < 2 or len(b_shape) < 2:
            return Decline(where, "an operand is a vector")
        lead = a_shape[:-2]
        if math.prod(b_shape[:-2]) == 1:
            batch, m = 1, math.prod(a_shape[:-1])
        elif b_shape[:-2] == lead:
            batch, m = math.prod(lead), a_shape[-2]
        elif len(b_shape) > 2 and math.prod(lead) == 1:
            batch, m = math.prod(b_shape[:-2]), a_shape[-2]
        else:
            return Decline(where, f"batch dimensions {lead} and {b_shape[:-2]} differ")
        after = absorb(flow, binding.var)
        k, n = b_shape[-2:]
        packed = weight is not None and batch == 1
        bits = 64 if dtype == "float64" else 32
        nest = plan(m, n, ((k, 1, n),), k * 4, target, bits)
        if packed:
            nest = plan(m, n, ((k, 1, nest.tile.nr),), k * 4, target, bits)
        fixed = flow.constant(a)
        product = Product(
            batch=batch,
            b_batched=batch > 1,
            k=k,
            nest=nest,
            packed=packed,
            a_constant=fixed is not None,
            b_constant=weight is not None,
            dtype=dtype,
            b_dtype=_stored(dtype) if packed else dtype,
            out_dtype=dtype_of(binding.var),
            epilogue=after.epilogue,
        )
        if batch > 1 and math.prod(lead) == 1:
            return Decline(where, "one matrix against many")
        constants: list[Array] = [] if fixed is None else [np.ascontiguousarray(fixed).reshape(-1)]
        if weight is not None:
            flat = weight.reshape(k, n) if packed else weight
            constants.append((pack(flat.astype(product.b_dtype), n, nest.tile) if packed else flat).reshape(-1))
        inputs = [x for x, known in ((a, fixed), (b, weight)) if known is None]
        return _call(product, after, inputs, constants, target)

    def reference(self, a: Array, b: Array, after: Epilogue, operands: list[Array]) -> Array:
        """epilogue(a @ b) with rows flattened, in float64."""
        out = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        return after.reference(out.reshape(-1, out.shape[-1]), operands)


def _stored(dtype: str) -> str:
    """Packed weights are kept in the type that the kernel computes in: conversion in the inner loop is slow."""
    return accumulator(dtype)


def _not_pointwise(call: relax.Call, data: tuple[int, ...], kernel: tuple[int, ...]) -> str:
    attrs = call.attrs
    if attrs.data_layout != "NHWC" or attrs.kernel_layout != "OHWI" or attrs.out_layout not in ("NHWC", ""):
        return f"layout {attrs.data_layout}, {attrs.kernel_layout}"
    plain = (
        kernel[1:3] == (1, 1)
        and all(int(s) == 1 for s in attrs.strides)
        and all(int(p) == 0 for p in attrs.padding)
        and int(attrs.groups) == 1
    )
    return "" if plain else "not a plain 1 x 1 convolution"


def _call(
    product: Product, after: Absorbed, inputs: list[relax.Expr], constants: list[Array], target: Target
) -> KernelCall:
    nest, kind = product.nest, SHORT[product.dtype]
    family = "gemm" if product.packed else "bmm"
    return KernelCall(
        name=f"{kind}_{family}{product.epilogue.name}_{nest.tile}__{target.isa.name.replace('-', '_')}",
        key=(product, target.spec),
        kernel=build(product),
        output=after.output,
        covers=after.covers,
        inputs=(*inputs, *after.inputs),
        constants=(*constants, *after.constants),
        parameters={"mr": nest.tile.mr, "nr": nest.tile.nr, "block": nest.block},
    )


def build(product: Product) -> PrimFunc:
    """The kernel as TIR."""
    p, nest, after = product, product.nest, product.epilogue
    tile, k, dtype = nest.tile, p.k, accumulator(product.dtype)
    a_size = p.batch * nest.m * k
    b_size = nest.panels * k * tile.nr if p.packed else (p.batch if p.b_batched else 1) * k * nest.n
    a_param, b_param = ("a", a_size, p.dtype), ("b", b_size, p.b_dtype)
    run_time = [x for x, constant in ((a_param, p.a_constant), (b_param, p.b_constant)) if not constant]
    known = [x for x, constant in ((a_param, p.a_constant), (b_param, p.b_constant)) if constant]
    inputs, constants = [*run_time, *after.buffers(False)], [*known, *after.buffers(True)]
    params = [*inputs, *constants, ("c", p.batch * nest.m * nest.n, p.out_dtype)]

    def body(*buffers: Buffer) -> None:
        named = {name: buffer for (name, _, _), buffer in zip(params, buffers, strict=True)}
        a, b, c = named["a"], named["b"], named["c"]
        extra = after.bind(named)
        which: list[Expr] = [0]

        def finish(row: Expr, col: Expr, value: Expr) -> None:
            row = row + which[0] * nest.m
            value = after.apply(value, extra, row, col, tile.lanes, dtype)
            store(c, row * nest.n + col, value, tile.lanes, dtype)

        def w_offset(panel: Expr, column: Expr) -> Expr:
            return panel * (k * tile.nr) if p.packed else column + which[0] * (k * nest.n if p.b_batched else 0)

        emit_nest(
            nest,
            a,
            b,
            a_offset=lambda row: (row + which[0] * nest.m) * k,
            w_offset=w_offset,
            finish=finish,
            dtype=dtype,
            outer=p.batch,
            begin=lambda number: which.__setitem__(0, number),
        )

    return prim_func(params, body)
