"""Where tokens may be reduced: the places of a residual stream behind attention, and behind whole blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from graphopt.axes import Axes, Axis, atoms, find, results_of
from graphopt.cost.formulas import base_name
from graphopt.edit import Edit
from graphopt.errors import Decline
from graphopt.passes.residual import Branch, branches
from graphopt.passes.tokens.attention import Attention, attentions
from graphopt.place import place
from graphopt.token_trace import Choice, choices

Where = Literal["attention", "block", "input"]


@dataclass(frozen=True, eq=False)
class Site:
    """A value of the stream, (b, n, c) as a rule, whose tokens run along `dim`.

    `block` counts from 0. `attention` is that of this block, in front of the value, `following` that of the next block,
    None behind the last. `hidden` is what the feed-forward part in front of the value has, None where there is none.
    """

    block: int
    name: str
    at: Node
    dim: int
    attention: Attention | None
    following: Attention | None
    hidden: Node | None = None


@dataclass(frozen=True)
class Block:
    """A block of a transformer: an attention, where its result was added to the stream, and where the block ends.

    `tokens` is the axis of the stream's tokens behind its attention: blocks with the same one follow each other.
    `hidden` (b, n, neurons) is what the last layer of its feed-forward part reads, None where that is not one sequence
    of layers.
    """

    name: str
    attention: Attention
    entry: Node
    after_attention: Node
    end: Node
    dim: int
    tokens: Axis
    hidden: Node | None


def streams(edit: Edit, found: list[Block]) -> list[list[Block]]:
    """Blocks by the stream that they are of, in order: those of a vision tower, those of a language model.

    Blocks of a stream share their tokens, or have those that earlier passes left of them, or brought back.
    """
    groups: list[list[Block]] = []
    known: dict[Axis, list[Block]] = {}
    earlier = choices(edit)
    for block in found:
        group = known.get(find(block.tokens)) or next((own for own in groups if _follows(block, own, earlier)), [])
        if not group:
            groups.append(group)
        group.append(block)
        known[find(block.tokens)] = group
    return groups


def _follows(block: Block, group: list[Block], earlier: Sequence[Choice]) -> bool:
    """Whether a block goes on with the stream of a group, whose tokens earlier passes reduced on the way."""
    at, first = block.after_attention, group[0]
    between = [choice for choice in earlier if first.entry in choice.above and at in choice.behind]
    return block.dim == first.dim and any(_left_of(each.after_attention, at, block.dim, between) for each in group)


def _left_of(before: Node, node: Node, dim: int, between: Sequence[Choice]) -> bool:
    """Whether a value is shaped as one in front of it, but for the tokens that were reduced between the two."""
    sizes = {int(before.meta["val"].shape[dim])}
    for choice in between:
        sizes |= {size - choice.size + choice.count for size in sizes}
    own, shape = (list(each.meta["val"].shape) for each in (node, before))
    return len(own) == len(shape) and own.pop(dim) in sizes and own == [*shape[:dim], *shape[dim + 1 :]]


def length(stream: list[Block]) -> int:
    """How many tokens a stream has in front of its first block."""
    return int(stream[0].entry.meta["val"].shape[stream[0].dim])


def blocks(edit: Edit, axes: Axes) -> tuple[list[Block], list[Decline]]:
    """The blocks with attention of tokens to tokens of the stream, in order; and attention that is in none."""
    program = edit.program
    nodes = {node.name: node for node in edit.graph.nodes}
    old = {node.name: node for node in program.graph.nodes}
    order = {node: n for n, node in enumerate(edit.graph.nodes)}
    sums = [(branch, nodes[branch.total.name]) for branch in branches(program)[0]]
    found: list[Block] = []
    declined: list[Decline] = []
    every, earlier = attentions(edit), choices(edit)
    for number, attention in enumerate(every):
        until = order[every[number + 1].node] if number + 1 < len(every) else len(order)
        own = [
            (branch, total)
            for branch, total in sums
            if order[attention.node] < order[total] < until and order[nodes[branch.source.name]] < order[attention.node]
        ]
        if not own:
            declined.append(Decline(place(attention.node), "what it gives is not added to what it was computed from"))
            continue
        branch, total = own[0]
        dims = _token_dims(axes, old[total.name], old[attention.query.name])
        if len(dims) != 1:
            reason = "its queries are windows, or several dimensions, of the stream"
            declined.append(Decline(place(attention.node), reason))
            continue
        # The last sum in front of the next attention that still has these tokens, or what is left of them.
        inside = [choice for choice in earlier if total in choice.above]
        ends = [
            (branch, each)
            for branch, each in sums
            if order[total] <= order[each] < until
            and _left_of(total, each, dims[0], [choice for choice in inside if each in choice.behind])
        ]
        last, end = ends[-1] if ends else (branch, total)
        hidden = hidden_of(last) if end is not total else None
        tokens = results_of(axes.dims[old[total.name]])[0][dims[0]]
        name = branch.unit or branch.name
        found.append(
            Block(
                name,
                attention,
                entry=nodes[branch.source.name],
                after_attention=total,
                end=end,
                dim=dims[0],
                tokens=tokens,
                hidden=nodes[hidden.name] if hidden is not None else None,
            )
        )
    return found, declined


def _token_dims(axes: Axes, stream: Node, query: Node) -> list[int]:
    """The dimensions of the stream that the rows of `query` are."""
    rows = find(results_of(axes.dims[query])[0][-2])
    wanted = set(atoms(rows))
    return [
        n
        for n, axis in enumerate(results_of(axes.dims[stream])[0])
        if axis.extent > 1 and (find(axis) is rows or (set(atoms(axis)) == wanted and axis.extent == rows.extent))
    ]


def sites(found: list[Block], where: Where) -> list[Site]:
    """One site per block: behind its attention, at its end, or (one only) in front of the first block."""
    if where == "input":
        first = found[0]
        return [Site(0, first.name, first.entry, first.dim, None, first.attention)]
    result = []
    for number, block in enumerate(found):
        following = found[number + 1].attention if number + 1 < len(found) else None
        at = block.after_attention if where == "attention" else block.end
        hidden = block.hidden if where == "block" else None
        result.append(Site(number, block.name, at, block.dim, block.attention, following, hidden))
    return result


def hidden_of(branch: Branch) -> Node | None:
    """What the last of the layers of a residual branch reads, neurons last; None where that is no linear layer of what
    other layers give for each item of the stream."""
    layer = branch.layers[-1]
    found = layer.args[0]
    if len(branch.layers) < 2 or base_name(layer) != "linear" or not isinstance(found, Node):
        return None
    return found if found.meta["val"].shape[:-1] == branch.total.meta["val"].shape[:-1] else None
