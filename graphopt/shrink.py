"""The first primitive: make axes of a program shorter, everywhere they occur, in one rebuild."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes, Axis, Choice, Keep, atoms, extent, find, index, owner, results_of, touched
from graphopt.axes.axis import parts
from graphopt.axes.call import extent_of
from graphopt.axes.choice import why_not_choose
from graphopt.axes.merging import CannotMerge, consumers
from graphopt.edit import Edit
from graphopt.errors import CannotShrink
from graphopt.program import Program

Indices = Sequence[int] | Sequence[Sequence[int]] | Tensor
Key = Axis | str | tuple[Axis | str, Axis | str]


def shrink(
    axes: Axes,
    keep: Mapping[Key, Indices],
    *,
    merge: Mapping[Axis | str, Tensor] | None = None,
) -> Program:
    """The program with only the kept items of some axes.

    Every stored tensor that has one of the axes is sliced, every literal that states an extent is rewritten, and shapes
    are propagated anew. The result equals the program with the dropped items masked out; for axes that an operator
    takes statistics over (layer norm, mean, softmax), with those of the kept items. Literals that were worked out from
    an extent outside of the graph, such as 1/n in a mean that is written as a sum, stay as they are.

    Args:
        axes: what `infer` found; its program is the one that shrinks, and is left unchanged.
        keep: for each atom (or its label) the indices that stay, in their new order, or a boolean mask of its extent.
            A permutation of all indices is a lossless re-ordering. For a pair of atoms (outer, inner), such as KV
            groups and the query heads that share one, a row of inner indices (or of a mask) for every item of outer:
            all rows keep as many.
        merge: for atoms in `keep`, a (kept, extent) matrix that says how items fold into kept ones: where stored values
            are produced along the axis the new ones are its product with the old ones (its rows are normalised by the
            user: a mean, as a rule); where they are summed over, the columns of the items that a row draws from are
            added up. So merging items that are equal changes nothing.

    Raises:
        CannotShrink: an axis is pinned, the indices are not ones it has or not a multiple that operators take, rows
            keep different numbers, or items cannot be merged; names the axis and the reason.
    """
    edit = Edit(axes.program)
    shrink_in(edit, axes, keep, merge=merge)
    return axes.program.replace(exported=edit.finish())


def shrink_in(
    edit: Edit,
    axes: Axes,
    keep: Mapping[Key, Indices],
    *,
    merge: Mapping[Axis | str, Tensor] | None = None,
) -> None:
    """As `shrink`, in an edit of `axes.program` whose graph is still as it was."""
    kept = checked(axes, keep)
    merged = {_atom(axes, key): matrix for key, matrix in (merge or {}).items()}
    summed = _checked_merge(axes, kept, merged)
    nodes = {node.name: node for node in edit.graph.nodes}
    _slice_tensors(edit, axes, kept, merged, summed, nodes)
    for old, dims in axes.dims.items():
        if old.op != "call_function" or old.name not in nodes or not _is_touched(axes, old, kept):
            continue
        node = nodes[old.name]
        rewrite(node, axes.literals.get(old, {}), axes.targets.get(old), kept, nodes)
        edit.infer(node)
        _check(node, dims, kept)


# What is asked for ----------------------------------------------------------------------------------------------------


def checked(axes: Axes, keep: Mapping[Key, Indices]) -> dict[Axis, Tensor | Choice]:
    """The keep sets by atom, as int64 indices or a Choice of them. Raises CannotShrink as `shrink` does."""
    kept: dict[Axis, Tensor | Choice] = {}
    for key, indices in keep.items():
        if isinstance(key, tuple):
            outer, axis = (_atom(axes, name) for name in key)
            choice: Tensor | Choice = _choice(axes, outer, axis, indices)
        else:
            axis = _atom(axes, key)
            if axis.pinned is not None:
                raise CannotShrink(axis=_called(axes, axis), reason=f"it is pinned: {axis.pinned}")
            choice = _indices(_called(axes, axis), axis.extent, torch.as_tensor(indices))
        if axis in kept:
            raise CannotShrink(axis=_called(axes, axis), reason="what stays of it is said twice")
        if len(choice) % axes.multiple(axis):
            raise CannotShrink(
                axis=_called(axes, axis), reason=f"{len(choice)} is no multiple of {axes.multiple(axis)}"
            )
        kept[axis] = choice
    return kept


def _indices(name: str, size: int, wanted: Tensor) -> Tensor:
    if wanted.dtype is torch.bool:
        if wanted.shape != (size,):
            raise CannotShrink(axis=name, reason=f"a mask of shape {tuple(wanted.shape)} for {size} items")
        wanted = wanted.nonzero().flatten()
    if wanted.is_floating_point() and wanted.numel():
        raise CannotShrink(axis=name, reason="indices must be integers")
    wanted = wanted.to(torch.int64).reshape(-1)
    if not len(wanted):
        raise CannotShrink(axis=name, reason="nothing of it would be left")
    if int(wanted.min()) < 0 or int(wanted.max()) >= size:
        raise CannotShrink(axis=name, reason=f"indices must be from 0 to {size - 1}")
    if len(wanted.unique()) != len(wanted):
        raise CannotShrink(axis=name, reason="an index is given twice")
    return wanted


def _choice(axes: Axes, outer: Axis, inner: Axis, rows: Indices) -> Choice:
    name = _called(axes, inner)
    reason = why_not_choose(axes, outer, inner)
    if reason is not None:
        raise CannotShrink(axis=name, reason=f"no choice of its own for every item of {outer.label}: {reason}")
    if len(rows) != outer.extent:
        raise CannotShrink(axis=name, reason=f"{len(rows)} rows for the {outer.extent} items of {outer.label}")
    found = []
    for item, row in enumerate(rows):
        found.append(_indices(f"{name}, {outer.label} item {item}", inner.extent, torch.as_tensor(row)))
        if len(found[-1]) != len(found[0]):
            raise CannotShrink(
                axis=name,
                reason=f"{outer.label} item {item} ({axes.where(outer)}) would keep {len(found[-1])} of its "
                f"{inner.extent}, item 0 {len(found[0])}; all must keep as many",
            )
    return Choice(outer, torch.stack(found))


def _atom(axes: Axes, key: Axis | str) -> Axis:
    if isinstance(key, str):
        try:
            return axes[key]
        except KeyError:
            raise CannotShrink(axis=key, reason="the program has no axis of that name") from None
    axis = find(key)
    if axis.kind is not None:
        raise CannotShrink(axis=repr(axis), reason=f"it consists of {', '.join(map(repr, atoms(axis)))}; name these")
    return axis


def _called(axes: Axes, axis: Axis) -> str:
    return f"{axis.label} ({axes.where(axis)})"


def _checked_merge(axes: Axes, kept: Keep, merged: Mapping[Axis, Tensor]) -> set[tuple[Node, int]]:
    """The stored tensors and dimensions in which merged items are added up."""
    summed: set[tuple[Node, int]] = set()
    for atom, matrix in merged.items():
        name = _called(axes, atom)
        if atom not in kept or isinstance(kept[atom], Choice):
            raise CannotShrink(axis=name, reason="merge names it, and keep does not say what stays of it")
        wanted = (len(kept[atom]), atom.extent)
        if tuple(matrix.shape) != wanted:
            raise CannotShrink(axis=name, reason=f"its merge matrix is {tuple(matrix.shape)}, not {wanted}")
        drawn = matrix != 0
        if bool((drawn.sum(0) > 1).any()):
            raise CannotShrink(axis=name, reason="an item would be merged into two")
        if not bool(drawn.any(1).all()) or not bool(matrix.isfinite().all()):
            raise CannotShrink(axis=name, reason="every row of its merge matrix must draw from some item, finitely")
        try:
            summed |= consumers(axes, atom)
        except CannotMerge as problem:
            raise CannotShrink(axis=name, reason=f"its items cannot be merged: {problem}") from None
    return summed


# Tensors --------------------------------------------------------------------------------------------------------------


def _slice_tensors(
    edit: Edit,
    axes: Axes,
    kept: Keep,
    merged: Mapping[Axis, Tensor],
    summed: set[tuple[Node, int]],
    nodes: Mapping[str, Node],
) -> None:
    done: dict[Any, Tensor] = {}  # tensors that share storage go on sharing it
    for node, dims in axes.dims.items():
        if not axes.is_stored(node) or not any(touched(axis, kept) for axis in dims):
            continue
        old = axes.program.tensors[node.name]
        key = (old.untyped_storage().data_ptr(), old.storage_offset(), old.shape, old.stride(), old.dtype)
        if key not in done:
            new = _chosen(old.detach(), dims, kept)
            for place, axis in enumerate(dims):
                if new.is_floating_point() and any(atom in merged for atom in atoms(axis)):
                    matrix = _matrix(axis, kept, merged, summed=(node, place) in summed).to(new.dtype)
                    new = torch.tensordot(matrix, new, dims=([1], [place])).movedim(0, place)
                elif touched(axis, kept) and new.shape[place] == axis.extent and not _outside(axis, dims, kept):
                    new = new.index_select(place, index(axis, kept))
            done[key] = new
        edit.set_tensor(nodes[node.name], done[key])


def _outside(axis: Axis, dims: Sequence[Axis], kept: Keep) -> Choice | None:
    """A choice of what stays of `axis` that another dimension decides."""
    for atom in atoms(axis):
        choice = kept.get(atom)
        if isinstance(choice, Choice) and find(choice.outer) not in atoms(axis):
            return choice
    return None


def _chosen(tensor: Tensor, dims: Sequence[Axis], kept: Keep) -> Tensor:
    """The tensor after the choices that one of its dimensions makes of another; the others are as they were."""
    for place, axis in enumerate(dims):
        choice = _outside(axis, dims, kept)
        if choice is None:
            continue
        other = next(n for n, own in enumerate(dims) if find(choice.outer) in atoms(own))
        items = owner(dims[other], choice.outer).tolist()
        pieces = [
            tensor.narrow(other, n, 1).index_select(place, index(axis, kept, {find(choice.outer): item}))
            for n, item in enumerate(items)
        ]
        tensor = torch.cat(pieces, other)
    return tensor


def _matrix(axis: Axis, kept: Keep, merged: Mapping[Axis, Tensor], *, summed: bool) -> Tensor:
    """The (kept, extent) matrix, float64, that carries items of `axis` to what stays of them."""
    axis = find(axis)
    if axis.kind is None:
        if axis in merged:
            given = merged[axis].double()
            return (given != 0).double() if summed else given
        return torch.eye(axis.extent, dtype=torch.float64)[index(axis, kept)]
    pieces = [_matrix(part, kept, merged, summed=summed) for part in parts(axis, axis.kind)]
    if axis.kind == "sum":
        return torch.block_diag(*pieces)
    matrix = pieces[0]
    for piece in pieces[1:]:
        matrix = torch.kron(matrix, piece)
    return matrix


# Calls ----------------------------------------------------------------------------------------------------------------


def _is_touched(axes: Axes, node: Node, kept: Keep) -> bool:
    around = [axes.dims.get(source) or [] for source in (node, *node.all_input_nodes)]
    return any(touched(axis, kept) for dims in around for own in results_of(dims) for axis in own)


def rewrite(node: Node, literals: Mapping[str, Any], target: Any, kept: Keep, nodes: Mapping[str, Node]) -> None:
    """Put the new extents in the place of the old ones among the arguments of a call."""
    if not literals:
        return
    values = {name: extent_of(value, kept) for name, value in literals.items()}
    values = {name: nodes[value.name] if isinstance(value, Node) else value for name, value in values.items()}
    if target is not None:
        node.target, node.args, node.kwargs = target, (), {}
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    args, kwargs = list(node.args), dict(node.kwargs)
    for place, argument in enumerate(arguments):
        if argument.name not in values:
            continue
        value = values[argument.name]
        if argument.kwarg_only or argument.name in kwargs:
            kwargs[argument.name] = value
            continue
        args += [each.default_value for each in arguments[len(args) : place + 1]]
        args[place] = value
    node.args, node.kwargs = tuple(args), kwargs


def _check(node: Node, dims: Any, kept: Keep) -> None:
    """The shapes that PyTorch propagates must be those that the axes predict: a rule is wrong otherwise."""
    value = node.meta["val"]
    values = value if isinstance(value, (list, tuple)) else [value]
    for tensor, own in zip(values, results_of(dims), strict=False):
        if isinstance(tensor, Tensor):
            expected = [extent(axis, kept) for axis in own]
            got = list(tensor.shape)
            assert got == expected, f"{node.name} ({node.target}) has shape {got} where its axes say {expected}"
