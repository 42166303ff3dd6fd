"""What stays of axes: which indices, and where they are in dimensions that consist of several axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from graphopt.axes.axis import Axis, atoms, find, parts


@dataclass(frozen=True, eq=False)
class Choice:
    """Another keep set of an atom for every item of an atom `outer`, all of the same size: query heads per KV group."""

    outer: Axis
    rows: Tensor  # (extent of outer, kept), int64

    def __len__(self) -> int:
        return int(self.rows.shape[1])

    @cached_property
    def places(self) -> dict[int, Tensor]:
        """By the extent of the chosen atom: (extent of outer, extent) new places, -1 where an item goes."""
        return {}

    def new_places(self, extent: int) -> Tensor:
        """(extent of outer, extent): the new place of each item, -1 where it goes."""
        if extent not in self.places:
            table = torch.full((len(self.rows), extent), -1)
            table.scatter_(1, self.rows, torch.arange(len(self)).expand(len(self.rows), -1))
            self.places[extent] = table
        return self.places[extent]


# The kept indices of atoms, int64 in their new order; or one set of them per item of another atom.
Keep = Mapping[Axis, Tensor | Choice]


def extent(axis: Axis, keep: Keep) -> int:
    """How long `axis` is when only the kept indices of its atoms stay."""
    axis = find(axis)
    if axis in keep:
        return len(keep[axis])
    if axis.kind is None:
        return axis.extent
    extents = [extent(part, keep) for part in parts(axis, axis.kind)]
    return math.prod(extents) if axis.kind == "product" else sum(extents)


def touched(axis: Axis, keep: Keep) -> bool:
    """Whether `keep` says anything about `axis` or what it consists of."""
    return any(atom in keep for atom in atoms(axis))


def index(axis: Axis, keep: Keep, given: Mapping[Axis, int] | None = None) -> Tensor:
    """The indices of `axis` that stay, int64, in their new order.

    Args:
        axis: any axis.
        keep: what stays of its atoms.
        given: the item of an atom that decides a Choice but is no part of `axis`; item 0 where it is not said.
    """
    axis = find(axis)
    choices = [keep[atom] for atom in atoms(axis) if isinstance(keep.get(atom), Choice)]
    if not choices:
        return _index(axis, keep)
    everything = torch.arange(axis.extent)
    owners = {}
    for choice in choices:
        assert isinstance(choice, Choice)
        own = owner(axis, choice.outer)
        owners[choice.outer] = torch.where(own < 0, (given or {}).get(choice.outer, 0), own)
    places = _places(axis, everything, keep, owners)
    stay = (places >= 0).nonzero().flatten()
    return stay[places[stay].argsort()]


def _index(axis: Axis, keep: Keep) -> Tensor:
    axis = find(axis)
    if axis in keep:
        indices = keep[axis]
        assert isinstance(indices, Tensor)
        return indices
    if axis.kind is None:
        return torch.arange(axis.extent)
    if axis.kind == "sum":
        return torch.cat([_index(part, keep) + offset for part, offset in segments(axis)])
    indices = torch.zeros(1, dtype=torch.long)
    for part in parts(axis, "product"):
        indices = (indices[:, None] * part.extent + _index(part, keep)[None, :]).reshape(-1)
    return indices


def _places(axis: Axis, items: Tensor, keep: Keep, owners: Mapping[Axis, Tensor]) -> Tensor:
    """The new places of `items` of `axis`, -1 where they go; `owners` says of each which item of an atom it is of."""
    axis = find(axis)
    kept = keep.get(axis)
    if isinstance(kept, Choice):
        return kept.new_places(axis.extent)[owners[kept.outer], items]
    if kept is not None:
        return torch.full((axis.extent,), -1).index_copy(0, kept, torch.arange(len(kept)))[items]
    if axis.kind is None:
        return items
    places = torch.zeros_like(items)
    gone = torch.zeros(len(items), dtype=torch.bool)
    if axis.kind == "product":
        inside = axis.extent
        for part in parts(axis, "product"):
            inside //= part.extent
            own = _places(part, items // inside % part.extent, keep, owners)
            gone |= own < 0
            places = places * extent(part, keep) + own
        return places.masked_fill(gone, -1)
    before = 0
    for part, offset in segments(axis):
        inside_it = ((items >= offset) & (items < offset + part.extent)).nonzero().flatten()
        narrowed = {atom: own[inside_it] for atom, own in owners.items()}
        own = _places(part, items[inside_it] - offset, keep, narrowed)
        places[inside_it] = torch.where(own < 0, -1, own + before)
        before += extent(part, keep)
    return places


def segments(axis: Axis) -> Iterator[tuple[Axis, int]]:
    """What a sum is a concatenation of, each with the index that it starts at."""
    offset = 0
    for part in parts(axis, "sum"):
        yield part, offset
        offset += part.extent


def owner(axis: Axis, atom: Axis) -> Tensor:
    """For each index of `axis` the index of `atom` that it belongs to, -1 where to none; int64, (extent,).

    Of an atom that occurs several times in one product the first occurrence counts.
    """
    axis, atom = find(axis), find(atom)
    if axis is atom:
        return torch.arange(atom.extent)
    if axis.kind is None:
        return torch.full((axis.extent,), -1)
    if axis.kind == "sum":
        return torch.cat([owner(part, atom) for part in parts(axis, "sum")])
    indices, found = torch.full((1,), -1), False
    for part in parts(axis, "product"):
        own = owner(part, atom) if not found else torch.full((part.extent,), -1)
        found = found or bool((own >= 0).any())
        indices = torch.where(own[None, :] >= 0, own[None, :], indices[:, None]).reshape(-1)
    return indices
