"""What a criterion is, and how values of tensors become scores of an axis's items."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from graphopt.axes import Axes, Axis, atoms, find, owner
from graphopt.errors import BadOption, Decline

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

        Every occurrence of the axis counts: all stored tensors that have it. Calibration data is gone through once for
        all axes; where it is None and some is needed, the program's example inputs serve.
        """

    def fallbacks(self, axes: Axes, wanted: Sequence[Axis]) -> list[Decline]:
        """The wanted axes that the criterion does not apply to, and what scores them instead. For the record."""
        return []


# Members: the stored tensors of an axis -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Member:
    """A stored floating-point tensor that is learned or multiplied with; tied tensors are one, under all their names.

    `dims` are its axes; `summed[place]` says whether some operator sums products over that dimension. Tables and
    statistics (rotary tables, masks, running means) are none.
    """

    names: tuple[str, ...]
    tensor: Tensor
    dims: tuple[Axis, ...]
    summed: tuple[bool, ...]

    def places(self, atom: Axis) -> list[int]:
        """The dimensions that an atom is part of."""
        return [place for place, dim in enumerate(self.dims) if atom in atoms(dim)]


def members(axes: Axes) -> list[Member]:
    """All of a program, in graph order."""
    kinds = {spec.arg.name: spec.kind for spec in axes.program.exported.graph_signature.input_specs}
    tensors = axes.program.tensors
    found: dict[Any, Member] = {}
    for node, dims in axes.dims.items():
        tensor = tensors.get(node.name)
        if tensor is None or not tensor.is_floating_point():
            continue
        summed = tuple((node, place) in axes.contracted for place in range(tensor.dim()))
        if kinds[node.name] is not InputKind.PARAMETER and not any(summed):
            continue
        memory = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        key = memory if tensor.numel() else node.name
        own = Member((node.name,), tensor.detach(), tuple(dims), summed)
        if (known := found.get(key)) is not None:
            both = tuple(a or b for a, b in zip(known.summed, summed, strict=True))
            own = Member((*known.names, node.name), known.tensor, known.dims, both)
        found[key] = own
    return list(found.values())


# From elements to items -----------------------------------------------------------------------------------------------


def sum_onto(values: Tensor, dims: Sequence[Axis], place: int, atom: Axis) -> Tensor:
    """Add up `values` over everything but one atom of dimension `place`: float64, (extent of the atom,).

    Args:
        values: one value per element of a tensor whose dimensions are `dims`.
        dims: its axes.
        place: the dimension that has `atom`, as itself or within a product or concatenation.
        atom: the axis whose items get the sums; elements that belong to none of them do not count.
    """
    return onto(_line(values, (place,)), owner(dims[place], atom), atom.extent)


def onto(line: Tensor, items: Tensor, extent: int) -> Tensor:
    """Add up one value per index of a dimension by the item that each belongs to (-1: to none); float64, (extent,)."""
    own = items >= 0
    return torch.zeros(extent, dtype=torch.float64).index_add(0, items[own], line.double()[own])


class Tally:
    """Sums of values over all elements that belong to each item of the wanted atoms.

    An element counts once for an item, even where two dimensions of its tensor make it the item's, as in a square
    matrix over one axis. Work is linear in the elements; what a tensor's atoms are is looked up once.
    """

    def __init__(self, wanted: Sequence[Axis]) -> None:
        self.wanted = [find(atom) for atom in wanted]
        self._set = set(self.wanted)
        self._owners: dict[tuple[Axis, Axis], Tensor] = {}

    def zeros(self) -> dict[Axis, Tensor]:
        """A score of zero for every item."""
        return {atom: torch.zeros(atom.extent, dtype=torch.float64) for atom in self.wanted}

    def atoms_of(self, dims: Sequence[Axis]) -> dict[Axis, list[int]]:
        """The wanted atoms of a tensor's dimensions, and where they are."""
        found: dict[Axis, list[int]] = {}
        for place, dim in enumerate(dims):
            for atom in dict.fromkeys(atoms(dim)):
                if atom in self._set:
                    found.setdefault(atom, []).append(place)
        return found

    def owner(self, dim: Axis, atom: Axis) -> Tensor:
        """As `graphopt.axes.owner`, remembered."""
        key = (find(dim), atom)
        if key not in self._owners:
            self._owners[key] = owner(*key)
        return self._owners[key]

    def sums(
        self, dims: Sequence[Axis], values: Tensor, counts: Callable[[Axis, int], bool] | None = None
    ) -> dict[Axis, Tensor]:
        """The sums of one tensor's `values` by atom, float64, (extent,).

        Args:
            dims: the tensor's axes.
            values: one for each of its elements.
            counts: whether an atom's occurrence in a dimension counts; all do where it is None.
        """
        lines: dict[tuple[int, ...], Tensor] = {}

        def line(*places: int) -> Tensor:
            if places not in lines:
                lines[places] = _line(values, places)
            return lines[places]

        found = {}
        for atom, everywhere in self.atoms_of(dims).items():
            places = [place for place in everywhere if counts is None or counts(atom, place)]
            if not places:
                continue
            total = torch.zeros(atom.extent, dtype=torch.float64)
            for n, place in enumerate(places):
                items = self.owner(dims[place], atom)
                total += onto(line(place), items, atom.extent)
                for other in places[:n]:  # what both dimensions make the item's was counted twice
                    both = (self.owner(dims[other], atom)[:, None] == items[None, :]) & (items >= 0)[None, :]
                    total -= onto((line(other, place) * both).sum(0), items, atom.extent)
            found[atom] = total
        return found


def _line(values: Tensor, places: tuple[int, ...]) -> Tensor:
    """Summed over all dimensions but `places`, float64."""
    others = [n for n in range(values.dim()) if n not in places]
    values = values.double()
    return values.sum(others) if others else values


def grouped(tensor: Tensor, dim: Axis, place: int, atom: Axis) -> Tensor:
    """The elements of a tensor by item of an atom of dimension `place`: (extent, elements of each), in one order."""
    items = owner(dim, atom)
    order = torch.where(items >= 0, items, atom.extent).argsort(stable=True)[: int((items >= 0).sum())]
    return tensor.movedim(place, 0)[order].reshape(atom.extent, -1)


# Criteria that are sums over elements ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elementwise(Criterion):
    """A criterion that has a value for every element of every tensor, and whose items are sums of these.

    `elements` by itself serves what sparsifies instead of shrinking.
    """

    @abstractmethod
    def elements(self, axes: Axes, calibration: Calibration | None) -> Iterator[tuple[Member, Tensor]]:
        """Members with a value for each element, of the member's shape; members without one are left out."""

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        tally = Tally(wanted)
        total = tally.zeros()
        for member, values in self.elements(axes, calibration):
            for atom, sums in tally.sums(member.dims, values).items():
                total[atom] += sums
        return total


# Scales of scores -----------------------------------------------------------------------------------------------------


def normalised(score: Tensor, how: str) -> Tensor:
    """A score on the scale of its own axis.

    Args:
        score: (extent,), not negative.
        how: "none"; "mean", "max" or "sum": divided by that of the axis; "gaussian": mean 0 and standard deviation 1;
            "lamp": divided by the sum of all that are not smaller (Lee et al., arXiv:2010.07611).

    Raises:
        BadOption: there is no such scale.
    """
    if how not in _SCALES:
        raise BadOption(what=f"no scale {how} for scores", way_out=f"known are: {', '.join(_SCALES)}")
    return _SCALES[how](score)


def _divided(score: Tensor, by: Tensor) -> Tensor:
    return score / by if float(by) > 0 else score


def _gaussian(score: Tensor) -> Tensor:
    spread = score.std(correction=0)
    return (score - score.mean()) / spread if float(spread) > 0 else torch.zeros_like(score)


def _lamp(score: Tensor) -> Tensor:
    ranked, order = score.sort()
    rest = ranked.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(ranked, ranked)  # equal scores stay equal
    return torch.where(rest[first] > 0, ranked / rest[first], 0.0)[order.argsort()]


_SCALES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda score: score,
    "mean": lambda score: _divided(score, score.mean()),
    "max": lambda score: _divided(score, score.max()),
    "sum": lambda score: _divided(score, score.sum()),
    "gaussian": _gaussian,
    "lamp": _lamp,
}


def stand_in(axes: Axes, wanted: Sequence[Axis], like: Mapping[Axis, Tensor]) -> dict[Axis, Tensor]:
    """Scores of axes that a criterion does not apply to: the norm of all their weights, on the scale of its own scores.

    Args:
        axes: the program's.
        wanted: the axes that need a score.
        like: scores of the others; the means of both agree. 1 where there are none.
    """
    from graphopt.passes.criteria.magnitude import L2

    scale = float(torch.cat(list(like.values())).mean()) if like else 1.0
    norms = {atom: score.sqrt() for atom, score in L2().scores(axes, wanted, None).items()}
    return {atom: normalised(norm, "mean") * (scale or 1.0) for atom, norm in norms.items()}


def checked_choice(criterion: str, option: str, given: str, known: Sequence[str]) -> str:
    """An option that is one of a few words. Raises BadOption where it is none of these."""
    if given not in known:
        raise BadOption(what=f"{criterion}: {option} is {given}", way_out=f"{option} is one of: {', '.join(known)}")
    return given


def data_of(axes: Axes, calibration: Calibration | None) -> Calibration:
    """The calibration data, or the program's example inputs where there is none. Raises BadCalibration without both."""
    from graphopt.calibration import calibration as read

    return read(None, axes.program) if calibration is None else calibration
