"""A program's graph as a Relax module, with the operators that carry meaning kept whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.converters import CONVERTERS, Converter, fourier
from graphopt.codegen.dataflow import dtype_of, is_tensor, shape_of
from graphopt.codegen.half import Importer
from graphopt.errors import GraphoptError, UnsupportedOp
from graphopt.exported import decomposed
from graphopt.place import place
from graphopt.program import Program

aten = torch.ops.aten

# torch.export's decompositions would take these apart, and the kernel templates and converters want them whole.
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
    aten.masked_scatter.default,
    aten.index_add.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
)


def to_relax(program: Program) -> IRModule:
    """Import the program; parameters and buffers become constants, outputs always a tuple.

    Raises:
        UnsupportedOp: an operator that TVM's importer does not know or cannot express, with its place in the model.
    """
    exported = decomposed(program.exported, _decompositions())
    importer = Importer()
    complex_only = {name: convert for name, convert in fourier.TABLE.items() if name not in importer.convert_map}
    converters = complex_only | CONVERTERS
    importer.update_convert_map({name: _bound(convert, importer) for name, convert in converters.items()})
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


def _bound(convert: Converter, importer: Importer) -> Callable[[fx.Node], relax.Expr]:
    return lambda node: convert(node, importer)


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
        if any(0 in tensor.shape for tensor in _tensors(node)):
            raise UnsupportedOp(op=str(node.target), where=place(node), reason="a tensor without elements")
        try:
            if any(tensor.is_complex() for tensor in _tensors(node)):
                value = fourier.convert_complex(node, _name(node), importer, convert)
            else:
                value = convert(node)
            return _as_promised(node, importer.rounded(node, value), importer)
        except GraphoptError:
            raise
        except Exception as error:
            reason = re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__
            raise UnsupportedOp(op=str(node.target), where=place(node), reason=reason) from error

    return located


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    """What the node reads and gives, as torch.export remembers it."""
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _as_promised(node: fx.Node, value: Any, importer: Importer) -> Any:
    """The value in the dtype that PyTorch says; TVM promotes by its own rules, and a wrong type has a wrong size.

    Raises:
        ValueError: another shape, or numbers of another kind: then the translation computes something else.
    """
    promised = node.meta.get("val")
    if not isinstance(promised, torch.Tensor) or not isinstance(value, relax.Expr) or not is_tensor(value):
        return value
    shape, wanted, got = tuple(promised.shape), str(promised.dtype).removeprefix("torch."), dtype_of(value)
    if shape_of(value) != shape:
        raise ValueError(f"its translation has the shape {shape_of(value)}, not {shape}")
    if got == wanted:
        return value
    if ("float" in got) != ("float" in wanted):
        raise ValueError(f"its translation gives {got}, not {wanted}")
    return importer.block_builder.emit(relax.op.astype(value, wanted))


def _refuse_symbolic(program: Program, module: IRModule) -> None:
    """Everything behind this point relies on static extents."""
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            shape = getattr(binding.var.ty, "shape", None)
            if shape is not None and not all(hasattr(d, "value") for d in shape):
                reason = f"its result has an extent that is known only at run time: {list(shape)}"
                raise UnsupportedOp(op=str(binding.value.op), where=program.name, reason=reason)
