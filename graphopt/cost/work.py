"""What each call of a program is to a processor: the loops of its kernel, as polynomials in axis extents.

A call becomes a product (rows, columns, reduction), a convolution, an attention, or a stream of bytes with some
arithmetic. Elementwise calls that alone use what a call before them gives are computed in its kernel, as code
generation does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from graphopt.axes.infer import is_pointwise
from graphopt.cost.formulas import Call, Extent, Shaped, counts, product, renames, total
from graphopt.cost.polynomial import Polynomial
from graphopt.program import Program

# product: batch, m, n, k          conv: pixels, inputs, outputs, inputs of a group, taps
# attention: heads, queries, keys, head_dim of queries and of values           stream, fused: FLOPs, elements
Kind = Literal["product", "conv", "attention", "stream", "fused"]
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "addmv"})


@dataclass(frozen=True)
class Work:
    """One call. `extents` are those that its kind names, then bytes of results and run-time operands, bytes of stored
    operands; `bits` of an element."""

    node: Node
    kind: Kind
    extents: tuple[Polynomial, ...]
    op: str
    bits: int = 32


def works(program: Program, shapes: Mapping[Node, tuple[Shaped, ...]]) -> tuple[Work, ...]:
    """The work of every call that does any, in order."""
    found, fusible = [], set[Node]()
    stored = set(program.tensors)
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        call = Call(node, lambda each: shapes[each])
        if renames(node):
            if node.all_input_nodes and node.all_input_nodes[0] in fusible and len(node.users) == 1:
                fusible.add(node)
            continue
        if not call.results:
            continue
        kind, extents = _loops(call)
        weights = [source for source in node.all_input_nodes if source.name in stored]
        others = [source for source in node.all_input_nodes if source.name not in stored]
        if kind == "stream" and call.op.startswith(("embedding", "index")):
            moved: Extent = total(result.bytes for result in call.results) * 2
            weights = []
        else:
            moved = total(tensor.bytes for source in (*others, node) for tensor in shapes[source])
        pointwise = kind == "stream" and (is_pointwise(node) or "batch_norm" in call.op)
        before = next((source for source in reversed(others) if source in fusible), None)
        if pointwise and before is not None:
            # What the kernel holds in registers is neither read nor written again.
            kind = "fused"
            rest = [source for source in others if source is not before]
            moved = total(tensor.bytes for source in rest for tensor in shapes[source])
        if (pointwise or kind != "stream") and _alone(node):
            fusible.add(node)
        held = total(tensor.bytes for source in weights for tensor in shapes[source])
        bits = call.results[0].item_bytes * 8
        found.append(Work(node, kind, tuple(map(_polynomial, (*extents, moved, held))), call.op, bits))
    return tuple(found)


def _alone(node: Node) -> bool:
    """Whether one call uses the (only) result, getitem aside."""
    users = [user for one in node.users for user in (one.users if "getitem" in str(one.target) else [one])]
    return len(set(users)) == 1


def _polynomial(extent: Extent) -> Polynomial:
    return extent if isinstance(extent, Polynomial) else Polynomial(extent)


def _loops(call: Call) -> tuple[Kind, tuple[Extent, ...]]:
    args = call.node.args
    if call.op == "linear":
        weight = call.shape(args[1])
        return "product", (1, product(call.shape(args[0])[:-1]), weight[0], weight[1])
    if call.op in _PRODUCTS:
        first = 1 if call.op.startswith(("add", "badd")) else 0
        a, b, out = call.shape(args[first]), call.shape(args[first + 1]), call.results[0].shape
        if len(b) <= 2:
            return "product", (1, product(a[:-1]), b[-1] if len(b) > 1 else 1, a[-1])
        return "product", (product(out[:-2]), a[-2] if len(a) > 1 else 1, b[-1], a[-1])
    if call.op.startswith("conv"):
        x, weight, out = call.shape(args[0]), call.shape(args[1]), call.results[0].shape
        if "transpose" in call.op:
            return "product", (1, x[0] * product(x[2:]), product(weight[1:]), weight[0])
        return "conv", (out[0] * product(out[2:]), x[1], weight[0], weight[1], product(weight[2:]))
    if call.op == "scaled_dot_product_attention":
        q, k, v = (call.shape(argument) for argument in args[:3])
        return "attention", (product(q[:-2]), q[-2], k[-2], q[-1], v[-1])
    flops = counts(call.node, call.shapes).flops
    return "stream", (flops, call.results[0].numel)
