"""The cost of one call by formula, from the extents of its tensors: integers, or polynomials in axis extents.

A multiply-add is two FLOPs. Elementwise operators count as _PER_ELEMENT says, one by default; operators that only move
or rename data count none. Bytes are those of the operator on its own, without fusion: each operand read once, the
result written once; views move nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from graphopt.cost import recurrent
from graphopt.cost.polynomial import Polynomial
from graphopt.exported import op_name

Extent = int | Polynomial


def product(extents: Iterable[Extent]) -> Extent:
    """Of all of them; 1 of none."""
    out: Extent = 1
    for extent in extents:
        out = out * extent
    return out


def total(values: Iterable[Extent]) -> Extent:
    """The sum of all of them; 0 of none."""
    given = list(values)
    if any(isinstance(value, Polynomial) for value in given):
        return Polynomial.sum(given)
    return sum(value for value in given if isinstance(value, int))


@dataclass(frozen=True)
class Shaped:
    """A tensor as formulas see it: its extents, and the bytes of an element."""

    shape: tuple[Extent, ...]
    item_bytes: int

    @property
    def numel(self) -> Extent:
        """Elements."""
        return product(self.shape)

    @property
    def bytes(self) -> Extent:
        """Bytes of all elements."""
        return self.numel * self.item_bytes


# What the results of a node are, one after another.
Shapes = Callable[[Node], Sequence[Shaped]]


@dataclass(frozen=True)
class Counts:
    """What one call costs, parameters aside: FLOPs, multiply-adds, bytes read and written."""

    flops: Extent = 0
    macs: Extent = 0
    bytes_read: Extent = 0
    bytes_written: Extent = 0


def tensors(value: object) -> Iterator[Tensor]:
    """The tensors in what a node's meta["val"] holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def numbers(node: Node) -> Sequence[Shaped]:
    """The results of a node with the extents that they have."""
    found = tensors(node.meta.get("val"))
    return [Shaped(tuple(map(int, tensor.shape)), tensor.element_size()) for tensor in found]


def base_name(node: Node) -> str:
    """The operator without namespace and overload: `conv2d`."""
    space, dot, rest = op_name(node).partition(".")
    return (rest if dot else space).partition(".")[0]


def renames(node: Node) -> bool:
    """Whether a call only gives a name to what is in memory already."""
    return base_name(node) in _FREE


def counts(node: Node, shapes: Shapes) -> Counts:
    """The cost of one call. An operator that is not known counts as elementwise."""
    if renames(node):
        return Counts()
    call = Call(node, shapes)
    written = total(result.bytes for result in call.results)
    if call.op in _GATHERS:  # reads as many elements as it writes, and the indices; not the whole table
        indices = total(tensor.bytes for source in node.all_input_nodes[1:] for tensor in shapes(source))
        return Counts(bytes_read=written + indices, bytes_written=written)
    read = total(tensor.bytes for source in node.all_input_nodes for tensor in shapes(source))
    macs = _MACS[call.op](call) if call.op in _MACS else 0
    return Counts(flops=2 * macs + _extra_flops(call), macs=macs, bytes_read=read, bytes_written=written)


class Call:
    """One call as formulas see it."""

    def __init__(self, node: Node, shapes: Shapes) -> None:
        self.node, self.op = node, base_name(node)
        self.results = list(shapes(node))
        self.shapes = shapes

    @property
    def numel(self) -> Extent:
        """Elements of all results."""
        return total(result.numel for result in self.results)

    def shape(self, value: object) -> tuple[Extent, ...]:
        """The extents of a tensor argument."""
        assert isinstance(value, Node)
        return self.shapes(value)[0].shape

    def argument(self, place: int, name: str) -> object:
        """An argument by place or name; None where it is left out."""
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name)


# Multiply-adds --------------------------------------------------------------------------------------------------------


def _conv(call: Call) -> Extent:
    args = call.node.args
    transposed = "transpose" in call.op or (call.op == "convolution" and bool(args[6]))
    # weight: (o, i / groups, *kernel), or (i, o / groups, *kernel) where transposed
    positions = product(call.shape(args[0])) if transposed else call.numel
    return positions * product(call.shape(args[1])[1:])


def _inner(place: int) -> Callable[[Call], Extent]:
    """Matrix products: each element of the result sums over the last dimension of the operand at `place`."""
    return lambda call: call.numel * call.shape(call.node.args[place])[-1]


def _attention(call: Call) -> Extent:
    query, key, value = (call.shape(argument) for argument in call.node.args[:3])
    return product(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(call: Call) -> Extent:
    """Operands are contracted one after another, as torch does; what sums over nothing is a plain multiplication."""
    operands = call.node.args[1]
    assert isinstance(operands, (list, tuple))
    left, _, right = str(call.node.args[0]).replace(" ", "").partition("->")
    if "->" not in str(call.node.args[0]):
        right = "".join(name for name in left if name == "." or (name.isalpha() and left.count(name) == 1))
    sizes: dict[str, Extent] = {}
    terms = []
    for term, operand in zip(left.split(","), operands, strict=True):
        before, dots, after = term.partition("...")
        shape = call.shape(operand)
        # Leading dimensions are aligned at their end: they are ...1, the last, ...2, the one before, and so on.
        leading = [f"...{n}" for n in range(len(shape) - len(before) - len(after), 0, -1)] if dots else []
        names = (*before, *leading, *after)
        sizes |= {name: size for name, size in zip(names, shape, strict=True) if sizes.get(name, 1) == 1}
        terms.append(set(names))
    macs: Extent = 0
    kept = {name for name in sizes if name in right or name.startswith("...")}
    done = terms[0]
    for place, own in enumerate(terms[1:], 1):
        later = kept.union(*terms[place + 1 :])
        # What only one of the two has, and nobody later, is summed before they meet.
        both = {name for name in done | own if name in later or (name in done and name in own)}
        if not both <= later:
            macs = macs + product(sizes[name] for name in both)
        done = both & later
    return macs


_MACS: dict[str, Callable[[Call], Extent]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv),
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "mv", "dot", "_grouped_mm", "grouped_mm_fallback"), _inner(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), _inner(1)),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    **dict.fromkeys(recurrent.LAYERS | recurrent.CELLS, lambda call: recurrent.macs(call.op, call.node, call.shape)),
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


def _extra_flops(call: Call) -> Extent:
    """FLOPs that are no multiply-adds of a matrix product."""
    if call.op in recurrent.LAYERS | recurrent.CELLS:
        return recurrent.extra_flops(call.op, call.node, call.shape)
    if call.op in _MACS:
        if call.op == "scaled_dot_product_attention":
            query, key = call.shape(call.node.args[0]), call.shape(call.node.args[1])
            return product(query[:-1]) * key[-2] * (1 + _PER_ELEMENT["softmax"])
        if call.op == "einsum" and not _einsum(call):
            return call.numel
        biased = call.op.startswith("add") or call.op == "baddbmm" or isinstance(call.argument(2, "bias"), Node)
        return call.numel if biased else 0
    if call.op in _NO_FLOPS:
        return 0
    if call.op in _REDUCTIONS:
        sources = call.node.all_input_nodes[:1]
        return product(call.shape(sources[0])) if sources else 0
    elements = call.results[0].numel if call.results else 0
    if "_pool" in call.op:
        window = call.argument(1, "kernel_size")
        rank = next((count for suffix, count in _SPATIAL.items() if suffix in call.op), 1)
        sizes = window if isinstance(window, (list, tuple)) else [window]
        full = list(sizes) * (rank if len(sizes) == 1 else 1)
        source = next(tensors(call.node.all_input_nodes[0].meta["val"])).shape[-rank:]
        # What a window has beyond the input is skipped (EfficientNet's is 2560 wide, so as to take in everything).
        return elements * product(min(int(size), int(most)) for size, most in zip(full, source, strict=True))
    return elements * _PER_ELEMENT.get(call.op, 1)
