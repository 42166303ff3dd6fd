"""Axes and their unification: what the extents of a program's dimensions consist of.

An axis is one dimension's index set. Where the program looks at it more closely it is refined, either to a product of
axes in row-major order (a reshape from 12 to (3, 4)) or to a sum, a concatenation (a cat of 8 and 4). Two dimensions
that must agree index by index are one axis: they are unified, and a refinement of one is a refinement of both.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

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
    return flat


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
        if root.pinned is None:  # else all that it consists of is pinned, too
            root.pinned = reason
            todo += root.parts


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
        False where they cannot, from the left nor from the right; what is left of both in the middle is pinned then.
    """
    left, right = _flat(xs, kind), _flat(ys, kind)
    if math.prod(x.extent for x in left) == 0 and kind == "product":
        _pin_all([*left, *right], "empty")
        return True
    for backwards in (False, True):
        if _match_from(left, right, kind, backwards):
            return True
    _pin_all([*left, *right], "a reshape mixes axes")
    return False


def _flat(axes: Iterable[Axis], kind: Kind) -> deque[Axis]:
    return deque(part for axis in axes for part in parts(axis, kind) if part.extent != (1 if kind == "product" else 0))


def _match_from(left: deque[Axis], right: deque[Axis], kind: Kind, backwards: bool) -> bool:
    """Match from one end for as long as it goes, taking off what matches; whether it went all the way."""

    def take(side: deque[Axis]) -> Axis:
        return find(side.pop() if backwards else side.popleft())

    def put(side: deque[Axis], axes: list[Axis]) -> None:
        if backwards:
            side.extend(axes)
        else:
            side.extendleft(axes[::-1])

    while left and right:
        x, y = take(left), take(right)
        if x.kind == kind or y.kind == kind:  # refined since it was listed
            put(left, parts(x, kind))
            put(right, parts(y, kind))
            continue
        if x.extent == y.extent:
            if not unify(x, y):
                return False
            continue
        if x.extent < y.extent:
            x, y, left, right = y, x, right, left
        rest = _split(x, y, kind, backwards)
        if rest is None:
            put(left, [x])
            put(right, [y])
            return False
        put(left, [rest])
    return True


def _split(x: Axis, y: Axis, kind: Kind, backwards: bool) -> Axis | None:
    """Refine `x` so that it starts (ends) with the smaller `y`, and give the rest; None where it cannot be."""
    if kind == "product" and x.extent % y.extent:
        return None
    rest = Axis(x.extent // y.extent if kind == "product" else x.extent - y.extent)
    halves = [rest, y] if backwards else [y, rest]
    if x.kind is not None:
        return rest if unify(x, _composite(kind, halves)) else None
    x.kind, x.parts = kind, halves
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
    return "(" + (" " if axis.kind == "product" else " + ").join(map(show, parts(axis, axis.kind))) + ")"
