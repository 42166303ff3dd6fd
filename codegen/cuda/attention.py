"""Attention as two products and a softmax, each of which has a good thread mapping; TVM's own lowering has none.

S[b, h, i, j] = scale * sum_d Q[b, i, h, d] * K[b, j, h, d] + bias        (float32)
P = softmax over j of S, -inf where a causal mask hides j
O[b, i, h, d] = sum_j P[b, h, i, j] * V[b, j, h, d]                       (float32 sums)
"""

from __future__ import annotations

import math

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.dataflow import dtype_of, op_of, shape_of
from graphopt.codegen.rebuild import rebuild


def split_attention(module: IRModule) -> IRModule:
    """Replace every relax.nn.attention by products and a softmax in float32."""
    return rebuild(module, _rewrite)


def _rewrite(binding: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
    if op_of(value) not in ("relax.nn.attention", "relax.nn.attention_bias"):
        return value
    query, key, attended = value.args[:3]
    bias = value.args[3] if len(value.args) > 3 else None
    dtype, emit = dtype_of(binding.var), builder.emit
    rows, columns, depth = shape_of(query)[1], shape_of(key)[1], shape_of(query)[3]
    scale = float(value.attrs.scale) if value.attrs.scale is not None else 1 / math.sqrt(depth)
    q = emit(relax.op.permute_dims(query, [0, 2, 1, 3]))
    k = emit(relax.op.permute_dims(key, [0, 2, 3, 1]))
    v = emit(relax.op.permute_dims(attended, [0, 2, 1, 3]))
    scores = emit(relax.op.matmul(q, k, out_dtype="float32"))
    scores = emit(relax.op.multiply(scores, relax.const(scale, "float32")))
    if bias is not None:
        wide = bias if dtype_of(bias) == "float32" else emit(relax.op.astype(bias, "float32"))
        scores = emit(relax.op.add(scores, wide))
    if value.attrs.causal_mask is not None:
        # TopLeft aligns the first row with the first column, BottomRight the last with the last.
        offset = columns - rows if value.attrs.causal_mask == "BottomRight" else 0
        hidden = np.where(np.tri(rows, columns, offset, dtype=bool), 0.0, -np.inf).astype("float32")
        scores = emit(relax.op.add(scores, relax.const(hidden)))
    weights = emit(relax.op.nn.softmax(scores, axis=-1))
    if dtype != "float32":
        weights = emit(relax.op.astype(weights, dtype))
    result = emit(relax.op.matmul(weights, v, out_dtype="float32"))
    if dtype != "float32":
        result = emit(relax.op.astype(result, dtype))
    return relax.op.permute_dims(result, [0, 2, 1, 3])
