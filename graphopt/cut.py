"""The run-time form of `shrink`: from a point of a program on, only some of the tokens, chosen by the program itself.

    before   x -> block -> block -> head
    after    x -> choose, fold -> block -> block -> head         fewer tokens in both blocks

How many stay is fixed, which ones is computed for each sample, so shapes stay static. Everything alive behind the point
that has the tokens goes with them: the stream and what skips ahead of it is folded, tables of positions and masks are
looked up at the tokens that stay. Where all tokens are wanted again they come back (`unfold`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt.axes import Axis, find, results_of
from graphopt.axes.axis import parts
from graphopt.edit import Edit
from graphopt.errors import CannotShrink
from graphopt.inline import inline
from graphopt.orders import Order, Orders, Turn, mark
from graphopt.place import place
from graphopt.region import Region, Span
from graphopt.shrink import rewrite

Positions = Literal["keep", "renumber"]


@dataclass(frozen=True)
class Kept:
    """Which tokens of a span stay, and what becomes of the others. Tensors, or the nodes that compute them.

    `index` (b, k) int64: the token that gives each new one its place. Then one of
        nothing    the others are dropped
        `sources`  (b, r) int64, and `slots` (b, r) int64: token sources[j] is merged into new token slots[j]:
                   a mean, weighted by `weight` (b, n), of which `share` (b, r) counts for the merged ones
        `matrix`   (b, k, n): new tokens are matrix @ tokens; `spread` (b, n, k): how they come back
    `size` (b, k): how many tokens each new one stands for.
    """

    index: Any
    sources: Any = None
    slots: Any = None
    weight: Any = None
    share: Any = None
    matrix: Any = None
    spread: Any = None
    size: Any = None


pytree.register_dataclass(Kept)


def cut(edit: Edit, region: Region, kept: Kept, *, positions: Positions = "keep", orders: Orders | None = None) -> Node:
    """Let the calls of a region run on the kept tokens; gives the value that they read instead of `region.at`.

    Args:
        edit: the graph.
        region: what `region_of` found in it.
        kept: nodes in front of the region's first call.
        positions: "keep": tables of positions and masks are looked up at the kept tokens, so for these the result is
            the same as if the others were masked out. "renumber": the kept tokens take the first places.
        orders: where the tokens stand that there are now, of cuts in front of this one; brought up to date.

    Raises:
        CannotShrink: something that has the tokens cannot be looked up for each sample.
    """
    first, where = region.nodes[0], region.where
    count = int(kept.index.meta["val"].shape[1])
    reduced = inline(edit, lambda x, own: fold(x, own, where), region.at, kept, like=first)
    index = inline(edit, _whole_index, kept.index, int(region.at.meta["val"].shape[where.dim]), where, like=first)
    before = Orders() if orders is None else replace(orders)
    size = int(region.at.meta["val"].shape[where.dim])
    after = before.advance(edit, index, list(region.wholes), size, first)
    places = {order: after.ranks(edit, before, order, first) if order else index for order in region.wholes}
    crossing: dict[Node, list[Node]] = {}
    for source, reader in region.crossings:
        crossing.setdefault(reader, []).append(source)
    done: dict[tuple[Node, int], Node] = {}
    turned: dict[Node, Node] = {}
    turns: dict[tuple[Order, Order], Node] = {}
    keep = {span: torch.arange(number) for span, number in region.counts(count).items()}
    gone = {node for loop in region.loops for node in loop.shorten(size - where.size + count)}
    for node in (each for each in region.nodes if each not in gone):
        swapped = {region.at: reduced, **turned}
        for source in crossing.get(node, ()):
            rank = _rank_for(region, source, node)
            if (source, rank) not in done:
                done[source, rank] = _crossed(edit, region, kept, places, source, node, rank, positions)
            swapped[source] = done[source, rank]
        for old, new in swapped.items():
            node.replace_input_with(old, new)
        if (turn := region.turns.get(node)) is not None:
            if (turn.before, turn.after) not in turns:
                turns[turn.before, turn.after] = after.turned(edit, turn, first)
            turned[node] = _turn(edit, region, node, turn, turns[turn.before, turn.after])
            continue
        literals = region.literals.get(node, {})
        names = {value.name: swapped.get(value, value) for value in literals.values() if isinstance(value, Node)}
        rewrite(node, literals, region.targets.get(node), keep, names)
        edit.infer(node)
    if orders is not None:
        orders.size, orders.places = after.size, after.places
    _bring_back(edit, region, kept, turned)
    for node in reversed(turned):
        if not node.users:
            edit.graph.erase_node(node)
    return reduced


def _turn(edit: Edit, region: Region, node: Node, turn: Turn, index: Node) -> Node:
    """The tokens that stay in another order, instead of a lookup of all by a stored permutation."""
    source = node.args[0]
    assert isinstance(source, Node)
    old = next(each for each in (node, *node.all_input_nodes) if region.dims.get(each))
    dims = results_of(region.dims[old])[0]
    batch = next((n for n, a in enumerate(dims) if region.batch is not None and find(a) is find(region.batch)), None)
    shape = tuple(map(int, source.meta["val"].shape))
    if batch is None and region.batch is not None and region.batch.extent > 1:
        raise CannotShrink(axis=place(node), reason="all samples share what it puts in another order")
    found: Node = inline(edit, _look_up, source, index, turn.dim, (shape[turn.dim],), 0, batch, like=node)
    mark(found, turn)
    return found


def _bring_back(edit: Edit, region: Region, kept: Kept, turned: Mapping[Node, Node]) -> None:
    """Give all tokens to the calls outside of a region that read results of it."""
    order = {node: place for place, node in enumerate(edit.graph.nodes)}
    readers: dict[Node, list[Node]] = {}
    for node, user in region.ends:
        readers.setdefault(node, []).append(user)
    for node, users in readers.items():
        span = region.span_of(node)
        if span is None:
            raise CannotShrink(axis=place(node), reason="all tokens are wanted again in a form that they do not have")
        base = region.at if region.is_stream(node) else None
        first = min(users, key=order.__getitem__)
        whole = inline(
            edit, lambda y, own, x, at=span: unfold(y, own, at, x), turned.get(node, node), kept, base, like=first
        )
        for user in users:
            user.replace_input_with(node, whole)


# What is computed -----------------------------------------------------------------------------------------------------


def fold(x: Tensor, kept: Kept, where: Span) -> Tensor:
    """The tokens that stay, with what is merged into them; others than those of the span as they are.

    Args:
        x: tokens along `where.dim`, samples along dimension 0 (none where that is the tokens' own).
        kept: as computed for `x`'s samples.
        where: the tokens that may go.
    """
    tokens = front(x, where.dim)
    if where.hole is not None and (kept.matrix is not None or kept.sources is not None):
        raise CannotShrink(axis="tokens", reason="one in the middle stays, so tokens can be dropped but not merged")
    if kept.matrix is not None:
        flat = tokens.flatten(2)
        span = _mixed(kept.matrix, flat[:, where.start : where.stop])
        pieces = [flat[:, : where.start], span, flat[:, where.stop :]]
        out = torch.cat([piece for piece in pieces if piece.shape[1]], 1).unflatten(2, tokens.shape[2:])
        return _back(out, where.dim)
    index = _whole_index(kept.index, tokens.shape[1], where)
    if kept.sources is None:
        return _back(rows(tokens, index), where.dim)
    assert kept.slots is not None
    flat = tokens.flatten(2)
    weight = torch.ones(kept.index.shape[0], where.size) if kept.weight is None else kept.weight
    merged = rows(weight, kept.sources)
    merged = merged if kept.share is None else merged * kept.share
    own = rows(weight, kept.index)
    own = torch.nn.functional.pad(own, (where.start, tokens.shape[1] - where.stop), value=1.0)
    slots, sources = kept.slots + where.start, kept.sources + where.start
    total = add_rows(own, slots, merged)
    sums = add_rows(rows(flat, index) * own[..., None], slots, rows(flat, sources) * merged[..., None])
    return _back((sums / total[..., None]).to(x.dtype).unflatten(2, tokens.shape[2:]), where.dim)


def unfold(y: Tensor, kept: Kept, where: Span, base: Tensor | None = None) -> Tensor:
    """All tokens again: merged ones as what they were merged into, dropped ones as in `base`, or zero.

    Args:
        y: what was computed from kept tokens, along `where.dim`.
        kept: which these are.
        where: the tokens that could go, among all.
        base: all tokens as they were before.
    """
    few = front(y, where.dim)
    flat = few.flatten(2)
    count = kept.index.shape[1]
    size = flat.shape[1] - count + where.size
    if kept.spread is not None:
        span = _mixed(kept.spread, flat[:, where.start : where.start + count])
        pieces = [flat[:, : where.start], span, flat[:, where.start + count :]]
        out = torch.cat([piece for piece in pieces if piece.shape[1]], 1)
        return _back(out.unflatten(2, few.shape[2:]), where.dim)
    index = _whole_index(kept.index, size, where)
    missing = where.size - count - (kept.sources.shape[1] if kept.sources is not None else 0)
    if missing == 0:  # the place among the kept ones of each, looked up once
        slots = torch.arange(index.shape[1]).expand(index.shape[0], -1)
        if kept.sources is not None and kept.slots is not None:
            index = torch.cat([index, kept.sources + where.start], 1)
            slots = torch.cat([slots, kept.slots + where.start], 1)
        places = torch.zeros(index.shape[0], size, dtype=torch.int64).scatter(1, index, slots)
        return _back(rows(few, places), where.dim)
    out = torch.zeros(flat.shape[0], size, flat.shape[2]) if base is None else front(base, where.dim).flatten(2)
    out = out.to(flat.dtype).scatter(1, index[..., None].expand(-1, -1, flat.shape[2]), flat)
    if kept.sources is not None and kept.slots is not None:
        sources = (kept.sources + where.start)[..., None].expand(-1, -1, flat.shape[2])
        out = out.scatter(1, sources, rows(flat, kept.slots + where.start))
    return _back(out.unflatten(2, few.shape[2:]), where.dim)


def _mixed(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix @ x, as precise as the more precise of the two, as `x` is stored."""
    wide = torch.promote_types(matrix.dtype, x.dtype)
    return torch.matmul(matrix.to(wide), x.to(wide)).to(x.dtype)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b]]: (b, n, ...) at (b, k) to (b, k, ...)."""
    if x.shape[0] == 1:
        return torch.index_select(x, 1, index[0])
    return x[torch.arange(x.shape[0])[:, None], index]


def add_rows(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """`x` (b, n, ...) with `values` (b, k, ...) added at (b, k), as often as an index occurs."""
    if x.shape[0] == 1:
        return torch.index_add(x, 1, index[0], values)
    wide = index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(values.shape)
    return torch.scatter_add(x, 1, wide, values)


def _whole_index(index: Tensor, size: int, where: Span) -> Tensor:
    """Indices among all `size` tokens; those in front of and behind the span stay, and that in its middle."""
    batch = index.shape[0]
    if where.hole is not None:
        half, hole = index.shape[1] // 2, where.hole - where.start
        index = index + (index >= hole)
        middle = torch.full((batch, 1), hole, dtype=index.dtype)
        index = torch.cat([index[:, :half], middle, index[:, half:]], 1)
    pieces = [torch.arange(where.start).expand(batch, -1)] if where.start else []
    pieces.append(index + where.start if where.start else index)
    if size > where.stop:
        pieces.append(torch.arange(where.stop, size).expand(batch, -1))
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def front(x: Tensor, dim: int) -> Tensor:
    """Samples first, tokens second."""
    if dim == 0:
        return x[None]
    return x if dim == 1 else x.movedim(dim, 1)


def _back(x: Tensor, dim: int) -> Tensor:
    if dim == 0:
        return x[0]
    return x if dim == 1 else x.movedim(1, dim)


# What crosses into the region -----------------------------------------------------------------------------------------


def _rank_for(region: Region, source: Node, reader: Node) -> int:
    """The rank that a value needs where every sample looks it up at places of its own; -1 where any will do."""
    if region.batch is None or region.batch.extent == 1 or region.is_stream(source):
        return -1
    own = results_of(region.dims[source])[0]
    if any(find(axis) is find(region.batch) for axis in own):
        return -1
    return len(results_of(region.dims[reader])[0])


def _crossed(
    edit: Edit,
    region: Region,
    kept: Kept,
    wholes: Mapping[Order, Node],
    source: Node,
    reader: Node,
    rank: int,
    positions: Positions,
) -> Node:
    if region.is_stream(source):
        return inline(edit, lambda x, own: fold(x, own, region.where), source, kept, like=reader)
    dims = results_of(region.dims[source])[0]
    batch = next((n for n, a in enumerate(dims) if region.batch is not None and find(a) is find(region.batch)), None)
    found: Node = source
    for dim in region.along(source):
        factors = parts(dims[dim], "product")
        which = next(n for n, factor in enumerate(factors) if region.carries(factor))
        own = find(factors[which])
        places = next((wholes[order] for order, axis in region.wholes.items() if own is find(axis)), None)
        places = _among_others(edit, region, kept, own, reader) if places is None else places
        if places is None:
            raise CannotShrink(axis=place(source), reason="it has only some of the tokens")
        shape = tuple(factor.extent for factor in factors)
        if positions == "renumber":
            found = inline(edit, _first, found, places, dim, shape, which, like=reader)
        elif rank < 0:
            found = inline(edit, _look_up, found, places, dim, shape, which, batch, like=reader)
        else:
            at = _batch_place(region, reader, source)
            found = inline(edit, _look_up_each, found, places, dim, shape, which, at, rank, len(dims), like=reader)
    return found


def _among_others(edit: Edit, region: Region, kept: Kept, axis: Axis, reader: Node) -> Node | None:
    """The indices that stay of an axis that the span stands in alone, or among others than at `region.at`: the tokens
    of a vision tower in the text of a language model. None where not all of the span does."""
    pieces, span = parts(axis, "sum"), find(region.spans[0])
    if region.where.hole is not None or [region.carries(piece) for piece in pieces].count(True) != 1:
        return None
    at = next((number for number, piece in enumerate(pieces) if piece is span), None)
    if at is None:
        return None
    if len(pieces) == 1:
        index: Node = kept.index
        return index
    start = sum(piece.extent for piece in pieces[:at])
    where = Span(0, start, start + span.extent)
    found: Node = inline(edit, _whole_index, kept.index, axis.extent, where, like=reader)
    return found


def _batch_place(region: Region, reader: Node, source: Node) -> int:
    """The dimension of a reader's result that the samples run along."""
    dims: list[Axis] = results_of(region.dims[reader])[0]
    for place_, axis in enumerate(dims):
        if region.batch is not None and find(axis) is find(region.batch):
            return place_
    raise CannotShrink(axis=place(source), reason=f"{reader.name} reads the same values of it for all samples")


def _first(x: Tensor, index: Tensor, dim: int, factors: tuple[int, ...], which: int) -> Tensor:
    """The first of the tokens, as many as stay."""
    return x.unflatten(dim, factors).narrow(dim + which, 0, index.shape[1]).flatten(dim, dim + len(factors) - 1)


def _look_up(x: Tensor, index: Tensor, dim: int, factors: tuple[int, ...], which: int, batch: int | None) -> Tensor:
    """The kept tokens along a factor of dimension `dim`, of each sample where there are several."""
    whole = x.unflatten(dim, factors) if len(factors) > 1 else x
    at = dim + which
    if index.shape[0] == 1:
        found = torch.index_select(whole, at, index[0])
    else:
        assert batch is not None
        batch = batch if batch < dim else batch + len(factors) - 1
        found = rows(whole.movedim((batch, at), (0, 1)), index).movedim((0, 1), (batch, at))
    return found.flatten(dim, dim + len(factors) - 1) if len(factors) > 1 else found


def _look_up_each(
    x: Tensor, index: Tensor, dim: int, factors: tuple[int, ...], which: int, at: int, rank: int, own: int
) -> Tensor:
    """What all samples share, looked up for each: samples run along dimension `at` of `rank`."""
    aligned = x if x.dim() == rank else x.reshape(*[1] * (rank - own), *x.shape)
    dim += rank - own
    if len(factors) > 1:
        raise CannotShrink(axis="tokens", reason="a product of dimensions, looked up by every sample")
    whole = aligned.movedim((at, dim), (0, 1)).expand(index.shape[0], *[-1] * (rank - 1))
    return rows(whole, index).movedim((0, 1), (at, dim))
