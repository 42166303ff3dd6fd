"""Peak activation memory: which results are alive when, in the order of the program.

A result is alive from the call that gives it to the last one that takes it, or a view of it, and outputs to the end.
The program's inputs and stored tensors belong to the caller and do not count; operators that only rename share the
memory of what they name. Nothing is fused, and nothing computed in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from torch.fx import Node

from graphopt.axes import Axis
from graphopt.cost.formulas import Shapes, renames, total
from graphopt.cost.polynomial import Compiled, Ints, Polynomial, Sizes
from graphopt.program import Program


@dataclass(frozen=True, eq=False)
class Memory:
    """The bytes of every storage, and the sets of storages that are alive together: only those that no other contains.

    `points[i]` are places in `storages`; `nodes[i]` names the call that runs then.
    """

    storages: tuple[Polynomial, ...]
    points: tuple[frozenset[int], ...]
    nodes: tuple[str, ...]

    def peak(self, sizes: Sizes | None = None) -> int:
        """The most bytes that are alive at once."""
        values = [polynomial(sizes) for polynomial in self.storages]
        return max((sum(values[place] for place in point) for point in self.points), default=0)

    @cached_property
    def polynomials(self) -> tuple[Polynomial, ...]:
        """The bytes that are alive at each of `points`; the peak is the largest of them."""
        return tuple(Polynomial.sum(self.storages[place] for place in sorted(point)) for point in self.points)

    def compiled(self, variables: tuple[Axis, ...]) -> Peaks:
        """The peak ready for evaluation at many sizes at once."""
        alive = np.zeros((len(self.storages), len(self.points)), np.int64)
        for column, point in enumerate(self.points):
            alive[list(point), column] = 1
        return Peaks(Compiled(self.storages, variables), alive)


@dataclass(frozen=True, eq=False)
class Peaks:
    """Peak bytes at many sizes: (..., variables) to (...) int64. `alive` is (storages, points) of 0 and 1."""

    storages: Compiled
    alive: Ints

    def __call__(self, sizes: ArrayLike) -> Ints:
        points = self.storages(sizes) @ self.alive
        return points.max(axis=-1, initial=0)


def memory_of(program: Program, shapes: Shapes) -> Memory:
    """The live ranges of a program whose results have these extents."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    named = {node for node in calls if renames(node) and node.all_input_nodes}
    owner: dict[Node, Node | None] = {}  # None: the memory is the caller's
    for node in program.graph.nodes:
        if node.op != "call_function":
            owner[node] = None
        else:
            owner[node] = owner[node.all_input_nodes[0]] if node in named else node
    last: dict[Node, int] = {}

    def use(source: Node, time: int) -> None:
        own = owner[source]
        if own is not None:
            last[own] = time

    for time, node in enumerate(calls):
        for source in (*node.all_input_nodes, node):
            use(source, time)
    for source in program.graph.output_node().all_input_nodes:
        use(source, len(calls))
    storages, points, nodes = list[Polynomial](), list[frozenset[int]](), list[str]()
    alive: dict[Node, int] = {}
    grown = False
    for time, node in enumerate(calls):
        if node not in named:
            alive[node] = len(storages)
            storages.append(Polynomial.sum([total(result.bytes for result in shapes(node))]))
            grown = True
        # What is alive only grows up to here, so earlier sets since the last end are part of this one.
        ends = [held for held in alive if last[held] <= time]
        if (ends or time == len(calls) - 1) and grown:
            points.append(frozenset(alive.values()))
            nodes.append(node.name)
            grown = False
        for held in ends:
            del alive[held]
    return Memory(tuple(storages), tuple(points), tuple(nodes))
