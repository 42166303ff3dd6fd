"""What recurrent layers cost: every weight once for each step of each sequence, and the arithmetic of the gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from graphopt.cost.polynomial import Polynomial

Extent = int | Polynomial
Shape = tuple[Extent, ...]

LAYERS = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
CELLS = frozenset(f"{name}_cell" for name in LAYERS)
# Of each element of the state at each step, with a sigmoid as 3 FLOPs and a tanh as 1 (as in `formulas`): the sums of
# what input and state give, the gates, and what they do to the state.
#   lstm  c' = f c + i g,  h' = o tanh(c'): 4 sums, 3 sigmoids, 2 tanh, 4 more
#   gru   n = tanh(a + r b),  h' = n + z (h - n): 2 sums, 2 sigmoids, 1 tanh, 5 more
_GATES = {"lstm": 19, "gru": 14, "rnn_tanh": 2, "rnn_relu": 2}


@dataclass(frozen=True)
class Direction:
    """One direction of one layer, or a cell: its weight matrices, biases, and the extent of its state."""

    matrices: tuple[Shape, ...]
    biases: tuple[Shape, ...]
    hidden: Extent


def macs(op: str, node: Node, shape: Callable[[object], Shape]) -> Extent:
    """Multiply-adds: each matrix takes part once a step, those of a layer's input, of its state, and its projection.

    Source: torch.utils.flop_counter on the decomposed operator, which has 2 FLOPs for each.
    """
    found: Extent = 0
    for own in _directions(op, node, shape):
        for outs, ins in own.matrices:
            found = found + outs * ins
    return _rows(node, shape) * found


def extra_flops(op: str, node: Node, shape: Callable[[object], Shape]) -> Extent:
    """FLOPs that are no multiply-adds of a matrix product: biases, gates, the new state."""
    found: Extent = 0
    for own in _directions(op, node, shape):
        found = found + own.hidden * _GATES[op.removesuffix("_cell")]
        for (count,) in own.biases:
            found = found + count
    return _rows(node, shape) * found


def _rows(node: Node, shape: Callable[[object], Shape]) -> Extent:
    """Steps of all sequences together: all dimensions of the input but its features. Packed ones lie behind another."""
    out: Extent = 1
    for extent in shape(node.args[0])[:-1]:
        out = out * extent
    return out


def _directions(op: str, node: Node, shape: Callable[[object], Shape]) -> list[Direction]:
    if op in CELLS:
        shapes = [shape(value) for value in node.args[2:] if isinstance(value, Node)]
        return [_direction(shapes, projected=False)]
    packed = "batch_sizes" in _names(node)
    params, biased = node.args[3 if packed else 2], bool(node.args[4 if packed else 3])
    assert isinstance(params, (list, tuple))
    layers, two = int(node.args[5 if packed else 4]), 2 if node.args[8 if packed else 7] else 1  # type: ignore[arg-type]
    shapes = [shape(value) for value in params]
    each = len(shapes) // (layers * two)
    return [
        _direction(shapes[start : start + each], projected=each > (4 if biased else 2))
        for start in range(0, len(shapes), each)
    ]


def _direction(shapes: Sequence[Shape], *, projected: bool) -> Direction:
    """From weights in the order of torch: of the input, of the state, their biases, the projection (out, hidden)."""
    matrices = tuple(own for own in shapes if len(own) == 2)
    biases = tuple(own for own in shapes if len(own) == 1)
    return Direction(matrices, biases, matrices[-1][1] if projected else matrices[1][1])


def _names(node: Node) -> set[str]:
    schema = getattr(node.target, "_schema", None)
    return {argument.name for argument in schema.arguments} if schema is not None else set()
