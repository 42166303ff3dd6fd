"""Layers whose weights can be fitted anew: linear layers, products with a stored matrix, and convolutions.

A layer is `groups` matrices (outs, ins) times rows of inputs: of a convolution a row is what lies under the kernel at
one position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from graphopt.axes.axes import operator_of
from graphopt.edit import Edit

BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")
_CONVS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
# Arguments of what is multiplied, the weight, and what is added.
_PRODUCTS = {
    "linear": ("input", "weight", "bias"),
    "matmul": ("self", "other", ""),
    "mm": ("self", "mat2", ""),
    "addmm": ("mat1", "mat2", "self"),
}


@dataclass(frozen=True)
class Layer:
    """A call, its stored weight, and where its bias can be set: in its own, or in the mean that a batch norm takes off.

    `sign` is -1 for the latter. `kernel` is empty for all but convolutions; `flipped`: the weight is (ins, outs).
    `options` are the literal arguments of a convolution by name.
    """

    node: Node
    source: Node
    weight: Node
    bias: Node | None
    sign: int
    groups: int
    flipped: bool
    kernel: tuple[int, ...]
    options: Mapping[str, object]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, outs, ins)."""
        size = self.weight.meta["val"].shape
        outs = int(size[1] if self.flipped else size[0])
        return self.groups, outs // self.groups, int(size.numel()) // outs

    @property
    def contracted(self) -> int:
        """The dimension of the weight that is summed over, beside those of the kernel."""
        return 0 if self.flipped else 1

    def rows_in(self, out: Tensor) -> int:
        """How many rows a result has."""
        return out.numel() // (self.groups * self.shape[1])

    def inputs(self, value: Tensor, out: Tensor, rows: Tensor) -> Tensor:
        """What the matrices are multiplied with: (groups, rows, ins), for some rows of the result."""
        if not self.kernel:
            return value.reshape(-1, value.shape[-1])[rows][None]
        value = F.pad(value, self._padding())
        stride, dilation = (self._sizes(name) for name in ("stride", "dilation"))
        for place, (size, step, apart) in enumerate(zip(self.kernel, stride, dilation, strict=True), 2):
            value = value.unfold(place, (size - 1) * apart + 1, step)[..., ::apart]
        at = torch.unravel_index(rows, (out.shape[0], *out.shape[2:]))
        value = value.movedim(1, len(self.kernel) + 1)  # (n, *places, channels, *kernel)
        windows = value[at]
        return windows.reshape(len(rows), self.groups, self.shape[2]).transpose(0, 1)

    def outputs(self, out: Tensor, rows: Tensor) -> Tensor:
        """(groups, rows, outs), for some rows of a result."""
        flat = (out.movedim(1, -1) if self.kernel else out).reshape(-1, self.groups * self.shape[1])
        return flat[rows].reshape(len(rows), self.groups, self.shape[1]).transpose(0, 1)

    def matrices(self, weight: Tensor) -> Tensor:
        """Something of the weight's shape as (groups, outs, ins)."""
        return (weight.T if self.flipped else weight).reshape(self.shape)

    def add(self, edit: Edit, correction: Tensor, shift: Tensor) -> None:
        """Add (groups, outs, ins) to the weight and (groups, outs) to the bias."""
        weight = edit.tensor(self.weight)
        assert weight is not None
        change = correction.reshape(-1, correction.shape[-1])
        change = change.T if self.flipped else change.reshape(weight.shape)
        edit.set_tensor(self.weight, (weight.double() + change).to(weight.dtype))
        if self.bias is not None:
            bias = edit.tensor(self.bias)
            assert bias is not None
            edit.set_tensor(self.bias, (bias.double() + self.sign * shift.reshape(bias.shape)).to(bias.dtype))

    def _sizes(self, name: str) -> list[int]:
        value = self.options[name]
        assert isinstance(value, Sequence)
        return [int(size) for size in value] * (len(self.kernel) if len(value) == 1 else 1)

    def _padding(self) -> list[int]:
        """What is added on each side, from the last dimension to the first, as `F.pad` takes it."""
        padding = self.options["padding"]
        if not isinstance(padding, str):
            return [size for size in reversed(self._sizes("padding")) for _ in range(2)]
        if padding == "valid":
            return [0, 0] * len(self.kernel)
        both = [(size - 1) * apart for size, apart in zip(self.kernel, self._sizes("dilation"), strict=True)]
        return [part for total in reversed(both) for part in (total // 2, total - total // 2)]


def layer_of(edit: Edit, node: Node, shared: Mapping[int, int]) -> Layer | str | None:
    """The layer that a call is; why its weight cannot be fitted; None for a call that multiplies with no weight.

    Args:
        edit: has the call.
        node: a call.
        shared: how many placeholders stand for a tensor, by the address of its storage.
    """
    kind = operator_of(node) if node.op == "call_function" else ""
    if kind not in _PRODUCTS and kind not in _CONVS:
        return None
    given = _arguments(node)
    source, weight, bias = (given.get(name) for name in _PRODUCTS.get(kind, _PRODUCTS["linear"]))
    if not isinstance(weight, Node) or not isinstance(source, Node) or weight.op != "placeholder":
        return None
    tensor = edit.tensor(weight)
    if tensor is None or not tensor.is_floating_point():
        return None
    if not _is_alone(edit, weight, shared):
        return "its weight is used more than once"
    flat = kind in _PRODUCTS
    rank = 2 if flat else _CONVS[kind] + 2
    if tensor.dim() != rank or (not flat and source.meta["val"].dim() != rank):
        return f"a weight of {tensor.dim()} dimensions"
    if kind == "addmm" and (given.get("alpha", 1) != 1 or given.get("beta", 1) != 1):
        return "a product with factors"
    outs = int(tensor.shape[1] if flat and kind != "linear" else tensor.shape[0])
    sign = 1 if isinstance(bias, Node) else -1
    place = bias if sign > 0 else _mean_behind(node)
    return Layer(
        node=node,
        source=source,
        weight=weight,
        bias=place if isinstance(place, Node) and _is_bias(edit, place, outs, shared) else None,
        sign=sign,
        groups=1 if flat else int(given["groups"]),
        flipped=flat and kind != "linear",
        kernel=() if flat else tuple(map(int, tensor.shape[2:])),
        options={} if flat else {name: given[name] for name in ("stride", "padding", "dilation")},
    )


def _arguments(node: Node) -> dict[str, Any]:
    """All arguments of a call by their names in the operator's schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    defaults = {each.name: each.default_value for each in schema if each.has_default_value()}
    return {**defaults, **{each.name: value for each, value in zip(schema, node.args, strict=False)}, **node.kwargs}


def _mean_behind(node: Node) -> object:
    """The running mean of the batch norm that alone reads a result."""
    users = list(node.users)
    if len(users) != 1 or operator_of(users[0]) not in BATCH_NORMS or users[0].args[0] is not node:
        return None
    return users[0].args[3]


def _is_bias(edit: Edit, node: Node, outs: int, shared: Mapping[int, int]) -> bool:
    tensor = edit.tensor(node)  # None where the program updates it
    return tensor is not None and tuple(tensor.shape) == (outs,) and _is_alone(edit, node, shared)


def _is_alone(edit: Edit, node: Node, shared: Mapping[int, int]) -> bool:
    tensor = edit.tensor(node)
    assert tensor is not None
    return len(node.users) == 1 and shared.get(tensor.untyped_storage().data_ptr(), 1) == 1
