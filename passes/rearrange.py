"""Which order of an axis lets the kept blocks hold the most: a search over permutations, which lose nothing.

The matrices of all layers that have an axis see the same order of it, as rows or as columns, so that it is chosen for
all of them together. Two steps alternate, and neither can make it worse:

* The kept units stay where they are, and items exchange places. What an item is worth at a place is then known for all
  pairs, (items, places), so that exchanges do not influence each other.
* The items stay, and the best units are chosen anew.

Along the inputs of N:M formats the first step would hardly move anything, as every output keeps others. There one place
of each group of M is emptied, and its items are dealt out anew: with `rest` what stays of a group, n_th its n-th
highest, an item v adds  max(0, v - n_th)  to what a row keeps, exactly.

Sources: sorted rows are SparseByteNN's, arXiv:2310.19509; that N:M gains from permuted inputs is Pool and Yu, "Channel
Permutations for N:M Sparsity", NeurIPS 2021. Differs: both searches, and one order for all layers of an axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.passes.sparse_grid import Grid

# Rounds of an axis, at most, and the least gain of one for which another follows.
ROUNDS = 12
_WORTH = 1e-4
# Longer axes are sorted only: the table of items and places would take too long.
MOST_ITEMS = 4096
# Elements of a table of items, groups and rows that is made at once.
_CHUNK = 1 << 24


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
        return float(self.grid.sums(self.scores)[self.kept()].double().sum())


@dataclass(frozen=True, eq=False)
class Role:
    """What an axis is in a layer: its rows (outputs), or the channels of its columns (inputs)."""

    work: Work
    rows: bool

    @property
    def matters(self) -> bool:
        """Whether the order decides what can be kept."""
        form = self.work.grid.form
        return form.rows > 1 if self.rows else form.cols > 1 or form.m > 1

    @property
    def dealt(self) -> bool:
        """Whether the axis runs along groups of M."""
        return not self.rows and self.work.grid.form.m > 1

    def norms(self) -> Tensor:
        """The sum of the scores of each item."""
        return self._by_item(self.work.scores).sum(1)

    def permute(self, order: Tensor) -> None:
        """Put the items in another order."""
        grid, scores = self.work.grid, self.work.scores
        if self.rows:
            self.work.scores = scores[order]
        else:
            shaped = scores.reshape(grid.outs, grid.taps, grid.channels)
            self.work.scores = shaped[:, :, order].reshape(scores.shape)

    def worth(self) -> Tensor:
        """What each item is worth at each place while the kept units stay where they are: (items, places)."""
        grid, kept = self.work.grid, self.work.kept()
        if self.rows:
            by_row = self.work.grid.in_columns(self.work.scores) @ kept.to(self.work.scores.dtype).T
            return by_row.repeat_interleave(grid.form.rows, 1)[:, : grid.outs]
        scores, places = grid.in_rows(self.work.scores), grid.columns_of(kept).to(self.work.scores.dtype)
        shape = (-1, grid.channels)
        return scores.reshape(shape).T @ places.reshape(shape)

    def worth_dealt(self, emptied: Tensor) -> Tensor:
        """What the item at each emptied place would add to each group: (groups, groups); one place a group."""
        grid, form = self.work.grid, self.work.grid.form
        scores = grid.in_rows(self.work.scores).reshape(-1, grid.channels)  # (rows x taps, channels)
        groups = len(emptied)
        whole = scores[:, : groups * form.m].reshape(-1, groups, form.m)
        taken = torch.zeros(groups, form.m, dtype=torch.bool)
        taken[torch.arange(groups), emptied % form.m] = True
        rest = whole[:, ~taken].reshape(-1, groups, form.m - 1)
        least = rest.topk(form.n, -1).values[..., -1] if form.n < form.m else torch.full_like(rest[..., 0], torch.inf)
        items = whole[:, taken]
        found = torch.zeros(groups, groups, dtype=scores.dtype)
        for part in torch.arange(len(scores)).split(max(1, _CHUNK // groups**2)):
            found += (items[part][:, :, None] - least[part][:, None, :]).clamp_min(0).sum(0)
        return found

    def _by_item(self, scores: Tensor) -> Tensor:
        if self.rows:
            return scores
        grid = self.work.grid
        return scores.reshape(grid.outs * grid.taps, grid.channels).T


def best_order(roles: Sequence[Role], extent: int) -> Tensor:
    """The order of an axis's items, (extent,), under which its layers keep the most; their scores are in it then.

    Args:
        roles: what the axis is in its layers; those whose order does not matter are not looked at.
        extent: its items.

    Returns:
        A permutation: at each place the item that is there now. Layers never keep less than before, up to rounding.
    """
    roles = [role for role in roles if role.matters]
    order = torch.arange(extent)
    start = _value(roles)
    if any(role.rows for role in roles):
        by_norm = sum((role.norms() for role in roles), torch.zeros(extent)).sort(descending=True, stable=True).indices
        order, start = _try(roles, order, by_norm, start)
    if extent > MOST_ITEMS:
        return order
    draw = torch.Generator().manual_seed(0)
    for _ in range(ROUNDS):
        before = start
        for moved in _moves(roles, extent, draw):
            order, start = _try(roles, order, moved, start)
        if start <= before * (1 + _WORTH):
            break
    return order


def _moves(roles: Sequence[Role], extent: int, draw: torch.Generator) -> Iterator[Tensor]:
    """The orders that a round tries, each worked out after the one before was tried."""
    dealt = [role for role in roles if role.dealt]
    if not dealt:
        yield exchanged(sum((role.worth() for role in roles), torch.zeros(())))
        return
    m = dealt[0].work.grid.form.m
    groups = extent // m
    for _ in range(m):
        emptied = torch.arange(groups) * m + torch.randint(m, (groups,), generator=draw)
        yield _dealt(roles, emptied, extent)


def _dealt(roles: Sequence[Role], emptied: Tensor, extent: int) -> Tensor:
    worth = sum(
        (role.worth_dealt(emptied) if role.dealt else role.worth()[emptied][:, emptied] for role in roles),
        torch.zeros(()),
    )
    order = torch.arange(extent)
    order[emptied] = emptied[exchanged(worth)]
    return order


def exchanged(worth: Tensor) -> Tensor:
    """An order in which no exchange of two items is worth anything any more.

    Args:
        worth: (items, places); item n is at place n now.

    Returns:
        The item at each place.
    """
    order = torch.arange(len(worth))
    least = 1e-6 * float(worth.abs().max()) if worth.numel() else 0.0
    for _ in range(len(worth)):
        own = worth[order]
        gain = own - own.diagonal()[:, None]  # of the item at one place, for going to another
        best, other = (gain + gain.T).max(1)
        partners, used = other.tolist(), set[int]()
        for place in best.argsort(descending=True).tolist():
            partner = partners[place]
            if float(best[place]) <= least:
                break
            if place not in used and partner not in used:
                used |= {place, partner}
                order[[place, partner]] = order[[partner, place]]
        if not used:
            break
    return order


def _value(roles: Sequence[Role]) -> float:
    return sum(work.value() for work in {id(role.work): role.work for role in roles}.values())


def _try(roles: Sequence[Role], order: Tensor, moved: Tensor, value: float) -> tuple[Tensor, float]:
    """The order and what it keeps after a move; as they were where that keeps no more."""
    for role in roles:
        role.permute(moved)
    if (after := _value(roles)) > value:
        return order[moved], after
    back = moved.argsort()
    for role in roles:
        role.permute(back)
    return order, value
