"""Writing TIR from Python: flat buffers, vectors as ramps, loops as `with` blocks.

Everything that is unrolled is a loop in Python, so a kernel's source says what each register holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

Expr = Any  # a TIR expression or a Python int
Buffer = Any

FLOATS = ("float32", "float16", "bfloat16", "float64")


def accumulator(dtype: str) -> str:
    """The type to compute in: 16-bit floats are widened."""
    return "float64" if dtype == "float64" else "float32"


def prim_func(buffers: Sequence[tuple[str, int, str]], body: Callable[..., None]) -> PrimFunc:
    """A function over flat buffers (name, elements, dtype); `body` is called with them and emits the statements."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kernel")
        T.func_attr({"tirx.noalias": True})
        body(*(T.arg(n, T.buffer((max(size, 1),), dtype, layout=None)) for n, size, dtype in buffers))
    return builder.get()


def index(start: Expr, lanes: int) -> Expr:
    """`lanes` consecutive elements from `start`."""
    return tirx.Ramp(start, 1, lanes) if lanes > 1 else start


def load(buffer: Buffer, start: Expr, lanes: int, dtype: str) -> Expr:
    """A vector of `dtype`, converted where the buffer's elements differ."""
    value = tirx.BufferLoad(buffer, [index(start, lanes)])
    many = f"x{lanes}" if lanes > 1 else ""
    if str(buffer.dtype) == dtype:
        return value
    if str(buffer.dtype) == "bfloat16":
        # The upper half of a float32. TVM spells that out itself, but forgets casts in bindings, which then go wrong.
        half = tirx.reinterpret(f"uint16{many}", value).astype(f"uint32{many}")
        value = tirx.reinterpret(f"float32{many}", tirx.shift_left(half, splat(16, lanes, "uint32")))
    return value.astype(dtype + many)


def store(buffer: Buffer, start: Expr, value: Expr, lanes: int, dtype: str) -> None:
    """Store a vector of `dtype`, converted to the buffer's elements."""
    kept = str(buffer.dtype)
    if kept != dtype:
        value = value.astype(f"{kept}x{lanes}" if lanes > 1 else kept)
    T.buffer_store(buffer, value, [index(start, lanes)])


def spread(value: Expr, lanes: int) -> Expr:
    """A scalar in every lane."""
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def splat(value: float, lanes: int, dtype: str) -> Expr:
    """A constant in every lane."""
    return spread(tirx.const(value, dtype), lanes)


def shuffled(vector: Expr, elements: int, picks: Sequence[int]) -> Expr:
    """The picked elements of a vector that has `elements`; it is bound, for it may be written several times."""
    if elements == 1:
        return spread(vector, len(picks))
    if list(picks) == list(range(elements)):
        return vector
    # A shuffle has no more lanes than its operands together.
    return tirx.Shuffle([vector] * -(-len(picks) // elements), [tirx.IntImm("int32", n) for n in picks])


def prefetch(buffer: Buffer, at: Expr) -> None:
    """Ask for the cache line with an element, which will be read soon, or never."""
    address = tirx.address_of(tirx.BufferLoad(buffer, [at]))
    read, keep, data = (tirx.IntImm("int32", value) for value in (0, 3, 1))
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, read, keep, data))


class Registers:
    """Vectors that LLVM keeps in registers: their indices are known when the kernel is written.

    TVM takes only small buffers of global scope from the stack, others from its runtime; so each vector is a buffer.
    """

    def __init__(self, count: int, lanes: int, dtype: str) -> None:
        self.lanes = lanes
        self._buffers = [T.alloc_buffer((lanes,), dtype, layout=None) for _ in range(count)]
        for i in range(count):
            self[i] = splat(0.0, lanes, dtype)

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, i: int) -> Expr:
        return tirx.BufferLoad(self._buffers[i], [index(0, self.lanes)])

    def __setitem__(self, i: int, value: Expr) -> None:
        T.buffer_store(self._buffers[i], value, [index(0, self.lanes)])


def loop(extent: int, parallel: bool = False) -> Any:
    """A counted loop, over threads where asked."""
    return T.parallel(0, extent) if parallel and extent > 1 else T.serial(0, extent)


def copy_run(target: Buffer, to: Expr, source: Buffer, start: Expr, count: int, lanes: int, fill: float = 0.0) -> None:
    """target[to : to + count] = source[start : start + count], or `fill` where `source` is None. No overlap."""

    def move(offset: Expr, width: int) -> None:
        kind = str(target.dtype)
        value = splat(fill, width, kind) if source is None else load(source, start + offset, width, kind)
        store(target, to + offset, value, width, kind)

    if count <= 0:
        return
    lanes = min(lanes, 1 << (count.bit_length() - 1))
    with T.serial(0, count // lanes) as i:
        move(i * lanes, lanes)
    if count % lanes:  # the last vector overlaps
        move(count - lanes, lanes)
