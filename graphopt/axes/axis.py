"""Axes and their unification: what the extents of a program's dimensions consist of.

An axis is one dimension's index set. Where the program looks at it more closely it is refined, either to a product of
axes in row-major order (a reshape from 12 to (3, 4)) or to a sum, a concatenation (a cat of 8 and 4). Two dimensions
that must agree index by index are one axis: they are unified, and a refinement of one is a refinement of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["product", "sum"]


class Axis:
    """A node of the union-find structure. Only the root that `find` gives has a meaning of its own.

    `extent` never changes here: a shrunk program has axes of its own. `kind` is None for an atom, which is what can be
    shrunk; `pinned` says why it must not be.
    """

    __slots__ = ("_up", "extent", "kind", "label", "parts", "pinned")

    def __init__(self, extent: int) -> None:
        self.extent = int(extent)
        self.kind: Kind | None = None
        self.parts: list[Axis] = []
        self.pinned: str | None = None
        self.label = ""
        self._up: Axis | None = None

    def __repr__(self) -> str:
        return show(self)


Keep = Mapping[Axis, Tensor]


def find(axis: Axis) -> Axis:
    """The axis that stands for all that were unified with `axis`."""
    root = axis
    while root._up is not None:
        root = root._up
    while axis._up is not None:
        axis._up, axis = root, axis._up
    return root


def parts(axis: Axis, kind: Kind) -> list[Axis]:
    """The axes that `axis` is a product or a sum of, in order; itself where it is not of that kind."""
    root = find(axis)
    if root.kind != kind:
        return [root]
    flat: list[Axis] = []
    todo = root.parts[::-1]
    while todo:
        part = find(todo.pop())
        if part.kind == kind:
            todo += part.parts[::-1]
        else:
            flat.append(part)
    root.parts = flat
    return list(flat)


def atoms(axis: Axis) -> list[Axis]:
    """Every atom that `axis` consists of, in order, repeated where it occurs more than once."""
    found, todo = [], [axis]
    while todo:
        root = find(todo.pop())
        if root.kind is None:
            found.append(root)
        else:
            todo += root.parts[::-1]
    return found


def product(factors: Iterable[Axis]) -> Axis:
    """The axis whose index runs over those of `factors`, the last one fastest; a single factor is itself."""
    return _composite("product", [factor for factor in factors if factor.extent != 1])


def concatenation(segments: Iterable[Axis]) -> Axis:
    """The axis that is `segments` one after another; a single segment is itself."""
    return _composite("sum", [segment for segment in segments if segment.extent])


def _composite(kind: Kind, axes: list[Axis]) -> Axis:
    if len(axes) == 1:
        return axes[0]
    extents = [axis.extent for axis in axes]
    axis = Axis(math.prod(extents) if kind == "product" else sum(extents))
    if axes:
        axis.kind, axis.parts = kind, axes
    return axis


def pin(axis: Axis, reason: str) -> None:
    """Never shrink `axis`, nor what it consists of. The first reason given stays."""
    todo = [axis]
    while todo:
        root = find(todo.pop())
        root.pinned = root.pinned or reason
        todo += [part for part in root.parts if find(part).pinned is None]


def unify(a: Axis, b: Axis) -> bool:
    """Make two axes of one extent the same, index by index.

    Returns:
        False where their structures do not fit each other; both are pinned then, so that nothing wrong can follow.
    """
    a, b = find(a), find(b)
    if a is b:
        return True
    assert a.extent == b.extent, f"axes of extents {a.extent} and {b.extent} cannot be one"
    reason = a.pinned or b.pinned
    fits = True
    if a.kind is None or (b.kind is not None and a.kind == b.kind == "sum" and len(a.parts) < len(b.parts)):
        a, b = b, a
    if b.kind is not None and a.kind == b.kind:
        fits = match(a.parts, b.parts, a.kind)
    elif b.kind is not None:
        if a.kind == "sum":
            a, b = b, a
        fits = _distribute(a, b)
    a, b = find(a), find(b)
    if reason is not None:
        pin(a, reason)
        pin(b, reason)
    if not fits:
        pin(a, f"{show(a)} and {show(b)} do not fit each other")
        pin(b, f"{show(a)} and {show(b)} do not fit each other")
    if a is not b:
        b._up = a
    return fits


def _distribute(a: Axis, b: Axis) -> bool:
    """Unify the product `a` with the sum `b`, where (x + y) z = x z + y z makes them agree.

    q, k and v of one linear layer, seen as (3, heads, dim) and split into three, are such a pair: 3 = 1 + 1 + 1, and
    each of the three is (heads, dim).
    """
    factors, segments = parts(a, "product"), parts(b, "sum")
    for split in range(1, len(factors)):
        inner = product(factors[split:])
        if all(segment.extent % inner.extent == 0 for segment in segments):
            break
    else:
        return False
    outers = [Axis(segment.extent // inner.extent) for segment in segments]
    fits = True
    for outer, segment in zip(outers, segments, strict=True):
        fits &= unify(segment, product([outer, inner]))
    return unify(product(factors[:split]), concatenation(outers)) and fits


def match(xs: Sequence[Axis], ys: Sequence[Axis], kind: Kind) -> bool:
    """Make two factorisations (or segmentations) of the same extent agree, by splitting the coarser at each step.

    Returns:
        False where they cannot; what is left of both is pinned then.
    """
    left = [part for x in reversed(xs) for part in reversed(parts(x, kind)) if kind == "sum" or part.extent != 1]
    right = [part for y in reversed(ys) for part in reversed(parts(y, kind)) if kind == "sum" or part.extent != 1]
    while left and right:
        x, y = find(left.pop()), find(right.pop())
        if x.kind == kind or y.kind == kind:  # refined since it was listed
            left += parts(x, kind)[::-1]
            right += parts(y, kind)[::-1]
            continue
        if x.extent == y.extent:
            if not unify(x, y):
                _pin_all([*left, *right], "a reshape mixes axes")
                return False
            continue
        if x.extent < y.extent:
            x, y, left, right = y, x, right, left
        rest = _split(x, y, kind)
        if rest is None:
            _pin_all([x, y, *left, *right], "a reshape mixes axes")
            return False
        left.append(rest)
    return True


def _split(x: Axis, y: Axis, kind: Kind) -> Axis | None:
    """Refine `x` so that it starts with the smaller `y`, and give what follows; None where it cannot be."""
    if kind == "product" and x.extent % y.extent:
        return None
    rest = Axis(x.extent // y.extent if kind == "product" else x.extent - y.extent)
    if x.kind is not None:
        return rest if unify(x, _composite(kind, [y, rest])) else None
    x.kind, x.parts = kind, [y, rest]
    if x.pinned:
        pin(y, x.pinned)
        pin(rest, x.pinned)
    return rest


def _pin_all(axes: Iterable[Axis], reason: str) -> None:
    for axis in axes:
        pin(axis, reason)


def show(axis: Axis) -> str:
    """`c3=64`, `(h1=4 d1=16)`, `(a1=8 + a2=4)`; `!` where it is pinned, the extent where it has no label."""
    axis = find(axis)
    if axis.kind is None:
        mark = "!" if axis.pinned and axis.extent != 1 else ""
        return f"{mark}{axis.label}={axis.extent}" if axis.label else f"{mark}{axis.extent}"
    return "(" + (" " if axis.kind == "product" else " + ").join(map(show, axis.parts)) + ")"


# A keep set -----------------------------------------------------------------------------------------------------------


def extent(axis: Axis, keep: Keep) -> int:
    """How long `axis` is when only the kept indices of its atoms (and of named composites) stay."""
    axis = find(axis)
    if axis in keep:
        return len(keep[axis])
    if axis.kind is None:
        return axis.extent
    extents = [extent(part, keep) for part in axis.parts]
    return math.prod(extents) if axis.kind == "product" else sum(extents)


def index(axis: Axis, keep: Keep) -> Tensor:
    """The indices of `axis` that stay, int64, in their new order."""
    axis = find(axis)
    if axis in keep:
        return keep[axis]
    if axis.kind is None:
        return torch.arange(axis.extent)
    if axis.kind == "sum":
        pieces, offset = [], 0
        for part in axis.parts:
            pieces.append(index(part, keep) + offset)
            offset += part.extent
        return torch.cat(pieces)
    indices = torch.zeros(1, dtype=torch.long)
    for part in axis.parts:
        indices = (indices[:, None] * part.extent + index(part, keep)[None, :]).reshape(-1)
    return indices


def owner(axis: Axis, atom: Axis) -> Tensor:
    """For each index of `axis` the index of `atom` that it belongs to, -1 where to none; int64, (extent,).

    Of an atom that occurs several times in one product the first occurrence counts.
    """
    axis, atom = find(axis), find(atom)
    if axis is atom:
        return torch.arange(atom.extent)
    if axis.kind == "sum":
        return torch.cat([owner(part, atom) for part in axis.parts])
    indices, found = torch.full((1,), -1), False
    for part in axis.parts:
        own = owner(part, atom) if not found else torch.full((part.extent,), -1)
        found = found or bool((own >= 0).any())
        indices = torch.where(own[None, :] >= 0, own[None, :], indices[:, None]).reshape(-1)
    return indices if axis.kind is not None else torch.full((axis.extent,), -1)


def touched(axis: Axis, keep: Keep) -> bool:
    """Whether `keep` says anything about `axis` or what it consists of."""
    axis = find(axis)
    return axis in keep or any(touched(part, keep) for part in axis.parts)
