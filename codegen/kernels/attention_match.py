"""Find attention in the graph: the operator itself, or two products with a softmax between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import relax

from graphopt.codegen.dataflow import Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.views import View, contiguous, reshaped, trail, view_of, written_as
from graphopt.errors import Decline

LAYOUT = ("relax.reshape", "relax.broadcast_to", "relax.expand_dims", "relax.squeeze")


@dataclass(frozen=True)
class Mask:
    """What is done to a score before the softmax."""

    view: View  # [b, h, n, m]
    keeps: bool = True  # bool only: whether true means seen
    fill: float = -math.inf  # bool only: what stands for a score that is not seen


@dataclass(frozen=True)
class Found:
    """Attention with its operands as views; see attention.py for the formula."""

    q: View  # [b, n, h, d]
    k: View  # [b, m, h, d]
    v: View  # [b, m, h, d]
    mask: Mask | None
    scale: float
    causal: int | None  # row i sees columns up to i + causal
    safe: bool  # rows that see nothing are zero
    dtype: str
    output: relax.Var
    covers: tuple[relax.Var, ...]
    out_strides: tuple[int, ...]  # of b, n, h, d

    @property
    def b(self) -> int:
        """Samples."""
        return self.q.shape[0]

    @property
    def n(self) -> int:
        """Queries."""
        return self.q.shape[1]

    @property
    def h(self) -> int:
        """Heads of the queries."""
        return self.q.shape[2]

    @property
    def d(self) -> int:
        """Size of a head."""
        return self.q.shape[3]

    @property
    def m(self) -> int:
        """Keys."""
        return self.k.shape[1]

    @property
    def views(self) -> tuple[View, ...]:
        """All that is read."""
        return (self.q, self.k, self.v, *((self.mask.view,) if self.mask else ()))


def find(flow: Dataflow, binding: relax.VarBinding) -> Found | Decline:
    """Attention that starts at an attention operator, or at the product of queries and keys."""
    if op_of(binding.value) == "relax.matmul":
        return _written_out(flow, binding)
    return _operator(flow, binding)


def _operator(flow: Dataflow, binding: relax.VarBinding) -> Found | Decline:
    call, where = binding.value, binding.var.name
    if call.attrs.window_size is not None:
        return Decline(where, "attention with a window")
    if shape_of(call.args[1]) != shape_of(call.args[2]):
        return Decline(where, "values of another size than the keys")
    q, k, v = (_operand(flow, a, last) for a, last in zip(call.args[:3], (False, False, True), strict=True))
    b, n, h, d = q.shape
    m = k.shape[1]
    mask = None
    if len(call.args) > 3:
        mask = Mask(_spread(_mask(flow, call.args[3]), (b, h, n, m)))
    scale = 1 / math.sqrt(d) if call.attrs.scale is None else float(call.attrs.scale)
    causal = {None: None, "TopLeft": 0, "BottomRight": m - n}[call.attrs.causal_mask]
    output, strides = _destination(flow, binding.var, (b, n, h, d))
    chain = trail(flow, binding.var)
    covers = chain[: 1 + next(i for i, x in enumerate(chain) if x.same_as(output))]
    return _checked(where, q, k, v, mask, scale, causal, True, output, tuple(covers), strides)


def _written_out(flow: Dataflow, binding: relax.VarBinding) -> Found | Decline:
    where = binding.var.name
    covers, scale, mask_expr, keeps, fill = [binding.var], 1.0, None, True, -math.inf
    masked: tuple[int, ...] = ()  # the shape that the scores have where the mask meets them
    while (user := flow.sole_user(covers[-1])) is not None and op_of(user.value) != "relax.nn.softmax":
        call, op = user.value, op_of(user.value)
        covers.append(user.var)
        if op in LAYOUT:
            if len(shape_of(call)) < 2 or shape_of(call)[-2:] != shape_of(binding.var)[-2:]:
                return Decline(where, "the product's rows are taken apart before any softmax")
            continue
        if op in ("relax.multiply", "relax.divide") and mask_expr is None:
            factor = flow.scalar(call.args[1]) if call.args[0].same_as(covers[-2]) else None
            if op == "relax.multiply" and factor is None and call.args[1].same_as(covers[-2]):
                factor = flow.scalar(call.args[0])
            if factor is not None:
                scale *= factor if op == "relax.multiply" else 1 / factor
                continue
        if op == "relax.add" and mask_expr is None:
            mask_expr, masked = call.args[1] if call.args[0].same_as(covers[-2]) else call.args[0], shape_of(call)
            continue
        if op == "relax.where" and mask_expr is None:
            keeps = bool(call.args[1].same_as(covers[-2]))
            filled = flow.scalar(call.args[2 if keeps else 1])
            if filled is not None and not call.args[0].same_as(covers[-2]):
                mask_expr, fill, masked = call.args[0], filled, shape_of(call)
                continue
        return Decline(where, f"{op or 'a tuple'} follows the product, and no softmax")
    if user is None:
        return Decline(where, "a product without a softmax behind it")
    shape = shape_of(user.var)
    if int(user.value.attrs.axis) % len(shape) != len(shape) - 1 or len(shape) < 3:
        return Decline(where, "softmax over another axis than the keys")
    weights = trail(flow, user.var)
    covers += weights
    last = flow.sole_user(weights[-1])
    if last is None or op_of(last.value) != "relax.matmul" or not last.value.args[0].same_as(weights[-1]):
        return Decline(where, "the softmax does not go into one product alone")
    covers.append(last.var)
    n, m = shape[-2:]
    lead = (math.prod(shape[:-3]), shape[-3])
    d = shape_of(binding.value.args[0])[-1]
    scales: list[float] = []
    q = _batched(flow, binding.value.args[0], (*lead, n, d), (0, 2, 1, 3), scales)
    k = _batched(flow, binding.value.args[1], (*lead, d, m), (0, 3, 1, 2), scales)
    v = _batched(flow, last.value.args[1], (*lead, m, shape_of(last.var)[-1]), (0, 2, 1, 3), None)
    if q is None or k is None or v is None:
        return Decline(where, "operands whose batch and heads are not those of the scores")
    if math.prod(shape_of(last.var)) != math.prod(lead) * n * v.shape[3]:
        return Decline(where, "the second product has other batch dimensions")
    mask = None
    if mask_expr is not None:
        spread = reshaped(_spread(_mask(flow, mask_expr), masked), (*lead, n, m))
        if spread is None:
            return Decline(where, "a mask that strides cannot spread over batch and heads")
        mask = Mask(spread, keeps, fill)
    output, bhnd = _destination(flow, last.var, (*lead, n, v.shape[3]))
    chain = trail(flow, last.var)
    covers += chain[1 : 1 + next(i for i, x in enumerate(chain) if x.same_as(output))]
    strides = (bhnd[0], bhnd[2], bhnd[1], bhnd[3])
    total = scale * math.prod(scales)
    return _checked(where, q, k, v, mask, total, None, False, output, tuple(covers), strides)


def _checked(
    where: str,
    q: View,
    k: View,
    v: View,
    mask: Mask | None,
    scale: float,
    causal: int | None,
    safe: bool,
    output: relax.Var,
    covers: tuple[relax.Var, ...],
    strides: tuple[int, ...],
) -> Found | Decline:
    if q.shape[3] != v.shape[3]:
        return Decline(where, f"values of size {v.shape[3]} beside keys of size {q.shape[3]}")
    dtype = dtype_of(output)
    if dtype not in ("float32", "float16", "bfloat16"):
        return Decline(where, f"attention in {dtype}")
    if any(dtype_of(view.base) != dtype for view in (q, k, v)):
        return Decline(where, "operands of different types")
    if mask is not None and dtype_of(mask.view.base) not in (dtype, "bool", "float32"):
        return Decline(where, f"a mask of {dtype_of(mask.view.base)}")
    return Found(q, k, v, mask, scale, causal, safe, dtype, output, covers, strides)


def _operand(flow: Dataflow, expr: relax.Expr, contiguous_last: bool) -> View:
    """A view of [b, n, h, d] with one stride for n and d; the tensor itself where there is none.

    Of values either n or d must lie together.
    """
    view = view_of(flow, expr)
    return view if _readable(view, contiguous_last) else contiguous(expr)


def _readable(view: View, contiguous_last: bool) -> bool:
    last = view.stride(3)
    if view.stride(1) is None or last is None:
        return False
    return last == 1 or view.shape[3] == 1 or not contiguous_last or (view.stride(1) == 1 and last > 0)


def _batched(
    flow: Dataflow, expr: relax.Expr, shape: tuple[int, ...], order: tuple[int, ...], scales: list[float] | None
) -> View | None:
    """An operand of a batched product, seen with `shape` and then permuted to [b, n, h, d]."""
    factors: list[float] = []
    for view in (view_of(flow, expr, scales=factors if scales is not None else None), contiguous(expr)):
        if math.prod(view.shape) != math.prod(shape):
            return None
        seen = reshaped(view, shape)
        if seen is not None:
            moved = View(seen.base, seen.offset, tuple(seen.dims[i] for i in order))
            if _readable(moved, scales is None):
                if scales is not None:
                    scales += factors
                return moved
        factors = []
    return None


def _mask(flow: Dataflow, expr: relax.Expr) -> View:
    """A view whose last dimension vectors can read: dense, or one element for all, as a scalar's is."""
    view = view_of(flow, expr)
    return view if not view.dims or view.stride(len(view.dims) - 1) in (0, 1) else contiguous(expr)


def _spread(view: View, shape: tuple[int, ...]) -> View:
    dims = [()] * (len(shape) - len(view.dims)) + list(view.dims)
    grown = [((e, 0),) if not dim and e > 1 else dim for dim, e in zip(dims, shape, strict=True)]
    return View(view.base, view.offset, tuple(grown))


def _destination(flow: Dataflow, var: relax.Var, shape: tuple[int, ...]) -> tuple[relax.Var, tuple[int, ...]]:
    """The last variable that only looks at `var`, and the strides that write it in its own order."""
    for seen in reversed(trail(flow, var)):
        strides = written_as(flow, var, seen, shape)
        if strides is not None:
            return seen, strides
    raise AssertionError("a variable is always a view of itself")
