"""scaled_dot_product_attention in all its spellings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from graphopt.codegen.converters.common import Converter, arguments
from graphopt.codegen.dataflow import dtype_of, shape_of
from graphopt.codegen.half import Importer

Emit = Callable[[relax.Expr], relax.Expr]


def _attention(node: fx.Node, importer: Importer) -> relax.Expr:
    """scaled_dot_product_attention of any rank, with masks of any dtype, an explicit scale and grouped heads."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if a["dropout_p"]:
        raise ValueError("it drops attention at random, which is for training; capture the model in eval mode")
    lead, rows, columns = shape_of(query)[:-2], shape_of(query)[-2], shape_of(key)[-2]
    key, value = (_with_lead(x, lead, a["enable_gqa"], emit) for x in (key, value))
    if a["enable_gqa"] and (groups := lead[-1] // shape_of(key)[-3]) > 1:
        key, value = (emit(relax.op.repeat(x, groups, axis=len(lead) - 1)) for x in (key, value))

    def four(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(batch, heads, rows, columns) of a shape of any rank."""
        *batch, heads, n, m = (1, 1, *shape)
        return math.prod(batch), heads, n, m

    def with_heads_inside(x: relax.Expr) -> relax.Expr:
        return emit(relax.op.permute_dims(emit(relax.op.reshape(x, four(shape_of(x)))), [0, 2, 1, 3]))

    q, k, v = (with_heads_inside(x) for x in (query, key, value))
    bias = None
    if mask is not None:
        dtype = dtype_of(query)
        if dtype_of(mask) == "bool":
            mask = emit(relax.op.where(mask, relax.const(0.0, dtype), relax.const(float("-inf"), dtype)))
        if len(lead) > 2:
            mask = emit(relax.op.broadcast_to(mask, (*lead, rows, columns)))
        mask = emit(relax.op.reshape(mask, four(shape_of(mask))))
        batch, heads = shape_of(mask)[:2]
        bias = emit(relax.op.broadcast_to(mask, (batch, heads, rows, columns)))
    if shape_of(k) == shape_of(v):
        causal = "TopLeft" if a["is_causal"] else None
        out = emit(relax.op.nn.attention(q, k, v, bias=bias, scale=a["scale"], causal_mask=causal))
    else:
        out = _written_out(q, k, v, bias, a, emit)
    out = emit(relax.op.permute_dims(out, [0, 2, 1, 3]))
    return emit(relax.op.reshape(out, (*lead, rows, shape_of(value)[-1])))


def _with_lead(x: relax.Expr, lead: tuple[int, ...], grouped: bool, emit: Emit) -> relax.Expr:
    """Keys or values for as many batches as there are of queries; the heads are left alone where they are grouped."""
    wanted = (*lead[:-1], shape_of(x)[-3]) if grouped else lead
    return x if shape_of(x)[:-2] == wanted else emit(relax.op.broadcast_to(x, (*wanted, *shape_of(x)[-2:])))


def _written_out(
    q: relax.Expr, k: relax.Expr, v: relax.Expr, bias: relax.Expr | None, a: dict[str, Any], emit: Emit
) -> relax.Expr:
    """Attention as products and a softmax, for values of another size than the keys; (batch, rows, heads, size)."""
    op, dtype = relax.op, dtype_of(q)
    scale = 1 / math.sqrt(shape_of(q)[-1]) if a["scale"] is None else a["scale"]
    q, v = (emit(op.permute_dims(x, [0, 2, 1, 3])) for x in (q, v))
    scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 2, 3, 1]))))
    scores = emit(op.multiply(scores, relax.const(scale, dtype)))
    if bias is not None:
        scores = emit(op.add(scores, bias))
    if a["is_causal"]:
        seen = relax.const(np.tril(np.ones(shape_of(scores)[-2:], "bool")), "bool")
        scores = emit(op.where(seen, scores, relax.const(-math.inf, dtype)))
    weights = emit(op.nn.softmax(scores, -1))
    # A row without any key left is zero, as PyTorch has it, and not 0 / 0.
    dead = emit(op.equal(emit(op.max(scores, -1, True)), relax.const(-math.inf, dtype)))
    weights = emit(op.where(dead, relax.const(0.0, dtype), weights))
    return emit(op.permute_dims(emit(op.matmul(weights, v)), [0, 2, 1, 3]))


TABLE: dict[str, Converter] = {
    "scaled_dot_product_attention.default": _attention,
}
