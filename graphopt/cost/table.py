"""What a program costs as it is: a row per node, and the totals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch.export.graph_signature import InputKind
from torch.fx import Node

from graphopt.cost.formulas import Counts, Extent, counts, numbers
from graphopt.exported import op_name
from graphopt.place import place
from graphopt.program import Program
from graphopt.weights import weights


@dataclass(frozen=True)
class Cost:
    """FLOPs (two per multiply-add), multiply-adds, parameters (elements), bytes read and written."""

    flops: int = 0
    macs: int = 0
    params: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[int, ...]:
        return (self.flops, self.macs, self.params, self.bytes_read, self.bytes_written)

    @property
    def bytes(self) -> int:
        """Bytes moved: read and written."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Row:
    """One node: where it comes from in the user's names, its operator, the shape of its (first) result, its cost.

    `sparse_flops` are the FLOPs that are left where a sparse kernel leaves out the zeros of an annotated weight.
    """

    name: str
    where: str
    op: str
    shape: tuple[int, ...]
    cost: Cost
    sparse_flops: int


@dataclass(frozen=True)
class Summary:
    """The cost of a program: a row per node that computes, and the totals.

    `total.params` counts each parameter once, however often it is used; `stored_bytes` are the bytes of parameters,
    buffers and constants together. All FLOPs are those of dense kernels, but for `sparse_flops`.
    """

    rows: tuple[Row, ...]
    total: Cost
    stored_bytes: int

    @property
    def sparse_flops(self) -> int:
        """The FLOPs of the program where sparse kernels take the annotated weights."""
        return sum(row.sparse_flops for row in self.rows)

    @property
    def ops(self) -> dict[str, int]:
        """How often each operator occurs, the most frequent first."""
        return dict(Counter(row.op for row in self.rows).most_common())


def summary(program: Program) -> Summary:
    """Cost of every node and in all. A parameter counts at the first node that uses it."""
    rows = []
    shares = _stored_shares(program)
    for node, fresh in parameter_uses(program):
        cost = node_cost(node) + Cost(params=sum(_whole(i.numel) for source in fresh for i in numbers(source)))
        results = numbers(node)
        shape = tuple(map(_whole, results[0].shape)) if results else ()
        left_out = 2 * round(cost.macs * (1 - shares.get(node, 1.0)))
        rows.append(Row(node.name, place(node), op_name(node), shape, cost, cost.flops - left_out))
    total = sum((row.cost for row in rows), Cost())
    return Summary(tuple(rows), total, program.parameters_bytes)


def _stored_shares(program: Program) -> dict[Node, float]:
    """What share of its multiply-adds a sparse kernel does, for the calls that take an annotated weight."""
    if not program.annotations:
        return {}
    known = weights(program.exported)
    return {
        use.call: annotation.stored
        for name, annotation in program.annotations.items()
        if name in known
        for use in known[name].uses
    }


def parameter_uses(program: Program) -> list[tuple[Node, list[Node]]]:
    """Every call in order, with the parameters that it is the first to use."""
    specs = program.exported.graph_signature.input_specs
    parameters = {spec.arg.name for spec in specs if spec.kind is InputKind.PARAMETER}
    found, seen = [], set[str]()
    for node in program.graph.nodes:
        if node.op == "call_function":
            fresh = [i for i in node.all_input_nodes if i.name in parameters and i.name not in seen]
            seen |= {i.name for i in fresh}
            found.append((node, fresh))
    return found


def node_cost(node: Node) -> Cost:
    """The cost of one call, without parameters. An operator that is not known counts as elementwise."""
    found: Counts = counts(node, numbers)
    flops, macs, read, written = map(_whole, (found.flops, found.macs, found.bytes_read, found.bytes_written))
    return Cost(flops=flops, macs=macs, bytes_read=read, bytes_written=written)


def _whole(extent: Extent) -> int:
    assert isinstance(extent, int)
    return extent
