"""The control: no better than chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from zlib import crc32

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis, find
from graphopt.passes.criteria.base import Elementwise, Member, members

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class Random(Elementwise):
    """Uniform in [0, 1), from a seed and the axis's label or the weight's name. What a criterion must beat.

    Whatever else is scored with it, an axis gets the same scores, and so does a weight. Another `seed` gives others.
    """

    name: ClassVar[str] = "random"
    comparable: ClassVar[bool] = True
    seed: int = 0

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        return {atom: self._drawn(atom.label, atom.extent) for atom in map(find, wanted)}

    def elements(self, axes: Axes, calibration: Calibration | None) -> Iterator[tuple[Member, Tensor]]:
        """See Elementwise."""
        for member in members(axes):
            yield member, self._drawn(axes.tensor_name(member.names[0]), *member.tensor.shape)

    def _drawn(self, name: str, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {name}".encode()))
        return torch.rand(shape, generator=generator, dtype=torch.float64)
