"""Scans written step by step: a loop over the tokens in Python, which a capture unrolls, and whose results are stacked.

    before  for t: a, b = x.select(1, t), y.select(1, t);  h = f(h, a, b);  ys += [g(h)]      stack(ys)
    after   the same first steps, as many as there are tokens

All steps must be alike: then the first of them are the loop over fewer tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt.cost.formulas import base_name

_MOST = 200  # calls of a step, and of what it reads that no other step made


@dataclass(frozen=True, eq=False)
class Loop:
    """`joined` stacks what the steps give along `dim`. `steps` are the calls of the loop, and in which step each is;
    of these `takes` take its token, along a dimension, of a value."""

    joined: Node
    dim: int
    steps: Mapping[Node, int]
    takes: Mapping[Node, tuple[Node, int]]

    @property
    def results(self) -> list[Node]:
        """What the steps give, in order."""
        return list(self.joined.args[0])  # type: ignore[arg-type]

    @property
    def sources(self) -> dict[Node, int]:
        """The values whose tokens are taken, and the dimension that they run along."""
        return dict(self.takes.values())

    def shorten(self, count: int) -> set[Node]:
        """Leave the first `count` steps; the calls that are erased for it."""
        self.joined.args = (self.results[:count], *self.joined.args[1:])
        gone = [node for node in self.joined.graph.nodes if self.steps.get(node, -1) >= count]
        for node in reversed(gone):
            node.graph.erase_node(node)
        return set(gone)


def loops_in(nodes: Iterable[Node]) -> list[Loop]:
    """All loops of which `nodes` have the stack, in order."""
    return [loop for node in nodes if (loop := loop_of(node)) is not None]


def loop_of(joined: Node) -> Loop | None:
    """The loop that a stack is the end of; None where its steps are not alike, or something else reads them."""
    results: Any = joined.args[0] if joined.args else None
    if base_name(joined) != "stack" or len(results) < 3 or len(set(results)) < len(results):
        return None
    finder = _Finder(len(results))
    for step, result in enumerate(results):
        if not finder.add(result, step) or (step and not finder.alike(result, results[step - 1], step)):
            return None
    own = {joined, *finder.steps}
    if any(user not in own for node in finder.steps for user in node.users):
        return None
    rank = joined.meta["val"].dim()
    dim = int(joined.args[1]) % rank if len(joined.args) > 1 else 0  # type: ignore[arg-type]
    return Loop(joined, dim, finder.steps, finder.takes)


class _Finder:
    """Sorts calls into the steps of a loop over `size` tokens; `twins` are the same calls of a step and the last one.

    What the first step reads instead of a state of the last is a twin of the state that the second reads.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.steps: dict[Node, int] = {}
        self.takes: dict[Node, tuple[Node, int]] = {}
        self.twins: dict[Node, Node] = {}

    def add(self, result: Node, step: int) -> bool:
        """Find the calls of a step that lead to its result: those that are computed from its tokens, or from a state of
        steps before. False where there are none, or too many."""
        seen: dict[Node, bool] = {}  # whether it is one of them; a call stands behind all that it reads

        def depends(node: Node) -> bool:
            if node not in seen and len(seen) < _MOST:
                seen[node] = False
                if (taken := self._taken(node, step)) is not None:
                    self.takes[node], seen[node] = taken, True
                elif node not in self.steps:
                    sources = [depends(each) for each in node.all_input_nodes]  # all are visited
                    seen[node] = any(sources)
                else:
                    return True
            return seen.get(node, False) or node in self.steps

        found = depends(result) and result not in self.steps
        self.steps |= {node: step for node, own in seen.items() if own}
        return found and len(seen) < _MOST

    def _taken(self, node: Node, step: int) -> tuple[Node, int] | None:
        """The value and dimension that a call takes the token of a step of."""
        if base_name(node) != "select" or node.args[2] not in (step, step - self.size):
            return None
        source: Any = node.args[0]
        shape = source.meta["val"].shape
        dim = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
        return (source, dim) if int(shape[dim]) == self.size else None

    def alike(self, own: Any, other: Any, step: int) -> bool:
        """Whether a value in a step is computed as another in the step before is."""
        if not isinstance(own, Node) or not isinstance(other, Node):
            return bool(own == other) and type(own) is type(other)
        if own in self.twins:
            return self.twins[own] is other
        if self.steps.get(own) == step:
            found = self.steps.get(other) == step - 1 and self._alike_calls(own, other, step)
        elif own in self.steps:  # a state, which the first step has from elsewhere
            return step == 1 and other not in self.steps
        else:
            return own is other
        if found:
            self.twins[own] = other
        return found

    def _alike_calls(self, own: Node, other: Node, step: int) -> bool:
        if own in self.takes or other in self.takes:
            return self.takes.get(own) == self.takes.get(other)
        (mine, form), (theirs, other_form) = (pytree.tree_flatten((n.args, n.kwargs)) for n in (own, other))
        return (
            own.target == other.target
            and form == other_form
            and all(self.alike(a, b, step) for a, b in zip(mine, theirs, strict=True))
        )
