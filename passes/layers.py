"""Linear layers and convolutions as matrices, and the two thinner layers that stand in for one of rank r."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Edit
from graphopt.exported import op_name

LINEAR = "aten.linear"
CONVS = {"aten.conv1d": 1, "aten.conv2d": 2, "aten.conv3d": 3}


@dataclass(frozen=True)
class Layer:
    """One layer with a stored weight that nothing else reads.

    As a matrix the weight is (outs, ins). `first` and `second` are how often the thin layer in front and the one behind
    are applied in a run: a layer of rank r takes r (first ins + second outs) multiply-adds, where the dense one takes
    second ins outs. `split` says along which line a convolution is taken apart: its channels (ins = i kh kw, outs = o;
    the one behind is 1 x 1) or space (ins = i kh, outs = o kw; kh x 1, then 1 x kw).
    """

    node: Node
    name: str
    ins: int
    outs: int
    first: int
    second: int
    split: str

    @property
    def source(self) -> Node:
        """What the layer reads."""
        source = self.node.args[0]
        assert isinstance(source, Node)
        return source

    @property
    def params(self) -> int:
        """Elements of the dense weight."""
        return self.ins * self.outs

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense layer."""
        return self.second * self.ins * self.outs

    @property
    def bias(self) -> Node | None:
        """The placeholder of the bias."""
        return bias_of(self.node)


def layer_of(edit: Edit, node: Node, split: str = "channel") -> Layer | str | None:
    """The layer that a call is; why it cannot be taken apart; None for any other call."""
    name = op_name(node) if node.op == "call_function" else ""
    if name != LINEAR and name not in CONVS:
        return None
    source, weight = node.args[:2]
    tensor = edit.tensor(weight)
    if tensor is None:
        return "its weight is computed at run time"
    assert isinstance(weight, Node)
    assert isinstance(source, Node)
    if len(weight.users) > 1:
        return "its weight is used more than once"
    if not tensor.is_floating_point():
        return f"its weight is {tensor.dtype}"
    path = edit.target(weight).removesuffix(".weight")
    out = node.meta["val"]
    if name == LINEAR:
        times = out.numel() // tensor.shape[0]
        return Layer(node, path, tensor.shape[1], tensor.shape[0], times, times, "channel")
    if conv_options(node)["groups"] != 1:
        return "it is a convolution in groups"
    outs, ins, *kernel = tensor.shape
    times = out.numel() // outs
    if split == "channel" or len(kernel) != 2 or min(kernel) == 1:
        return Layer(node, path, ins * math.prod(kernel), outs, times, times, "channel")
    between = out.shape[0] * out.shape[2] * source.meta["val"].shape[3]
    return Layer(node, path, ins * kernel[0], outs * kernel[1], between, times, "space")


def conv_options(node: Node) -> dict[str, object]:
    """The options of a convolution by name, as lists where they are one number per dimension."""
    rank = CONVS[op_name(node)]
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = {"bias": None, "stride": [1], "padding": [0], "dilation": [1], "groups": 1}
    given: dict[str, object] = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    for name in ("stride", "padding", "dilation"):
        value = given[name]
        sizes = list(value) if isinstance(value, (list, tuple)) else [value]
        given[name] = sizes * rank if len(sizes) == 1 else sizes
    return given


def bias_of(node: Node) -> Node | None:
    """The bias of a linear layer or a convolution."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias if isinstance(bias, Node) else None


def matrix_of(layer: Layer, weight: Tensor) -> Tensor:
    """The weight as a float64 matrix (outs, ins)."""
    weight = weight.detach().double()
    if layer.split == "space":
        return weight.permute(0, 3, 1, 2).reshape(layer.outs, layer.ins)
    return weight.reshape(layer.outs, layer.ins)


def samples_of(layer: Layer, value: Tensor) -> Tensor:
    """What the matrix is multiplied with in one run, as float64 rows (times, ins). Not where space is split."""
    assert layer.split == "channel"
    value = value.detach().double()
    if op_name(layer.node) == LINEAR:
        return value.reshape(-1, layer.ins)
    weight = layer.node.args[1]
    assert isinstance(weight, Node)
    options = conv_options(layer.node)
    kernel = list(weight.meta["val"].shape[2:])
    padding, stride, dilation = (_sizes(options[key]) for key in ("padding", "stride", "dilation"))
    value = F.pad(value, [size for pad in reversed(padding) for size in (pad, pad)])
    for place, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True)):
        windows = value.unfold(place + 2, (size - 1) * apart + 1, step)
        value = windows[..., ::apart]  # the window of this dimension comes last
    rank = len(kernel)
    order = [0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank)]
    return value.permute(order).reshape(-1, layer.ins)


def replace_layer(edit: Edit, layer: Layer, front: Tensor, back: Tensor, shift: Tensor | None = None) -> Node:
    """Put two thin layers in the place of one. Returns the one behind.

    Args:
        edit: the program that has the layer.
        layer: as `layer_of` gave it.
        front: (rank, ins), of the layer in front, which has no bias.
        back: (outs, rank), of the one behind, which has the old bias.
        shift: (outs,), added to the bias; for layers that have one.
    """
    node, rank = layer.node, front.shape[0]
    old, bias = node.args[1], bias_of(node)
    dtype = node.meta["val"].dtype
    assert isinstance(old, Node)
    if shift is not None:
        value = edit.tensor(bias)
        assert value is not None
        moved = (value.double() + shift).to(dtype)
        assert bias is not None
        if len(bias.users) > 1:
            bias = edit.add_tensor(edit.target(bias), moved, parameter=True)
        else:
            edit.set_tensor(bias, moved)
    if op_name(node) == LINEAR:
        v = edit.add_tensor(f"{layer.name}.front.weight", front.to(dtype), parameter=True)
        u = edit.add_tensor(f"{layer.name}.back.weight", back.to(dtype), parameter=True)
        thin = edit.call(node.target, (layer.source, v), like=node)
        thick = edit.call(node.target, (thin, u, *([bias] if bias is not None else [])), like=node)
    else:
        thin, thick = _convs(edit, layer, front.to(dtype), back.to(dtype), bias, rank)
    edit.replace(node, thick)
    edit.graph.erase_node(old)
    return thick


def _convs(edit: Edit, layer: Layer, front: Tensor, back: Tensor, bias: Node | None, rank: int) -> tuple[Node, Node]:
    node, options = layer.node, conv_options(layer.node)
    weight = node.args[1]
    assert isinstance(weight, Node)
    _, ins, *kernel = weight.meta["val"].shape
    stride, padding, dilation = (_sizes(options[key]) for key in ("stride", "padding", "dilation"))
    ones, zeros = [1] * len(kernel), [0] * len(kernel)
    if layer.split == "space":
        outs = layer.outs // kernel[1]
        v_shape, u = (rank, ins, kernel[0], 1), back.reshape(outs, kernel[1], 1, rank).permute(0, 3, 2, 1)
        first = ([stride[0], 1], [padding[0], 0], [dilation[0], 1])
        second = ([1, stride[1]], [0, padding[1]], [1, dilation[1]])
    else:
        v_shape, u = (rank, ins, *kernel), back.reshape(layer.outs, rank, *ones)
        first, second = (stride, padding, dilation), (ones, zeros, ones)
    v_node = edit.add_tensor(f"{layer.name}.front.weight", front.reshape(v_shape), parameter=True)
    u_node = edit.add_tensor(f"{layer.name}.back.weight", u, parameter=True)
    thin = edit.call(node.target, (layer.source, v_node, None, *first), like=node)
    return thin, edit.call(node.target, (thin, u_node, bias, *second), like=node)


def _sizes(value: object) -> list[int]:
    assert isinstance(value, Sequence)
    return [int(size) for size in value]
