"""Fourier transforms, and the complex numbers that they come in.

Neither TVM nor our kernels have complex numbers: such a value is a pair of real tensors here, held together by a Relax
tuple that is never emitted. Transforms have static lengths, so each is a product with the matrix

    C[n, k] = cos(2 pi n k / N),  S[n, k] = sin(2 pi n k / N)

forward: (re + i im)(C - i S), backward: (re + i im)(C + i S), then the scale of the norm.
limit: N times the input's size in multiplications per real product, where an FFT needs log N; up to a few hundred
points the product is as fast, beyond that it is merely correct.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import fx
from tvm import relax

from graphopt.codegen.converters.common import Converter, arguments, as_dtype
from graphopt.codegen.dataflow import dtype_of, shape_of
from graphopt.codegen.half import Importer

Pair = tuple[relax.Expr, relax.Expr | None]  # real and imaginary part; None: it is zero

REAL = {torch.complex64: "float32", torch.complex128: "float64", torch.complex32: "float16"}


def is_complex(node: fx.Node) -> bool:
    """Whether the node gives a complex tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def convert_complex(node: fx.Node, name: str, importer: Importer, real: Callable[[fx.Node], relax.Expr]) -> relax.Expr:
    """Convert a node that reads or gives complex numbers.

    Args:
        node: the node.
        name: the importer's key for it.
        importer: the importer.
        real: what converts the same operator on real numbers.

    Raises:
        ValueError: the operator has no translation for complex numbers.
    """
    if name in TABLE:
        return TABLE[name](node, importer)
    if name not in _PART_BY_PART:
        raise ValueError("it is applied to complex numbers")
    inputs = [n for n in node.all_input_nodes if is_complex(n)]
    before = {n: importer.env[n] for n in inputs}
    parts = []
    try:
        for part in range(2):
            importer.env.update({n: _filled(_pair(value), importer)[part] for n, value in before.items()})
            parts.append(real(node))
    finally:
        importer.env.update(before)
    return relax.Tuple(parts)


# Pairs ---------------------------------------------------------------------------------------------------------------


def _pair(value: relax.Expr) -> Pair:
    if isinstance(value, relax.Tuple):
        fields = list(value.fields)
        return fields[0], fields[1] if len(fields) == 2 else None
    return value, None


def _joined(pair: Pair) -> relax.Expr:
    return relax.Tuple([part for part in pair if part is not None])


def _filled(pair: Pair, importer: Importer) -> tuple[relax.Expr, relax.Expr]:
    re, im = pair
    if im is None:
        im = importer.block_builder.emit(relax.op.zeros_like(re))
    return re, im


def _of(value: relax.Expr | float | complex, dtype: str, importer: Importer) -> Pair:
    """A pair from what an argument may be: complex, real, a number."""
    if isinstance(value, complex):
        return relax.const(value.real, dtype), relax.const(value.imag, dtype)
    if isinstance(value, relax.Tuple):
        return _pair(value)
    return as_dtype(value, dtype, importer), None


def _sum(x: relax.Expr | None, y: relax.Expr | None, importer: Importer, sign: int = 1) -> relax.Expr | None:
    """x + sign * y, where None is zero."""
    emit = importer.block_builder.emit
    if y is None:
        return x
    if x is None:
        return y if sign > 0 else emit(relax.op.negative(y))
    return emit((relax.op.add if sign > 0 else relax.op.subtract)(x, y))


def _times(x: relax.Expr | None, y: relax.Expr | None, importer: Importer) -> relax.Expr | None:
    return None if x is None or y is None else importer.block_builder.emit(relax.op.multiply(x, y))


# Transforms ----------------------------------------------------------------------------------------------------------


def _norm(kind: int, count: int) -> float:
    """PyTorch's normalisations by number: none, by the root of the number of points, by the number."""
    return (1.0, 1 / math.sqrt(count), 1 / count)[kind]


def _angles(rows: int, columns: int, period: int) -> np.ndarray:
    """2 pi n k / period, with n k reduced first, so that large indices lose no digits."""
    return 2 * np.pi / period * (np.outer(np.arange(rows), np.arange(columns)) % period)


def _along(pair: Pair, dim: int, matrix: tuple[np.ndarray, np.ndarray], importer: Importer) -> Pair:
    """(re + i im) times the complex matrix (from, to), along one dimension."""
    emit = importer.block_builder.emit
    rank = len(shape_of(pair[0]))
    axes = list(range(rank))
    axes[dim], axes[-1] = axes[-1], axes[dim]
    dtype = dtype_of(pair[0])

    def last(x: relax.Expr | None) -> relax.Expr | None:
        return x if x is None or axes[-1] == rank - 1 else emit(relax.op.permute_dims(x, axes))

    def product(x: relax.Expr | None, part: int) -> relax.Expr | None:
        return None if x is None else emit(relax.op.matmul(x, relax.const(matrix[part], dtype)))

    re, im = (last(x) for x in pair)
    real = last(_sum(product(re, 0), product(im, 1), importer, -1))
    assert real is not None
    return real, last(_sum(product(re, 1), product(im, 0), importer))


def _transformed(pair: Pair, dims: list[int], forward: bool, importer: Importer) -> Pair:
    sign = -1 if forward else 1
    for dim in dims:
        n = shape_of(pair[0])[dim]
        angles = _angles(n, n, n)
        pair = _along(pair, dim, (np.cos(angles), sign * np.sin(angles)), importer)
    return pair


def _scaled(pair: Pair, factor: float, importer: Importer) -> Pair:
    if factor == 1:
        return pair
    scale = relax.const(factor, dtype_of(pair[0]))
    re, im = (_times(part, scale, importer) for part in pair)
    assert re is not None
    return re, im


def _dims(dims: list[int], x: relax.Expr) -> list[int]:
    return [dim % len(shape_of(x)) for dim in dims]


def _fft_c2c(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    pair = _pair(a["self"])
    dims = _dims(a["dim"], pair[0])
    factor = _norm(a["normalization"], math.prod(shape_of(pair[0])[dim] for dim in dims))
    return _joined(_scaled(_transformed(pair, dims, a["forward"], importer), factor, importer))


def _fft_r2c(node: fx.Node, importer: Importer) -> relax.Expr:
    """Of real numbers; one-sided: the last dimension keeps the first half, of which the rest is the mirror image."""
    a = arguments(node, importer)
    x = a["self"]
    dims = _dims(a["dim"], x)
    *others, last = dims
    n = shape_of(x)[last]
    angles = _angles(n, n // 2 + 1 if a["onesided"] else n, n)
    pair = _along((x, None), last, (np.cos(angles), -np.sin(angles)), importer)
    factor = _norm(a["normalization"], math.prod(shape_of(x)[dim] for dim in dims))
    return _joined(_scaled(_transformed(pair, others, True, importer), factor, importer))


def _fft_c2r(node: fx.Node, importer: Importer) -> relax.Expr:
    """Back to real numbers from the first half: what the mirror image would add is the same once more."""
    a = arguments(node, importer)
    pair = _pair(a["self"])
    *others, last = _dims(a["dim"], pair[0])
    n, half = a["last_dim_size"], a["last_dim_size"] // 2 + 1
    if shape_of(pair[0])[last] != half:
        raise ValueError(f"{shape_of(pair[0])[last]} numbers for {n} points, where there should be {half}")
    twice = np.full((half, 1), 2.0)
    twice[0] = 1
    if n % 2 == 0:
        twice[-1] = 1
    angles = _angles(half, n, n)
    pair = _transformed(pair, others, False, importer)
    real, _ = _along(pair, last, (twice * np.cos(angles), twice * np.sin(angles)), importer)
    factor = _norm(a["normalization"], n * math.prod(shape_of(real)[dim] for dim in others))
    return _scaled((real, None), factor, importer)[0]


# The rest of what is done with complex numbers -----------------------------------------------------------------------


def _to_copy(node: fx.Node, importer: Importer) -> relax.Expr:
    dtype = REAL.get(node.meta["val"].dtype)
    if dtype is None:
        raise ValueError("complex numbers become real ones, and lose a part")
    re, im = _pair(arguments(node, importer)["self"])
    return _joined((as_dtype(re, dtype, importer), None if im is None else as_dtype(im, dtype, importer)))


def _complex(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    return _spread(node, (a["real"], a["imag"]), importer)


def _polar(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    re, im = (_times(a["abs"], emit(op(a["angle"])), importer) for op in (relax.op.cos, relax.op.sin))
    assert re is not None
    return _joined((re, im))


def _view_as_real(node: fx.Node, importer: Importer) -> relax.Expr:
    emit = importer.block_builder.emit
    re, im = _filled(_pair(arguments(node, importer)["self"]), importer)
    return emit(relax.op.stack([re, im], len(shape_of(re))))


def _view_as_complex(node: fx.Node, importer: Importer) -> relax.Expr:
    emit = importer.block_builder.emit
    x = arguments(node, importer)["self"]
    dim = len(shape_of(x)) - 1
    parts = [emit(relax.op.strided_slice(x, [dim], [i], [i + 1])) for i in range(2)]
    return relax.Tuple([emit(relax.op.squeeze(part, [dim])) for part in parts])


def _added(sign: int) -> Converter:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        a, dtype = arguments(node, importer), REAL[node.meta["val"].dtype]
        if a.get("alpha", 1) != 1:
            raise ValueError("complex numbers with alpha")
        x, y = (_of(a[key], dtype, importer) for key in ("self", "other"))
        re = _sum(x[0], y[0], importer, sign)
        im = _sum(x[1], y[1], importer, sign)
        assert re is not None
        return _spread(node, (re, im), importer)

    return convert


def _multiplied(node: fx.Node, importer: Importer) -> relax.Expr:
    a, dtype = arguments(node, importer), REAL[node.meta["val"].dtype]
    x, y = (_of(a[key], dtype, importer) for key in ("self", "other"))
    re = _sum(_times(x[0], y[0], importer), _times(x[1], y[1], importer), importer, -1)
    im = _sum(_times(x[0], y[1], importer), _times(x[1], y[0], importer), importer)
    assert re is not None
    return _spread(node, (re, im), importer)


def _spread(node: fx.Node, pair: Pair, importer: Importer) -> relax.Expr:
    """Both parts in the result's shape, where only one was broadcast."""
    shape = tuple(node.meta["val"].shape)
    emit = importer.block_builder.emit
    return _joined(
        tuple(x if x is None or shape_of(x) == shape else emit(relax.op.broadcast_to(x, shape)) for x in pair)  # type: ignore[arg-type]
    )


def _absolute(node: fx.Node, importer: Importer) -> relax.Expr:
    re, im = _pair(arguments(node, importer)["self"])
    emit = importer.block_builder.emit
    if im is None:
        return emit(relax.op.abs(re))
    return emit(relax.op.sqrt(_sum(_times(re, re, importer), _times(im, im, importer), importer)))


def _conjugate(node: fx.Node, importer: Importer) -> relax.Expr:
    re, im = _pair(arguments(node, importer)["self"])
    return _joined((re, _sum(None, im, importer, -1)))


TABLE: dict[str, Converter] = {
    "_conj.default": _conjugate,
    "_conj_physical.default": _conjugate,
    "_fft_c2c.default": _fft_c2c,
    "_fft_c2r.default": _fft_c2r,
    "_fft_r2c.default": _fft_r2c,
    "_to_copy.default": _to_copy,
    "abs.default": _absolute,
    "add.Tensor": _added(1),
    "complex.default": _complex,
    "mul.Tensor": _multiplied,
    "polar.default": _polar,
    "sub.Tensor": _added(-1),
    "view_as_complex.default": _view_as_complex,
    "view_as_real.default": _view_as_real,
}

# What does the same to both parts.
_PART_BY_PART = frozenset(
    f"{name}.default" for name in ("clone", "expand", "neg", "permute", "unsqueeze", "view", "reshape")
) | {"select.int", "slice.Tensor", "squeeze.dim", "squeeze.dims", "sum.dim_IntList", "transpose.int"}
