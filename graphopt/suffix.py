"""What calls behind a point of a program make of its tokens: axes by which fewer can be followed, or why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axis, atoms, find, results_of
from graphopt.axes import axis as ax
from graphopt.axes.call import Call
from graphopt.axes.infer import Inference
from graphopt.cost.formulas import base_name, tensors
from graphopt.edit import Edit
from graphopt.loops import Loop
from graphopt.orders import Order, Turn, marked, permutation, through

if TYPE_CHECKING:
    from graphopt.region import Span


class Suffix(Inference):
    """Axis inference of a part of a program; what it reads has axes of its own, which nothing pins."""

    def __init__(
        self,
        edit: Edit,
        at: Node,
        where: Span,
        inside: Sequence[Node],
        tolerated: frozenset[str],
        compact: bool,
        counted: bool = False,
        loops: Sequence[Loop] = (),
    ) -> None:
        super().__init__(edit.program)
        self.tolerated, self.compact, self.counted = tolerated, compact, counted
        self.edit, self.at, self.inside = edit, at, inside
        own = set(inside) if tolerated else set()
        self.loops = {loop.joined: loop for loop in loops if loop.joined in own}
        self.takes = {node: take for loop in self.loops.values() for node, take in loop.takes.items()}
        self.taken: dict[Node, Axis] = {}  # of which tokens a step takes its own
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
                    return node, _BY_EXPERT if _sorts_by_expert(node) else root.pinned or apart
            if len(set(roots)) < len(roots):
                one = " in one tensor" if base_name(node) in _JOINING else ""
                return node, f"tokens in one order meet tokens in another{one}"
            if (disorder := self._disorder(node)) is not None:
                return node, disorder
            if self.counted and self._sums_up(node):
                return node, "it counts each token that was merged"
            if self._weighs_rows(node):
                return node, "it has a weight for each feature of each token"
        return None

    def visit(self, node: Node) -> None:
        turn = self._turn(node) if self.tolerated else None
        if turn is not None:
            own = list(self.dims[node.all_input_nodes[0]])
            own[turn.dim] = self._whole(turn.after)
            self.dims[node], self.turns[node] = own, turn
        elif (dims := self._slid(node) or self._stepped(node)) is not None:
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

    def _stepped(self, node: Node) -> list[Axis] | None:
        """The dimensions of a token that a step of a loop takes, and of what the steps give together."""
        if (take := self.takes.get(node)) is not None:
            source, dim = take
            own = list(self.dims[source])
            whole = next((each for each in self.wholes.values() if atoms(each) == atoms(own[dim])), None)
            if whole is None:
                return None
            self.taken[node] = whole
            return [*own[:dim], *own[dim + 1 :]]
        if (loop := self.loops.get(node)) is None or self._uneven(loop) is not None:
            return None
        own = list(self.dims[loop.results[0]])
        own.insert(loop.dim, next(self.taken[take] for take in loop.takes))
        return own

    def _uneven(self, loop: Loop) -> str | None:
        """Why the steps of a loop cannot be fewer as there are fewer tokens; None where they can."""
        if any(self.dims.get(node) and self.carries(node) for node in loop.steps):
            return "its steps read all tokens"
        ways = {(find(self.taken[take]), self.backwards.get(source, False)) for take, (source, _) in loop.takes.items()
                if take in self.taken}  # fmt: skip
        if len(ways) == 1 and len(set(loop.takes) - set(self.taken)) == 0 and None not in {way for _, way in ways}:
            return None
        return "its steps take tokens in several orders" if ways else None

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
        if node in self.taken:
            return None
        if (loop := self.loops.get(node)) is not None and set(loop.takes) & set(self.taken):
            self.backwards[node] = self.backwards.get(next(iter(loop.sources)), False)
            return self._uneven(loop)
        sources = [each for each in node.all_input_nodes if self.dims.get(each) and self.carries(each)]
        if not sources or not self.dims.get(node):
            return None
        name = base_name(node)
        own = {self.backwards.get(each, False) for each in sources}
        if len(own) > 1 and None not in own and name not in _JOINING:
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

    def _sums_up(self, node: Node) -> bool:
        """Whether a call makes one value of all tokens that counts them: a head's mean, no sum over keys of each."""
        if base_name(node) not in ("mean", "sum") or not self.dims.get(node) or self.carries(node):
            return False
        return any(self.carries(each) for each in node.all_input_nodes if self.dims.get(each))

    def _weighs_rows(self, node: Node) -> bool:
        """Whether a layer reads the features of all tokens in one row: a head that wants all tokens."""
        weight = node.args[1] if base_name(node) == "linear" else None
        own = self.dims.get(weight) if isinstance(weight, Node) and weight in self.constants else None
        return own is not None and find(own[-1]).kind == "product" and self.among(own[-1])

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
        return same(results_of(self.dims[node])[0], self.dims[self.at])


def _sorts_by_expert(node: Node) -> bool:
    """Whether experts compute a sorted sequence in groups."""
    found, todo = {node}, [node] if base_name(node) in ("sort", "argsort") else []
    while todo and len(found) < _FAR:
        for user in todo.pop(0).users:
            if "grouped_mm" in base_name(user):
                return True
            if user not in found:
                found.add(user)
                todo.append(user)
    return False


def same(own: Sequence[Axis], wanted: Sequence[Axis]) -> bool:
    """Whether dimensions are the same, one by one; those of extent 1 may be any."""
    return len(own) == len(wanted) and all(
        a.extent == b.extent == 1 or find(a) is find(b) for a, b in zip(own, wanted, strict=True)
    )


_TAKING = ("select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind")
_JOINING = ("cat", "concat", "concatenate", "stack")
_FAR = 30
_BY_EXPERT = "it sorts tokens by expert; experts by batched products (batched_mm) need no order"
