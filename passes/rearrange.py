"""Which order of an axis lets the kept blocks hold the most: a search over permutations, which lose nothing.

The matrices of all layers that have an axis see the same order of it, as rows or as columns, so that it is chosen for
all of them together. Where an axis is only a part of a dimension (the sizes of all heads), all copies move alike.

The search starts from the best of three orders: as it is, sorted by norm, and strong rows with those that are strong in
the same columns. Then one place of each block is emptied, again and again, and what was there is dealt out anew. What
an item is worth at each of the places is known then, so that exchanges do not influence each other. With `rest` what
the others in the block add up to, v the item, and p what a kept element is worth at least,

    blocks   sum over the block's columns of  max(0, rest + v - p * size)      exact while p stays
    N:M      sum over rows of  max(0, v - the N-th highest of the others)      exact

Wherever blocks lie askew (groups that cross taps, rows of V:N:M) masks are taken as they are. A move is undone where
the layers do not hold more after it.

Sources: sorted rows are SparseByteNN's, arXiv:2310.19509; that N:M gains from permuted inputs is Pool and Yu, "Channel
Permutations for N:M Sparsity", NeurIPS 2021. Differs: the search, and one order for all layers of an axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from graphopt.axes import Axis, atoms, find, index, owner
from graphopt.passes.sparse_grid import Grid, units_for

# Rounds of an axis, at most, and the least gain of one for which another follows.
ROUNDS = 12
_WORTH = 5e-4
# A gain of less may be what sums in another order differ by.
_ROUNDING = 1e-6
# Elements of a table of items, places and columns that is made at once, and of all that a greedy start may look at.
_CHUNK = 1 << 22
_GREEDY = 1 << 34


@dataclass(eq=False)
class Work:
    """A layer's element scores (outs, ins), in the order that its axes have by now; as many as `target` stay."""

    grid: Grid
    scores: Tensor
    target: float
    by_row: bool = False

    def kept(self) -> Tensor:
        """The units that stay: (rows, columns), bool."""
        return self.grid.pick(self.grid.sums(self.scores), self.target, self.by_row)

    def value(self) -> float:
        """The sum of the scores that stay."""
        return float(self._staying()[0].double().sum())

    def price(self) -> float:
        """The least mean score of a unit that stays."""
        sums, sizes = self._staying()
        return float((sums / sizes).min()) if len(sums) else 0.0

    def _staying(self) -> tuple[Tensor, Tensor]:
        """Scores and sizes of the units that stay, in any order."""
        grid, sums = self.grid, self.grid.sums(self.scores)
        unit = int(grid.sizes[0, 0])
        if grid.form.m > 1 or self.by_row or unit * sums.numel() != grid.size:
            kept = self.kept()
            return sums[kept], grid.sizes[kept]
        # Units of one size: the same without sorting them all.
        best = sums.flatten().topk(units_for(self.target / grid.size, sums.numel()), sorted=False).values
        return best, grid.sizes[:1, :1].flatten()


@dataclass(frozen=True, eq=False)
class Role:
    """What an axis is in a layer: its rows (outputs), or the channels of its columns (inputs).

    `spots` (copies, extent): where each item is among the rows or the channels.
    """

    work: Work
    rows: bool
    spots: Tensor

    @property
    def block(self) -> int:
        """How many consecutive rows or channels are kept or zero together, or compete; 1: the order does not matter."""
        form = self.work.grid.form
        return form.rows if self.rows else form.cols * form.m

    @cached_property
    def askew(self) -> bool:
        """Whether the axis's blocks are not the same in all parts of the matrix."""
        grid = self.work.grid
        if self.rows:
            return grid.form.m > 1
        return grid.taps > 1 and grid.channels % self.block > 0

    def profile(self) -> Tensor:
        """The scores of each item by what it could share blocks for: (extent, columns of all copies)."""
        grid, scores = self.work.grid, self.work.scores
        by_item = grid.in_columns(scores) if self.rows else grid.in_rows(scores).reshape(-1, grid.channels).T
        return by_item[self.spots].movedim(0, 1).flatten(1)

    def permute(self, order: Tensor) -> None:
        """Put the items in another order."""
        grid, scores = self.work.grid, self.work.scores
        moved = torch.arange(grid.outs if self.rows else grid.channels)
        moved[self.spots] = self.spots[:, order]
        if self.rows:
            self.work.scores = scores[moved]
        else:
            shaped = scores.reshape(grid.outs, grid.taps, grid.channels)
            self.work.scores = shaped[:, :, moved].reshape(scores.shape)

    def worth(self, emptied: Tensor) -> Tensor:
        """What the items of some places are worth at each of these, up to what does not depend on the item.

        Args:
            emptied: (k,) places of the axis, no two of them in one block.

        Returns:
            (k items, k places)
        """
        grid, form = self.work.grid, self.work.grid.form
        if self.rows:
            items = grid.in_columns(self.work.scores)  # (outs, columns)
            sums, sizes = grid.sums(self.work.scores), grid.sizes
            masks = (
                self.work.kept().to(items.dtype).repeat_interleave(form.rows, 0)[: grid.outs] if self.askew else None
            )
        else:
            flat = grid.in_rows(self.work.scores)
            items = flat.reshape(-1, grid.channels).T  # (channels, rows x taps)
            masks = None
            if self.askew:
                masks = grid.columns_of(self.work.kept()).to(items.dtype).reshape(-1, grid.channels).T
            elif form.m == 1:
                sums = grid.sums(self.work.scores).reshape(items.shape[1], -1).T
                sizes = grid.sizes.reshape(items.shape[1], -1).T
        price = self.work.price() if masks is None and form.m == 1 else 0.0
        total = torch.zeros(len(emptied), len(emptied), dtype=items.dtype)
        for spots in self.spots[:, emptied]:
            if masks is not None:
                total += items[spots] @ masks[spots].T
                continue
            block = spots // self.block
            if form.m > 1:
                offsets = -_nth_of_others(items, spots, form.n, form.m)
            else:
                offsets = sums[block] - items[spots] - price * sizes[block]
            total += _gains(items[spots], offsets)
        return total


def role_of(work: Work, rows: bool, dim: Axis, atom: Axis) -> Role:
    """The role of an atom that a dimension of a layer's weight is or has as a part."""
    if find(dim) is find(atom):
        return Role(work, rows, torch.arange(atom.extent)[None])
    first = (owner(dim, atom) == 0).nonzero().flatten()
    columns = []
    for item in range(atom.extent):
        order = torch.arange(atom.extent)
        order[[0, item]] = order[[item, 0]]
        columns.append(index(dim, {find(atom): order})[first])
    assert find(atom) in atoms(dim)
    return Role(work, rows, torch.stack(columns, 1))


def best_order(roles: Sequence[Role], extent: int) -> Tensor:
    """The order of an axis's items, (extent,), under which its layers keep the most; their scores are in it then.

    Args:
        roles: what the axis is in its layers; those whose order does not matter move along.
        extent: its items.

    Returns:
        A permutation: at each place the item that is there now. Layers never keep less than before.
    """
    mattering = [role for role in roles if role.block > 1]
    order, value = torch.arange(extent), _value(mattering)
    if not mattering:
        return order
    for start in list(_starts(mattering, extent)):
        # Each start is an order of the items as they were at first.
        order, value = _try(roles, mattering, order, order.argsort()[start], value)
    draw = torch.Generator().manual_seed(0)
    length = math.lcm(*(role.block for role in mattering))
    groups = torch.arange(0, extent, length)
    if len(groups) < 2:
        return order
    for _ in range(ROUNDS):
        before = value
        for _ in range(length):
            emptied = groups + (torch.rand(len(groups), generator=draw) * (extent - groups).clamp_max(length)).long()
            worth = torch.stack([role.worth(emptied) for role in mattering]).sum(0)
            moved = torch.arange(extent)
            moved[emptied] = emptied[exchanged(worth)]
            order, value = _try(roles, mattering, order, moved, value)
        if value <= before * (1 + _WORTH):
            break
    return order


def exchanged(worth: Tensor) -> Tensor:
    """An order in which no exchange of two items is worth anything any more.

    Args:
        worth: (items, places); item n is at place n now.

    Returns:
        The item at each place.
    """
    order = torch.arange(len(worth))
    least = _ROUNDING * float(worth.abs().max()) if worth.numel() else 0.0
    for _ in range(len(worth)):
        own = worth[order]
        gain = own - own.diagonal()[:, None]  # of the item at one place, for going to another
        best, other = (gain + gain.T).max(1)
        partners, gains, used = other.tolist(), best.tolist(), set[int]()
        for place in best.argsort(descending=True).tolist():
            partner = partners[place]
            if gains[place] <= least:
                break
            if place not in used and partner not in used:
                used |= {place, partner}
                order[[place, partner]] = order[[partner, place]]
        if not used:
            break
    return order


def _starts(roles: Sequence[Role], extent: int) -> Iterator[Tensor]:
    """Orders to start from, for axes that are rows."""
    roles = [role for role in roles if role.rows]
    if not roles:
        return
    profiles = [role.profile() for role in roles]
    norms = torch.stack([profile.sum(1) for profile in profiles]).sum(0)
    yield norms.argsort(descending=True, stable=True)
    rows = roles[0].block
    if extent // rows * extent * sum(profile.shape[1] for profile in profiles) > _GREEDY:
        return
    keeps = [role.work.target / role.work.grid.size for role in roles]
    left, order = torch.ones(extent, dtype=torch.bool), []
    while left.any():
        seed = int(torch.where(left, norms, -1.0).argmax())
        alike = torch.zeros(extent)
        for profile, keep in zip(profiles, keeps, strict=True):
            columns = profile[seed].topk(math.ceil(keep * profile.shape[1])).indices
            alike += profile[:, columns].sum(1)
        alike[seed] = torch.inf
        chosen = torch.where(left, alike, -1.0).topk(min(rows, int(left.sum()))).indices
        left[chosen] = False
        order.append(chosen)
    yield torch.cat(order)


def _nth_of_others(items: Tensor, spots: Tensor, n: int, m: int) -> Tensor:
    """The n-th highest of the other members of each spot's group of m: (k, columns); 0 where there are fewer."""
    groups = spots // m * m
    others = torch.stack([groups + step for step in range(m)])  # (m, k)
    there = (others < len(items)) & (others != spots)
    values = items[others.clamp_max(len(items) - 1)] * there[..., None]
    return values.topk(n, 0).values[-1]


def _gains(items: Tensor, offsets: Tensor) -> Tensor:
    """Sum over columns of max(0, item + offset): (k, columns) twice to (k, k)."""
    total = torch.zeros(len(items), len(offsets), dtype=items.dtype)
    width = max(1, _CHUNK // max(1, len(items) * len(offsets)))
    for part, offset in zip(items.split(width, 1), offsets.split(width, 1), strict=True):
        total += (part[:, None] + offset[None]).relu_().sum(-1)
    return total


def _value(roles: Sequence[Role]) -> float:
    return sum(work.value() for work in {id(role.work): role.work for role in roles}.values())


def _try(
    roles: Sequence[Role], mattering: Sequence[Role], order: Tensor, moved: Tensor, value: float
) -> tuple[Tensor, float]:
    """The order and what it keeps after a move; as they were where that keeps no more."""
    for role in roles:
        role.permute(moved)
    if (after := _value(mattering)) > value * (1 + _ROUNDING):
        return order[moved], after
    back = moved.argsort()
    for role in roles:
        role.permute(back)
    return order, value
