"""Find zeros that the weights have already, and annotate these with the format that they keep to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from graphopt.edit import Edit
from graphopt.errors import Decline
from graphopt.exported import op_name
from graphopt.passes.base import Pass
from graphopt.place import place
from graphopt.sparsity import LEAST_ZEROS, Annotation
from graphopt.weights import weights

# Operators that multiply by a stored tensor of three or more dimensions, which no sparse kernel takes, and its places.
_OTHERS = {
    "aten.conv_transpose1d": (1,),
    "aten.conv_transpose2d.input": (1,),
    "aten.conv_transpose3d.input": (1,),
    "aten.matmul": (0, 1),
    "aten.bmm": (0, 1),
    "aten.baddbmm": (1, 2),
}


@dataclass(frozen=True)
class DetectSparsity(Pass):
    """Annotate the weights of linear layers, matrix products and convolutions that are zero in part.

        before  conv2d(x, conv.weight)                     # conv.weight has zeros
        after   conv2d(x, conv.weight)                     # conv.weight: 4x1, 10.0% kept

    The largest blocks that hold are found, else N of M, else unstructured. What is annotated already, by the user or by
    `capture`, stays as it is. Values do not change; code generation chooses kernels by the annotations.
    """

    name: ClassVar[str] = "detect-sparsity"

    def apply(self, edit: Edit) -> None:
        known = weights(edit.exported)
        for name, weight in known.items():
            found = edit.program.annotations.get(name)
            if found is None:
                result = weight.found()
                if isinstance(result, Annotation):
                    found = result
                    edit.annotate(name, found.format)
                    edit.count(f"{found.word} weight")
                elif result is not None:
                    edit.declined.append(Decline(name, result))
            if found is not None:
                edit.details.append({"tensor": name, **found.to_json()})
        for node in edit.graph.nodes:
            if node.op == "call_function" and op_name(node) in _OTHERS:
                _decline_others(edit, node)


def _decline_others(edit: Edit, call: Node) -> None:
    """Say of zeros in a stored operand that no sparse kernel takes it."""
    for position in _OTHERS[op_name(call)]:
        operand = call.args[position]
        tensor = edit.tensor(operand)
        if tensor is None or not tensor.is_floating_point() or tensor.dim() < 3:
            continue
        zeros = 1 - int(torch.count_nonzero(tensor)) / max(1, tensor.numel())
        if zeros >= LEAST_ZEROS:
            assert isinstance(operand, Node)
            reason = f"{zeros:.0%} zeros, and no sparse kernel does {op_name(call)} ({place(call)})"
            edit.declined.append(Decline(edit.target(operand), reason))
