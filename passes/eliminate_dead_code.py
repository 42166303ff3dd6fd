"""Remove what no output depends on: calls, and the parameters, buffers and constants that only they used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.edit import Edit, is_random
from graphopt.passes.base import Pass


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Remove calls without users, then tensors without users.

        before  a = relu(x); b = linear(x, head.weight)         -> a
        after   a = relu(x)                                     -> a      (head.weight is gone, too)

    User inputs stay, used or not, since they are the program's interface. Random calls stay: without them the
    following ones would draw other numbers.
    """

    name: ClassVar[str] = "eliminate-dead-code"

    def apply(self, edit: Edit) -> None:
        for node in reversed(edit.graph.nodes):
            if node.users or node.op == "output":
                continue
            if node.op == "call_function":
                if is_random(node):
                    edit.decline(node, f"{node.name} draws random numbers, which changes those drawn after it")
                    continue
                edit.graph.erase_node(node)
                edit.count("calls")
            elif node.op == "placeholder" and edit.is_stored(node) and not edit.is_mutated(node):
                edit.graph.erase_node(node)
                edit.count("tensors")
