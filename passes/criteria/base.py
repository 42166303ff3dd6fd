"""What a criterion is, and how values of tensors become scores of an axis's items."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis, owner

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class Criterion(ABC):
    """Scores the items of axes: the higher, the more is lost when the item goes. Options are fields.

    Scores of different axes are comparable only where the criterion says so (`comparable`); an allocation that ranks
    globally normalises the others.
    """

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = False
    comparable: ClassVar[bool] = False

    @abstractmethod
    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """For each wanted atom the score of each item: float64, (extent,), finite.

        Every occurrence of the axis counts: all stored tensors that have it.
        """


def sum_onto(values: Tensor, dims: Sequence[Axis], place: int, atom: Axis) -> Tensor:
    """Add up `values` over everything but one atom of dimension `place`: float64, (extent of the atom,).

    Args:
        values: one value per element of a tensor whose dimensions are `dims`.
        dims: its axes.
        place: the dimension that has `atom`, as itself or within a product or concatenation.
        atom: the axis whose items get the sums; elements that belong to none of them do not count.
    """
    others = [n for n in range(values.dim()) if n != place]
    line = values.double().sum(others) if others else values.double()
    items = owner(dims[place], atom)
    own = items >= 0
    return torch.zeros(atom.extent, dtype=torch.float64).index_add(0, items[own], line[own])


def stored_values(axes: Axes, atom: Axis) -> list[tuple[str, Tensor, int, bool]]:
    """The stored floating-point tensors with an atom: name, tensor, dimension, whether it is summed over there.

    Tensors that share storage come once.
    """
    found, seen = [], set()
    tensors = axes.program.tensors
    for name, place, summed in axes.stored_in(atom):
        tensor = tensors[name]
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), place)
        if tensor.is_floating_point() and key not in seen:
            seen.add(key)
            found.append((name, tensor.detach(), place, summed))
    return found
