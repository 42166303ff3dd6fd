"""float16 on processors that cannot convert it: bits in memory, float32 in between, conversions in integers.

    to float32      move exponent and mantissa up by 13 bits and add 112 to the exponent; a subnormal gets an exponent
                    of its own, and loses it by a subtraction of floats, which is exact
    to float16      round to nearest even by adding 0xfff and the lowest bit that stays; a subnormal is rounded by the
                    addition of 0.5, whose last bit is the last bit of a float16
    a + b           both widened, added, and the sum rounded: as the processors do that convert natively

Infinities stay, too large numbers become them, a NaN stays one. All vectors: LLVM's own way is a call of a function
for each element, and for some lengths of vectors its WebAssembly back end never finishes.
limit: about 9 operations a vector to float32, 15 to float16.
Source: F. Giesen, "half to float done quic" and "float->half variants".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir import Call, IRModule, PointerType, PrimType
from tvm.tirx import PrimFunc, Select

from graphopt.codegen.kernels.tir_rewrite import Rewriter, is_load
from graphopt.targets.target import Target

Expr = Any  # TIR expressions: their operators are overloaded at run time

_COMPUTED = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max)
_COMPARED = (tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE)
# Calls that move values about, and so take bits as they are.
_MOVING = ("reinterpret", "likely", "address_of", "buffer_data")

EXPONENT_GAP = 112 << 23  # between the exponents' biases, 127 and 15, in place in a float32
INFINITY, HALF_INFINITY, HALF_NAN = 0x7F800000, 0x7C00, 0x7E00
LEAST_NORMAL = 113 << 23  # 2^-14 as float32
TOO_LARGE = 143 << 23  # 2^16
ONE_HALF = 126 << 23


def _like(scalar: str, x: Expr) -> str:
    lanes = int(x.ty.dtype.lanes)
    return scalar if lanes == 1 else f"{scalar}x{lanes}"


Let = Callable[[Expr], Expr]  # computes a value once, before the statement, and gives what holds it


def widen(half: Expr, let: Let) -> Expr:
    """The float32 with the value of a float16, whose bits are given as uint16; exact."""
    kind = _like("uint32", half)

    def number(x: int) -> Expr:
        return tirx.const(x, kind)

    bits = let(tirx.Cast(kind, half))
    moved = let(tirx.shift_left(bits & number(0x7FFF), number(13)))
    lifted = tirx.reinterpret(_like("float32", half), moved + number(LEAST_NORMAL))
    subnormal = tirx.reinterpret(kind, lifted - tirx.const(2.0**-14, _like("float32", half)))
    finite = Select(moved < number(1 << 23), subnormal, moved + number(EXPONENT_GAP))
    magnitude = Select(moved >= number(HALF_INFINITY << 13), moved | number(INFINITY), finite)
    return tirx.reinterpret(_like("float32", half), magnitude | tirx.shift_left(bits & number(0x8000), number(16)))


def narrow(x: Expr, let: Let) -> Expr:
    """The bits, as uint16, of the float16 nearest to a float32; of two equally near ones the even one."""
    kind = _like("uint32", x)

    def number(value: int) -> Expr:
        return tirx.const(value, kind)

    bits = let(tirx.reinterpret(kind, x))
    magnitude = let(bits & number(0x7FFFFFFF))
    shifted = tirx.reinterpret(_like("float32", x), magnitude) + tirx.const(0.5, _like("float32", x))
    subnormal = tirx.reinterpret(kind, shifted) - number(ONE_HALF)
    odd = tirx.shift_right(magnitude, number(13)) & number(1)
    # Written as an addition of unsigned numbers, which wrap around.
    normal = tirx.shift_right(magnitude + number(2**32 - EXPONENT_GAP + 0xFFF) + odd, number(13))
    special = Select(magnitude > number(INFINITY), number(HALF_NAN), number(HALF_INFINITY))
    finite = Select(magnitude < number(LEAST_NORMAL), subnormal, normal)
    result = Select(magnitude >= number(TOO_LARGE), special, finite)
    return tirx.Cast(_like("uint16", x), result | tirx.shift_right(bits & number(1 << 31), number(16)))


def _is_half(e: Any) -> bool:
    return isinstance(e.ty, PrimType) and str(e.ty.dtype).startswith("float16")


def _bits_type(dtype: Any) -> str:
    return str(dtype).replace("float16", "uint16")


class _Soften(Rewriter):
    """Every expression of float16 becomes one of uint16, its bits."""

    def __init__(self) -> None:
        self.renamed: dict[Any, Any] = {}
        self.pending: list[tirx.Stmt] = []
        self.guards: list[Expr] = []
        self.found = False

    def function(self, func: PrimFunc) -> PrimFunc:
        params = []
        for param in func.params:
            if isinstance(param.ty, PointerType) and str(param.ty.element_type.dtype) == "float16":
                self.found = True
                self.renamed[param] = tirx.Var(param.name, PointerType(PrimType("uint16"), param.ty.storage_scope))
            params.append(self.renamed.get(param, param))
        body = self.stmt(func.body)
        return PrimFunc(params, body, func.ret_type, func.attrs) if self.found else func

    def buffer(self, buffer: Any) -> Any:
        if not str(buffer.dtype).startswith("float16"):
            return buffer
        if buffer not in self.renamed:
            self.found = True
            t = buffer.ty
            self.renamed[buffer] = tirx.decl_buffer(
                t.shape, _bits_type(t.dtype), buffer.name, None, t.strides, t.elem_offset, t.storage_scope,
                t.data_alignment, t.offset_factor, None, t.layout,
            )  # fmt: skip
        return self.renamed[buffer]

    def stmt(self, s: Any) -> Any:
        assert not self.pending, "a loop's condition has a conversion, which would be computed only once"
        result = self.visit(s)
        if not self.pending:
            return result
        sequence, self.pending = [*self.pending, result], []
        return tirx.SeqStmt(sequence)

    def visit(self, s: Any) -> Any:
        if isinstance(s, tirx.DeclBuffer):
            buffer, data = self.buffer(s.buffer), self.expr(s.data)
            same = buffer.same_as(s.buffer) and data.same_as(s.data)
            return s if same else tirx.DeclBuffer(buffer, data=data)
        if isinstance(s, tirx.AllocBuffer):
            buffer = self.buffer(s.buffer)
            return s if buffer.same_as(s.buffer) else tirx.AllocBuffer(buffer, s.annotations)
        if isinstance(s, tirx.Bind) and _is_half(s.var):
            value = self.expr(s.value)
            self.renamed[s.var] = tirx.Var(s.var.name, value.ty.dtype)
            return tirx.Bind(self.renamed[s.var], value)
        if isinstance(s, tirx.BufferStore):
            value, indices = self.expr(s.value), [self.expr(i) for i in s.indices]
            return tirx.BufferStore(self.buffer(s.buffer), value, indices)
        if isinstance(s, tirx.IfThenElse):
            # What the condition needs must stand before the whole statement, and not in a branch.
            condition = self.expr(s.condition)
            before, self.pending = self.pending, []
            then = self.stmt(s.then_case)
            other = None if s.else_case is None else self.stmt(s.else_case)
            self.pending = before
            return tirx.IfThenElse(condition, then, other)
        return super().stmt(s)

    def let(self, value: Expr) -> Expr:
        # A buffer and not a variable, which TVM's analyzer would replace by its value wherever it stands: a chain of
        # conversions would take forever. LLVM keeps the buffer in a register.
        scalar, lanes = str(value.ty.dtype).split("x")[0], int(value.ty.dtype.lanes)
        buffer = tirx.decl_buffer((lanes,), scalar, "half", scope="global", layout=None)
        index = tirx.Ramp(0, 1, lanes) if lanes > 1 else tirx.const(0, "int32")
        for guard in reversed(self.guards):  # it is computed early, and must not read where it may not
            value = tirx.if_then_else(guard, value, tirx.const(0, value.ty.dtype))
        self.pending += [tirx.AllocBuffer(buffer), tirx.BufferStore(buffer, value, [index])]
        return tirx.BufferLoad(buffer, [index])

    def narrow(self, x: Expr) -> Expr:
        self.found = True
        return narrow(x, self.let)

    def wide(self, e: Any) -> Any:
        """An expression whose value, if it is float16, is float32."""
        if not _is_half(e):
            return self.expr(e)
        self.found = True
        return widen(self.expr(e), self.let)

    def expr(self, e: Any) -> Any:
        if isinstance(e, tirx.Var):
            return self.renamed.get(e, e)
        if is_load(e):
            return tirx.BufferLoad(self.buffer(e.source), [self.expr(i) for i in e.indices])
        if isinstance(e, tirx.FloatImm) and _is_half(e):
            with np.errstate(over="ignore"):
                return tirx.const(int(np.float16(float(e.value)).view(np.uint16)), "uint16")
        if isinstance(e, tirx.Let):
            # Conversions in its body are computed before the statement, where the variable must be known.
            self.renamed[e.var] = self.let(self.expr(e.value))
            return self.expr(e.body)
        if isinstance(e, tirx.Cast):
            return self.cast(e)
        if isinstance(e, _COMPUTED) and _is_half(e):
            return self.narrow(type(e)(self.wide(e.a), self.wide(e.b)))
        if isinstance(e, _COMPARED) and _is_half(e.a):
            return type(e)(self.wide(e.a), self.wide(e.b))
        if isinstance(e, Call) and e.op.name.endswith("if_then_else"):
            condition = self.expr(e.args[0])
            then, other = self.guarded(condition, e.args[1]), self.guarded(tirx.Not(condition), e.args[2])
            return tirx.if_then_else(condition, then, other)
        if isinstance(e, Call) and (_is_half(e) or any(_is_half(a) for a in e.args)):
            return self.halves(e)
        return super().expr(e)

    def guarded(self, guard: Expr, e: Any) -> Any:
        self.guards.append(guard)
        try:
            return self.expr(e)
        finally:
            self.guards.pop()

    def cast(self, e: tirx.Cast) -> Any:
        value = self.wide(e.value)
        if _is_half(e):
            # By way of float32, as PyTorch; every integer that is not infinite as float16 is exact there.
            kind = _like("float32", e)
            return self.narrow(value if str(value.ty.dtype) == kind else tirx.Cast(kind, value))
        return value if value.ty.dtype == e.ty.dtype else tirx.Cast(e.ty.dtype, value)

    def halves(self, e: Call) -> Any:
        name = e.op.name.rpartition(".")[2]
        if name in _MOVING:
            args = [self.expr(a) for a in e.args]
            if name == "reinterpret":
                dtype = _bits_type(e.ty.dtype)
                return args[0] if str(args[0].ty.dtype) == dtype else tirx.reinterpret(dtype, args[0])
            kind = PrimType(_bits_type(e.ty.dtype)) if _is_half(e) else e.ty
            return Call(e.op, args, e.attrs, ty_args=e.ty_args, ret_ty=kind)
        args = [self.wide(a) for a in e.args]
        kind = PrimType(_like("float32", e)) if _is_half(e) else e.ty
        result = Call(e.op, args, e.attrs, ty_args=e.ty_args, ret_ty=kind)
        return self.narrow(result) if _is_half(e) else result


def converts_natively(target: Target) -> bool:
    """Whether the processor has instructions from float16 to float32 and back."""
    return target.isa.name == "neon" or "f16c" in target.features


def SoftenHalf(target: Target) -> tvm.ir.transform.Pass:
    """Leave no float16 in functions, where the target's processors cannot convert it."""

    @tvm.ir.transform.module_pass(opt_level=0, name="SoftenHalf")
    def run(module: IRModule, _: tvm.ir.transform.PassContext) -> IRModule:
        if converts_natively(target):
            return module
        functions = {name: _Soften().function(func) for name, func in module.functions.items()}
        return IRModule(functions, attrs=module.attrs)

    return run
