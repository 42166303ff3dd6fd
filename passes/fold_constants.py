"""Compute at compile time what does not depend on the inputs: masks, position ids, rotary tables, converted weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.edit import Edit, is_pure
from graphopt.passes.base import Pass

KIB = 1024


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace the largest sub-graphs without user inputs by their values.

        before  r = arange(16); f = mul(r, 0.1); c = cos(f); y = mul(x, c)
        after   y = mul(x, cos_folded)

    A value may be larger than the tensors that it makes superfluous by `growth_bytes` at most. So a broadcast mask or a
    half-precision weight that is widened stays a computation, and its inputs are folded instead.
    """

    name: ClassVar[str] = "fold-constants"
    growth_bytes: int = 256 * KIB

    def apply(self, edit: Edit) -> None:
        constant = _constant_nodes(edit)
        parameters = edit.exported.graph_signature.inputs_to_parameters
        learned: set[Node] = set()
        for node in edit.graph.nodes:
            if node.name in parameters or not learned.isdisjoint(node.all_input_nodes):
                learned.add(node)
        values: dict[Node, Any] = {}
        known: dict[tuple[Any, ...], Node] = {}
        for node in reversed(list(edit.graph.nodes)):
            # Users come before what they use, so a node that is folded has left its inputs without users by now.
            if node not in constant or node.op != "call_function":
                continue
            if not node.users:
                edit.graph.erase_node(node)
                continue
            reason = self._reason_against(node, edit, constant, values)
            if reason == _ONLY_PARTS:
                continue
            if reason:
                edit.decline(node, reason)
                continue
            value = _evaluate(node, edit, values)
            # What was made of parameters can still be trained.
            parameter = node in learned and value.is_floating_point()
            data = value.numpy(force=True).tobytes() if _plain(value) else id(value)
            key = (parameter, value.dtype, tuple(value.shape), data)
            if key not in known:
                known[key] = edit.add_tensor(f"{node.name}_folded", value, parameter=parameter)
            edit.replace(node, known[key])
            edit.count(str(node.target).removesuffix(".default"))

    def _reason_against(self, node: Node, edit: Edit, constant: set[Node], values: dict[Node, Any]) -> str:
        if not isinstance(node.meta.get("val"), Tensor):
            return _ONLY_PARTS
        if any(user.op == "output" for user in node.users):
            return "it is an output of the program"
        meta = node.meta["val"]
        freed = sum(_bytes(tensor) for tensor in _freed(node, edit))
        grown = int(meta.numel()) * meta.element_size() - freed
        if grown > self.growth_bytes:
            return f"its value would add {grown} bytes to the program, allowed are {self.growth_bytes}"
        return ""


# A split or the like: its parts are folded one by one, and it goes with the last of them.
_ONLY_PARTS = "not a single tensor"


def _constant_nodes(edit: Edit) -> set[Node]:
    """Tensors that never change, and pure calls on nothing else."""
    constant: set[Node] = set()
    for node in edit.graph.nodes:
        if node.op == "placeholder":
            if edit.tensor(node) is not None:
                constant.add(node)
        elif node.op == "call_function" and is_pure(node) and all(i in constant for i in node.all_input_nodes):
            constant.add(node)
    return constant


def _freed(node: Node, edit: Edit) -> list[Tensor]:
    """The stored tensors that nothing else uses once the value of `node` is known."""
    gone = {node}
    todo = list(node.all_input_nodes)
    while todo:
        item = todo.pop()
        if item not in gone and all(user in gone for user in item.users):
            gone.add(item)
            todo += item.all_input_nodes
    found = [edit.tensor(item) for item in gone if item.op == "placeholder"]
    return [tensor for tensor in found if tensor is not None]


def _evaluate(node: Node, edit: Edit, values: dict[Node, Any]) -> Any:
    """The value of a constant node; those that it needs are worked out first, without recursion."""
    todo = [node]
    while todo:
        item = todo[-1]
        if item in values:
            todo.pop()
        elif item.op == "placeholder":
            values[item] = edit.tensor(item)
        elif missing := [i for i in item.all_input_nodes if i not in values]:
            todo += missing
        else:
            args, kwargs = map_arg((item.args, item.kwargs), lambda i: values[i])
            with torch.no_grad():
                values[item] = item.target(*args, **kwargs)  # type: ignore[operator]
    value = values[node]
    # A view would keep the whole of what it looks at; a value of its own may be written out and freed alone.
    return value.detach().clone(memory_format=torch.contiguous_format)


def _plain(value: Tensor) -> bool:
    """Whether numpy can hold it, so that equal values are found by their bytes."""
    return value.dtype not in (torch.bfloat16,) and not value.is_quantized


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
