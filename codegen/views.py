"""Chains of reshapes and transposes, reduced to the one transpose that they amount to.

    reshape [197, 384] -> [197, 6, 64], permute [6, 197, 64], permute [197, 6, 64], reshape [197, 384]   ->   nothing
    permute NHWC -> NCHW, reshape [c, h w], permute [h w, c]                                             ->   a reshape

A chain is followed as strides into the chain's root: a reshape splits and groups (stride, extent) pairs, a transpose
reorders them. What counts in the end is their order only. A reshape is free: it names the same bytes. Elementwise
operators do not mind the order: they are computed on the root, and the view taken of their result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.dataflow import Constant, dtype_of, is_tensor, op_of, shape_of
from graphopt.codegen.rebuild import rebuild

RESHAPES = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")

ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in (
        "abs add astype ceil clip cos divide erf exp floor floor_divide log maximum minimum multiply negative power "
        "round rsqrt sigmoid sin sqrt square subtract tanh nn.gelu nn.gelu_tanh nn.leakyrelu nn.relu nn.silu"
    ).split()
)

# (stride in elements of the root, extent); extents of one are left out.
Factor = tuple[int, int]


@dataclass(frozen=True)
class View:
    """A tensor as a reordering of the elements of a dense, row-major root: per dimension its factors, outermost first."""

    root: relax.Expr
    dims: tuple[tuple[Factor, ...], ...]

    def permuted(self, axes: list[int]) -> View:
        """The view with its dimensions in another order."""
        return View(self.root, tuple(self.dims[a] for a in axes))

    def reshaped(self, shape: tuple[int, ...]) -> View | None:
        """The view under another shape; None where a new extent would cut a factor that it does not divide."""
        rest = [factor for dim in self.dims for factor in dim][::-1]
        dims: list[tuple[Factor, ...]] = []
        for extent in shape:
            taken: list[Factor] = []
            while extent > 1:
                stride, size = rest.pop()
                if extent % size == 0:
                    taken.append((stride, size))
                    extent //= size
                elif size % extent == 0:
                    inner = size // extent
                    taken.append((stride * inner, extent))
                    rest.append((stride, inner))
                    extent = 1
                else:
                    return None
            dims.append(tuple(taken))
        return View(self.root, tuple(dims))

    def blocks(self) -> list[Factor]:
        """The factors in the view's order, those that lie together in the root taken as one."""
        blocks: list[Factor] = []
        for stride, size in (factor for dim in self.dims for factor in dim):
            if blocks and blocks[-1][0] == stride * size:
                blocks[-1] = (stride, blocks[-1][1] * size)
            else:
                blocks.append((stride, size))
        return blocks


def root_view(expr: relax.Expr) -> View:
    """A tensor as a view of itself."""
    shape = shape_of(expr)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return View(expr, tuple(((stride, n),) if n > 1 else () for stride, n in zip(strides, shape, strict=True)))


def simplify_views(module: IRModule) -> IRModule:
    """Replace each chain of reshapes and transposes by at most reshape, transpose, reshape of the chain's root."""
    views: dict[relax.Var, View] = {}

    def sink(value: relax.Call, builder: relax.BlockBuilder) -> relax.Expr:
        """An elementwise operator on views of one kind becomes a view of the operator on the roots."""
        tensors = [a for a in value.args if is_tensor(a) and not _is_scalar(a)]
        seen = [views.get(a) for a in tensors]
        kinds = {(view.dims, shape_of(view.root)) for view in seen if view is not None}
        if None in seen or len(kinds) != 1 or len({shape_of(a) for a in tensors}) != 1:
            return value
        roots = {a: view.root for a, view in zip(tensors, seen, strict=True)}
        args = [roots.get(a, _flat(a)) if is_tensor(a) else a for a in value.args]
        root = builder.emit(relax.Call(value.op, args, value.attrs, value.ty_args))
        after = View(root, seen[0].dims)
        new = _emit(after, shape_of(tensors[0]), builder)
        views[new] = after
        return new

    def rewrite(binding: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
        op = op_of(value)
        if op in ELEMENTWISE:
            return sink(value, builder)
        if op not in RESHAPES and op != "relax.permute_dims":
            return value
        source, shape = value.args[0], shape_of(binding.var)
        before = views.get(source) or root_view(source)
        if 0 in shape:
            return value
        if op == "relax.permute_dims":
            after = before.permuted([int(a) for a in value.attrs.axes or range(len(shape))[::-1]])
        else:
            after = before.reshaped(shape) or root_view(source).reshaped(shape)
        if after is None:
            return _reshape(source, shape, builder)
        new = _emit(after, shape, builder)
        if isinstance(new, relax.Var):
            views[new] = after
        return new

    return rebuild(module, rewrite)


def _emit(view: View, shape: tuple[int, ...], builder: relax.BlockBuilder) -> relax.Expr:
    """The fewest operators that turn the view's root into `shape`."""
    blocks = view.blocks()
    in_root = sorted(blocks, reverse=True)  # the larger the stride, the further out
    value = view.root
    if in_root != blocks:
        value = _reshape(value, tuple(size for _, size in in_root), builder)
        value = builder.emit(relax.op.permute_dims(value, [in_root.index(block) for block in blocks]))
    return _reshape(value, shape, builder)


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
