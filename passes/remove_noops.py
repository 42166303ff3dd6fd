"""Remove calls that change nothing, and say reshape wherever memory order does not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Edit
from graphopt.exported import op_name
from graphopt.passes.base import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class RemoveNoops(Pass):
    """Take out identities, and write every view as a reshape.

        before  y = dropout(x, 0.1, False); z = clone(transpose(y, 1, 2)); u = view(z, [1, 64]); v = view(u, [64])
        after   z = transpose(x, 1, 2); v = reshape(z, [64])

    An identity is a call that in a program without updates in place gives its first input: copies, dropout out of
    training, conversions to the same dtype, expansions, slices and permutations that keep all, adding 0, multiplying
    by 1. Assertions on metadata go as well: shapes are static here and were checked at capture. A copy that only puts
    memory in another order goes too, since a reshape, other than a view, works on any order. Of concatenations go the
    parts without elements, as a rotary embedding of all of a head leaves them behind.
    """

    name: ClassVar[str] = "remove-noops"

    def apply(self, edit: Edit) -> None:
        for node in list(edit.graph.nodes):
            if node.op != "call_function":
                continue
            name = op_name(node).removeprefix("aten.")
            if name.partition(".")[0] in _ASSERTIONS and not node.users:
                edit.graph.erase_node(node)
                edit.count("assertion")
            elif name in ("view", "_unsafe_view", "reshape"):
                _reshape(edit, node)
            elif name == "cat":
                _without_empty_parts(edit, node)
            elif (rule := _IDENTITIES.get(name)) is not None and rule(node) and _same_value(node):
                _drop(edit, node, name.partition(".")[0])
        _infer_again(edit)


_ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size")


def _drop(edit: Edit, node: Node, kind: str, source: object = None) -> None:
    """Let users take `source`, by default the first argument, in place of the node."""
    source = node.args[0] if source is None else source
    assert isinstance(source, Node)
    if source.op == "placeholder" and any(user.op == "output" for user in node.users):
        edit.decline(node, "it makes an input of the program an output, which needs a value of its own")
        return
    edit.replace(node, source)
    edit.count(kind)


def _reshape(edit: Edit, node: Node) -> None:
    """Drop a reshape to the same shape; else take the input of a reshape in front, and become a reshape."""
    source = node.args[0]
    assert isinstance(source, Node)
    if _same_value(node):
        _drop(edit, node, "reshape")
        return
    shape = [int(size) for size in node.meta["val"].shape]
    if source.target is aten.reshape.default:  # only the last shape of a chain counts
        node.update_arg(0, source.args[0])
        edit.count("reshape of reshape")
        if not source.users:
            edit.graph.erase_node(source)
        if _same_value(node):
            _drop(edit, node, "reshape")
            return
    node.update_arg(1, shape)
    node.target = aten.reshape.default


def _without_empty_parts(edit: Edit, node: Node) -> None:
    """Drop what has no elements from a concatenation, unless its dtype decides on that of the result."""
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    values = {part: part.meta["val"] for part in parts if isinstance(part, Node)}
    kept = [part for part in values if values[part].numel()]
    whole = node.meta["val"].dtype
    if not kept or len(kept) == len(values) or any(values[part].dtype != whole for part in kept):
        return
    node.update_arg(0, [part for part in parts if part in kept])
    edit.count("empty part")
    for part in values:
        if part.op == "call_function" and not part.users:
            edit.graph.erase_node(part)
    if len(node.args[0]) == 1:  # type: ignore[arg-type]
        _drop(edit, node, "cat", kept[0])


def _same_value(node: Node) -> bool:
    """Same shape, dtype and device as the first input. What the call does to the values is its rule's to know."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    same_kind = before.dtype == after.dtype and before.device == after.device
    return same_kind and tuple(before.shape) == tuple(after.shape)


def _infer_again(edit: Edit) -> None:
    """Strides follow from those in front, which may have changed."""
    for node in edit.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            edit.infer(node)


# When is a call an identity, given that shape and dtype stay? One rule per operator. ------------------------


def _always(node: Node) -> bool:
    return True


def _argument(node: Node, place: int, name: str, default: object) -> object:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _not_training(node: Node) -> bool:
    return _argument(node, 2, "train", True) is False or bool(_argument(node, 1, "p", None) == 0.0)


def _strided(node: Node) -> bool:
    return node.kwargs.get("layout") in (None, torch.strided)


def _identity_permutation(node: Node) -> bool:
    rank = node.meta["val"].dim()
    dims = node.args[1]
    assert isinstance(dims, (list, tuple))
    return [int(d) % rank for d in dims] == list(range(rank))  # type: ignore[arg-type]


def _same_dims(node: Node) -> bool:
    rank = max(1, node.meta["val"].dim())
    return int(node.args[1]) % rank == int(node.args[2]) % rank  # type: ignore[arg-type]


def _no_step(node: Node) -> bool:
    # The shape stays, so all of the dimension is taken; backwards is not possible.
    return _argument(node, 4, "step", 1) == 1


def _all_zero(place: int, name: str) -> Callable[[Node], bool]:
    def rule(node: Node) -> bool:
        value = _argument(node, place, name, None)
        return isinstance(value, (list, tuple)) and bool(value) and all(size == 0 for size in value)

    return rule


def _is_number(value: object, wanted: int) -> bool:
    """Whether a value is a number of Python's, no truth value, and equal to `wanted`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == wanted


def _adds_zero(node: Node) -> bool:
    # -0.0 + 0 is 0.0: a sign that no reader of the result can tell except through division by it.
    return _is_number(node.args[1], 0)


def _scales_by_one(node: Node) -> bool:
    return _is_number(node.args[1], 1)


def _exponent_one(node: Node) -> bool:
    return _is_number(node.args[1], 1)


_IDENTITIES: dict[str, Callable[[Node], bool]] = {
    "dropout": _not_training,
    "feature_dropout": _not_training,
    "alpha_dropout": _not_training,
    "clone": _always,
    "contiguous": _always,
    "detach": _always,
    "alias": _always,
    "lift_fresh": _always,
    "lift_fresh_copy": _always,
    "_to_copy": _strided,
    "to.dtype": _always,
    "to.dtype_layout": _strided,
    "to.device": _always,
    "to.other": _always,
    "type_as": _always,
    "expand": _always,
    "expand_as": _always,
    "broadcast_to": _always,
    "flatten.using_ints": _always,
    "unflatten.int": _always,
    "squeeze": _always,
    "squeeze.dim": _always,
    "squeeze.dims": _always,
    "repeat": _always,
    "tile": _always,
    "repeat_interleave.self_int": _always,
    "slice.Tensor": _no_step,
    "narrow": _always,
    "permute": _identity_permutation,
    "transpose.int": _same_dims,
    "roll": _all_zero(1, "shifts"),
    "pad": _all_zero(1, "pad"),
    "constant_pad_nd": _all_zero(1, "pad"),
    "add.Tensor": _adds_zero,
    "sub.Tensor": _adds_zero,
    "mul.Tensor": _scales_by_one,
    "div.Tensor": _scales_by_one,
    "pow.Tensor_Scalar": _exponent_one,
}
