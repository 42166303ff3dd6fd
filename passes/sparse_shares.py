"""How many weights of each layer stay, when a share of all of them does.

The allocations of axes (`passes.allocation`) decide sizes of a handful of axes; here every block of every weight has a
score of its own, and what a layer costs is linear in what stays, so that a share for all is all there is to search for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.budget import Floats, Ints
from graphopt.passes.allocation.minimum_threshold import raised
from graphopt.passes.sparse_grid import Grid, prefix


@dataclass(frozen=True, eq=False)
class Ranked:
    """A layer as an allocation sees it: its units, the extents of its weight (outs, channels, kernel), and the mean
    scores of its units (rows, columns), comparable between layers; None where the allocation needs none.
    """

    grid: Grid
    extents: tuple[int, ...]
    density: Tensor | None = None


# For a share of all weights the elements of each layer that stay, real numbers.
Shares = Callable[[float], Floats]


def uniform(layers: Sequence[Ranked], minimum: float) -> Shares:
    """The same share of each layer."""
    sizes = _sizes(layers)
    return lambda keep: keep * sizes


def erk(layers: Sequence[Ranked], minimum: float) -> Shares:
    """Erdős-Rényi-Kernel: the share of a layer is proportional to the sum of its extents over their product.

    Layers that would have more than all of their weights stay dense, and the others make up for it.

    Source: Evci et al., "Rigging the Lottery" (RigL), ICML 2020, arXiv:1911.11134; Mocanu et al., arXiv:1707.04780.
    """
    sizes = _sizes(layers)
    raw = np.array([sum(layer.extents) / np.prod([float(n) for n in layer.extents]) for layer in layers])

    def shares(keep: float) -> Floats:
        dense = np.zeros(len(layers), bool)
        while not dense.all():
            scale = (keep * sizes.sum() - sizes[dense].sum()) / (raw * sizes)[~dense].sum()
            over = ~dense & (scale * raw > 1)
            if not over.any():
                return np.where(dense, sizes, scale * raw * sizes)
            dense |= over & (raw == raw[over].max())
        return sizes

    return shares


def ranked(layers: Sequence[Ranked], minimum: float) -> Shares:
    """One ranking of all units of all layers, and a least share of all weights that every layer keeps (Global MP with a
    minimum threshold).

    Layers that the ranking leaves with less get that much, smaller ones stay whole; the others give it, in proportion
    to what they lost.

    Source: Gupta et al., "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
    arXiv:2209.14624.
    """
    densities = [layer.density.flatten() for layer in layers if layer.density is not None]
    assert len(densities) == len(layers), "a global ranking needs scores"
    sizes = torch.cat([layer.grid.sizes.flatten() for layer in layers])
    order = torch.cat(densities).sort(descending=True, stable=True).indices
    cumulated = sizes[order].cumsum(0)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    # By layer: where its units are in the ranking, and how many elements it has up to there.
    places, within = [], []
    for own, each in zip(*(whole.split([len(d) for d in densities]) for whole in (rank, sizes)), strict=True):
        at, units = own.sort()
        places.append(at)
        within.append(torch.cat([each.new_zeros(1), each[units].cumsum(0)]))
    whole = _sizes(layers)
    floor = int(whole.sum() * minimum)

    def shares(keep: float) -> Floats:
        count = prefix(cumulated, keep * whole.sum())
        kept = [int(sums[int(torch.searchsorted(at, count))]) for at, sums in zip(places, within, strict=True)]
        removed = whole.astype(np.int64) - np.array(kept, np.int64)
        if ((whole - removed < floor) & (removed > 0)).any():
            return whole_units(layers, whole * (1 - raised(whole.astype(np.int64), removed, floor)), floor)
        return whole - removed

    return shares


SHARES: dict[str, Callable[[Sequence[Ranked], float], Shares]] = {"global": ranked, "uniform": uniform, "erk": erk}


def whole_units(layers: Sequence[Ranked], wanted: Floats, floor: int) -> Floats:
    """Elements of each layer that whole units make: at least the floor, and all together as many as wanted, within one
    unit where floors allow it.
    """
    found, carried = [], 0.0
    for layer, target in zip(layers, wanted, strict=True):
        size, unit = layer.grid.size, int(layer.grid.sizes[0, 0])
        least = -(-floor // unit) * unit
        own = min(max(round((target + carried) / unit) * unit, least), size)
        carried += target - own
        found.append(float(own))
    return np.array(found)


def largest(cost: Callable[[float], float], limit: float) -> float:
    """The largest share of all weights whose cost is within a limit; 0 where none is."""
    low, high = 0.0, 1.0
    if cost(high) <= limit:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low


def _sizes(layers: Sequence[Ranked]) -> Floats:
    sizes: Ints = np.array([layer.grid.size for layer in layers], np.int64)
    return sizes.astype(np.float64)
