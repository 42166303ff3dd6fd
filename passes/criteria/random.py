"""The control: no better than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis
from graphopt.passes.criteria.base import Criterion

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform in [0, 1), from a seed. What a criterion must beat."""

    name: ClassVar[str] = "random"
    comparable: ClassVar[bool] = True
    seed: int = 0

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        generator = torch.Generator().manual_seed(self.seed)
        return {atom: torch.rand(atom.extent, generator=generator, dtype=torch.float64) for atom in wanted}
