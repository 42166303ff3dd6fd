"""Programs whose channels or features stand in front of pixels or tokens, with weights that have zeros in a format."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tvm import relax

from graphopt.codegen.kernels.template import Template
from graphopt.sparsity import parse_annotation
from graphopt.targets.target import Target
from tests.codegen.kernels.dense import HOST, Case, Emit, Pair, Program, Shape, case_of, const

op = relax.op

FORMATS = ("unstructured", "2x1", "4x1", "8x1", "16x1", "2x2", "1x4", "2:4", "1:4", "8:2:4", "dense")
# What becomes of some rows of the matrix: nothing, all of their elements are zero, or none.
ROWS = ("as they are", "some empty", "some full", "all zero")


def mask(rng: np.random.Generator, outputs: int, inputs: int, word: str, keep: float, rows: str) -> np.ndarray:
    """Which elements of a matrix (outputs, inputs) are kept: `keep` of the blocks where the format leaves that open."""
    form = parse_annotation(word)
    if form is None:
        return np.ones((outputs, inputs), bool)
    blocks = rng.random((-(-outputs // form.rows), -(-inputs // form.cols)))
    if form.m > 1:
        groups = np.pad(blocks, ((0, 0), (0, -blocks.shape[1] % form.m))).reshape(len(blocks), -1, form.m)
        kept = (groups.argsort(-1).argsort(-1) < form.n).reshape(len(blocks), -1)[:, : blocks.shape[1]]
    else:
        kept = blocks < keep
    if rows != "as they are":
        kept[rng.random(len(kept)) < (1.0 if rows == "all zero" else 0.5)] = rows == "some full"
    return kept.repeat(form.rows, 0)[:outputs].repeat(form.cols, 1)[:, :inputs]


def _column(p: Program, y: Pair, inner: int) -> np.ndarray:
    """A number for every output."""
    return p.normal(y[1].shape[-1 - inner], *[1] * inner)


def _with(p: Program, e: Emit, y: Pair, what: np.ndarray, how: str) -> Pair:
    on_relax, on_torch = (op.add, torch.add) if how == "add" else (op.multiply, torch.multiply)
    return e(on_relax(y[0], const(what))), on_torch(y[1], torch.from_numpy(what).double())


def _bias(p: Program, e: Emit, y: Pair, inner: int) -> Pair:
    return _with(p, e, y, _column(p, y, inner), "add")


def _residual(p: Program, e: Emit, y: Pair, inner: int) -> Pair:
    r, value = p.input(*y[1].shape)
    return e(op.add(y[0], r)), y[1] + value


def _relu(e: Emit, y: Pair) -> Pair:
    return e(op.nn.relu(y[0])), F.relu(y[1])


def _gate(p: Program, e: Emit, y: Pair, inner: int) -> Pair:
    """A run-time factor for every output, of every image."""
    g, value = p.input(*y[1].shape[:-inner], *[1] * inner)
    return e(op.multiply(g, y[0])), y[1] * value


def _hardswish(p: Program, e: Emit, y: Pair, inner: int) -> Pair:
    y = _bias(p, e, y, inner)
    gate = e(op.divide(e(op.clip(e(op.add(y[0], const(3.0))), 0, 6)), const(6.0)))
    return e(op.multiply(y[0], gate)), F.hardswish(y[1])


def _bias_relu6(p: Program, e: Emit, y: Pair, inner: int) -> Pair:
    y = _bias(p, e, y, inner)
    return e(op.clip(y[0], 0, 6)), F.relu6(y[1])


def _gelu(p: Program, e: Emit, y: Pair, inner: int) -> Pair:
    return e(op.nn.gelu(y[0])), F.gelu(y[1])


TAILS: dict[str, Callable[[Program, Emit, Pair, int], Pair]] = {
    "none": lambda p, e, y, inner: y,
    "bias": _bias,
    "bias_relu6": _bias_relu6,
    "bias_residual_relu": lambda p, e, y, inner: _relu(e, _residual(p, e, _bias(p, e, y, inner), inner)),
    "gelu": _gelu,
    "scale": lambda p, e, y, inner: _with(p, e, y, _column(p, y, inner), "multiply"),
    "gate": _gate,
    "hardswish": _hardswish,
    # A constant for each pixel, the same for all outputs, and one for each pixel of each output.
    "map": lambda p, e, y, inner: _with(
        p, e, y, p.normal(*[1] * (y[1].ndim - inner), *y[1].shape[-inner:]), "multiply"
    ),
    "table": lambda p, e, y, inner: _with(p, e, y, p.normal(*y[1].shape[-1 - inner :]), "add"),
}


def turned(
    weight: Callable[[np.random.Generator], np.ndarray],
    tokens: tuple[int, ...],
    tail: str,
    template: Template,
    seed: int = 0,
    target: Target = HOST,
) -> Case:
    """A constant (outputs, inputs) times a run-time [1.., inputs, tokens]; `tokens` as (1.., tokens)."""
    p = Program(seed)

    def emit(e: Emit) -> Pair:
        w = weight(p.rng)
        x, xv = p.input(*tokens[:-1], w.shape[1], tokens[-1])
        return TAILS[tail](p, e, (e(op.matmul(const(w), x)), torch.from_numpy(w).double() @ xv), 1)

    return case_of(p, emit, template, target)


def linear(
    outputs: int, inputs: int, tokens: int, tail: str, template: Template, *, word: str = "unstructured",
    keep: float = 0.3, rows: str = "as they are", seed: int = 0, target: Target = HOST,
) -> Case:  # fmt: skip
    """`turned` with a random matrix in a format."""

    def weight(rng: np.random.Generator) -> np.ndarray:
        kept = mask(rng, outputs, inputs, word, keep, rows)
        return np.where(kept, rng.standard_normal(kept.shape), 0).astype(np.float32)

    return turned(weight, (tokens,), tail, template, seed, target)


def convolution(
    s: Shape, tail: str, template: Template, *, word: str = "unstructured", keep: float = 0.3,
    rows: str = "as they are", seed: int = 0, target: Target = HOST,
) -> Case:  # fmt: skip
    """A convolution in NCHW whose weight is in a format, as a matrix with channels fastest."""
    p = Program(seed)

    def emit(e: Emit) -> Pair:
        x, xv = p.input(s.batch, s.cin, *s.size)
        inputs = s.cin // s.groups
        kept = mask(p.rng, s.cout, inputs * s.kernel[0] * s.kernel[1], word, keep, rows)
        kept = np.moveaxis(kept.reshape(s.cout, *s.kernel, inputs), -1, 1)
        w = np.where(kept, p.normal(*kept.shape), np.float32(0))
        y = e(
            op.nn.conv2d(
                *(x, const(w)),
                strides=s.strides,
                padding=s.padding,
                dilation=s.dilation,
                groups=s.groups,
            )
        )
        top, left, bottom, right = s.padding
        xv = F.pad(xv, (left, right, top, bottom))
        yv = F.conv2d(xv, torch.from_numpy(w).double(), None, s.strides, 0, s.dilation, s.groups)
        return TAILS[tail](p, e, (y, yv), 2)

    return case_of(p, emit, template, target)
