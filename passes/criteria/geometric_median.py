"""How far an item is from all others of its axis: what is in their middle can be replaced by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis, atoms, find
from graphopt.passes.criteria.base import Criterion, checked_choice, grouped, members

if TYPE_CHECKING:
    from graphopt.calibration import Calibration

# Distances that are held at a time.
_PAIRS = 1 << 24


@dataclass(frozen=True)
class GeometricMedian(Criterion):
    """The sum of distances from an item's weights to those of the other items of the axis.

        score_j = sum over k ||v_j - v_k||_2          v_j: all weights of item j, in all tensors, as one vector

    The items next to the geometric median have the lowest score, and are what the others stand in for: an item of large
    weights that is like its neighbours goes before a small one that is like none. So a dead item is not the lowest.

    Source: He et al., "Filter Pruning via Geometric Median for Deep Neural Networks Acceleration", CVPR 2019,
    arXiv:1811.00250. Differs: the vector has the weights of all tensors of the axis, not only those of one filter.

    Attributes:
        ends: "all", or "producers": only the weights that an item comes from, as in the paper.
    """

    name: ClassVar[str] = "geometric-median"
    ends: str = "all"

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        checked_choice(self.name, "ends", self.ends, ("all", "producers"))
        vectors: dict[Axis, list[Tensor]] = {find(atom): [] for atom in wanted}
        for member in members(axes):
            if member.tensor.dim() < 2:
                continue
            for place, dim in enumerate(member.dims):
                for atom in dict.fromkeys(atom for atom in atoms(dim) if atom in vectors):
                    if self.ends == "all" or not member.summed[place]:
                        vectors[atom].append(grouped(member.tensor, dim, place, atom))
        return {atom: distances(parts, atom.extent) for atom, parts in vectors.items()}


def distances(vectors: Sequence[Tensor], extent: int) -> Tensor:
    """The sum of each item's distances to all others; `vectors` are each (extent, n), and are put side by side."""
    total = torch.zeros(extent, dtype=torch.float64)
    rows = max(1, _PAIRS // extent)
    for start in range(0, extent, rows):
        own = slice(start, min(start + rows, extent))
        squares = torch.zeros(own.stop - own.start, extent, dtype=torch.float64)
        for vector in vectors:
            v = vector.double()
            lengths = v.square().sum(1)
            squares += (lengths[own, None] + lengths[None, :] - 2 * v[own] @ v.T).clamp_min(0)
        squares[torch.arange(own.stop - own.start), torch.arange(own.start, own.stop)] = 0
        total[own] = squares.sqrt().sum(1)
    return total
