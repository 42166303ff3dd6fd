"""scaled_dot_product_attention in all its spellings."""

from __future__ import annotations

import math

from torch import fx
from tvm import relax

from graphopt.codegen.converters.common import Converter, arguments
from graphopt.codegen.dataflow import dtype_of, shape_of
from graphopt.codegen.half import Importer


def _attention(node: fx.Node, importer: Importer) -> relax.Expr:
    """scaled_dot_product_attention of any rank, with masks of any dtype, an explicit scale and grouped heads."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if a["dropout_p"]:
        raise ValueError("it drops attention at random, which is for training; capture the model in eval mode")
    lead, rows, columns = shape_of(query)[:-2], shape_of(query)[-2], shape_of(key)[-2]
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
        if len(shape_of(mask)) > 4 and math.prod(shape_of(mask)[:-3]) != 1:
            mask = emit(relax.op.broadcast_to(mask, (*lead, rows, columns)))
        mask = emit(relax.op.reshape(mask, four(shape_of(mask))))
        batch, heads = shape_of(mask)[:2]
        bias = emit(relax.op.broadcast_to(mask, (batch, heads, rows, columns)))
    causal = "TopLeft" if a["is_causal"] else None
    out = emit(relax.op.nn.attention(q, k, v, bias=bias, scale=a["scale"], causal_mask=causal))
    out = emit(relax.op.permute_dims(out, [0, 2, 1, 3]))
    return emit(relax.op.reshape(out, (*lead, rows, shape_of(value)[-1])))


TABLE: dict[str, Converter] = {
    "scaled_dot_product_attention.default": _attention,
}
