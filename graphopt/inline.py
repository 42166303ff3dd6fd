"""Write what a PyTorch function computes into the graph of a program that is being changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from graphopt.edit import Edit


def inline(edit: Edit, function: Callable[..., Any], *args: Any, like: Node) -> Any:
    """Insert the calls that `function` makes, in front of `like`, which says where in the user's source they belong.

    The function is run once on tensors without values, so what it does may hang on shapes, never on values.

    Args:
        edit: the graph to insert into.
        function: takes `args` with a tensor in the place of each node, and gives tensors, in any structure.
        args: nodes, and anything else, in any structure.
        like: all nodes among `args` stand in front of it.

    Returns:
        What the function gave, with nodes in the place of tensors.
    """
    flat, spec = pytree.tree_flatten(args, is_leaf=lambda item: isinstance(item, Node))
    nodes = [item for item in flat if isinstance(item, Node)]
    made: list[Any] = []

    def traced(*tensors: Tensor) -> list[Any]:
        given = iter(tensors)
        filled = [next(given) if isinstance(item, Node) else item for item in flat]
        results, shape = pytree.tree_flatten(function(*pytree.tree_unflatten(filled, spec)))
        made[:] = [shape, results]
        return results

    with torch.no_grad():
        module = make_fx(traced, pre_dispatch=True)(*(node.meta["val"] for node in nodes))
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    inside: dict[Node, Any] = dict(zip(placeholders, nodes, strict=True))
    for node in module.graph.nodes:
        if node.op == "get_attr":  # a tensor that the function made from numbers
            value = getattr(module, node.target)
            inside[node] = edit.add_tensor(f"inline.{like.name}.{node.target}", value, parameter=False)
        elif node.op == "call_function" and node.target not in _DROPPED:
            args_, kwargs = map_arg((node.args, node.kwargs), inside.__getitem__)
            inside[node] = edit.call(node.target, args_, kwargs, like=like)
        elif node.op == "call_function":
            inside[node] = inside.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    outputs: Any = module.graph.output_node().args[0]
    shape, results = made
    found = [inside[node] if isinstance(node, Node) else value for node, value in zip(outputs, results, strict=True)]
    return pytree.tree_unflatten(found, shape)


_aten = torch.ops.aten
_DROPPED = (_aten.detach.default, _aten.detach_.default, _aten.lift_fresh_copy.default, torch._C._set_grad_enabled)
