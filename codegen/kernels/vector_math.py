"""Transcendental functions as vector code: polynomials in float32, without one call of libm.

    exp      2^n p(r), x = n ln 2 + r, |r| <= ln 2 / 2, p of degree 7 (Cephes)          at most 2 ulp
    log      e ln 2 + p(m - 1), x = m 2^e, sqrt(1/2) <= m < sqrt(2) (Cephes)            at most 2 ulp
    erf      x P(x^2) / Q(x^2), constant beyond 3.75 (the rational of XLA and Eigen)    at most 5 ulp
    tanh     -u / (u + 2), u = exp(-2 |x|) - 1, with the sign of x                      at most 3 ulp
    sigmoid  1 / (1 + exp(-x))                                                          at most 3 ulp
    sin, cos the quadrant in float64, then Cephes's polynomials                         at most 2 ulp, |x| <= 1e5
    pow      products for small integer exponents, sqrt for halves; exp2(y log2 x) for other constant exponents, with a
             relative error of at most (2 + |y log2 x|) 2^-22

Everything holds for the whole range: infinities and NaN as in C, results below the smallest normal float32 are flushed
to zero, and so are such arguments of log. float16 is computed in float32; float64 stays a call of libm.
limit: about 15 operations a vector for exp; no float is converted to an integer, so that no target traps or saturates.
Source: S. Moshier, Cephes Mathematical Library, single precision; XLA's and Eigen's rational for erf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import Call, IRModule
from tvm.tirx import PrimFunc, Select

from graphopt.codegen.kernels.tir_rewrite import Rewriter
from graphopt.targets.target import Target

Expr = Any  # TIR expressions: their operators are overloaded at run time
Let = Callable[[Expr], Expr]  # computes a value once, before the statement, and gives the variable that holds it
Function = Callable[[Expr, Let], Expr]

LN2_HI, LN2_LO = 0.693359375, -2.12194440e-4  # the high part has 9 bits, so n * LN2_HI is exact
ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the mantissa
ROUND64 = 6755399441055744.0  # 1.5 * 2^52
MOST_PRODUCTS = 16
TINY = 1.1754943508222875e-38
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
ERF_P = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
ERF_Q = (
    -1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885, 0.014070470171167667,
    0.11098505178285362, 0.49746925110067538, 1.0,
)  # fmt: skip
ERF_LARGE = 3.7439211627767994
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def _like(value: float, x: Expr) -> Expr:
    return tirx.const(value, x.ty.dtype)


def _uint(value: int, x: Expr) -> Expr:
    return tirx.const(value, _type("uint32", x))


def _type(scalar: str, x: Expr) -> str:
    lanes = int(x.ty.dtype.lanes)
    return scalar if lanes == 1 else f"{scalar}x{lanes}"


def _bits(x: Expr) -> Expr:
    # Unsigned: an overflow of signed numbers is undefined, and LLVM makes use of that.
    return tirx.reinterpret(_type("uint32", x), x)


def _signed(bits: Expr) -> Expr:
    return tirx.reinterpret(_type("int32", bits), bits)


def _float(bits: Expr) -> Expr:
    return tirx.reinterpret(_type("float32", bits), bits)


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    value = _like(coefficients[0], x)
    for c in coefficients[1:]:
        value = value * x + _like(c, x)
    return value


def _exp_from(n_shifted: Expr, r: Expr, x: Expr, low: float, high: float) -> Expr:
    """2^n exp(r), where n_shifted is n + ROUND; x and its limits decide what saturates."""
    p = _horner(r, EXP) * (r * r) + r + _like(1.0, r)
    # Adding n to the exponent field, and not multiplying by 2^n, reaches the largest float32 (n is 128 there).
    scaled = _float(_bits(p) + tirx.shift_left(_bits(n_shifted), _uint(23, x)))
    flushed = Select(x < _like(low, x), _like(0.0, x), scaled)
    return Select(x <= _like(high, x), flushed, x + _like(math.inf, x))  # a NaN goes the second way, and stays one


def exp(x: Expr, let: Let) -> Expr:
    """e^x."""
    t = let(x * _like(math.log2(math.e), x) + _like(ROUND, x))
    n = let(t - _like(ROUND, x))
    r = let(x - n * _like(LN2_HI, x) - n * _like(LN2_LO, x))
    return _exp_from(t, r, x, -87.33654, 88.72283)


def exp2(x: Expr, let: Let) -> Expr:
    """2^x."""
    t = let(x + _like(ROUND, x))
    r = let((x - (t - _like(ROUND, x))) * _like(math.log(2), x))
    return _exp_from(t, r, x, -126.0, 127.99999)


def exp10(x: Expr, let: Let) -> Expr:
    """10^x, with log10(2) in two parts as exp has ln 2."""
    hi, lo = _split(math.log10(2))
    t = let(x * _like(math.log2(10), x) + _like(ROUND, x))
    n = let(t - _like(ROUND, x))
    r = let((x - n * _like(hi, x) - n * _like(lo, x)) * _like(math.log(10), x))
    return _exp_from(t, r, x, -37.92977, 38.531837)


def _log_with(x: Expr, let: Let, combine: Callable[[Expr, Expr, Expr], Expr]) -> Expr:
    """A logarithm: combine(e, f, y), where x = (1 + f) 2^e and log(1 + f) = f + y."""
    shifted = let(_bits(x) + _uint(0x3F800000 - 0x3F3504F3, x))
    e = let(tirx.Cast(_type("float32", x), _signed(tirx.shift_right(shifted, _uint(23, x)))) - _like(127.0, x))
    f = let(_float((shifted & _uint(0x7FFFFF, x)) + _uint(0x3F3504F3, x)) - _like(1.0, x))
    z = let(f * f)
    y = let(_horner(f, LOG) * f * z - _like(0.5, x) * z)
    value = Select(x < _like(math.inf, x), combine(e, f, y), x)
    edge = Select(x < _like(0.0, x), _like(math.nan, x), _like(-math.inf, x))
    return Select(x < _like(TINY, x), edge, value)


def log(x: Expr, let: Let) -> Expr:
    """Natural logarithm."""
    return _log_with(x, let, lambda e, f, y: e * _like(LN2_HI, x) + (f + (y + e * _like(LN2_LO, x))))


def _log_base(base: float) -> Function:
    """log_b: the exponent's part and the fraction's are scaled apart, so that powers of two keep their precision."""
    hi, lo = _split(1 / math.log(base))
    e_hi, e_lo = _split(math.log(2) / math.log(base))

    def run(x: Expr, let: Let) -> Expr:
        def combine(e: Expr, f: Expr, y: Expr) -> Expr:
            small = y * _like(hi, x) + (f + y) * _like(lo, x) + e * _like(e_lo, x)
            return e * _like(e_hi, x) + (f * _like(hi, x) + small)

        return _log_with(x, let, combine)

    return run


def _split(value: float) -> tuple[float, float]:
    """A constant as a part of 10 bits, whose products with short numbers are exact, and the rest."""
    scale = 2.0 ** (10 - math.ceil(math.log2(value)))
    hi = round(value * scale) / scale
    return hi, value - hi


def log1p(x: Expr, let: Let) -> Expr:
    """log(1 + x): what the addition rounded away is put back through the derivative."""
    one = _like(1.0, x)
    u = let(one + x)
    finite = tirx.And(x > _like(-1.0, x), x < _like(math.inf, x))
    return log(u, let) + Select(finite, (x - (u - one)) / u, _like(0.0, x))


def sigmoid(x: Expr, let: Let) -> Expr:
    """1 / (1 + e^-x)."""
    return _like(1.0, x) / (_like(1.0, x) + exp(let(_like(0.0, x) - x), let))


def tanh(x: Expr, let: Let) -> Expr:
    """Hyperbolic tangent through exp(-2 |x|) - 1, which keeps the small results exact."""
    sign = _uint(0x80000000, x)
    doubled = let(_float(_bits(x) | sign) * _like(2.0, x))
    z = let(Select(doubled < _like(-18.1, x), _like(-18.1, x), doubled))
    t = let(z * _like(math.log2(math.e), x) + _like(ROUND, x))
    n = let(t - _like(ROUND, x))
    r = let(z - n * _like(LN2_HI, x) - n * _like(LN2_LO, x))
    scale = let(_float(tirx.shift_left(_bits(t), _uint(23, x)) + _uint(0x3F800000, x)))
    u = let(scale * (_horner(r, EXP) * (r * r) + r) + (scale - _like(1.0, x)))
    return _float(_bits((_like(0.0, x) - u) / (u + _like(2.0, x))) | (_bits(x) & sign))


def erf(x: Expr, let: Let) -> Expr:
    """Error function."""
    hi, lo = _like(ERF_LARGE, x), _like(-ERF_LARGE, x)
    c = let(Select(x > hi, hi, Select(x < lo, lo, x)))
    z = let(c * c)
    return c * _horner(z, ERF_P) / _horner(z, ERF_Q)


def _quadrant(shift: int) -> Function:
    """sin(x + shift pi / 2)."""

    def run(x: Expr, let: Let) -> Expr:
        w = let(tirx.Cast(_type("float64", x), x))
        t = let(w * _like(2 / math.pi, w) + _like(ROUND64, w))
        n = let(t - _like(ROUND64, w))
        # The first part of pi / 2 has 33 bits, so that its product with n is exact.
        r64 = w - n * _like(1.57079632673412561417e00, w) - n * _like(6.07710050650619224932e-11, w)
        r = let(tirx.Cast(_type("float32", w), r64))
        q = let(tirx.Cast(_type("uint32", w), tirx.reinterpret(_type("uint64", w), t)) + _uint(shift, w))
        z = let(r * r)
        sine = _horner(z, SIN) * z * r + r
        cosine = _horner(z, COS) * z * z + (_like(1.0, r) - _like(0.5, r) * z)
        odd = (q & _uint(1, r)) > _uint(0, r)
        return _float(_bits(Select(odd, cosine, sine)) ^ tirx.shift_left(q & _uint(2, r), _uint(30, r)))

    return run


def rsqrt(x: Expr, let: Let) -> Expr:
    """1 / sqrt(x), by the exact instructions: estimates differ between processors."""
    return _like(1.0, x) / tirx.sqrt(x)


def power(x: Expr, y: float, let: Let) -> Expr:
    """x^y for a constant y; what C's pow gives for zeros, infinities, NaN and negative bases."""
    if y == 0:
        return _like(1.0, x)
    if -MOST_PRODUCTS <= y < 0 and (2 * y).is_integer():
        return _like(1.0, x) / power(x, -y, let)
    if 0 < y <= MOST_PRODUCTS and (2 * y).is_integer():
        return _products(x, y, let)
    a = let(_float(_bits(x) & _uint(0x7FFFFFFF, x)))
    magnitude = exp2(let(_like(y, x) * LOG2(a, let)), let)
    if not y.is_integer():
        # Only here does a negative base have no value; a negative zero and infinity count as positive.
        invalid = tirx.And(x < _like(0.0, x), x > _like(-math.inf, x))
        return Select(invalid, _like(math.nan, x), magnitude)
    return magnitude if y % 2 == 0 else _float(_bits(magnitude) | (_bits(x) & _uint(0x80000000, x)))


def _products(x: Expr, y: float, let: Let) -> Expr:
    """Square and multiply; the half of a half-integer exponent is a square root."""
    result = tirx.sqrt(x) if y % 1 else None
    square, left = x, int(y)
    while left:
        if left & 1:
            result = square if result is None else result * square
        left >>= 1
        square = let(square * square) if left else square
    return result


LOG2 = _log_base(2.0)
UNARY: dict[str, Function] = {
    "exp": exp,
    "exp2": exp2,
    "exp10": exp10,
    "log": log,
    "log2": LOG2,
    "log10": _log_base(10.0),
    "log1p": log1p,
    "erf": erf,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "rsqrt": rsqrt,
    "sin": _quadrant(0),
    "cos": _quadrant(1),
}


class _Expand(Rewriter):
    """Puts the values that a function shares into variables before the statement that calls it."""

    def __init__(self) -> None:
        self.bindings: list[tirx.Stmt] = []
        self.guards: list[Expr] = []

    def stmt(self, s: Any) -> Any:
        if not isinstance(s, tirx.BufferStore | tirx.Bind | tirx.Evaluate):
            return super().stmt(s)
        result = super().stmt(s)
        if not self.bindings:
            return result
        sequence, self.bindings = [*self.bindings, result], []
        return tirx.SeqStmt(sequence)

    def let(self, value: Expr) -> Expr:
        # A buffer and not a variable: TVM's simplifier looks through variables, and takes (x + c) - c for x even in
        # floats. LLVM keeps the buffer in a register.
        lanes = int(value.ty.dtype.lanes)
        buffer = tirx.decl_buffer((lanes,), str(value.ty.dtype).split("x")[0], "m", scope="global")
        index = tirx.Ramp(0, 1, lanes) if lanes > 1 else tirx.const(0, "int32")
        self.bindings += [tirx.AllocBuffer(buffer), tirx.BufferStore(buffer, value, [index])]
        return tirx.BufferLoad(buffer, [index])

    def expr(self, e: Any) -> Any:
        if isinstance(e, tirx.Select):
            return tirx.Select(*self.branches(e.condition, e.true_value, e.false_value))
        if isinstance(e, Call) and _name(e) == "if_then_else":
            return tirx.if_then_else(*self.branches(*e.args))
        return super().expr(e)

    def branches(self, condition: Expr, then: Expr, other: Expr) -> tuple[Expr, Expr, Expr]:
        """Both ways of a choice: what is computed early on either of them must not read where it may not."""
        condition = self.expr(condition)
        results = []
        for guard, value in ((condition, then), (tirx.Not(condition), other)):
            self.guards.append(guard)
            results.append(self.expr(value))
            self.guards.pop()
        return condition, results[0], results[1]

    def call(self, call: Call) -> Expr:
        name = _name(call)
        if name not in UNARY and name != "pow":
            return call
        x = call.args[0]
        dtype = str(x.ty.dtype).split("x")[0]
        exponent = _constant(call.args[1]) if name == "pow" else None
        if dtype not in ("float32", "float16") or (name == "pow" and (exponent is None or not math.isfinite(exponent))):
            return call
        for guard in reversed(self.guards):
            x = (
                tirx.if_then_else(guard, x, _like(1.0, x))
                if int(x.ty.dtype.lanes) == 1
                else Select(guard, x, _like(1.0, x))
            )
        v = self.let(x if dtype == "float32" else tirx.Cast(_type("float32", x), x))
        y = UNARY[name](v, self.let) if exponent is None else power(v, exponent, self.let)
        return y if dtype == "float32" else tirx.Cast(x.ty.dtype, y)


def _name(call: Call) -> str:
    return call.op.name.rpartition(".")[2] if isinstance(call.op, tvm.ir.Op) else ""


def _constant(x: Expr) -> float | None:
    if isinstance(x, tirx.Broadcast):
        x = x.value
    if isinstance(x, tirx.Cast):
        x = x.value
    return float(x.value) if isinstance(x, tirx.FloatImm | tirx.IntImm) else None


def ExpandMath(target: Target) -> tvm.ir.transform.Pass:
    """Replace calls of exp, erf, tanh and their like by vector code. The same for every target."""

    @tvm.ir.transform.module_pass(opt_level=0, name="ExpandMath")
    def run(module: IRModule, _: tvm.ir.transform.PassContext) -> IRModule:
        expanded = {}
        for name, func in module.functions.items():
            body = _Expand().stmt(func.body)
            if not body.same_as(func.body):
                func = PrimFunc(func.params, body, func.ret_type, func.attrs)
            expanded[name] = func
        return IRModule(expanded, attrs=module.attrs)

    # Unrolled first: a copied binding would define its variable twice.
    return tvm.ir.transform.Sequential([tirx.transform.UnrollLoop(), run])
