"""A dense program and what was made of it, run together, node by node, on all batches at once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from graphopt.edit import Edit
from graphopt.exported import arguments, stored
from graphopt.program import Program

Batch = Mapping[str, Tensor]
# The value that a placeholder stands for, by its node and the number of the batch.
Given = Callable[[Node, int], Any]


class Side:
    """One graph. Values, a list of one per batch, live as long as a later node reads them."""

    def __init__(self, module: GraphModule, graph: Graph, given: Given, batches: int) -> None:
        self.nodes = list(graph.nodes)
        self.values: dict[Node, list[Any]] = {}
        self._module, self._given, self._batches = module, given, batches
        self._dying = _dying(self.nodes)
        self._next = 0

    def value(self, node: Node, batch: int) -> Any:
        """What a node that ran, or a placeholder, stands for in a batch."""
        return self._given(node, batch) if node.op == "placeholder" else self.values[node][batch]

    def run(self, node: Node) -> None:
        """Work out the values of a node (again), from those of its inputs."""
        if node.op == "get_attr":
            self.values[node] = [operator.attrgetter(str(node.target))(self._module)] * self._batches
        if node.op != "call_function":
            return
        results = []
        for batch in range(self._batches):
            args, kwargs = map_arg((node.args, node.kwargs), lambda source: self.value(source, batch))  # noqa: B023
            results.append(node.target(*args, **kwargs))  # type: ignore[operator]
        self.values[node] = results

    def steps(self) -> Iterator[Node]:
        """Run nodes in order, each before it is handed out; what nobody reads any more goes when the next is taken."""
        while self._next < len(self.nodes):
            node = self.nodes[self._next]
            self.run(node)
            yield node
            for dead in self._dying[self._next]:
                self.values.pop(dead, None)
            self._next += 1


def together(before: Side, after: Side) -> Iterator[tuple[Node | None, Node]]:
    """Every node of `after` behind which others come, once it ran, with the node of `before` of that name."""
    dense = {node.name: node for node in before.nodes}
    steps = before.steps()
    reached: Node | None = None
    for node in after.steps():
        twin = dense.get(node.name)
        while twin is not None and reached is not twin:
            reached = next(steps)
        yield twin, node


def dense_side(program: Program, batches: Sequence[Batch]) -> Side:
    """A program as it is."""
    given = [dict(zip(_names(program), arguments(program.exported, batch), strict=True)) for batch in batches]
    return Side(program.exported.graph_module, program.graph, lambda node, n: given[n][node.name], len(batches))


def edited_side(edit: Edit, batches: Sequence[Batch]) -> Side:
    """A program in the making, always with the tensors that it has now."""
    program = edit.program
    given = [dict(zip(_names(program), arguments(program.exported, batch), strict=True)) for batch in batches]

    def value(node: Node, batch: int) -> Any:
        return stored(edit.exported, edit.target(node)) if edit.is_stored(node) else given[batch][node.name]

    return Side(edit.exported.graph_module, edit.graph, value, len(batches))


def peak_bytes(graph: Graph) -> int:
    """What the values of one batch take at most while a Side runs; views count as copies."""
    nodes = list(graph.nodes)
    alive, most = 0, 0
    for node, dead in zip(nodes, _dying(nodes), strict=True):
        alive += _bytes(node)
        most = max(most, alive)
        alive -= sum(map(_bytes, dead))
    return most


def _names(program: Program) -> list[str]:
    return [spec.arg.name for spec in program.exported.graph_signature.input_specs]


def _dying(nodes: Sequence[Node]) -> list[list[Node]]:
    """For each place the nodes whose values nobody reads behind it."""
    last: dict[Node, int] = {}
    for place, node in enumerate(nodes):
        last[node] = place
        for source in node.all_input_nodes:
            last[source] = place
    dying: list[list[Node]] = [[] for _ in nodes]
    for node, place in last.items():
        dying[place].append(node)
    return dying


def _bytes(node: Node) -> int:
    if node.op != "call_function":
        return 0
    value = node.meta.get("val")
    values: Iterable[Any] = value if isinstance(value, (list, tuple)) else [value]
    return sum(each.numel() * each.element_size() for each in values if isinstance(each, Tensor))
