"""Fold batch normalisation, with its running statistics, into the convolution or linear layer beside it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Edit
from graphopt.exported import op_name
from graphopt.passes.base import Pass

_CONVS = {f"aten.conv{rank}d{overload}" for rank in (1, 2, 3) for overload in ("", ".padding")}
_TRANSPOSED = {"aten.conv_transpose1d", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"}
_LINEAR = {"aten.linear"}
FOLDABLE = _CONVS | _TRANSPOSED | _LINEAR


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Scale the weights by gamma / sqrt(var + eps), and shift the bias.

        before  y = conv2d(x, w, b); z = batch_norm(y, gamma, beta, mean, var)
        after   z = conv2d(x, w * s, (b - mean) * s + beta)             with s = gamma / sqrt(var + eps)

    Convolutions (also transposed and grouped) and linear layers in front of a batch norm take it in where nothing else
    reads them. A batch norm in front of a convolution without padding, or of a linear layer, goes into that. The new
    weights are computed in float64 and rounded once.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def apply(self, edit: Edit) -> None:
        for node in list(edit.graph.nodes):
            norm = _match(node)
            if norm is None:
                continue
            reason = _fold_backward(edit, *norm)
            if reason and not _fold_forward(edit, *norm):
                edit.decline(node, reason)


def _match(node: Node) -> tuple[Node, Node] | None:
    """The batch norm and the node that holds its result, where it runs on stored statistics."""
    if node.op != "call_function":
        return None
    if op_name(node) == "aten._native_batch_norm_legit_no_training":
        users = list(node.users)
        if len(users) == 1 and users[0].target is operator.getitem and users[0].args[1] == 0:
            return node, users[0]
    elif op_name(node) == "aten.batch_norm" and not node.args[5]:
        return node, node
    return None


def _scale_and_shift(edit: Edit, norm: Node) -> tuple[Tensor, Tensor] | None:
    """s and t, both (c,) float64, such that the batch norm is x * s + t along dimension 1; None if not constant."""
    eps = norm.args[6] if op_name(norm) == "aten._native_batch_norm_legit_no_training" else norm.args[7]
    tensors = [edit.tensor(argument) for argument in norm.args[1:5]]
    if any(tensor is None and argument is not None for tensor, argument in zip(tensors, norm.args[1:5], strict=True)):
        return None
    gamma, beta, mean, var = tensors
    if mean is None or var is None:
        return None
    scale = torch.rsqrt(var.double() + float(eps))  # type: ignore[arg-type]
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    return scale, shift + beta.double() if beta is not None else shift


def _fold_backward(edit: Edit, norm: Node, result: Node) -> str:
    """Fold into the layer in front. Returns why that cannot be, or "" when it is done."""
    layer = norm.args[0]
    assert isinstance(layer, Node)
    if layer.op != "call_function" or op_name(layer) not in FOLDABLE:
        return f"its input is {op_name(layer) if layer.op == 'call_function' else 'an input'}, no convolution or linear"
    if len(layer.users) > 1:
        others = [user.name for user in layer.users if user is not norm]
        return f"{layer.name} also feeds {others[0]}"
    if op_name(layer) in _LINEAR and layer.meta["val"].dim() != 2:
        return f"{layer.name} has its features last, and the batch norm normalises dimension 1"
    factors = _scale_and_shift(edit, norm)
    weight, bias = edit.tensor(layer.args[1]), edit.tensor(_bias(layer))
    if factors is None or weight is None or (bias is None and _bias(layer) is not None):
        return "weights or statistics are computed at run time"
    scale, shift = factors
    new_bias = shift if bias is None else bias.double() * scale + shift
    _set_weights(edit, layer, _scaled_rows(layer, weight, scale).to(weight.dtype), new_bias.to(weight.dtype))
    edit.replace(result, layer)
    if result is not norm:
        edit.graph.erase_node(norm)
    edit.count(f"{op_name(layer).removeprefix('aten.').partition('.')[0]} + batch_norm")
    return ""


def _scaled_rows(layer: Node, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight, in float64, with each output channel scaled."""
    if op_name(layer) in _TRANSPOSED:  # (i, o / groups, *kernel): the channels of a group are dimension 1
        groups = layer.args[6] if len(layer.args) > 6 else layer.kwargs.get("groups", 1)
        assert isinstance(groups, int)
        parts = weight.double().unflatten(0, (groups, -1))
        return (parts * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    return weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))


def _fold_forward(edit: Edit, norm: Node, result: Node) -> bool:
    """Fold into the one layer behind, where that adds no padding between."""
    layer = next(iter(result.users), None)
    if layer is None or len(result.users) != 1 or layer.op != "call_function" or layer.args[0] is not result:
        return False
    name = op_name(layer)
    if name in _LINEAR:
        if result.meta["val"].dim() != 2:
            return False
    elif name not in _CONVS or not _unpadded(layer):
        return False
    factors = _scale_and_shift(edit, norm)
    weight, bias = edit.tensor(layer.args[1]), edit.tensor(_bias(layer))
    if factors is None or weight is None or (bias is None and _bias(layer) is not None):
        return False
    scale, shift = factors
    # Row o of the weight reads the channels of its group: (o, i / groups, *kernel).
    groups = scale.numel() // weight.shape[1]
    ones = [1] * (weight.dim() - 2)
    by_group = (groups, 1, weight.shape[1], *ones)
    rows = weight.double().unflatten(0, (groups, -1))
    added = (rows * shift.view(by_group)).flatten(2).sum(-1).flatten()
    new_bias = added if bias is None else added + bias.double()
    new_weight = (rows * scale.view(by_group)).flatten(0, 1)
    _set_weights(edit, layer, new_weight.to(weight.dtype), new_bias.to(weight.dtype))
    source = norm.args[0]
    assert isinstance(source, Node)
    edit.replace(result, source)
    if result is not norm:
        edit.graph.erase_node(norm)
    edit.count(f"batch_norm + {name.removeprefix('aten.').partition('.')[0]}")
    return True


def _unpadded(layer: Node) -> bool:
    padding = layer.args[4] if len(layer.args) > 4 else layer.kwargs.get("padding", 0)
    if isinstance(padding, (list, tuple)):
        return all(size == 0 for size in padding)
    return padding in (0, "valid")


def _bias(layer: Node) -> object:
    return layer.args[2] if len(layer.args) > 2 else layer.kwargs.get("bias")


def _set_weights(edit: Edit, layer: Node, weight: Tensor, bias: Tensor) -> None:
    """Give a layer new weights, under the old names where no other layer reads these."""
    old = layer.args[1]
    assert isinstance(old, Node)
    base = edit.target(old)
    layer.update_arg(1, _tensor_node(edit, old, weight, base))
    previous = _bias(layer)
    name = f"{base.removesuffix('weight')}bias"
    node = edit.add_tensor(name, bias, parameter=True) if previous is None else _tensor_node(edit, previous, bias, name)
    if "bias" in layer.kwargs:
        layer.update_kwarg("bias", node)
    else:
        layer.args = (*layer.args[:2], node, *layer.args[3:])


def _tensor_node(edit: Edit, old: object, value: Tensor, name: str) -> Node:
    assert isinstance(old, Node)
    if len(old.users) > 1:
        return edit.add_tensor(name, value, parameter=True)
    edit.set_tensor(old, value)
    return old
