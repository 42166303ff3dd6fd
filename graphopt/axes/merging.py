"""When items of an atom may be merged, and which stored tensors are summed over along it."""

from __future__ import annotations

from torch.fx import Node

from graphopt.axes.axes import Axes, results_of
from graphopt.axes.axis import Axis, atoms, find
from graphopt.place import place


class CannotMerge(Exception):
    """Why items of an axis cannot be merged."""


def consumers(axes: Axes, atom: Axis) -> set[tuple[Node, int]]:
    """The stored tensors and dimensions along which merged items of `atom` are added up, not averaged.

    Raises:
        CannotMerge: a sum over the axis has no stored tensor that could make up for the items that are gone, a
            statistic of it would change, or a tensor is used in both ways.
    """
    atom = find(atom)
    if axes.statistics.get(atom):
        raise CannotMerge(f"statistics are taken over it in {axes.statistics[atom][0]}")
    found: set[tuple[Node, int]] = set()
    for call, operands in axes.sums.items():
        having = [node for node, dim in operands if atom in atoms(results_of(axes.dims[node])[0][dim])]
        if not having:
            continue
        weights = [axes.source(node) for node in having if axes.is_stored(axes.source(node))]
        if len(weights) != 1:
            which = "no tensor" if not weights else "two tensors"
            raise CannotMerge(f"{axes.name_of(call)} ({place(call)}) sums over it with {which} of the program's")
        dims = [n for n, axis in enumerate(axes.dims[weights[0]]) if atom in atoms(axis)]
        if len(dims) != 1:
            raise CannotMerge(f"{axes.name_of(weights[0])} has it twice")
        found.add((weights[0], dims[0]))
    _check_uses(axes, atom, found)
    return found


def _check_uses(axes: Axes, atom: Axis, found: set[tuple[Node, int]]) -> None:
    """Every use of a stored tensor sums over the atom, or none does; likewise for two names of one tensor."""
    ways: dict[object, tuple[bool, Node]] = {}
    for node, dims in axes.dims.items():
        if not axes.is_stored(node) or not any(atom in atoms(axis) for axis in dims):
            continue
        summed = any((node, n) in found for n in range(len(dims)))
        for user, through in _users(axes, node):
            operands = [dim for operand, dim in axes.sums.get(user, ()) if operand is through]
            if summed is not any(atom in atoms(results_of(axes.dims[through])[0][dim]) for dim in operands):
                raise CannotMerge(f"{axes.name_of(node)} is summed over in one place and not in another")
        tensor = axes.program.tensors[node.name]
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        if ways.setdefault(key, (summed, node))[0] is not summed:
            raise CannotMerge(f"{axes.name_of(node)} is summed over in one place and not in another")


def _users(axes: Axes, node: Node) -> list[tuple[Node, Node]]:
    """What uses a tensor, behind views of it: the user, and the view that it uses."""
    found, todo = [], [node]
    while todo:
        item = todo.pop()
        for user in item.users:
            if user.op != "call_function":
                continue
            if axes.source(user) is axes.source(node) and user is not node:
                todo.append(user)
            else:
                found.append((user, item))
    return found
