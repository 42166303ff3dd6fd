"""What every converter needs: arguments by name, and values in the dtype that PyTorch says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from tvm import relax

from graphopt.codegen.dataflow import dtype_of
from graphopt.codegen.half import Importer

Converter = Callable[[fx.Node, Importer], relax.Expr]


def arguments(node: fx.Node, importer: Importer) -> dict[str, Any]:
    """The call's arguments by name, defaults included, with tensors as Relax values."""
    bound = {}
    for i, formal in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = formal.default_value if formal.has_default_value() else None
        value = node.args[i] if i < len(node.args) else node.kwargs.get(formal.name, default)
        bound[formal.name] = fx.map_arg(value, lambda n: importer.env[n])
    return bound


def promised(node: fx.Node) -> str:
    """The dtype of the result."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def as_dtype(x: Any, dtype: str, importer: Importer) -> relax.Expr:
    """A tensor or number in a dtype."""
    if not isinstance(x, relax.Expr):
        return relax.const(x, dtype)
    return x if dtype_of(x) == dtype else importer.block_builder.emit(relax.op.astype(x, dtype))
