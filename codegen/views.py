"""Layout operators as strides: what reshape, permute, slice and broadcast make of a tensor, without moving anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax

from graphopt.codegen.dataflow import Dataflow, dtype_of, is_tensor, op_of, shape_of

RESHAPES = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")

# (extent, stride) from the outermost in; a stride of 0 repeats. Extents of one are left out.
Factors = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class View:
    """Elements of `base`, a dense tensor: each dimension is a product of strided factors."""

    base: relax.Expr
    offset: int
    dims: tuple[Factors, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents."""
        return tuple(math.prod(e for e, _ in dim) for dim in self.dims)

    def stride(self, dim: int) -> int | None:
        """The one stride of a dimension; None if it has several."""
        factors = self.dims[dim]
        return 0 if not factors else factors[0][1] if len(factors) == 1 else None

    def address(self, dim: int, index: Any) -> Any:
        """What an index of a dimension adds to the address, in elements."""
        total: Any = 0
        inner = 1
        for extent, stride in reversed(self.dims[dim]):
            if stride:
                digit = index if inner == 1 else index // inner
                total = total + (digit % extent if inner * extent < self.shape[dim] else digit) * stride
            inner *= extent
        return total

    def dense(self) -> bool:
        """Whether the elements lie in the base in their own order, from its start, and are all of it."""
        runs = merged(f for dim in self.dims for f in dim)
        whole = math.prod(shape_of(self.base)) == math.prod(self.shape)
        return self.offset == 0 and whole and (not runs or (len(runs) == 1 and runs[0][1] == 1))


def contiguous(expr: relax.Expr) -> View:
    """A tensor as a view of itself."""
    return View(expr, 0, dense_dims(shape_of(expr)))


def dense_dims(shape: tuple[int, ...]) -> tuple[Factors, ...]:
    """The dimensions of a dense tensor."""
    dims: list[Factors] = []
    stride = 1
    for extent in reversed(shape):
        dims.append(((extent, stride),) if extent != 1 else ())
        stride *= extent
    return tuple(reversed(dims))


def view_of(flow: Dataflow, expr: relax.Expr, stop: relax.Var | None = None, scales: list[float] | None = None) -> View:
    """Follow an expression back through layout operators, to `stop` at the furthest, as far as strides can say.

    With a list of `scales`, products with a scalar are followed too, and the scalars are appended.
    """
    call = None if stop is not None and expr.same_as(stop) else flow.value(expr)
    if call is not None and not isinstance(call, relax.Var):
        source, rule = _rule(flow, call)
        if source is None and scales is not None:
            factor, source = _scaled(flow, call)
            if source is not None:
                scales.append(factor)
                return view_of(flow, source, stop, scales)
        if source is not None:
            seen = rule(view_of(flow, source, stop, scales))
            if seen is None:  # not by strides: then at least from where it is a tensor of its own
                seen = rule(contiguous(source))
            if seen is not None:
                return seen
    return contiguous(expr)


def _scaled(flow: Dataflow, call: relax.Expr) -> tuple[float, relax.Expr | None]:
    op = op_of(call)
    if op not in ("relax.multiply", "relax.divide"):
        return 1.0, None
    right = flow.scalar(call.args[1])
    if right is not None and shape_of(call.args[0]) == shape_of(call):
        return (right if op == "relax.multiply" else 1 / right), call.args[0]
    left = flow.scalar(call.args[0]) if op == "relax.multiply" else None
    if left is not None and shape_of(call.args[1]) == shape_of(call):
        return left, call.args[1]
    return 1.0, None


def _rule(flow: Dataflow, call: relax.Expr) -> tuple[relax.Expr | None, Any]:
    """The tensor that a layout operator looks at, and what it does to a view of it."""
    if isinstance(call, relax.TupleGetItem):
        split = flow.value(call.tuple_value)
        if op_of(split) == "relax.split":
            return split.args[0], lambda v: _piece(v, split, call.index)
        return None, None
    op = op_of(call)
    if op in RESHAPES:
        return call.args[0], lambda v: reshaped(v, shape_of(call))
    if op == "relax.permute_dims":
        rank = len(shape_of(call))
        axes = [int(a) % rank for a in call.attrs.axes] if call.attrs.axes else list(reversed(range(rank)))
        return call.args[0], lambda v: permuted(v, axes)
    if op == "relax.broadcast_to":
        return call.args[0], lambda v: _broadcast(v, shape_of(call))
    if op == "relax.repeat" and call.attrs.axis is not None:
        return call.args[0], lambda v: _repeat(v, int(call.attrs.axis), int(call.attrs.repeats))
    if op == "relax.strided_slice" and not call.attrs.assume_inbound:
        return call.args[0], lambda v: _slices(v, call)
    if op == "relax.astype" and dtype_of(call) == dtype_of(call.args[0]):
        return call.args[0], lambda v: v
    return None, None


def permuted(view: View, axes: Sequence[int]) -> View:
    """The view with its dimensions in another order."""
    return View(view.base, view.offset, tuple(view.dims[a] for a in axes))


def merged(factors: Iterable[tuple[int, int]]) -> Factors:
    """Join neighbours that count on from each other."""
    runs: list[tuple[int, int]] = []
    for extent, stride in factors:
        if extent == 1:
            continue
        if runs and runs[-1][1] == stride * extent:
            runs[-1] = (runs[-1][0] * extent, stride)
        else:
            runs.append((extent, stride))
    return tuple(runs)


def reshaped(view: View, shape: tuple[int, ...]) -> View | None:
    """The same elements with other extents; None where strides cannot say it."""
    left = list(merged(f for dim in view.dims for f in dim))
    dims: list[Factors] = []
    for extent in shape:
        taken: list[tuple[int, int]] = []
        needed = extent
        while needed > 1:
            size, stride = left.pop(0)
            if needed % size == 0:
                taken.append((size, stride))
                needed //= size
            elif size % needed == 0:
                taken.append((needed, stride * (size // needed)))
                left.insert(0, (size // needed, stride))
                needed = 1
            else:
                return None
        dims.append(merged(taken))
    return View(view.base, view.offset, tuple(dims))


def _broadcast(view: View, shape: tuple[int, ...]) -> View:
    dims = [()] * (len(shape) - len(view.dims)) + list(view.dims)
    grown = [((extent, 0),) if not dim and extent > 1 else dim for dim, extent in zip(dims, shape, strict=True)]
    return View(view.base, view.offset, tuple(grown))


def _repeat(view: View, axis: int, times: int) -> View:
    dims = list(view.dims)
    dims[axis] = merged((*dims[axis], (times, 0)))
    return View(view.base, view.offset, tuple(dims))


def _cut(view: View, axis: int, begin: int, count: int) -> View | None:
    """`count` indices of a dimension, from `begin`."""
    factors = view.dims[axis]
    if count == view.shape[axis]:
        return view
    if len(factors) != 1:
        return None
    stride = factors[0][1]
    kept: Factors = ((count, stride),) if count != 1 else ()
    dims = (*view.dims[:axis], kept, *view.dims[axis + 1 :])
    return View(view.base, view.offset + begin * stride, dims)


def _piece(view: View, split: relax.Call, index: int) -> View | None:
    axis = int(split.attrs.axis) % len(view.dims)
    whole = view.shape[axis]
    sections = split.attrs.indices_or_sections
    if isinstance(sections, int) or not hasattr(sections, "__len__"):
        size = -(-whole // int(sections))
        cuts = [*range(0, whole, size), whole]
    else:
        cuts = [0, *(int(c) for c in sections), whole]
    return _cut(view, axis, cuts[index], cuts[index + 1] - cuts[index])


def _slices(view: View, call: relax.Call) -> View | None:
    found = [_integers(a) for a in call.args[1:]]
    fields = [f for f in found if f is not None]
    if len(fields) < max(3, len(found)):
        return None
    axes, begins, ends = fields[:3]
    strides = fields[3] if len(fields) > 3 else [1] * len(axes)
    if any(s != 1 for s in strides):
        return None
    seen: View | None = view
    for axis, begin, end in zip(axes, begins, ends, strict=True):
        axis %= len(view.dims)
        whole = view.shape[axis]
        start, stop = (min(max(i + whole if i < 0 else i, 0), whole) for i in (begin, end))
        seen = _cut(seen, axis, start, stop - start) if seen is not None and stop > start else None
    return seen


def _integers(expr: relax.Expr) -> list[int] | None:
    if not isinstance(expr, relax.Tuple):
        return None
    values = [getattr(f, "value", f) for f in expr.fields]
    return [int(getattr(v, "value", v)) for v in values]


def trail(flow: Dataflow, var: relax.Var) -> list[relax.Var]:
    """Variables that only look differently at a value, each the sole reader of the one before; `var` comes first."""
    chain = [var]
    while (user := flow.sole_user(chain[-1])) is not None:
        source, _ = _rule(flow, user.value)
        if source is None or not is_tensor(user.var) or isinstance(user.value, relax.TupleGetItem):
            break
        chain.append(user.var)
    return chain


def written_as(flow: Dataflow, var: relax.Var, seen: relax.Var, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides with which to write `var`, taken as `shape`, so that memory is `seen`, a view of it, in dense order."""
    view = view_of(flow, seen, stop=var)
    if not view.base.same_as(var) or math.prod(view.shape) != math.prod(shape_of(var)) or view.offset:
        return None
    at: dict[int, tuple[int, int]] = {}  # stride in var's own dense order: extent, stride in seen's dense order
    stride = 1
    for extent, source in reversed([f for dim in view.dims for f in dim]):
        at[source] = (extent, stride)
        stride *= extent
    result: list[int] = []
    for factors in dense_dims(shape):
        if not factors:
            result.append(0)
            continue
        (extent, own) = factors[0]
        parts: list[tuple[int, int]] = []
        while extent > 1:
            start = next((o for o, (size, _) in at.items() if o <= own < o * size and own % o == 0), None)
            if start is None:
                return None
            size, to = at[start]
            taken = min(extent, start * size // own)
            if extent % taken:
                return None
            parts.insert(0, (taken, to * (own // start)))
            own, extent = own * taken, extent // taken
        runs = merged(parts)
        if len(runs) != 1:
            return None
        result.append(runs[0][1])
    return tuple(result)
