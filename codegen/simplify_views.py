"""Chains of reshapes and transposes, reduced to the one transpose that they amount to.

    reshape [197, 384] -> [197, 6, 64], permute [6, 197, 64], permute [197, 6, 64], reshape [197, 384]   ->   nothing
    permute NHWC -> NCHW, reshape [c, h w], permute [h w, c]                                             ->   a reshape

A chain is followed as strides into the chain's root: a reshape splits and groups (extent, stride) pairs, a transpose
reorders them. What counts in the end is their order only. A reshape is free: it names the same bytes. Elementwise
operators do not mind the order: they are computed on the root, and the view taken of their result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.dataflow import Constant, dtype_of, is_tensor, op_of, shape_of
from graphopt.codegen.rebuild import rebuild
from graphopt.codegen.sink import ELEMENTWISE, Transposed, sink
from graphopt.codegen.views import RESHAPES, View, contiguous, merged, permuted, reshaped


def simplify_views(module: IRModule) -> IRModule:
    """Replace each chain of reshapes and transposes by at most reshape, transpose, reshape of the chain's root."""
    views: dict[relax.Var, View] = {}
    emitted: dict[tuple[relax.Expr, int, Any, tuple[int, ...]], relax.Var] = {}  # the same view is taken once

    def transposed(expr: relax.Expr) -> Transposed | None:
        view = views.get(expr) if isinstance(expr, relax.Var) else None
        order = _order(view) if view else None
        return Transposed(view.base, order) if view and order else None

    def remember(view: View, shape: tuple[int, ...], builder: relax.BlockBuilder) -> relax.Expr:
        key = (view.base, view.offset, view.dims, shape)
        if isinstance(view.base, relax.Var) and key in emitted:
            return emitted[key]
        new = _emit(view, shape, builder)
        if isinstance(new, relax.Var):
            views[new] = view
            emitted[key] = new
        return new

    def sunk(value: relax.Call, shape: tuple[int, ...], builder: relax.BlockBuilder) -> relax.Expr | None:
        """The operator moved in front of its arguments' transposes or reshapes, if it can be."""
        tensors = [t for a in value.args for t in (a.fields if isinstance(a, relax.Tuple) else [a]) if is_tensor(t)]
        seen = next((t for t in map(transposed, tensors) if t), None)
        if seen is None:
            return same_view(value, tensors, shape, builder)

        def reorder(expr: relax.Expr) -> relax.Expr:
            other = transposed(expr)
            if other and other.order == seen.order:
                return other.root
            if len(shape_of(expr)) != len(seen.order):
                return expr
            axes = [seen.order.index(d) for d in range(len(seen.order))]
            before = views.get(expr) if isinstance(expr, relax.Var) else None
            shape = tuple(shape_of(expr)[a] for a in axes)
            return remember(permuted(before or contiguous(expr), axes), shape, builder)

        new = sink(value, seen, reorder, builder.emit)
        return remember(permuted(contiguous(new.root), new.order), shape, builder) if new else None

    def same_view(
        value: relax.Call, tensors: list[relax.Expr], shape: tuple[int, ...], builder: relax.BlockBuilder
    ) -> relax.Expr | None:
        """An elementwise operator on views of one kind becomes a view of the operator on the roots."""
        if op_of(value) not in ELEMENTWISE:
            return None
        found: dict[relax.Expr, View] = {}
        for tensor in tensors:
            if not _is_scalar(tensor):
                if tensor not in views:
                    return None
                found[tensor] = views[tensor]
        kinds = {(view.dims, shape_of(view.base)) for view in found.values()}
        if len(kinds) != 1 or len({shape_of(t) for t in found}) != 1:
            return None
        args = [a if not is_tensor(a) else found[a].base if a in found else _flat(a) for a in value.args]
        root = builder.emit(relax.Call(value.op, args, value.attrs, value.ty_args))
        ((dims, _),) = kinds
        return remember(View(root, 0, dims), shape, builder)

    def rewrite(binding: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
        op = op_of(value)
        if op not in RESHAPES and op != "relax.permute_dims":
            new = sunk(value, shape_of(binding.var), builder) if op and is_tensor(binding.var) else None
            return value if new is None else new
        source, shape = value.args[0], shape_of(binding.var)
        before = views.get(source) or contiguous(source)
        if 0 in shape:
            return value
        if op == "relax.permute_dims":
            after: View | None = permuted(before, [int(a) for a in value.attrs.axes or range(len(shape))[::-1]])
        else:
            after = reshaped(before, shape) or reshaped(contiguous(source), shape)
        if after is None:
            return _reshape(source, shape, builder)
        return remember(after, shape, builder)

    return rebuild(module, rewrite)


def _emit(view: View, shape: tuple[int, ...], builder: relax.BlockBuilder) -> relax.Expr:
    """The fewest operators that turn the view's root into `shape`."""
    blocks = merged(factor for dim in view.dims for factor in dim)
    in_root = tuple(sorted(blocks, key=lambda block: -block[1]))  # the larger the stride, the further out
    value = view.base
    if in_root != blocks:
        value = _reshape(value, tuple(extent for extent, _ in in_root), builder)
        value = builder.emit(relax.op.permute_dims(value, [in_root.index(block) for block in blocks]))
    return _reshape(value, shape, builder)


def _order(view: View) -> tuple[int, ...] | None:
    """Which dimension of the root each dimension is, if the view is a transpose and does move something."""
    root = contiguous(view.base).dims
    if len(root) != len(view.dims):
        return None
    free = [i for i, dim in enumerate(root) if not dim]
    order = []
    for dim in view.dims:
        if dim and dim in root:
            order.append(root.index(dim))
        elif not dim and free:
            order.append(free.pop(0))
        else:
            return None
    return tuple(order) if order != sorted(order) else None


def _is_scalar(expr: relax.Expr) -> bool:
    return isinstance(expr, Constant) and math.prod(shape_of(expr)) == 1


def _flat(scalar: relax.Expr) -> relax.Expr:
    """A constant with one element without its rank, so that it broadcasts to anything; other tensors as they are."""
    if not isinstance(scalar, Constant):
        return scalar
    return relax.const(scalar.value.numpy().reshape(()), dtype_of(scalar))


def _reshape(value: relax.Expr, shape: tuple[int, ...], builder: relax.BlockBuilder) -> relax.Expr:
    if shape_of(value) == shape:
        return value
    if isinstance(value, Constant):
        return relax.const(np.reshape(value.value.numpy(), shape), dtype_of(value))
    return builder.emit(relax.op.reshape(value, shape))
