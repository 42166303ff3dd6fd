"""What a program costs: FLOPs, multiply-adds, parameters and bytes moved, per node and in all, from shapes alone.

A multiply-add is two FLOPs. Elementwise operators count as _PER_ELEMENT says, one by default; operators that only move
or rename data count none. Bytes are those of the operator on its own, without fusion: each operand read once, the
result written once; views move nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from graphopt.exported import op_name
from graphopt.place import place
from graphopt.program import Program


@dataclass(frozen=True)
class Cost:
    """FLOPs (two per multiply-add), multiply-adds, parameters (elements), bytes read and written."""

    flops: int = 0
    macs: int = 0
    params: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[int, ...]:
        return (self.flops, self.macs, self.params, self.bytes_read, self.bytes_written)


@dataclass(frozen=True)
class Row:
    """One node: where it comes from in the user's names, its operator, the shape of its (first) result, its cost."""

    name: str
    where: str
    op: str
    shape: tuple[int, ...]
    cost: Cost


@dataclass(frozen=True)
class Summary:
    """The cost of a program: a row per node that computes, and the totals.

    `total.params` counts each parameter once, however often it is used; `stored_bytes` are the bytes of parameters,
    buffers and constants together.
    """

    rows: tuple[Row, ...]
    total: Cost
    stored_bytes: int

    @property
    def ops(self) -> dict[str, int]:
        """How often each operator occurs, the most frequent first."""
        return dict(Counter(row.op for row in self.rows).most_common())


def summary(program: Program) -> Summary:
    """Cost of every node and in all. A parameter counts at the first node that uses it."""
    specs = program.exported.graph_signature.input_specs
    parameters = {spec.arg.name for spec in specs if spec.kind is InputKind.PARAMETER}
    rows, seen = [], set[str]()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        cost = node_cost(node)
        fresh = [i for i in node.all_input_nodes if i.name in parameters and i.name not in seen]
        seen |= {i.name for i in fresh}
        cost += Cost(params=sum(_numel(i) for i in fresh))
        shapes = [tuple(map(int, tensor.shape)) for tensor in _tensors(node.meta.get("val"))]
        rows.append(Row(node.name, place(node), op_name(node), shapes[0] if shapes else (), cost))
    total = sum((row.cost for row in rows), Cost())
    return Summary(tuple(rows), total, program.parameters_bytes)


def node_cost(node: Node) -> Cost:
    """The cost of one call, without parameters. An operator that is not known counts as elementwise."""
    op = _base_name(node)
    if op in _FREE:
        return Cost()
    written = sum(_bytes(tensor) for tensor in _tensors(node.meta.get("val")))
    if op in _GATHERS:  # reads as many elements as it writes, and the indices; not the whole table
        indices = sum(_bytes(tensor) for i in node.all_input_nodes[1:] for tensor in _tensors(i.meta.get("val")))
        return Cost(bytes_read=written + indices, bytes_written=written)
    read = sum(_bytes(tensor) for i in node.all_input_nodes for tensor in _tensors(i.meta.get("val")))
    macs = _MACS[op](node) if op in _MACS else 0
    flops = 2 * macs + _extra_flops(op, node)
    return Cost(flops=flops, macs=macs, bytes_read=read, bytes_written=written)


def _base_name(node: Node) -> str:
    return op_name(node).removeprefix("aten.").partition(".")[0]


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _numel(node: Node) -> int:
    return sum(int(tensor.numel()) for tensor in _tensors(node.meta.get("val")))


def _bytes(tensor: Tensor) -> int:
    return int(tensor.numel()) * tensor.element_size()


def _shape(value: object) -> tuple[int, ...]:
    assert isinstance(value, Node)
    return tuple(map(int, value.meta["val"].shape))


def _argument(node: Node, place: int, name: str) -> object:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


# Multiply-adds --------------------------------------------------------------------------------------------------------


def _conv(node: Node) -> int:
    transposed = "transpose" in _base_name(node) or (_base_name(node) == "convolution" and bool(node.args[6]))
    weight = _shape(node.args[1])
    # weight: (o, i / groups, *kernel), or (i, o / groups, *kernel) where transposed
    positions = math.prod(_shape(node.args[0])) if transposed else _numel(node)
    return positions * math.prod(weight[1:])


def _inner(place: int) -> Callable[[Node], int]:
    """Matrix products: each element of the result sums over the last dimension of the operand at `place`."""
    return lambda node: _numel(node) * _shape(node.args[place])[-1]


def _attention(node: Node) -> int:
    query, key, value = (_shape(argument) for argument in node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(node: Node) -> int:
    operands = node.args[1]
    assert isinstance(operands, (list, tuple))
    terms = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
    if "..." in str(node.args[0]) or len(operands) < 2:
        return 0
    extents = {letter: size for term, o in zip(terms, operands, strict=True) for letter, size in zip(term, _shape(o))}  # noqa: B905 (checked by einsum)
    return math.prod(extents.values())


_MACS: dict[str, Callable[[Node], int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv),
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "mv", "dot"), _inner(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), _inner(1)),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
}

# Other FLOPs ----------------------------------------------------------------------------------------------------------

# Names for what is in memory already.
_FREE = frozenset({
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "t", "permute", "numpy_T", "movedim",
    "unsqueeze", "squeeze", "expand", "expand_as", "view_as", "slice", "select", "narrow", "split", "split_with_sizes",
    "chunk", "unbind", "alias", "detach", "as_strided", "diagonal", "getitem", "lift_fresh", "sym_size", "unfold",
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size",
})  # fmt: skip
# Look-ups: as much is read as is written.
_GATHERS = frozenset({"embedding", "index", "index_select", "gather", "take", "take_along_dim"})
# Movement and creation.
_NO_FLOPS = frozenset({
    "clone", "contiguous", "copy", "_to_copy", "to", "type_as", "lift_fresh_copy", "cat", "concat", "stack", "pad",
    "constant_pad_nd", "roll", "flip", "repeat", "repeat_interleave", "tile", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "select_scatter", "slice_scatter", "scatter", "index_put", "full", "full_like", "zeros", "ones",
    "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full", "new_empty", "empty", "empty_like", "arange", "eye",
    "linspace", "scalar_tensor", "tril", "triu", "meshgrid", "fill", "dropout", "upsample_nearest2d", "one_hot",
})  # fmt: skip
# Of each element that is read.
_REDUCTIONS = frozenset({
    "sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "argmax", "argmin", "cumsum", "cumprod",
    "logsumexp", "topk", "sort", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool2d",
})  # fmt: skip
# Of each element of the result: the textbook form with every arithmetic operation and every function call as one.
_PER_ELEMENT = {
    "softmax": 5, "_softmax": 5, "log_softmax": 5, "_log_softmax": 5, "layer_norm": 8, "native_layer_norm": 8,
    "group_norm": 8, "native_group_norm": 8, "instance_norm": 8, "rms_norm": 5, "batch_norm": 2,
    "_native_batch_norm_legit_no_training": 2, "gelu": 5, "silu": 4, "mish": 5, "sigmoid": 3, "hardswish": 4,
    "hardsigmoid": 3, "hardtanh": 2, "relu6": 2, "clamp": 2, "softplus": 3, "elu": 3, "glu": 4, "addcmul": 3,
    "upsample_bilinear2d": 8, "var": 4, "std": 5,
}  # fmt: skip
_SPATIAL = {"1d": 1, "2d": 2, "3d": 3}


def _extra_flops(op: str, node: Node) -> int:
    """FLOPs that are no multiply-adds of a matrix product."""
    if op in _MACS:
        if op == "scaled_dot_product_attention":
            query, key = _shape(node.args[0]), _shape(node.args[1])
            return math.prod(query[:-1]) * key[-2] * (1 + _PER_ELEMENT["softmax"])
        biased = op.startswith("add") or op == "baddbmm" or isinstance(_argument(node, 2, "bias"), Node)
        return _numel(node) if biased else 0
    if op in _NO_FLOPS:
        return 0
    if op in _REDUCTIONS:
        return sum(_numel(i) for i in node.all_input_nodes[:1])
    results = list(_tensors(node.meta.get("val")))
    elements = int(results[0].numel()) if results else 0
    if "_pool" in op:
        window = _argument(node, 1, "kernel_size")
        rank = next((count for suffix, count in _SPATIAL.items() if suffix in op), 1)
        sizes = window if isinstance(window, (list, tuple)) else [window]
        full = list(sizes) * (rank if len(sizes) == 1 else 1)
        return elements * math.prod(size for size in full if isinstance(size, int))
    return elements * _PER_ELEMENT.get(op, 1)
