"""Definitions and uses in a straight-line Relax function, and the values of its constant parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
from tvm import ir, relax

Array = np.ndarray
Constant = ir.expr.GenericConst


def shape_of(expr: relax.Expr) -> tuple[int, ...]:
    """Static extents of a tensor expression."""
    return tuple(int(d) for d in expr.ty.shape)


def dtype_of(expr: relax.Expr) -> str:
    """Element type of a tensor expression, as "float32"."""
    return str(expr.ty.dtype)


def is_tensor(expr: relax.Expr) -> bool:
    """Whether the expression has one tensor (not a tuple or a shape) for its value."""
    return isinstance(expr.ty, relax.TensorType)


def op_of(expr: relax.Expr) -> str:
    """Name of the operator called, as "relax.nn.conv2d"; empty for anything but a call of an operator."""
    return expr.op.name if isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op) else ""


class Dataflow:
    """One straight-line function, seen as definitions and uses. It does not change while it is looked at."""

    def __init__(self, function: relax.Function) -> None:
        self.function = function
        self.bindings: list[relax.VarBinding] = [b for block in function.body.blocks for b in block.bindings]
        self._value = {b.var: b.value for b in self.bindings}
        self._users: dict[relax.Var, list[relax.VarBinding]] = defaultdict(list)
        self.position = {b.var: i for i, b in enumerate(self.bindings)}
        for binding in self.bindings:
            for var in set(_variables(binding.value)):
                self._users[var].append(binding)
        self._outputs = set(_variables(function.body.body))

    def value(self, expr: relax.Expr) -> relax.Expr:
        """The expression that a variable stands for, through variables that only rename; parameters stay variables."""
        while isinstance(expr, relax.Var) and expr in self._value:
            expr = self._value[expr]
        return expr

    def users(self, var: relax.Var) -> list[relax.VarBinding]:
        """Bindings that read the variable, in program order."""
        return self._users[var]

    def sole_user(self, var: relax.Var) -> relax.VarBinding | None:
        """The only reader of a variable that is not itself returned."""
        users = self._users[var]
        return users[0] if len(users) == 1 and var not in self._outputs else None

    def constant(self, expr: relax.Expr) -> Array | None:
        """The value of an expression made of constants and views of them; None if it is only known at run time."""
        expr = self.value(expr)
        if isinstance(expr, Constant):
            return expr.value.numpy()
        op = op_of(expr)
        if op not in _FOLD:
            return None
        args = [self.constant(a) for a in expr.args if is_tensor(a)]
        if any(a is None for a in args):
            return None
        return _FOLD[op](expr, *args)

    def scalar(self, expr: relax.Expr) -> float | None:
        """The value of a constant with one element; None for anything else."""
        value = self.constant(expr)
        return float(value.reshape(())) if value is not None and value.size == 1 else None


_FOLD: dict[str, Callable[..., Array]] = {
    "relax.permute_dims": lambda e, x: x.transpose([int(a) for a in e.attrs.axes] if e.attrs.axes else None),
    "relax.reshape": lambda e, x: x.reshape(shape_of(e)),
    "relax.expand_dims": lambda e, x: x.reshape(shape_of(e)),
    "relax.squeeze": lambda e, x: x.reshape(shape_of(e)),
    "relax.broadcast_to": lambda e, x: np.broadcast_to(x, shape_of(e)),
    "relax.astype": lambda e, x: x.astype(dtype_of(e)),
    "relax.add": lambda e, x, y: x + y,
    "relax.subtract": lambda e, x, y: x - y,
    "relax.multiply": lambda e, x, y: x * y,
    "relax.divide": lambda e, x, y: x / y,
    "relax.less": lambda e, x, y: x < y,
    "relax.maximum": lambda e, x, y: np.maximum(x, y),
    "relax.minimum": lambda e, x, y: np.minimum(x, y),
    "relax.negative": lambda e, x: -x,
    "relax.sqrt": lambda e, x: np.sqrt(x),
    "relax.where": lambda e, c, x, y: np.asarray(np.where(c, x, y), x.dtype),
    "relax.rsqrt": lambda e, x: 1 / np.sqrt(x),
}


def _variables(expr: relax.Expr) -> Iterator[relax.Var]:
    if isinstance(expr, relax.Var):
        yield expr
    elif isinstance(expr, relax.Tuple):
        for field in expr.fields:
            yield from _variables(field)
    elif isinstance(expr, relax.TupleGetItem):
        yield from _variables(expr.tuple_value)
    elif isinstance(expr, relax.Call):
        for arg in expr.args:
            yield from _variables(arg)
