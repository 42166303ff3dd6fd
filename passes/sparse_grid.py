"""A weight's matrix in units that are kept or zero as a whole, and which of them stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from graphopt.sparsity import Format

# Sizes are sums of whole numbers; what is above a limit by less is rounding.
_EPSILON = 1e-6


@dataclass(frozen=True)
class Grid:
    """Units of a matrix (outs, taps x channels): blocks of `form`, or with `kernels` of `form.rows` outputs x one
    channel x all taps.

    The last units of a row or a column are smaller where sizes are odd.
    """

    outs: int
    taps: int
    channels: int
    form: Format
    kernels: bool = False

    @property
    def size(self) -> int:
        """Elements of the matrix."""
        return self.outs * self.taps * self.channels

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows and columns of units there are."""
        width = self.channels if self.kernels else self.taps * self.channels
        return -(-self.outs // self.form.rows), -(-width // self.form.cols)

    @cached_property
    def sizes(self) -> Tensor:
        """Elements of each unit: (rows, columns) int64."""
        rows, columns = self.shape
        width = self.channels if self.kernels else self.taps * self.channels
        heights = (self.outs - torch.arange(rows) * self.form.rows).clamp_max(self.form.rows)
        widths = (width - torch.arange(columns) * self.form.cols).clamp_max(self.form.cols)
        return heights[:, None] * widths[None, :] * (self.taps if self.kernels else 1)

    # Elements and units ---------------------------------------------------------------------------------------------

    def in_columns(self, scores: Tensor) -> Tensor:
        """Element scores (outs, ins) summed over the columns of each unit: (outs, columns)."""
        if self.kernels:
            return scores.reshape(self.outs, self.taps, self.channels).sum(1)
        return _summed(scores, self.form.cols)

    def in_rows(self, scores: Tensor) -> Tensor:
        """Element scores (outs, ins) summed over the rows of each unit: (rows, ins)."""
        return _summed(scores.T, self.form.rows).T

    def sums(self, scores: Tensor) -> Tensor:
        """Element scores (outs, ins) summed by unit: (rows, columns)."""
        return _summed(self.in_columns(scores).T, self.form.rows).T

    def columns_of(self, kept: Tensor) -> Tensor:
        """Which columns of the matrix are kept in each row of units: (rows, columns) to (rows, ins)."""
        if self.kernels:
            return kept.repeat(1, self.taps)
        return kept.repeat_interleave(self.form.cols, 1)[:, : self.taps * self.channels]

    def elements(self, kept: Tensor) -> Tensor:
        """Which elements are kept: (rows, columns) to (outs, ins), bool."""
        return self.columns_of(kept).repeat_interleave(self.form.rows, 0)[: self.outs]

    # Which stay -----------------------------------------------------------------------------------------------------

    def density(self, sums: Tensor) -> Tensor:
        """The mean score of the elements of each unit, by which units of different sizes are compared."""
        return sums / self.sizes

    def pick(self, sums: Tensor, target: float, by_row: bool = False) -> Tensor:
        """The units that stay, (rows, columns) bool: those with the highest mean score, of equal ones the first.

        Args:
            sums: (rows, columns) scores of units.
            target: elements that stay. The last unit that is needed for them stays whole. An N:M format says itself how
                many stay.
            by_row: all rows keep as many units.
        """
        form = self.form
        if form.m > 1:
            return best_of_each(sums, form.n, form.m)
        density = self.density(sums)
        if by_row:
            count = units_for(target / self.size, self.shape[1])
            order = density.sort(dim=1, descending=True, stable=True).indices[:, :count]
            return torch.zeros(self.shape, dtype=torch.bool).scatter_(1, order, True)
        kept = torch.zeros(self.sizes.numel(), dtype=torch.bool)
        order = density.flatten().sort(descending=True, stable=True).indices
        kept[order[: prefix(self.sizes.flatten()[order].cumsum(0), target)]] = True
        return kept.reshape(self.shape)

    def stored(self, target: float, by_row: bool = False) -> int:
        """Elements that `pick` keeps for a target, but for what smaller units at the edges take off."""
        if self.form.m > 1:
            return int((best_of_each(torch.zeros(self.shape), self.form.n, self.form.m) * self.sizes).sum())
        if by_row:
            return min(self.size, units_for(target / self.size, self.shape[1]) * int(self.sizes[:, 0].sum()))
        unit = int(self.sizes[0, 0])
        return min(self.size, math.ceil(target / unit - _EPSILON) * unit)


def prefix(cumulated: Tensor, target: float) -> int:
    """The shortest prefix that has as many elements as the target; the whole where none has."""
    if target <= _EPSILON:
        return 0
    return min(len(cumulated), int(torch.searchsorted(cumulated, target - _EPSILON)) + 1)


def units_for(keep: float, count: int) -> int:
    """As many of `count` units as a share asks for; what is left over of a unit stays."""
    return min(count, max(0, math.ceil(keep * count - _EPSILON)))


def best_of_each(sums: Tensor, n: int, m: int) -> Tensor:
    """The n highest of each m consecutive columns, of equal ones the first; of a shorter last group, too."""
    rows, columns = sums.shape
    padded = torch.full((rows, -(-columns // m) * m), -torch.inf, dtype=sums.dtype)
    padded[:, :columns] = sums
    order = padded.view(rows, -1, m).sort(dim=-1, descending=True, stable=True).indices[..., :n]
    kept = torch.zeros(rows, padded.shape[1] // m, m, dtype=torch.bool).scatter_(-1, order, True)
    return kept.reshape(rows, -1)[:, :columns]


def _summed(values: Tensor, width: int) -> Tensor:
    """Sums of each `width` consecutive columns, of those that are left over at the end, too."""
    if width == 1:
        return values
    rows, columns = values.shape
    padded = values.new_zeros(rows, -(-columns // width) * width)
    padded[:, :columns] = values
    return padded.reshape(rows, -1, width).sum(-1)
