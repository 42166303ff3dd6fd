"""Where stored weights are multiplied with something computed, and how large that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes
from graphopt.exported import op_name
from graphopt.observe import watch

Squares = Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class Use:
    """One call that sums products of a stored weight with a computed value.

    `squares` makes of the value of `source` the sum of squares, over batch and positions, of what each element of the
    weight is multiplied with: float64, broadcastable to the weight. `summed` are the weight's dimensions that this call
    sums over.
    """

    node: Node
    weight: Node
    source: Node
    summed: frozenset[int]
    squares: Squares


def op(node: Node) -> str:
    """`conv2d` for aten.conv2d.default; "" for what is no call."""
    return (
        op_name(node).rpartition("::")[2].removeprefix("aten.").partition(".")[0] if node.op == "call_function" else ""
    )


def given(node: Node) -> dict[str, Any]:
    """The arguments of a call by the names of its schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    known = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**known, **dict(zip([a.name for a in schema.arguments], node.args, strict=False)), **node.kwargs}


def uses(axes: Axes) -> Iterator[Use]:
    """All of a program, in the order of its calls. Weights that are computed from others are not found."""
    for node in axes.dims:
        if (finder := _FINDERS.get(op(node))) is not None:
            for use in finder(node, given(node)):
                if axes.is_stored(use.weight) and not axes.is_stored(use.source):
                    yield use


def input_norms(
    axes: Axes, found: Iterable[Use], batches: Iterable[Mapping[str, Tensor]]
) -> Iterator[tuple[Use, Tensor]]:
    """For each use the L2 norm of what each element of its weight meets, per batch: sqrt(sum of squares / batches)."""
    by_source: dict[str, list[Use]] = {}
    for use in found:
        by_source.setdefault(use.source.name, []).append(use)
    sums: dict[Use, Tensor] = {}
    counts = dict.fromkeys(by_source, 0)

    def see(name: str, value: Any) -> None:
        counts[name] += 1
        for use in by_source[name]:
            squares = use.squares(value)
            sums[use] = sums[use] + squares if use in sums else squares

    watch(axes.program, batches, by_source, see)
    for use, total in sums.items():
        yield use, (total / counts[use.source.name]).sqrt()


# How each operator multiplies -----------------------------------------------------------------------------------------


def _square(value: Tensor) -> Tensor:
    return value.double().square()


def _to(squares: Tensor, shape: Iterable[int]) -> Tensor:
    """Sum what broadcasting to `shape` would repeat."""
    sizes = list(shape)
    squares = squares.sum(tuple(range(squares.dim() - len(sizes)))) if squares.dim() > len(sizes) else squares
    ones = [n for n, size in enumerate(sizes[len(sizes) - squares.dim() :]) if size == 1 and squares.shape[n] > 1]
    return squares.sum(ones, keepdim=True) if ones else squares


def _last(value: Tensor) -> Tensor:
    return _square(value).reshape(-1, value.shape[-1]).sum(0)


def _linear(node: Node, call: Mapping[str, Any]) -> Iterator[Use]:
    yield Use(node, call["weight"], call["input"], frozenset({1}), lambda x: _last(x)[None, :])


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(map(int, node.meta["val"].shape))


def _channels(weight: tuple[int, ...], groups: int, transposed: bool, value: Tensor) -> Tensor:
    spatial = len(weight) - 2
    batched = value if value.dim() == len(weight) else value[None]
    squares = _square(batched).sum((0, *range(2, batched.dim())))
    if transposed:
        return squares.view(-1, 1, *[1] * spatial)
    per_group = squares.view(groups, 1, -1).expand(groups, weight[0] // groups, -1)
    return per_group.reshape(weight[0], -1, *[1] * spatial)


def _convolution(node: Node, call: Mapping[str, Any]) -> Iterator[Use]:
    transposed = bool(call.get("transposed", "transpose" in op(node)))
    squares = partial(_channels, _shape(call["weight"]), int(call["groups"]), transposed)
    # A transposed one sums over the first dimension, but for the groups in it.
    summed = frozenset({0}) if transposed and call["groups"] == 1 else frozenset() if transposed else frozenset({1})
    yield Use(node, call["weight"], call.get("input", call.get("self")), summed, squares)


def _right(weight: tuple[int, ...], value: Tensor) -> Tensor:
    """`value` @ weight."""
    if len(weight) <= 2:
        return _last(value).view(-1, *[1] * (len(weight) - 1))
    squares = _square(value)
    squares = squares.sum(-2) if squares.dim() > 1 else squares
    return _to(squares.unsqueeze(-1), (*weight[:-1], 1))


def _left(weight: tuple[int, ...], value: Tensor) -> Tensor:
    """weight @ `value`."""
    squares = _square(value)
    squares = squares.sum(-1).unsqueeze(-2) if squares.dim() > 1 else squares[None]
    return _to(squares, (*weight[:-2], 1, weight[-1])) if len(weight) > 1 else squares.reshape(-1, weight[-1]).sum(0)


def _product(node: Node, call: Mapping[str, Any]) -> Iterator[Use]:
    names = [("mat1", "mat2"), ("batch1", "batch2"), ("self", "mat2"), ("self", "other"), ("self", "vec")]
    a, b = next((call[x], call[y]) for x, y in names if x in call and y in call)
    rank = len(_shape(b))
    yield Use(node, b, a, frozenset({max(rank - 2, 0)}), partial(_right, _shape(b)))
    yield Use(node, a, b, frozenset({len(_shape(a)) - 1}), partial(_left, _shape(a)))


def _einsum(node: Node, call: Mapping[str, Any]) -> Iterator[Use]:
    terms, arrow, result = str(call["equation"]).replace(" ", "").partition("->")
    names, operands = terms.split(","), list(call["tensors"])
    plain = arrow and len(names) == 2 and "." not in terms and all(len(set(name)) == len(name) for name in names)
    if not plain:
        return
    for own, other in ((0, 1), (1, 0)):
        weight, shape = names[own], _shape(operands[own])
        shared = [letter for letter in weight if letter in names[other]]
        summed = frozenset(n for n, letter in enumerate(weight) if letter not in result)
        sizes = [size if letter in shared else 1 for letter, size in zip(weight, shape, strict=True)]
        equation = f"{names[other]}->{''.join(shared)}"
        yield Use(node, operands[own], operands[other], summed, partial(_by_letters, equation, sizes))


def _by_letters(equation: str, sizes: list[int], value: Tensor) -> Tensor:
    return torch.einsum(equation, _square(value)).reshape(sizes)


def _embedding(node: Node, call: Mapping[str, Any]) -> Iterator[Use]:
    """A product with one-hot rows: how often each word occurs."""
    words = _shape(call["weight"])[0]
    counts = partial(torch.bincount, minlength=words)
    yield Use(node, call["weight"], call["indices"], frozenset(), lambda x: counts(x.flatten()).double()[:, None])


def _recurrent(node: Node, call: Mapping[str, Any]) -> Iterator[Use]:
    """The first layer's input is known, of the states only those that come out last; inner layers are taken alike."""
    if "input" not in call:
        return
    params, two = list(call["params"]), 2 if call["bidirectional"] else 1
    per = len(params) // (int(call["num_layers"]) * two)
    for place in range(0, len(params), per):
        layer, side = divmod(place // per, two)
        outer, hidden = params[place], params[place + 1]
        size = _shape(hidden)[1]
        if layer == 0:
            yield Use(node, outer, call["input"], frozenset({1}), lambda x: _last(x)[None, :])
        else:
            yield Use(node, outer, node, frozenset({1}), lambda results: _last(results[0])[None, :])
        yield Use(node, hidden, node, frozenset({1}), partial(_state, side * size, size))


def _state(start: int, size: int, results: Any) -> Tensor:
    return _last(results[0])[None, start : start + size]


_FINDERS: dict[str, Callable[[Node, Mapping[str, Any]], Iterator[Use]]] = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("mm", "bmm", "mv", "matmul", "addmm", "baddbmm"), _product),
    "einsum": _einsum,
    "embedding": _embedding,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
}
