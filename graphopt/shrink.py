"""The first primitive: make axes of a program shorter, everywhere they occur, in one rebuild."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes, Axis, atoms, extent, find, index, results_of
from graphopt.axes.axis import Keep, touched
from graphopt.axes.call import extent_of
from graphopt.edit import Edit
from graphopt.errors import CannotShrink
from graphopt.program import Program

Indices = Sequence[int] | Tensor


def shrink(
    axes: Axes,
    keep: Mapping[Axis | str, Indices],
    *,
    merge: Mapping[Axis | str, Tensor] | None = None,
) -> Program:
    """The program with only the kept items of some axes.

    Every stored tensor that has one of the axes is sliced, every literal that states an extent is rewritten, and shapes
    are propagated anew. The result equals the program with the dropped items masked out; for axes that an operator
    takes statistics over (layer norm, mean, softmax), with those of the kept items.

    Args:
        axes: what `infer` found; its program is the one that shrinks, and is left unchanged.
        keep: for each atom (or its label) the indices that stay, in their new order, or a boolean mask of its extent.
            A permutation of all indices is a lossless re-ordering.
        merge: for atoms in `keep`, a (kept, extent) matrix that says how dropped items fold into kept ones: where
            stored values are produced along the axis the new ones are its product with the old ones (its rows are
            normalised by the user: a mean, as a rule); where they are summed over, the columns of the items that a row
            draws from are added up.

    Raises:
        CannotShrink: an axis is pinned, or the indices are not ones it has; names it and the reason.
    """
    edit = Edit(axes.program)
    shrink_in(edit, axes, keep, merge=merge)
    return axes.program.replace(exported=edit.finish())


def shrink_in(
    edit: Edit,
    axes: Axes,
    keep: Mapping[Axis | str, Indices],
    *,
    merge: Mapping[Axis | str, Tensor] | None = None,
) -> None:
    """As `shrink`, in an edit of `axes.program` whose graph is still as it was."""
    kept = checked(axes, keep)
    merged = {_atom(axes, key): matrix for key, matrix in (merge or {}).items()}
    assert all(key in kept for key in merged), "merge names an axis that keep does not"
    nodes = {node.name: node for node in edit.graph.nodes}
    _slice_tensors(edit, axes, kept, merged, nodes)
    for old, dims in axes.dims.items():
        if old.op != "call_function" or old.name not in nodes:
            continue
        node = nodes[old.name]
        if _is_touched(axes, old, kept):
            _rewrite(node, axes.literals.get(old, {}), axes.targets.get(old), kept, nodes)
        edit.infer(node)
        _check(node, dims, kept)


def checked(axes: Axes, keep: Mapping[Axis | str, Indices]) -> dict[Axis, Tensor]:
    """The keep sets as int64 indices by atom. Raises CannotShrink as `shrink` does."""
    kept = {}
    for key, indices in keep.items():
        axis = _atom(axes, key)
        name = f"{axis.label} ({axes.where(axis)})"
        if axis.pinned is not None:
            raise CannotShrink(axis=name, reason=f"it is pinned: {axis.pinned}")
        wanted = torch.as_tensor(indices)
        if wanted.dtype is torch.bool:
            if wanted.shape != (axis.extent,):
                raise CannotShrink(axis=name, reason=f"a mask of shape {tuple(wanted.shape)} for {axis.extent} items")
            wanted = wanted.nonzero().flatten()
        wanted = wanted.to(torch.int64).reshape(-1)
        if not len(wanted):
            raise CannotShrink(axis=name, reason="nothing of it would be left")
        if int(wanted.min()) < 0 or int(wanted.max()) >= axis.extent:
            raise CannotShrink(axis=name, reason=f"indices must be from 0 to {axis.extent - 1}")
        if len(wanted.unique()) != len(wanted):
            raise CannotShrink(axis=name, reason="an index is given twice")
        kept[axis] = wanted
    return kept


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


def _slice_tensors(
    edit: Edit, axes: Axes, kept: Keep, merged: Mapping[Axis, Tensor], nodes: Mapping[str, Node]
) -> None:
    done: dict[Any, Tensor] = {}  # tensors that share storage go on sharing it
    for node, dims in axes.dims.items():
        if not axes.is_stored(node) or not any(touched(axis, kept) for axis in dims):
            continue
        old = axes.program.tensors[node.name]
        key = (old.untyped_storage().data_ptr(), old.storage_offset(), old.shape, old.stride())
        if key not in done:
            new = old.detach()
            for place, axis in enumerate(dims):
                if touched(axis, kept):
                    new = _along(new, place, axis, kept, merged, summed=(node, place) in axes.contracted)
            done[key] = new
        edit.set_tensor(nodes[node.name], done[key])


def _along(
    tensor: Tensor, place: int, axis: Axis, kept: Keep, merged: Mapping[Axis, Tensor], *, summed: bool
) -> Tensor:
    own = [atom for atom in atoms(axis) if atom in merged]
    if not own or not tensor.is_floating_point():
        return tensor.index_select(place, index(axis, kept))
    matrix = _matrix(axis, kept, merged, summed=summed).to(tensor.dtype)
    return torch.tensordot(matrix, tensor, dims=([1], [place])).movedim(0, place)


def _matrix(axis: Axis, kept: Keep, merged: Mapping[Axis, Tensor], *, summed: bool) -> Tensor:
    """The (kept, extent) matrix, float64, that carries items of `axis` to what stays of them."""
    axis = find(axis)
    if axis.kind is None:
        if axis in merged:
            given = merged[axis].double()
            return (given != 0).double() if summed else given
        eye = torch.eye(axis.extent, dtype=torch.float64)
        return eye[kept[axis]] if axis in kept else eye
    pieces = [_matrix(part, kept, merged, summed=summed) for part in axis.parts]
    if axis.kind == "sum":
        return torch.block_diag(*pieces)
    matrix = pieces[0]
    for piece in pieces[1:]:
        matrix = torch.kron(matrix, piece)
    return matrix


def _is_touched(axes: Axes, node: Node, kept: Keep) -> bool:
    around = [axes.dims.get(source) or [] for source in (node, *node.all_input_nodes)]
    return any(touched(axis, kept) for dims in around for own in results_of(dims) for axis in own)


def _rewrite(node: Node, literals: Mapping[str, Any], target: Any, kept: Keep, nodes: Mapping[str, Node]) -> None:
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
