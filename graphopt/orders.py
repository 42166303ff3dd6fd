"""Orders in which tokens are visited: constant permutations behind a cut, which at run time have fewer tokens.

    before  x -> x[:, order] -> scan -> y[:, back]          order, back: stored, each token once
    after   few -> few[:, a(b)] -> scan -> y[:, b(a)]       tokens that stay, in the order of the whole sequence

An order is a tuple of the original tokens by place, () for the original one. A token that stays has its place among all
in every order; that of a scan's neighbours is known so, too, however many went between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.cost.formulas import base_name
from graphopt.edit import Edit
from graphopt.inline import inline

Order = tuple[int, ...]
_LOOKUPS = ("index", "index_select", "_unsafe_index")
_MARK = "turn"  # the key of a run-time turn among a node's notes


@dataclass(frozen=True)
class Turn:
    """A call that puts what runs along `dim` from one order into another."""

    dim: int
    before: Order
    after: Order


def permutation(node: Node, constants: Mapping[Node, Tensor]) -> tuple[int, Order] | None:
    """The dimension that a call looks up by a stored permutation, and that; None for any other call."""
    if node.op != "call_function" or base_name(node) not in _LOOKUPS:
        return None
    if base_name(node) == "index_select":
        dim, index = node.args[1:3]
    else:
        given = [(n, item) for n, item in enumerate(node.args[1]) if item is not None]  # type: ignore[arg-type]
        if len(given) != 1:
            return None
        dim, index = given[0]
    stored = constants.get(index) if isinstance(index, Node) else None
    source = node.args[0]
    if stored is None or stored.dim() != 1 or stored.dtype is torch.bool or not isinstance(source, Node):
        return None
    dim = int(dim) % source.meta["val"].dim()  # type: ignore[arg-type]
    size = int(source.meta["val"].shape[dim])
    found = tuple(int(item) % size for item in stored)
    return (dim, found) if sorted(found) == list(range(size)) else None


def through(before: Order, step: Order) -> Order:
    """The order of what is in order `before` and looked up by `step`."""
    found = tuple(before[place] for place in step) if before else step
    return () if found == tuple(range(len(found))) else found


def marked(node: Node) -> Turn | None:
    """The turn that a call is whose index is computed at run time, by an earlier cut."""
    return node.meta.get(_MARK)


@dataclass
class Orders:
    """Where the tokens that there are now stand among all at first: `places` (b, n) by order, ascending as a rule.

    `size` is how many there were. It is filled by cuts, one after another.
    """

    size: int = 0
    places: dict[Order, Node] = field(default_factory=dict)

    def advance(self, edit: Edit, index: Node, orders: list[Order], size: int, like: Node) -> Orders:
        """The places behind one more cut, whose `index` (b, k) says which of the tokens of now stay."""
        if not self.places:
            return Orders(size, {(): index} | self._sorted(edit, index, orders, size, like))
        first = inline(edit, lambda was, own: was.gather(1, own), self.places[()], index, like=like)
        return Orders(self.size, {(): first} | self._sorted(edit, first, orders, self.size, like))

    @staticmethod
    def _sorted(edit: Edit, first: Node, orders: list[Order], size: int, like: Node) -> dict[Order, Node]:
        def placed(first: Tensor, order: Order) -> Tensor:
            return torch.tensor(_inverse(order, size))[first].sort(-1).values

        return {order: inline(edit, placed, first, order, like=like) for order in orders if order}

    def ranks(self, edit: Edit, before: Orders, order: Order, like: Node) -> Node:
        """Where the tokens of now stand among those that there were in front of the cut, in an order."""
        if not before.places:
            return self.places[order]
        return inline(edit, _rank, before.places[order], self.places[order], self.size, like=like)

    def turned(self, edit: Edit, turn: Turn, like: Node) -> Node:
        """For each place behind a turn, the one in front that has its token: (b, k)."""
        steps = _inverse(turn.before, self.size)
        step = [steps[token] for token in (turn.after or range(self.size))]

        def moved(before: Tensor, after: Tensor) -> Tensor:
            return _rank(before, torch.tensor(step)[after], self.size)

        found: Node = inline(edit, moved, self.places[turn.before], self.places[turn.after], like=like)
        return found


def mark(result: Node, turn: Turn) -> None:
    """Note which of the calls that made `result` is the run-time turn, so that a later cut follows it."""
    node = result
    while base_name(node) not in _LOOKUPS:  # dimensions are moved to where a lookup wants them
        node = node.all_input_nodes[0]
    dim = int(node.args[1]) if base_name(node) == "index_select" else 1  # type: ignore[arg-type]
    node.meta[_MARK] = Turn(dim, turn.before, turn.after)


def _rank(among: Tensor, places: Tensor, size: int) -> Tensor:
    """The position in `among` (b, n) of each of `places` (b, k), all below `size`."""
    count = torch.arange(among.shape[1]).expand(among.shape[0], -1)
    return torch.zeros(among.shape[0], size, dtype=torch.int64).scatter(1, among, count).gather(1, places)


def _inverse(order: Order, size: int) -> list[int]:
    """The place of each token."""
    found = list(range(size))
    for place, token in enumerate(order):
        found[token] = place
    return found
