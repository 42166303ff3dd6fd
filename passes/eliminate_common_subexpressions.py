"""Compute once what is computed several times, and keep once what is stored several times."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node

from graphopt.edit import Edit, is_pure
from graphopt.passes.base import Pass


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merge calls of the same operator on the same arguments, and names of the same tensor.

        before  a = exp(x); b = exp(x); y = add(a, b)
        after   a = exp(x); y = add(a, a)

    Random calls are never merged: two dropouts draw two masks. Tied weights become one input of the graph.
    """

    name: ClassVar[str] = "eliminate-common-subexpressions"

    def apply(self, edit: Edit) -> None:
        seen: dict[Hashable, Node] = {}
        for node in list(edit.graph.nodes):
            if node.op == "placeholder":
                tensor = edit.tensor(node)
                key = None if tensor is None else ("tensor", *_identity(tensor))
            elif node.op == "call_function" and is_pure(node):
                key = (node.target, _key(node.args), _key(dict(sorted(node.kwargs.items()))))
            else:
                key = None
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is not node:
                edit.replace(node, first)
                edit.count("tensors" if node.op == "placeholder" else "calls")


def _identity(tensor: Tensor) -> tuple[Hashable, ...]:
    """The same memory seen in the same way; empty tensors have none, so only the very same object counts."""
    memory = tensor.data_ptr() or id(tensor)
    return (memory, tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device))


def _key(value: Any) -> Hashable:
    """A hashable stand-in that tells apart what Python's == does not: 1 and True and 1.0, 0.0 and -0.0."""
    if isinstance(value, Node):
        return ("node", value.name)
    if isinstance(value, (list, tuple)):
        return ("list", *map(_key, value))
    if isinstance(value, dict):
        return ("dict", *((key, _key(item)) for key, item in value.items()))
    return (type(value).__name__, repr(value))
