"""A program's graph as a Relax module, with the operators that carry meaning kept whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.half import Importer
from graphopt.errors import GraphoptError, UnsupportedOp
from graphopt.place import place
from graphopt.program import Program

aten = torch.ops.aten

# torch.export's decompositions would take these apart, and the kernel templates want them whole.
KEPT_WHOLE = (
    aten.linear.default,
    aten.matmul.default,
    aten.scaled_dot_product_attention.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.max_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.pixel_shuffle.default,
)


def to_relax(program: Program) -> IRModule:
    """Import the program; parameters and buffers become constants, outputs always a tuple.

    Raises:
        UnsupportedOp: an operator that TVM's importer does not know or cannot express, with its place in the model.
    """
    exported = program.exported.run_decompositions(_decompositions())
    importer = Importer()
    importer.update_convert_map({name: partial(convert, importer=importer) for name, convert in CONVERTERS.items()})
    _refuse_unknown(exported.graph, importer)
    importer.update_convert_map({name: _located(convert, importer) for name, convert in importer.convert_map.items()})
    module = importer.from_exported_program(
        exported,
        keep_params_as_input=False,
        unwrap_unit_return_tuple=False,
        no_bind_return_tuple=False,
        custom_convert_map=None,
    )
    _refuse_symbolic(program, module)
    return module


def _decompositions() -> dict[Any, Callable[..., Any]]:
    table = torch.export.default_decompositions()
    for op in KEPT_WHOLE:
        table.pop(op, None)
    return table


def _name(node: fx.Node) -> str:
    """The importer's key for a node: "linear.default"."""
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _refuse_unknown(graph: fx.Graph, importer: Importer) -> None:
    for node in graph.nodes:
        if node.op == "call_function" and _name(node) not in importer.convert_map:
            raise UnsupportedOp(op=str(node.target), where=place(node), reason="no translation exists")


def _located(convert: Callable[[fx.Node], relax.Expr], importer: Importer) -> Callable[[fx.Node], relax.Expr]:
    """The converter with every failure told in the user's terms."""

    def located(node: fx.Node) -> relax.Expr:
        try:
            return importer.rounded(node, convert(node))
        except GraphoptError:
            raise
        except Exception as error:
            reason = re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__
            raise UnsupportedOp(op=str(node.target), where=place(node), reason=reason) from error

    return located


def _refuse_symbolic(program: Program, module: IRModule) -> None:
    """Everything behind this point relies on static extents."""
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            shape = getattr(binding.var.ty, "shape", None)
            if shape is not None and not all(hasattr(d, "value") for d in shape):
                reason = f"its result has an extent that is known only at run time: {list(shape)}"
                raise UnsupportedOp(op=str(binding.value.op), where=program.name, reason=reason)


def _attention(node: fx.Node, importer: Importer) -> relax.Expr:
    """scaled_dot_product_attention with masks of any dtype, an explicit scale and grouped heads."""
    bound = dict(
        zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False), **node.kwargs
    )
    emit = importer.block_builder.emit
    query, key, value = (importer.env[bound[name]] for name in ("query", "key", "value"))
    if bound.get("dropout_p", 0.0):
        raise ValueError("it drops attention at random, which is for training; capture the model in eval mode")
    shape = [int(d) for d in query.ty.shape]
    lead, (rows, _) = shape[:-2], shape[-2:]

    def as_bnhd(x: relax.Expr) -> relax.Expr:
        extents = [int(d) for d in x.ty.shape]
        heads = extents[-3] if len(extents) > 2 else 1
        batch = int(np.prod(extents[:-3])) if len(extents) > 3 else 1
        x = emit(relax.op.reshape(x, (batch, heads, *extents[-2:])))
        return emit(relax.op.permute_dims(x, [0, 2, 1, 3]))

    if bound.get("enable_gqa"):
        groups = int(query.ty.shape[-3]) // int(key.ty.shape[-3])
        key, value = (emit(relax.op.repeat(x, groups, axis=len(shape) - 3)) if groups > 1 else x for x in (key, value))
    q, k, v = as_bnhd(query), as_bnhd(key), as_bnhd(value)
    mask = bound.get("attn_mask")
    bias = None
    if mask is not None:
        bias = importer.env[mask]
        dtype = str(query.ty.dtype)
        if str(bias.ty.dtype) == "bool":
            bias = emit(relax.op.where(bias, relax.const(0.0, dtype), relax.const(float("-inf"), dtype)))
        extents = [int(d) for d in bias.ty.shape]
        full = [*lead[-2:], rows, int(key.ty.shape[-2])] if len(extents) > 2 else [1, 1, *extents]
        extents = [1] * (4 - len(extents)) + extents
        if len(shape) > 4 and int(np.prod(extents[:-3])) not in (1, int(q.ty.shape[0])):
            raise ValueError(f"a mask of shape {extents} over more than one batch axis")
        bias = emit(relax.op.reshape(bias, (int(np.prod(extents[:-3])), *extents[-3:])))
        assert len(full) >= 3
        target = (int(bias.ty.shape[0]), int(bias.ty.shape[1]), rows, int(k.ty.shape[1]))
        bias = emit(relax.op.broadcast_to(bias, target)) if tuple(int(d) for d in bias.ty.shape) != target else bias
    scale = bound.get("scale")
    causal = "TopLeft" if bound.get("is_causal") else None
    out = emit(relax.op.nn.attention(q, k, v, bias=bias, scale=scale, causal_mask=causal))
    out = emit(relax.op.permute_dims(out, [0, 2, 1, 3]))
    return emit(relax.op.reshape(out, (*lead, rows, int(value.ty.shape[-1]))))


CONVERTERS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention.default": _attention,
}
