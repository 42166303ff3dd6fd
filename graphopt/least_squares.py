"""Corrections of linear maps by ridge regression, from sums over samples: memory does not grow with the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# For each map the rows of D that share their zeros, and the columns in which these are not zero.
Supports = Sequence[Sequence[tuple[Tensor, Tensor]]]


class Moments:
    """Sums over rows (x, e) of what a correction e ~ D x + s is worked out from, for `groups` independent maps.

    Everything is float64: `xx` (groups, ins, ins), `xe` (groups, ins, outs), `x` (groups, ins), `e` (groups, outs).
    """

    def __init__(self, groups: int, ins: int, outs: int) -> None:
        self.count = 0
        self.xx = torch.zeros(groups, ins, ins, dtype=torch.float64)
        self.xe = torch.zeros(groups, ins, outs, dtype=torch.float64)
        self.x = torch.zeros(groups, ins, dtype=torch.float64)
        self.e = torch.zeros(groups, outs, dtype=torch.float64)
        self.ee = 0.0

    def add(self, x: Tensor, e: Tensor) -> None:
        """Take in rows: x (groups, rows, ins), e (groups, rows, outs); any floating-point dtype."""
        x, e = x.double(), e.double()
        self.count += x.shape[1]
        self.xx.baddbmm_(x.mT, x)
        self.xe.baddbmm_(x.mT, e)
        self.x += x.sum(1)
        self.e += e.sum(1)
        self.ee += float(e.square().sum())

    def solve(self, ridge: float, *, shift: bool, supports: Supports | None = None) -> tuple[Tensor, Tensor] | None:
        """The D and s that make sum |e - D x - s|^2 + lam |D|^2 least.

        Args:
            ridge: lam as a share of the mean variance of the inputs, times the rows; infinity: D is zero.
            shift: whether there is an s; else it is zero. It is not held back by lam.
            supports: where D may have values, as `supports_of` gives it; anywhere where None.

        Returns:
            D (groups, outs, ins) and s (groups, outs), or None where the equations cannot be solved.
        """
        rows = max(self.count, 1)
        groups, ins, outs = self.xe.shape
        correction, moved = self.xe.new_zeros(groups, outs, ins), self.xe.new_zeros(groups, outs)
        if not math.isinf(ridge):
            gram, right = self.xx.clone(), self.xe.clone()
            if shift:
                gram.baddbmm_(self.x[:, :, None], self.x[:, None, :], alpha=-1 / rows)
                right.baddbmm_(self.x[:, :, None], self.e[:, None, :], alpha=-1 / rows)
            diagonal = gram.diagonal(dim1=1, dim2=2)
            # Inputs that are always the same leave nothing to divide by: they stay as they are.
            diagonal += (ridge * diagonal.mean(1, keepdim=True)).clamp_min(1e-30)
            whole = [[(torch.arange(outs), torch.arange(ins))]] * groups
            for group, parts in enumerate(whole if supports is None else supports):
                for rows_alike, columns in parts:
                    factor, failed = torch.linalg.cholesky_ex(gram[group][columns][:, columns])
                    if bool(failed):
                        return None
                    solved = torch.cholesky_solve(right[group][columns][:, rows_alike], factor)
                    correction[group, rows_alike[:, None], columns] = solved.T
            if not bool(correction.isfinite().all()):
                return None
        if shift:
            moved = (self.e - (correction @ self.x[:, :, None])[..., 0]) / rows
        return correction, moved

    def error(self, correction: Tensor, shift: Tensor) -> float:
        """sum |e - D x - s|^2 over the rows."""
        mapped = (correction @ self.x[:, :, None])[..., 0]
        left = self.ee - 2 * float((correction.mT * self.xe).sum())
        left += float(((correction @ self.xx) * correction).sum())
        left += float((shift * (2 * (mapped - self.e) + self.count * shift)).sum())
        return max(left, 0.0)


def supports_of(kept: Tensor) -> Supports:
    """The supports of maps whose zeros stay: kept (groups, outs, ins) bool. Rows without any are left out."""
    found = []
    for rows in kept:
        patterns, alike = rows.unique(dim=0, return_inverse=True)
        parts = [((alike == n).nonzero().flatten(), pattern.nonzero().flatten()) for n, pattern in enumerate(patterns)]
        found.append([(own, columns) for own, columns in parts if len(columns)])
    return found


def work_of(supports: Supports) -> float:
    """Multiply-adds that one `solve` takes, about."""
    return float(sum(len(columns) ** 3 / 3 for parts in supports for _, columns in parts))
