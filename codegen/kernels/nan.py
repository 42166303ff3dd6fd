"""Maxima and minima that hand a NaN on, as PyTorch's do.

TVM compiles max(a, b) to a comparison and a choice, which loses the NaN of `a`. Here

    x against a constant c    c > x ? c : x                        the same one instruction, its operands exchanged
    two values, Arm           llvm.maximum                         fmax
    two values, elsewhere     isnan(b) ? b : (b > a ? b : a)       the inner choice keeps the NaN of a, the outer b

so that a NaN survives relu, clamp, the maximum over an axis and pooling. Which of two zeros is larger stays open.
A kernel that cannot lose a NaN, as a softmax sees it again in its sum, writes `plain_max` and pays for nothing.
Source: Intel's and Arm's descriptions of maxps and fmax; LLVM Language Reference Manual, llvm.maximum.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import IRModule
from tvm.tirx import PrimFunc, Select

from graphopt.codegen.kernels.tir_rewrite import Rewriter
from graphopt.targets.target import Target

Expr = Any  # TIR expressions: their operators are overloaded at run time


def plain_max(a: Expr, b: Expr) -> Expr:
    """The larger of two values in one instruction; `b` where either is NaN."""
    return Select(a > b, a, b)


class _Propagate(Rewriter):
    """Bottom-up, so that the maxima inside an operand hand their NaN on first."""

    def __init__(self, intrinsics: bool) -> None:
        self.intrinsics = intrinsics

    def expr(self, e: Any) -> Any:
        e = super().expr(e)
        if not isinstance(e, tirx.Max | tirx.Min) or not str(e.ty.dtype).startswith("float"):
            return e
        largest = isinstance(e, tirx.Max)
        if self.intrinsics:
            return tirx.call_llvm_pure_intrin(e.ty.dtype, f"llvm.{'maximum' if largest else 'minimum'}", e.a, e.b)
        for limit, x in ((e.a, e.b), (e.b, e.a)):
            number = _constant(limit)
            if number is not None:
                return limit if math.isnan(number) else _once(x, lambda v, c=limit: _choice(c, v, largest))
        return _once(e.a, lambda a: _once(e.b, lambda b: _either(a, b, largest)))


def _once(x: Expr, use: Any) -> Expr:
    """An expression that names `x` more than once, and computes it once."""
    held = tirx.Var("held", x.ty.dtype)
    return tirx.Let(held, x, use(held))


def _choice(first: Expr, other: Expr, largest: bool) -> Expr:
    return Select(first > other if largest else first < other, first, other)


def _either(a: Expr, b: Expr, largest: bool) -> Expr:
    return Select(tirx.isnan(b), b, _choice(b, a, largest))


def _constant(x: Expr) -> float | None:
    x = x.value if isinstance(x, tirx.Broadcast) else x
    return float(x.value) if isinstance(x, tirx.FloatImm) else None


def PropagateNan(target: Target) -> tvm.ir.transform.Pass:
    """Rewrite the maxima and minima of floats; integers have no NaN."""
    intrinsics = str(target.llvm.get("mtriple", "")).startswith(("aarch64", "arm"))

    @tvm.ir.transform.module_pass(opt_level=0, name="PropagateNan")
    def run(module: IRModule, _: tvm.ir.transform.PassContext) -> IRModule:
        rewritten = {}
        for name, func in module.functions.items():
            body = _Propagate(intrinsics).stmt(func.body)
            if not body.same_as(func.body):
                func = PrimFunc(func.params, body, func.ret_type, func.attrs)
            rewritten[name] = func
        return IRModule(rewritten, attrs=module.attrs)

    return run
