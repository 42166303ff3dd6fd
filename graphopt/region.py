"""What stands behind a point of a program and can do with fewer tokens, and where all of them are wanted again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axis, atoms, find, results_of
from graphopt.axes import axis as ax
from graphopt.axes.call import Call
from graphopt.axes.infer import Inference
from graphopt.cost.formulas import base_name, tensors
from graphopt.edit import Edit
from graphopt.errors import Decline
from graphopt.orders import Order, Turn, marked, permutation, through
from graphopt.place import place

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
    what `shrink` rewrites. `ends` are the results that calls outside read with all tokens: (result, reader), and
    `blocked` says of these readers why they are outside.
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
        return _same(results_of(self.dims[node])[0], results_of(self.dims[self.at])[0])

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
    """
    outside: dict[Node, str] = dict.fromkeys(until.users, "tokens come back in front of it") if until else {}
    order = list(edit.graph.nodes)
    behind = descendants(order, at)
    while True:
        # Everything behind a call that is outside is outside, too.
        gone = descendants(order, *outside) | set(outside)
        inside = [node for node in order if node in behind and node not in gone]
        suffix = _Suffix(edit, at, where, inside, ORDER if ordered else frozenset(), compact)
        if (blocker := suffix.run_region()) is not None:
            node, reason = blocker
            outside[node] = reason
            continue
        ends = suffix.ends(shrinks)
        if not at_stream or not (copied := _end_in_stream(edit, suffix, ends, set(inside))):
            break
        order = list(edit.graph.nodes)
        behind = descendants(order, at)
        outside |= dict.fromkeys(copied, "its result is wanted of all tokens")
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
        ends=tuple(ends),
        blocked=tuple(Decline(place(node), reason) for node, reason in outside.items()),
    )


def _same(own: Sequence[Axis], wanted: Sequence[Axis]) -> bool:
    """Whether dimensions are the same, one by one; those of extent 1 may be any."""
    return len(own) == len(wanted) and all(
        a.extent == b.extent == 1 or find(a) is find(b) for a, b in zip(own, wanted, strict=True)
    )


def descendants(order: Sequence[Node], *roots: Node) -> set[Node]:
    """The calls that are computed from any of `roots`."""
    found: set[Node] = set()
    for node in order:
        if node.op == "call_function" and any(each in found or each in roots for each in node.all_input_nodes):
            found.add(node)
    return found


class _Suffix(Inference):
    """Axis inference of a part of a program; what it reads has axes of its own, which nothing pins."""

    def __init__(
        self, edit: Edit, at: Node, where: Span, inside: Sequence[Node], tolerated: frozenset[str], compact: bool
    ) -> None:
        super().__init__(edit.program)
        self.tolerated, self.compact = tolerated, compact
        self.edit, self.at, self.inside = edit, at, inside
        size = int(at.meta["val"].shape[where.dim])
        self.spans = [Axis(stop - start) for start, stop in where.pieces()]
        hole = [Axis(1)] if where.hole is not None else []
        self.tokens = ax.concatenation(
            [Axis(where.start), self.spans[0], *hole, *self.spans[1:], Axis(size - where.stop)]
        )
        self.pieces = len(self.spans)
        self.others = size - where.size
        self.wholes: dict[Order, Axis] = {(): self.tokens}
        self.turns: dict[Node, Turn] = {}
        self.dims[at] = [
            self.tokens if n == where.dim else Axis(extent) for n, extent in enumerate(at.meta["val"].shape)
        ]
        self.backwards: dict[Node, bool | None] = {}
        self.constants = {
            node: tensor
            for each in inside
            for node in each.all_input_nodes
            if (tensor := edit.tensor(node)) is not None
        }

    def run_region(self) -> tuple[Node, str] | None:
        """Visit all calls; the first that wants something of the tokens which fewer would not give, and why."""
        for node in self.inside:
            for source in node.all_input_nodes:
                if source not in self.dims:
                    value = source.meta.get("val")
                    found = [[Axis(int(size)) for size in tensor.shape] for tensor in tensors(value)]
                    self.dims[source] = found[0] if isinstance(value, Tensor) else found
            self.visit(node)
            roots = [find(span) for span in self.spans]
            for root in roots:
                if root.pinned is not None or root.kind is not None:
                    apart = "it makes a grid of the tokens" if root.kind == "product" else "it takes some tokens apart"
                    return node, root.pinned or apart
            if len(set(roots)) < len(roots):
                return node, "tokens in one order meet tokens in another"
            if (disorder := self._disorder(node)) is not None:
                return node, disorder
        return None

    def visit(self, node: Node) -> None:
        turn = self._turn(node) if self.tolerated else None
        if turn is not None:
            own = list(self.dims[node.all_input_nodes[0]])
            own[turn.dim] = self._whole(turn.after)
            self.dims[node], self.turns[node] = own, turn
        elif (dims := self._slid(node)) is not None:
            self.dims[node] = dims
        else:
            super().visit(node)

    def _turn(self, node: Node) -> Turn | None:
        """What a call does to the order of tokens, where it looks all of them up by a stored permutation."""
        known = marked(node)
        found = permutation(node, self.constants) if known is None else (known.dim, ())
        if found is None:
            return None
        dim, step = found
        own = find(self.dims[node.all_input_nodes[0]][dim])
        before = next((order for order, axis in self.wholes.items() if find(axis) is own), None)
        if before is None or (known is not None and known.before != before):
            return None
        return Turn(dim, before, through(before, step)) if known is None else known

    def _whole(self, order: Order) -> Axis:
        """The dimension that all tokens of an order are; those of one order are an atom of their own."""
        if order not in self.wholes:
            span = Axis(sum(each.extent for each in self.spans[: self.pieces]))
            self.spans.append(span)
            self.wholes[order] = ax.concatenation([Axis(self.others), span])
        return self.wholes[order]

    def _slid(self, node: Node) -> list[Axis] | None:
        """The dimensions of a convolution along the tokens, where it may slide over those that stay."""
        if not self.compact or base_name(node) != "conv1d":
            return None
        call = Call(node, self)
        own = call.dims(call.arg("input"))
        if not any(find(axis) is find(own[-1]) for axis in self.wholes.values()):
            return None
        size = call.arg("weight").meta["val"].shape[-1]
        padding, stride, dilation = (call.arg(name) for name in ("padding", "stride", "dilation"))
        if isinstance(padding, str) or [*stride, *dilation] != [1, 1] or padding[0] not in (size - 1, (size - 1) / 2):
            return None
        channels = Axis(call.shape[-2])
        return [*own[:-2], channels, ax.concatenation([own[-1], Axis(2 * padding[0] - size + 1)])]

    def _disorder(self, node: Node) -> str | None:
        """Why a call needs tokens at their places though the order of those that stay is kept; None where it does not.

        Remembers which results have the tokens backwards (None: some of them): nothing may meet these that has not.
        """
        sources = [each for each in node.all_input_nodes if self.dims.get(each) and self.carries(each)]
        if not sources or not self.dims.get(node):
            return None
        name = base_name(node)
        own = {self.backwards.get(each, False) for each in sources}
        if len(own) > 1 and None not in own and name not in ("cat", "concat", "concatenate", "stack"):
            return "tokens meet tokens in reverse order"
        state = own.pop() if len(own) == 1 else None
        if name in ("roll", "rot90", "flip"):
            dims = results_of(self.dims[sources[0]])[0]
            places: Any = node.args[1 if name == "flip" else 2] if len(node.args) > (name != "flip") + 1 else []
            places = places or range(len(dims))
            moved = any(self.among(dims[each]) for each in places)
            if moved and name != "flip":
                return "it moves tokens to other places"
            state = not state if moved and state is not None else state
        others = {find(span) for span in self.spans[self.pieces :]}
        own_atoms = [atoms(axis) for each in sources for dims in results_of(self.dims[each]) for axis in dims]
        if (state or any(others & set(each) for each in own_atoms)) and name in _TAKING and not self._all_in(node):
            return f"tokens in {'reverse' if state else 'another'} order are taken apart"
        if node in self.turns and state is not False:
            return "tokens in reverse order are put in another"
        self.backwards[node] = state
        return None

    def _all_in(self, node: Node) -> bool:
        """Whether a dimension of a result is all tokens, and nothing else."""
        wholes = [atoms(whole) for whole in self.wholes.values()]
        return any(atoms(axis) in wholes for own in results_of(self.dims[node]) for axis in own)

    def carries(self, node: Node) -> bool:
        """Whether a result has the tokens."""
        return any(self.among(axis) for own in results_of(self.dims[node]) for axis in own)

    def among(self, axis: Axis) -> bool:
        """Whether tokens are among the items of an axis."""
        own = set(atoms(axis))
        return any(find(span) in own for span in self.spans)

    def ends(self, shrinks: Callable[[Node], bool]) -> list[tuple[Node, Node]]:
        """The results that are read outside with all tokens, and by whom."""
        inside = set(self.inside)
        return [
            (node, user)
            for node in self.inside
            if self.carries(node)
            for user in node.users
            if user not in inside and not (user.op == "output" and shrinks(node))
        ]

    def is_stream(self, node: Node) -> bool:
        """Whether a result has the very dimensions of `at`."""
        return _same(results_of(self.dims[node])[0], self.dims[self.at])


def _end_in_stream(edit: Edit, suffix: _Suffix, ends: Sequence[tuple[Node, Node]], inside: set[Node]) -> list[Node]:
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


def _behind_stream(suffix: _Suffix, node: Node, inside: set[Node]) -> set[Node]:
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
_TAKING = ("select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind")
