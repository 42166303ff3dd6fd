"""The layers whose weights passes set to zero: which they are, and their weights as matrices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes.axes import operator_of
from graphopt.edit import Edit
from graphopt.errors import Decline
from graphopt.passes.checks import check_included, matches, not_excluded
from graphopt.refit import Layer, layer_of

# Convolutions of no more channels read the image itself: all of the signal goes through few weights.
STEM_CHANNELS = 4
# What multiplies by a weight that has no matrix view here.
_OTHERS = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "bmm", "baddbmm", "einsum",
           "lstm", "gru", "bilinear"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SparseLayer:
    """A layer with a stored weight that nothing else reads, under the user's name for it.

    As a matrix, in the order of `graphopt.sparsity`, the weight is (outs, taps x channels), channels fastest; of a
    convolution in groups the channels are those of one group.
    """

    layer: Layer
    name: str
    outs: int
    taps: int
    channels: int

    @property
    def node(self) -> Node:
        """The call."""
        return self.layer.node

    @property
    def weight(self) -> Node:
        """The placeholder of the weight."""
        return self.layer.weight

    @property
    def ins(self) -> int:
        """Columns of the matrix."""
        return self.taps * self.channels

    @property
    def size(self) -> int:
        """Elements of the weight."""
        return self.outs * self.ins

    @property
    def times(self) -> int:
        """How often each weight is multiplied in a run."""
        return self.layer.rows_in(self.node.meta["val"])

    @property
    def place_of_outs(self) -> int:
        """The weight's dimension of outputs; `Layer.contracted` is that of the channels."""
        return 1 - self.layer.contracted

    def matrix(self, tensor: Tensor) -> Tensor:
        """Something of the weight's shape as (outs, ins)."""
        if self.layer.flipped:
            return tensor.T
        return tensor.movedim(1, -1).reshape(self.outs, self.ins)

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if self.layer.flipped:
            return matrix.T
        kernel = self.layer.kernel
        return matrix.reshape(self.outs, *kernel, self.channels).movedim(-1, 1)

    def rows(self, value: Tensor, out: Tensor, chosen: Tensor) -> Tensor:
        """What the matrix is multiplied with, in the order of its columns: (groups, rows, ins), as `Layer.inputs`."""
        inputs = self.layer.inputs(value, out, chosen)
        groups, rows, _ = inputs.shape
        return inputs.reshape(groups, rows, self.channels, self.taps).mT.reshape(groups, rows, self.ins)


def sparse_layers(edit: Edit, name: str, include: Sequence[str], exclude: Sequence[str]) -> list[SparseLayer]:
    """The layers to be made sparse, in graph order; notes those that are left alone, and why.

    Args:
        edit: has the program.
        name: the pass's.
        include: patterns of names. Layers that they name are taken even where they would stay dense by default.
        exclude: patterns of names that stay dense.

    Raises:
        BadOption: a pattern of `include` is no layer's.
    """
    tensors = edit.program.tensors
    shared = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    found, names = [], []
    for node in edit.graph.nodes:
        layer = layer_of(edit, node, shared)
        if isinstance(layer, str):
            edit.decline(node, layer)
        elif layer is None:
            if node.op == "call_function" and operator_of(node) in _OTHERS and _has_weight(edit, node):
                edit.decline(node, f"the weight of {operator_of(node)} is not made sparse")
        else:
            own = _sparse_layer(edit, layer)
            names.append(own.name)
            if include and not matches(own.name, include):
                continue
            if matches(own.name, exclude):
                edit.declined.append(Decline(own.name, "excluded"))
            elif not include and (reason := _stays_dense(own)):
                edit.declined.append(Decline(own.name, reason))
            else:
                found.append(own)
    check_included(name, include, names, "layer")
    edit.notes += not_excluded(exclude, names, "layer")
    return found


def _sparse_layer(edit: Edit, layer: Layer) -> SparseLayer:
    groups, outs, ins = layer.shape
    taps = math.prod(layer.kernel)
    name = edit.target(layer.weight).removesuffix(".weight")
    return SparseLayer(layer, name, groups * outs, taps, ins // taps)


def _stays_dense(layer: SparseLayer) -> str:
    """Why a layer is left alone unless it is named; "" where it is not."""
    if not layer.layer.kernel:
        return ""
    if layer.layer.groups > 1 and layer.channels == 1:
        return f"a depthwise convolution has {layer.taps} weights a channel, none to spare; include names it"
    if layer.channels * layer.layer.groups <= STEM_CHANNELS:
        return f"the stem reads {layer.channels} channels, all of the signal; include names it"
    return ""


def _has_weight(edit: Edit, node: Node) -> bool:
    tensors = [edit.tensor(source) for source in node.all_input_nodes]
    return any(tensor is not None and tensor.is_floating_point() and tensor.dim() > 1 for tensor in tensors)


def masked(weight: Tensor, kept: Tensor) -> Tensor:
    """The weight with zeros where it is not kept; what is kept has its very bits."""
    return torch.where(kept, weight, torch.zeros((), dtype=weight.dtype))
