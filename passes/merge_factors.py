"""Multiply two linear layers in a row into one, where that is less work: the inverse of factoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Edit
from graphopt.exported import op_name
from graphopt.passes.base import Pass
from graphopt.passes.layers import CONVS, LINEAR, bias_of, conv_options


@dataclass(frozen=True)
class MergeFactors(Pass):
    """Replace U (V x + a) + b by (U V) x + (U a + b).

        before  linear (r=256 i=768) -> linear (o=768 r=256)        with 8 tokens; 256 (768 + 768) multiply-adds each
        after   linear (o=768 i=768)                                768 * 768 each

    With `by` "flops" two layers become one where that takes fewer FLOPs; with "bytes" where fewer bytes are read and
    written (weights, inputs and outputs, without what stays between the two): with few tokens in flight the weights are
    most of that, and time follows bytes. "always" merges whatever can be. Linear layers and convolutions without groups
    merge; of two convolutions the second must be 1 x 1, without stride or padding. Nothing else may read what is
    between.

    Source: the pre-merge of Wei et al., "Building on Efficient Foundations", NeurIPS 2024, arXiv:2406.16450. Differs:
    they keep both forms and choose by the number of tokens in each run; a program here has one number.
    """

    name: ClassVar[str] = "merge-factors"

    by: Literal["flops", "bytes", "always"] = "flops"

    def apply(self, edit: Edit) -> None:
        for node in list(edit.graph.nodes):
            pair = _pair(edit, node)
            if isinstance(pair, str):
                edit.decline(node, pair)
                continue
            if pair is None:
                continue
            front, back = pair
            before, after = _costs(front, back, self.by)
            if self.by != "always" and after >= before:
                edit.decline(node, f"one layer takes {after:,} {self.by}, the two take {before:,}")
                continue
            _merge(edit, front, back)
            edit.count(f"{_kind(front)} + {_kind(back)}")


def _kind(node: Node) -> str:
    return op_name(node).removeprefix("aten.").partition(".")[0]


def _pair(edit: Edit, back: Node) -> tuple[Node, Node] | str | None:
    """A layer and the one in front of it; why they cannot be one; None where there are no two."""
    if back.op != "call_function" or not (op_name(back) == LINEAR or op_name(back) in CONVS):
        return None
    front = back.args[0]
    if not isinstance(front, Node) or front.op != "call_function" or op_name(front) != op_name(back):
        return None
    if len(front.users) > 1:
        return f"{front.name} also feeds {next(user.name for user in front.users if user is not back)}"
    for node in (front, back):
        tensors = [edit.tensor(node.args[1]), edit.tensor(bias_of(node))]
        if tensors[0] is None or (tensors[1] is None and bias_of(node) is not None):
            return "a weight is computed at run time"
    if op_name(back) in CONVS:
        first, second = conv_options(front), conv_options(back)
        weight = back.args[1]
        assert isinstance(weight, Node)
        if first["groups"] != 1 or second["groups"] != 1:
            return "one of them is a convolution in groups"
        pointwise = all(size == 1 for size in weight.meta["val"].shape[2:])
        if not pointwise or set(second["stride"]) != {1} or set(second["padding"]) != {0}:  # type: ignore[call-overload]
            return "the second is no 1 x 1 convolution without stride and padding"
    return front, back


def _costs(front: Node, back: Node, by: str) -> tuple[int, int]:
    """FLOPs or bytes of the two, and of the one."""
    rank, ins, *kernel = _shape(front.args[1])
    outs = _shape(back.args[1])[0]
    window = torch.Size(kernel).numel()
    times = back.meta["val"].numel() // outs
    biases = (bias_of(front) is not None, bias_of(back) is not None)
    dense, thin = outs * ins * window, rank * (ins * window + outs)
    if by == "bytes":
        size = back.meta["val"].element_size()
        source = front.args[0]
        assert isinstance(source, Node)
        ends = source.meta["val"].numel() + times * outs
        before = thin + biases[0] * rank + biases[1] * outs
        return (before + ends) * size, (dense + any(biases) * outs + ends) * size
    flops = times * (2 * thin + biases[0] * rank + biases[1] * outs)
    return flops, times * (2 * dense + any(biases) * outs)


def _shape(node: object) -> torch.Size:
    assert isinstance(node, Node)
    return node.meta["val"].shape


def _merge(edit: Edit, front: Node, back: Node) -> None:
    old, inner = back.args[1], front.args[1]
    v, u = edit.tensor(inner), edit.tensor(old)
    assert v is not None
    assert u is not None
    assert isinstance(inner, Node)
    assert isinstance(old, Node)
    mixer = u.double().flatten(1)
    weight = torch.tensordot(mixer, v.double(), dims=1).to(v.dtype)
    biases = [edit.tensor(bias_of(node)) for node in (front, back)]
    bias: Tensor | None = None
    if biases[0] is not None:
        bias = mixer @ biases[0].double()
    if biases[1] is not None:
        bias = biases[1].double() if bias is None else bias + biases[1].double()
    base = edit.target(old).removesuffix(".weight").removesuffix(".back")
    new = edit.add_tensor(f"{base}.weight", weight, parameter=True)
    added = None if bias is None else edit.add_tensor(f"{base}.bias", bias.to(v.dtype), parameter=True)
    source = front.args[0]
    if op_name(back) == LINEAR:
        merged = edit.call(back.target, (source, new, *([added] if added is not None else [])), like=back)
    else:
        merged = edit.call(back.target, (source, new, added, *front.args[3:]), front.kwargs, like=back)
    stale = [node for node in (inner, old, bias_of(front), bias_of(back)) if node is not None]
    edit.replace(back, merged)
    edit.graph.erase_node(front)
    for node in dict.fromkeys(stale):
        if not node.users:
            edit.graph.erase_node(node)
