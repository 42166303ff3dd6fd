"""What stands behind a point of a program and can do with fewer tokens, and where all of them are wanted again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axis, atoms, find, results_of
from graphopt.axes import axis as ax
from graphopt.axes.infer import Inference
from graphopt.cost.formulas import base_name, tensors
from graphopt.edit import Edit
from graphopt.errors import Decline
from graphopt.place import place

# Pins that matter to a constant keep set, not to items that stay in their order.
ORDER = frozenset({"its order matters", "causal"})


@dataclass(frozen=True)
class Span:
    """The tokens of `[start, stop)` along dimension `dim` of a value, of which some go; all others stay."""

    dim: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many tokens there are to choose from."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Region:
    """The calls behind `at` that run on fewer tokens.

    `dims` has the axes of these calls' results and of all that they read; `span` is the atom that shrinks, `tokens` the
    dimension it is a part of, `batch` the axis each of whose items chooses for itself. `literals` and `targets` are
    what `shrink` rewrites. `ends` are the results that calls outside read with all tokens: (result, reader), and
    `blocked` says of these readers why they are outside.
    """

    at: Node
    where: Span
    nodes: tuple[Node, ...]
    span: Axis
    tokens: Axis
    batch: Axis | None
    dims: Mapping[Node, Any]
    literals: Mapping[Node, Mapping[str, Any]]
    targets: Mapping[Node, Any]
    ends: tuple[tuple[Node, Node], ...]
    blocked: tuple[Decline, ...]

    def carries(self, axis: Axis) -> bool:
        """Whether items of the tokens are among those of `axis`."""
        return find(self.span) in atoms(axis)

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
    """
    outside: dict[Node, str] = dict.fromkeys(until.users, "tokens come back in front of it") if until else {}
    order = list(edit.graph.nodes)
    behind = descendants(order, at)
    while True:
        # Everything behind a call that is outside is outside, too.
        gone = descendants(order, *outside) | set(outside)
        inside = [node for node in order if node in behind and node not in gone]
        suffix = _Suffix(edit, at, where, inside, ORDER if ordered else frozenset())
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
        span=suffix.span,
        tokens=suffix.tokens,
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

    def __init__(self, edit: Edit, at: Node, where: Span, inside: Sequence[Node], tolerated: frozenset[str]) -> None:
        super().__init__(edit.program)
        self.tolerated = tolerated
        self.edit, self.at, self.inside = edit, at, inside
        size = int(at.meta["val"].shape[where.dim])
        self.span = Axis(where.size)
        self.tokens = ax.concatenation([Axis(where.start), self.span, Axis(size - where.stop)])
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
            root = find(self.span)
            if root.pinned is not None or root.kind is not None:
                apart = "it makes a grid of the tokens" if root.kind == "product" else "it takes some tokens apart"
                return node, root.pinned or apart
            if (disorder := self._disorder(node)) is not None:
                return node, disorder
        return None

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
            moved = any(find(self.span) in atoms(dims[each]) for each in places)
            if moved and name != "flip":
                return "it moves tokens to other places"
            state = not state if moved and state is not None else state
        self.backwards[node] = state
        return None

    def carries(self, node: Node) -> bool:
        """Whether a result has the tokens."""
        return any(find(self.span) in atoms(axis) for own in results_of(self.dims[node]) for axis in own)

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
