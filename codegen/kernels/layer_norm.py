"""Layer norm and RMS norm over the last axes.

    Y[r, c] = (X[r, c] - mean_r) / sqrt(var_r + eps) * gamma[c] + beta[c]      layer norm
    Y[r, c] = X[r, c] / sqrt(mean_r(X^2) + eps) * gamma[c]                     RMS norm
    X, Y   (rows, C), any float, dense; sums in float32
    limit: X is read three times (twice for RMS) but from memory once: a row stays in L1. Bound by the bandwidth of L2

RMS norm is also found as PyTorch's decomposition spells it: x * rsqrt(mean(x * x) + eps) * weight.
Source: Ba et al., Layer Normalization, arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernels.emit import FLOATS, load, loop, prim_func, spread, store
from graphopt.codegen.kernels.rows import PARALLEL_ELEMENTS, each_of_row, fold_row
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.errors import Decline
from graphopt.targets.target import Target


@dataclass(frozen=True)
class Norm:
    """One norm of the graph."""

    x: relax.Expr
    gamma: relax.Expr | None
    beta: relax.Expr | None
    epsilon: float
    width: int
    centred: bool
    output: relax.Var
    covers: tuple[relax.Var, ...]


class LayerNorm(Template):
    """Layer norm and RMS norm; see the module."""

    name: ClassVar[str] = "layer-norm"
    anchors: ClassVar[tuple[str, ...]] = ("relax.nn.layer_norm", "relax.nn.rms_norm", "relax.rsqrt")

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take a norm operator, or the chain around a reciprocal square root."""
        found = _chain(flow, binding) if op_of(binding.value) == "relax.rsqrt" else _operator(binding)
        if isinstance(found, Decline):
            return found
        dtype = dtype_of(found.x)
        if dtype not in FLOATS or dtype == "float64":
            return Decline(binding.var.name, f"norm in {dtype}")
        inputs, constants = [found.x], []
        for weight in (found.gamma, found.beta):
            if weight is None:
                continue
            value = flow.constant(weight)
            if value is None:
                return Decline(binding.var.name, "weights that are known only at run time")
            constants.append(np.ascontiguousarray(value.reshape(-1), dtype=np.float32))
        rows = math.prod(shape_of(found.x)) // found.width
        which = "layer_norm" if found.centred else "rms_norm"
        affine = (found.gamma is not None, found.beta is not None)
        return KernelCall(
            name=f"{dtype}_{which}_{found.width}__{target.isa.name}".replace("-", "_"),
            key=(which, target.spec, dtype, rows, found.width, affine, found.epsilon),
            kernel=build(rows, found.width, dtype, found.centred, affine, found.epsilon, target),
            output=found.output,
            covers=found.covers,
            inputs=tuple(inputs),
            constants=tuple(constants),
        )


def _operator(binding: relax.VarBinding) -> Norm | Decline:
    call = binding.value
    centred = op_of(call) == "relax.nn.layer_norm"
    shape = shape_of(call)
    axes = sorted(int(a) % len(shape) for a in call.attrs.axes)
    if axes != list(range(len(shape) - len(axes), len(shape))):
        return Decline(binding.var.name, f"norm over axes {axes} of {len(shape)}, which are not the last ones")
    x, gamma, *rest = call.args
    beta = rest[0] if centred and call.attrs.center else None
    scaled = not centred or call.attrs.scale
    width = math.prod(shape[a] for a in axes)
    covers = (binding.var,)
    return Norm(x, gamma if scaled else None, beta, float(call.attrs.epsilon), width, centred, binding.var, covers)


def _chain(flow: Dataflow, binding: relax.VarBinding) -> Norm | Decline:
    where = binding.var.name
    add = flow.value(binding.value.args[0])
    if op_of(add) != "relax.add":
        return Decline(where, "a reciprocal square root of no sum")
    epsilon, mean_var = flow.scalar(add.args[1]), add.args[0]
    if epsilon is None:
        epsilon, mean_var = flow.scalar(add.args[0]), add.args[1]
    mean = flow.value(mean_var)
    if epsilon is None or op_of(mean) != "relax.mean" or not mean.attrs.keepdims:
        return Decline(where, "no mean plus a constant under the root")
    square_var = mean.args[0]
    square, shape = flow.value(square_var), shape_of(mean.args[0])
    if [int(a) % len(shape) for a in mean.attrs.axis] != [len(shape) - 1]:
        return Decline(where, "a mean over other axes than the last")
    x = square.args[0] if op_of(square) in ("relax.power", "relax.multiply") else None
    squared = op_of(square) == "relax.multiply" and square.args[1].same_as(x)
    if x is None or not (squared or (op_of(square) == "relax.power" and flow.scalar(square.args[1]) == 2)):
        return Decline(where, "no mean of squares under the root")
    inner = [square_var, mean_var, binding.value.args[0], binding.var]
    users = [flow.sole_user(v) for v in inner]
    if any(u is None for u in users):
        return Decline(where, "a step of the norm is also read elsewhere")
    scaled = users[-1]
    assert scaled is not None
    if op_of(scaled.value) != "relax.multiply" or not any(a.same_as(x) for a in scaled.value.args):
        return Decline(where, "the root does not scale the tensor that it was taken of")
    covers, gamma, output = [*inner, scaled.var], None, scaled.var
    weigh = flow.sole_user(scaled.var)
    if weigh is not None and op_of(weigh.value) == "relax.multiply":
        other = weigh.value.args[1] if weigh.value.args[0].same_as(scaled.var) else weigh.value.args[0]
        value = flow.constant(other)
        if value is not None and value.size == shape[-1] and value.shape[-1:] == shape[-1:]:
            gamma, output = other, weigh.var
            covers.append(weigh.var)
    return Norm(x, gamma, None, epsilon, shape[-1], False, output, tuple(covers))


def build(
    rows: int, width: int, dtype: str, centred: bool, affine: tuple[bool, bool], epsilon: float, target: Target
) -> PrimFunc:
    """The kernel: x, gamma and beta where there are any, y."""
    lanes = target.isa.lanes(32)
    names = [n for n, there in zip(("gamma", "beta"), affine, strict=True) if there]
    buffers = [("x", rows * width, dtype), *((n, width, "float32") for n in names), ("y", rows * width, dtype)]

    def body(x: Any, *rest: Any) -> None:
        weights, y = dict(zip(names, rest, strict=False)), rest[-1]
        with loop(rows, target.threads and rows * width >= PARALLEL_ELEMENTS) as r, T.sblock("row"):
            at = T.bind(r * width)

            def value(c: Any, w: int) -> Any:
                return load(x, at + c, w, "float32")

            mean: Any = None
            if centred:
                total = fold_row(width, lanes, "float32", 0.0, value, lambda a, b: a + b)
                mean = T.bind(total * tirx.const(1 / width, "float32"))

            def centre(c: Any, w: int) -> Any:
                return value(c, w) if mean is None else value(c, w) - spread(mean, w)

            squares = fold_row(
                width, lanes, "float32", 0.0, lambda c, w: centre(c, w) * centre(c, w), lambda a, b: a + b
            )
            spreaded = squares * tirx.const(1 / width, "float32") + tirx.const(epsilon, "float32")
            inverse = T.bind(tirx.const(1.0, "float32") / tirx.sqrt(spreaded))

            def write(c: Any, w: int) -> None:
                result = centre(c, w) * spread(inverse, w)
                if "gamma" in weights:
                    result = result * load(weights["gamma"], c, w, "float32")
                if "beta" in weights:
                    result = result + load(weights["beta"], c, w, "float32")
                store(y, at + c, result, w, "float32")

            each_of_row(width, lanes, write)

    return prim_func(buffers, body)


def reference(
    x: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None, epsilon: float, centred: bool
) -> np.ndarray:
    """What the kernel computes, over the last axis."""
    x = x - x.mean(-1, keepdims=True) if centred else x
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    return y * (1 if gamma is None else gamma) + (0 if beta is None else beta)
