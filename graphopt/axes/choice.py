"""When an atom may keep other items for every item of another atom: query heads of each KV group on their own."""

from __future__ import annotations

from torch.fx import Node

from graphopt.axes.axes import Axes, operator_of, results_of
from graphopt.axes.axis import Axis, atoms, find, parts
from graphopt.axes.keep import owner
from graphopt.place import place

# What these make is the same for every item of an axis that their inputs do not have.
_NAMES = """
    expand expand_as broadcast_to repeat tile repeat_interleave full zeros ones new_zeros new_ones new_full
    zeros_like ones_like full_like broadcast_tensors scalar_tensor
"""
_STRETCHING = frozenset(_NAMES.split())


def why_not_choose(axes: Axes, outer: Axis, inner: Axis) -> str | None:
    """Why `inner` cannot keep other items for each item of `outer`; None where it can.

    It can where every tensor with `inner` has `outer`, too, once, so that each of its elements belongs to one item of
    it, or is the same for all items of `inner`.
    """
    outer, inner = find(outer), find(inner)
    if outer is inner:
        return "an axis is no group of itself"
    if inner.pinned is not None:
        return f"it is pinned: {inner.pinned}"
    stretched: set[Node] = set()
    together = False
    for node, dims in axes.dims.items():
        for own in results_of(dims):
            if not any(inner in atoms(axis) for axis in own):
                continue
            problem = _problem(own, outer, inner)
            together |= problem is None
            if problem is None:
                continue
            if not _is_stretched(axes, node, inner, stretched):
                return f"{axes.name_of(node)} ({place(node)}) {problem}"
            stretched.add(node)
    return None if together else f"no tensor has both {outer.label} and {inner.label}"


def _problem(dims: list[Axis], outer: Axis, inner: Axis) -> str | None:
    """What keeps an element of an item of `inner` from belonging to one item of `outer`; None where nothing does."""
    everywhere = sum(bool((owner(axis, outer) >= 0).all()) for axis in dims if outer in atoms(axis))
    for axis in dims:
        if inner not in atoms(axis):
            continue
        count = _groups(axis, outer, inner)
        others = everywhere - bool((owner(axis, outer) >= 0).all())
        if count is None or count + others > 1:
            return f"has several {outer.label} for one {inner.label}"
        if count + others == 0:
            return f"has {inner.label} without {outer.label}"
    return None


def _groups(axis: Axis, outer: Axis, inner: Axis, around: int = 0) -> int | None:
    """How many `outer` stand around each `inner` in one dimension; None where not the same number around each."""
    axis = find(axis)
    if axis is inner:
        return around
    if axis.kind is None:
        return None
    if axis.kind == "product":
        around += sum(part is outer for part in parts(axis, "product"))
    counts = {_groups(part, outer, inner, around) for part in parts(axis, axis.kind) if inner in atoms(part)}
    return counts.pop() if len(counts) == 1 else None


def _is_stretched(axes: Axes, node: Node, inner: Axis, stretched: set[Node]) -> bool:
    """Whether a tensor is the same for all items of `inner`, as far as can be seen."""
    if node.op != "call_function":
        return False
    sources = [
        source
        for source in node.all_input_nodes
        if any(inner in atoms(axis) for own in results_of(axes.dims.get(source) or []) for axis in own)
    ]
    if not sources:
        return operator_of(node) in _STRETCHING
    return axes.is_elementwise(node) and all(source in stretched for source in sources)
