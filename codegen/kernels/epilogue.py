"""What is computed on a result while it is still in registers: bias, scale, activation, residual, gate.

    C[row, col] = f(acc[row, col], operands[row or 0, col or 0])

An epilogue is the elementwise part of the graph behind an anchor, as a list of steps over earlier values. It ends at
the last variable that is the only one with readers outside, so x * sigmoid(x) is taken whole or not at all. A run-time
operand must be defined before the value that it meets: of the two branches of a residual sum the later one takes the
sum, and no two kernels ever want the same binding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, is_tensor, op_of, shape_of
from graphopt.codegen.kernels.emit import FLOATS, Buffer, Expr, load, splat, spread

MAX_STEPS = 24  # longer chains gain nothing in one kernel, and its code grows

# A value of the chain by number (0 is the accumulator), an operand by number, or a constant.
Ref = tuple[str, int | float]


@dataclass(frozen=True)
class Operand:
    """A tensor beside the accumulator; it is read at the strides that broadcasting gives it."""

    extents: tuple[int, ...]  # of the row index, outermost first, as far as the operand needs them apart
    strides: tuple[int, ...]
    by_column: bool
    size: int
    dtype: str
    constant: bool

    def offset(self, row: Expr, col: Expr) -> Expr:
        """Index of the element that belongs to [row, col]."""
        at: Expr = col if self.by_column else 0
        for extent, stride in zip(reversed(self.extents), reversed(self.strides), strict=True):
            if stride:
                last = extent == math.prod(self.extents)
                at = at + (row if last else tirx.floormod(row, extent)) * stride
            row = tirx.floordiv(row, extent)
        return at


@dataclass(frozen=True)
class Step:
    """One elementwise operator over earlier values."""

    op: str
    args: tuple[Ref, ...]
    label: str


@dataclass(frozen=True)
class Epilogue:
    """The steps and the layout of their operands: everything that shapes the code, nothing of the constants' values."""

    steps: tuple[Step, ...] = ()
    operands: tuple[Operand, ...] = ()

    @property
    def name(self) -> str:
        """Short name for the kernel's symbol, as "_bias_relu"; empty for none."""
        return "".join(f"_{s.label}" for s in self.steps if s.label)[:48].rstrip("_")

    def buffers(self, constant: bool) -> list[tuple[str, int, str]]:
        """Parameters of the kernel for the constant or for the run-time operands."""
        kind = "constant" if constant else "operand"
        return [(f"{kind}{i}", o.size, o.dtype) for i, o in enumerate(self.operands) if o.constant == constant]

    def bind(self, named: Mapping[str, Buffer]) -> list[Buffer]:
        """Buffers in the order of the operands, from the kernel's parameters by name."""
        return [named[("constant" if o.constant else "operand") + str(i)] for i, o in enumerate(self.operands)]

    def apply(self, acc: Expr, buffers: Sequence[Buffer], row: Expr, col: Expr, lanes: int, dtype: str) -> Expr:
        """The expression for `lanes` results from column `col` of `row`; emits bindings of values with many readers."""
        values = [acc]
        readers = [a for s in self.steps for a in s.args]

        def get(ref: Ref) -> Expr:
            kind, at = ref
            if kind == "constant":
                return splat(at, lanes, dtype)
            if kind == "value":
                return values[int(at)]
            operand = self.operands[int(at)]
            where = operand.offset(row, col)
            if operand.by_column:
                return load(buffers[int(at)], where, lanes, dtype)
            return spread(load(buffers[int(at)], where, 1, dtype), lanes)

        if readers.count(("value", 0)) > 1:
            values[0] = T.Bind(acc)
        for number, step in enumerate(self.steps, 1):
            value = EMIT[step.op](lambda x: splat(x, lanes, dtype), *map(get, step.args))
            values.append(T.Bind(value) if readers.count(("value", number)) > 1 else value)
        return values[-1]

    def reference(self, acc: Array, arrays: Sequence[Array]) -> Array:
        """The same on numpy arrays: `acc` (rows, columns), operands flat in their order."""
        rows, cols = acc.shape
        values = [acc]

        def get(ref: Ref) -> Array:
            kind, at = ref
            if kind == "constant":
                return np.asarray(at, acc.dtype)
            if kind == "value":
                return values[int(at)]
            operand = self.operands[int(at)]
            row = np.arange(rows)
            where = np.zeros((rows, cols), np.int64) + (np.arange(cols) if operand.by_column else 0)
            for extent, stride in zip(reversed(operand.extents), reversed(operand.strides), strict=True):
                where += ((row % extent) * stride)[:, None]
                row = row // extent
            return np.asarray(arrays[int(at)]).reshape(-1)[where].astype(acc.dtype)

        for step in self.steps:
            values.append(REFERENCE[step.op](*map(get, step.args)))
        return values[-1]


@dataclass(frozen=True)
class Absorbed:
    """An epilogue with what it was made from."""

    epilogue: Epilogue
    output: relax.Var
    covers: tuple[relax.Var, ...]
    inputs: tuple[relax.Expr, ...]
    constants: tuple[Array, ...]


Like = Callable[[float], Expr]
EMIT: dict[str, Callable[..., Expr]] = {
    "add": lambda _, a, b: a + b,
    "subtract": lambda _, a, b: a - b,
    "multiply": lambda _, a, b: a * b,
    "divide": lambda _, a, b: a / b,
    "maximum": lambda _, a, b: tirx.max(a, b),
    "minimum": lambda _, a, b: tirx.min(a, b),
    "relu": lambda c, a: tirx.max(a, c(0.0)),
    "sigmoid": lambda _, a: tirx.sigmoid(a),
    "tanh": lambda _, a: tirx.tanh(a),
    "exp": lambda _, a: tirx.exp(a),
    "erf": lambda _, a: tirx.erf(a),
    "sqrt": lambda _, a: tirx.sqrt(a),
    "negative": lambda c, a: c(0.0) - a,
    "square": lambda _, a: a * a,
    "silu": lambda _, a: a * tirx.sigmoid(a),
    "gelu": lambda c, a: a * c(0.5) * (c(1.0) + tirx.erf(a * c(math.sqrt(0.5)))),
    "gelu_tanh": lambda c, a: (
        a * c(0.5) * (c(1.0) + tirx.tanh(a * (c(1.0) + a * a * c(0.044715)) * c(math.sqrt(2.0 / math.pi))))
    ),
    "leakyrelu": lambda c, a, slope: tirx.max(a, c(0.0)) + tirx.min(a, c(0.0)) * slope,
}


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


_erf = np.vectorize(math.erf, otypes=[np.float64])

REFERENCE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "relu": lambda a: np.maximum(a, 0.0),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "exp": np.exp,
    "erf": _erf,
    "sqrt": np.sqrt,
    "negative": np.negative,
    "square": np.square,
    "silu": lambda a: a * _sigmoid(a),
    "gelu": lambda a: 0.5 * a * (1.0 + _erf(a / math.sqrt(2.0))),
    "gelu_tanh": lambda a: 0.5 * a * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * a**3))),
    "leakyrelu": lambda a, slope: np.where(a > 0, a, a * slope),
}

_UNARY = {
    f"relax.{name}": name.rpartition(".")[2]
    for name in (
        *("sigmoid", "tanh", "exp", "erf", "sqrt", "negative", "square"),
        *("nn.relu", "nn.silu", "nn.gelu", "nn.gelu_tanh"),
    )
}
_BINARY = {f"relax.{name}": name for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")}
_VIEWS = ("relax.reshape", "relax.expand_dims", "relax.squeeze")


def absorb(flow: Dataflow, var: relax.Var, inner: int = 1) -> Absorbed:
    """Follow the elementwise operators behind an anchor's variable, as far as one kernel can take them.

    The `inner` last dimensions together are the column index: two for images whose channels stand in front.
    """
    chain = _Chain(flow, var, inner)
    best = chain.snapshot()
    while len(chain.steps) < MAX_STEPS:
        waiting = [b for v in chain.number for b in flow.users(v) if b.var not in chain.number]
        if not waiting:
            break
        following = min(waiting, key=lambda b: flow.position[b.var])
        if not chain.take(following):
            break
        # A view at the end is left outside: it is free, and others may look at what is in front of it.
        if chain.closed(following.var) and op_of(following.value) not in _VIEWS:
            best = chain.snapshot()
    return best


class _Chain:
    """The steps taken so far."""

    def __init__(self, flow: Dataflow, var: relax.Var, inner: int) -> None:
        self.flow, self.last, self.inner = flow, var, inner
        self.number: dict[relax.Var, int] = {var: 0}  # to the value it stands for; views share one
        self.steps: list[Step] = []
        self.operands: list[Operand] = []
        self.sources: list[relax.Expr | Array] = []
        self.dtype = dtype_of(var)
        self.outputs = _outputs(flow)
        shape = shape_of(var)
        self.cols, self.rows = math.prod(shape[-inner:]), math.prod(shape[:-inner])

    def snapshot(self) -> Absorbed:
        sources = list(zip(self.operands, self.sources, strict=True))
        return Absorbed(
            Epilogue(tuple(self.steps), tuple(self.operands)),
            self.last,
            tuple(self.number),
            tuple(s for o, s in sources if not o.constant),
            tuple(np.ascontiguousarray(s).reshape(-1) for o, s in sources if o.constant),
        )

    def closed(self, last: relax.Var) -> bool:
        """Whether nothing but `last` is read outside the chain."""
        inside = self.number
        return all(
            v.same_as(last) or (v not in self.outputs and all(b.var in inside for b in self.flow.users(v)))
            for v in inside
        )

    def take(self, binding: relax.VarBinding) -> bool:
        """Append the operator if it is one that an epilogue can hold."""
        call, var = binding.value, binding.var
        if isinstance(call, relax.Var):
            self.number[var], self.last = self.number[call], var
            return True
        op = op_of(call)
        if not op or not is_tensor(var) or dtype_of(var) != self.dtype:
            return False
        shape = shape_of(var)
        if op in _VIEWS and self.inner > 1:
            return False
        columns = math.prod(shape[-self.inner :]) if len(shape) >= self.inner else 0
        if not shape or columns != self.cols or math.prod(shape[: -self.inner]) != self.rows:
            return False
        if op in _VIEWS:
            self.number[var], self.last = self.number[call.args[0]], var
            return True
        step = self._step(op, call, shape, var)
        if step is None:
            return False
        self.steps.append(step)
        self.number[var], self.last = len(self.steps), var
        return True

    def _step(self, op: str, call: relax.Call, shape: tuple[int, ...], var: relax.Var) -> Step | None:
        if op in _UNARY:
            return Step(_UNARY[op], (self._value(call.args[0]),), _UNARY[op])
        if op == "relax.nn.leakyrelu":
            return Step("leakyrelu", (self._value(call.args[0]), ("constant", float(call.attrs.alpha))), "leakyrelu")
        if op == "relax.clip":
            low, high = (_number(a) for a in call.args[1:3])
            if low is None or high is None:
                return None
            return self._clip(self._value(call.args[0]), low, high)
        if op == "relax.nn.relu6":
            return self._clip(self._value(call.args[0]), 0.0, 6.0)
        if op not in _BINARY:
            return None
        latest = max(self.flow.position[a] for a in call.args if isinstance(a, relax.Var) and a in self.number)
        refs = [self._ref(a, shape, latest) for a in call.args]
        if any(r is None for r in refs):
            return None
        return Step(_BINARY[op], tuple(r for r in refs if r is not None), self._label(op, refs))

    def _clip(self, value: Ref, low: float, high: float) -> Step:
        label = "relu6" if (low, high) == (0.0, 6.0) else "clip"
        if math.isfinite(low):
            self.steps.append(Step("maximum", (value, ("constant", low)), ""))
            value = ("value", len(self.steps))
        return Step("minimum", (value, ("constant", high)), label)

    def _label(self, op: str, refs: Sequence[Ref | None]) -> str:
        constant_row = any(r and r[0] == "operand" and self.operands[int(r[1])].constant for r in refs)
        name = _BINARY[op]
        return {"add": "bias", "multiply": "scale"}.get(name, name) if constant_row else name

    def _value(self, expr: relax.Expr) -> Ref:
        return ("value", self.number[expr])

    def _ref(self, expr: relax.Expr, shape: tuple[int, ...], latest: int) -> Ref | None:
        """A value of the chain, a constant, or a new operand; None where the kernel could not read it."""
        if expr in self.number:
            return self._value(expr)
        number = self.flow.scalar(expr)
        if number is not None:
            return ("constant", number)
        array = self.flow.constant(expr)
        if array is None:
            # Parameters have no position: they are there from the start.
            if not isinstance(expr, relax.Var) or self.flow.position.get(expr, -1) > latest:
                return None
            if not is_tensor(expr) or dtype_of(expr) not in FLOATS:
                return None
        extents = array.shape if array is not None else shape_of(expr)
        dtype = str(array.dtype) if array is not None else dtype_of(expr)
        operand = _broadcast(extents, shape, dtype, array is not None, self.inner)
        if operand is None:
            return None
        self.operands.append(operand)
        self.sources.append(expr if array is None else array)
        return ("operand", len(self.operands) - 1)


def _broadcast(
    operand: tuple[int, ...], shape: tuple[int, ...], dtype: str, constant: bool, inner: int = 1
) -> Operand | None:
    """How a tensor of shape `operand` is read when it meets one of `shape`, whose `inner` last dimensions are one."""
    extents = (1,) * (len(shape) - len(operand)) + tuple(operand)
    if len(extents) != len(shape) or any(e not in (1, s) for e, s in zip(extents, shape, strict=True)):
        return None
    if inner > 1:
        last, whole = math.prod(extents[-inner:]), math.prod(shape[-inner:])
        if last not in (1, whole):
            return None
        extents, shape = (*extents[:-inner], last), (*shape[:-inner], whole)
    merged: list[tuple[int, int]] = []  # (extent of the row index, stride), innermost first
    stride = extents[-1]
    for extent, size in list(zip(extents, shape, strict=True))[-2::-1]:
        if size == 1:
            continue
        own = stride if extent > 1 else 0
        if merged and (own == merged[-1][0] * merged[-1][1]):
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, own))
        stride *= extent
    if all(s == 0 for _, s in merged):
        merged = []
    merged.reverse()
    by_column = extents[-1] > 1 or shape[-1] == 1
    return Operand(
        tuple(e for e, _ in merged), tuple(s for _, s in merged), by_column, math.prod(operand), dtype, constant
    )


def _outputs(flow: Dataflow) -> set[relax.Var]:
    """Variables that the function returns."""
    body = flow.function.body.body
    return {f for f in (body.fields if isinstance(body, relax.Tuple) else [body]) if isinstance(f, relax.Var)}


def _number(expr: Any) -> float | None:
    value = getattr(expr, "value", expr)
    value = getattr(value, "value", value)
    return float(value) if isinstance(value, int | float) else None
