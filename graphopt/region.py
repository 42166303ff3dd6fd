"""What stands behind a point of a program and can do with fewer tokens, and where all of them are wanted again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axis, atoms, find, results_of
from graphopt.cost.formulas import base_name
from graphopt.edit import Edit
from graphopt.errors import Decline
from graphopt.loops import Loop, loops_in
from graphopt.orders import Order, Turn
from graphopt.place import place
from graphopt.suffix import Suffix, same

# Pins that matter to a constant keep set, not to items that stay in their order.
ORDER = frozenset({"its order matters", "causal"})


@dataclass(frozen=True)
class Span:
    """The tokens of `[start, stop)` along dimension `dim` of a value, of which some go; all others stay.

    `hole` is the place of one among them that stays, and stands in the middle of those that do (Vim's class token).
    """

    dim: int
    start: int
    stop: int
    hole: int | None = None

    @property
    def size(self) -> int:
        """How many tokens there are to choose from."""
        return self.stop - self.start - (self.hole is not None)

    def of(self, count: int) -> Span:
        """The span when so many of these tokens stay."""
        if self.hole is None:
            return replace(self, stop=self.start + count)
        return replace(self, stop=self.start + count + 1, hole=self.start + count // 2)

    def chosen(self, x: Tensor) -> Tensor:
        """The tokens to choose from, of all along dimension 1."""
        pieces = [x[:, start:stop] for start, stop in self.pieces()]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def pieces(self) -> list[tuple[int, int]]:
        """Where the tokens to choose from stand: the span, or what is in front of and behind its hole."""
        return [(self.start, self.stop)] if self.hole is None else [(self.start, self.hole), (self.hole + 1, self.stop)]


@dataclass(frozen=True, eq=False)
class Region:
    """The calls behind `at` that run on fewer tokens.

    `dims` has the axes of these calls' results and of all that they read; `spans` are the atoms that shrink, `tokens`
    the dimension they are parts of, `batch` the axis each of whose items chooses for itself. Tokens may be put in other
    orders and back: `turns` are the calls that do, `wholes` the dimension that all tokens of an order are, and its atom
    is among the spans, too; `backwards` says which results were flipped (None: in part). `literals` and `targets` are
    what `shrink` rewrites; `loops` run over tokens step by step. `ends` are the results that calls outside read with
    all tokens: (result, reader), and `blocked` says of these readers why they are outside.
    """

    at: Node
    where: Span
    nodes: tuple[Node, ...]
    spans: tuple[Axis, ...]
    tokens: Axis
    wholes: Mapping[Order, Axis]
    turns: Mapping[Node, Turn]
    backwards: Mapping[Node, bool | None]
    batch: Axis | None
    dims: Mapping[Node, Any]
    literals: Mapping[Node, Mapping[str, Any]]
    targets: Mapping[Node, Any]
    loops: tuple[Loop, ...]
    ends: tuple[tuple[Node, Node], ...]
    blocked: tuple[Decline, ...]

    def carries(self, axis: Axis) -> bool:
        """Whether items of the tokens are among those of `axis`."""
        own = set(atoms(axis))
        return any(find(span) in own for span in self.spans)

    def counts(self, count: int) -> dict[Axis, int]:
        """How many items of each span's atom there are when `count` tokens stay."""
        halves = [count] if self.where.hole is None else [count // 2, count - count // 2]
        own = [*halves, *[count] * (len(self.spans) - len(halves))]
        return {find(span): number for span, number in zip(self.spans, own, strict=True)}

    def along(self, node: Node) -> list[int]:
        """The dimensions of a result that run over the tokens."""
        return [place for place, axis in enumerate(results_of(self.dims[node])[0]) if self.carries(axis)]

    def is_stream(self, node: Node) -> bool:
        """Whether a result has the very dimensions of `at`."""
        return same(results_of(self.dims[node])[0], results_of(self.dims[self.at])[0])

    def span_of(self, node: Node) -> Span | None:
        """The span among the tokens of a result; None where these are part of something else, or not in their order."""
        dims = self.along(node)
        own = find(results_of(self.dims[node])[0][dims[0]]) if len(dims) == 1 else None
        if own is find(self.tokens):
            return replace(self.where, dim=dims[0])
        if own is find(self.spans[0]) and self.where.hole is None:  # class tokens were taken off
            return Span(dims[0], 0, self.where.size)
        return None

    @property
    def crossings(self) -> Iterator[tuple[Node, Node]]:
        """(value from outside that has the tokens, the call of the region that reads it)."""
        inside = set(self.nodes)
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source is not self.at and source not in inside and self.dims.get(source) and self.along(source):
                    yield source, node


def region_of(
    edit: Edit,
    at: Node,
    where: Span,
    *,
    ordered: bool = False,
    at_stream: bool = False,
    until: Node | None = None,
    shrinks: Callable[[Node], bool] = lambda _: False,
    compact: bool = False,
    counted: bool = False,
) -> Region:
    """Find the region behind `at`.

    A call that cannot work on fewer tokens (it makes a grid of them, convolves or shuffles them, takes some apart from
    the others) gets all of them back, and so does all that is computed from it.

    Args:
        edit: the graph.
        at: the value whose tokens go.
        where: which of its tokens may go.
        ordered: those that stay are in their order, so calls to which only the order matters are no obstacle.
        at_stream: all tokens come back in a value that has the dimensions of `at`, where one is near: what follows
            is computed for all tokens then.
        until: a value behind which all tokens are there again.
        shrinks: for a result that leaves the program, whether it leaves with fewer tokens.
        compact: convolutions along the tokens slide over those that stay, as if they were neighbours.
        counted: tokens that stay stand for others, which a mean or sum of all of them counts: it gets all tokens.
    """
    outside: dict[Node, str] = dict.fromkeys(until.users, "tokens come back in front of it") if until else {}
    order = list(edit.graph.nodes)
    behind = descendants(order, at)
    loops = loops_in(node for node in order if node in behind)
    while True:
        # Everything behind a call that is outside is outside, too.
        gone = descendants(order, *outside) | set(outside)
        inside = [node for node in order if node in behind and node not in gone]
        suffix = Suffix(edit, at, where, inside, ORDER if ordered else frozenset(), compact, counted, loops)
        if (blocker := suffix.run_region()) is not None:
            node, reason = blocker
            outside[node] = reason
            continue
        ends = suffix.ends(shrinks)
        if not at_stream or not (copied := _end_in_stream(edit, suffix, ends, set(inside))):
            break
        order = list(edit.graph.nodes)
        behind = descendants(order, at)
        outside |= dict.fromkeys(copied, "what reads its result wants all tokens")
    return Region(
        at=at,
        where=where,
        nodes=tuple(inside),
        spans=tuple(suffix.spans),
        tokens=suffix.tokens,
        wholes=suffix.wholes,
        turns=suffix.turns,
        backwards=suffix.backwards,
        batch=None if where.dim == 0 else results_of(suffix.dims[at])[0][0],
        dims=suffix.dims,
        literals=suffix.literals,
        targets=suffix.targets,
        loops=tuple(loop for loop in suffix.loops.values() if set(loop.takes) <= set(suffix.taken)),
        ends=tuple(ends),
        blocked=tuple(Decline(place(node), reason) for node, reason in outside.items()),
    )


def descendants(order: Sequence[Node], *roots: Node) -> set[Node]:
    """The calls that are computed from any of `roots`."""
    found: set[Node] = set()
    for node in order:
        if node.op == "call_function" and any(each in found or each in roots for each in node.all_input_nodes):
            found.add(node)
    return found


def ancestors(node: Node) -> set[Node]:
    """What a value is computed from, itself included."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        each = todo.pop()
        if each not in found:
            found.add(each)
            todo += each.all_input_nodes
    return found


def _end_in_stream(edit: Edit, suffix: Suffix, ends: Sequence[tuple[Node, Node]], inside: set[Node]) -> list[Node]:
    """Let readers of ends that are no sums of the stream read copies of all that lies between; the copies."""
    wanted: set[Node] = set()
    for node, _ in ends:
        wanted |= _behind_stream(suffix, node, inside)
    if not wanted:
        return []
    order = list(edit.graph.nodes)
    chain = [node for node in order if node in wanted]
    copied: dict[Node, Node] = {}
    for each in chain:
        with edit.graph.inserting_after(each):
            copied[each] = edit.graph.node_copy(each, lambda source: copied.get(source, source))
    for node, user in ends:
        if node in copied:
            user.replace_input_with(node, copied[node])
    for each in reversed(chain):
        if not each.users:
            edit.graph.erase_node(each)
    return list(copied.values())


def _behind_stream(suffix: Suffix, node: Node, inside: set[Node]) -> set[Node]:
    """The calls between sums of the stream and `node`, itself included; none where it is such a sum."""
    found: set[Node] = set()
    todo = [node]
    while todo:
        each = todo.pop()
        if each in found or each not in inside or (base_name(each) in _SUMS and suffix.is_stream(each)):
            continue
        found.add(each)
        todo += each.all_input_nodes
    return found


_SUMS = ("add", "sub", "add_")
