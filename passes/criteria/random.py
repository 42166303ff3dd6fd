"""The control: no better than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from zlib import crc32

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis, find
from graphopt.passes.criteria.base import Criterion

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform in [0, 1), from a seed and the axis's label. What a criterion must beat.

    Whatever else is scored with it, an axis gets the same scores.
    """

    name: ClassVar[str] = "random"
    comparable: ClassVar[bool] = True
    seed: int = 0

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        found = {}
        for atom in map(find, wanted):
            generator = torch.Generator().manual_seed(crc32(f"{self.seed} {atom.label}".encode()))
            found[atom] = torch.rand(atom.extent, generator=generator, dtype=torch.float64)
        return found
