"""Sort, argsort and top-k along any axis.

    order[o, :, i] = the stable permutation that sorts X[o, :, i]; values are gathered through it
    X      (outer, n, inner), any dtype, dense
    few    of at most 64 elements each is compared with all others, in vectors: its rank is its place
    sort   (key, index) pairs are dealt to 256 buckets by each byte of the key, least first, between two halves of a
           scratch buffer; a byte that all keys share costs no pass
    top-k  of few, a heap of the k best so far, its worst at the root: n comparisons, and O(log k) for each that enters;
           of many, the first k of a sort
    limit  a sort: about 6 instructions an element and byte, no branch depends on the data; a top-k of few reads memory
           once

Elements are compared through integer keys in the same order: equal keys keep the order of their indices, NaN is greater
than everything and equal to itself, -0.0 equals 0.0, as in PyTorch. A descending order complements the keys.
Source: Knuth, The Art of Computer Programming, volume 3, sections 5.2 (counting), 5.2.3 (heaps), 5.2.5 (digits).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernels.emit import load, prim_func, splat, spread, store
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.errors import Decline
from graphopt.targets.target import Target

Expr = Any
FEW = 64  # elements up to which comparing all with all is faster than 4 tables of 256 counts
HEAP_SHARE = 8  # a heap holds at most this part of a line: what enters it costs a mispredicted branch or two
DIGIT = 256
WIDE_KEYS = ("float64", "int64", "uint64", "uint32")  # what does not fit into an int32 in order


@dataclass(frozen=True)
class Order:
    """What is sorted, and what of it is wanted."""

    outer: int
    n: int
    inner: int
    dtype: str
    descending: bool
    values: bool
    indices: str  # dtype of the indices; empty where they are not wanted
    k: int = 0  # the first k only, 1 <= k <= n; 0: all

    @property
    def compared(self) -> str:
        """Dtype in which elements are looked at: 16-bit floats as float32, which holds them exactly."""
        return "float32" if self.dtype in ("float16", "bfloat16") else self.dtype

    @property
    def key(self) -> str:
        """Dtype of the integer keys."""
        return "int64" if self.dtype in WIDE_KEYS else "int32"

    @property
    def kept(self) -> int:
        """Elements of a line that are given back."""
        return self.k or self.n

    @property
    def way(self) -> str:
        """How it is done: "few", "heap" or "digits"."""
        if self.n <= FEW:
            return "few"
        return "heap" if 0 < self.k * HEAP_SHARE <= self.n else "digits"

    @property
    def slots(self) -> int:
        """(key, index) pairs of scratch."""
        return {"few": self.n, "heap": self.k, "digits": 2 * self.n}[self.way]

    @property
    def key_bytes(self) -> int:
        """Bytes of a key."""
        return 8 if self.key == "int64" else 4

    @property
    def scratch(self) -> tuple[tuple[str, int, str], ...]:
        """Name, elements and dtype of the buffers that it works in."""
        found = [("keys", self.slots, self.key), ("places", self.slots, "int32")]
        found += [("counts", DIGIT * self.key_bytes, "int32")] * (self.way == "digits")
        return tuple(found)


class Sorting(Template):
    """Sort, argsort and top-k; see the module."""

    name: ClassVar[str] = "sorting"
    anchors: ClassVar[tuple[str, ...]] = ("relax.sort", "relax.argsort", "relax.topk")

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take the operator, whatever its axis and dtype."""
        call, where = binding.value, binding.var.name
        shape, dtype = shape_of(call.args[0]), dtype_of(call.args[0])
        if not math.prod(shape):
            return Decline(where, f"a tensor without elements: {shape}")
        if not dtype.startswith(("float16", "float32", "float64", "bfloat16", "int", "uint", "bool")):
            return Decline(where, f"sorting {dtype}")
        order = order_of(call, shape, dtype)
        what = f"topk{order.k}" if order.k else op_of(call).removeprefix("relax.")
        return KernelCall(
            name=f"{dtype}_{what}_{order.n}",
            key=("sorting", order, target.spec),
            kernel=build(order, target),
            output=binding.var,
            covers=(binding.var,),
            inputs=(call.args[0],),
            scratch_bytes=tuple(size * (8 if kind == "int64" else 4) for _, size, kind in order.scratch),
        )


def order_of(call: relax.Call, shape: tuple[int, ...], dtype: str) -> Order:
    """What a sort, argsort or topk of a tensor of this shape and dtype asks for."""
    attrs, op = call.attrs, op_of(call)
    axis = int(attrs.axis) % max(1, len(shape))
    n = shape[axis] if shape else 1
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    if op == "relax.topk":
        wanted = str(attrs.ret_type)
        return Order(
            outer,
            n,
            inner,
            dtype,
            descending=bool(attrs.largest),
            values=wanted != "indices",
            indices=str(attrs.dtype) if wanted != "values" else "",
            k=min(int(attrs.k), n) if int(attrs.k) > 0 else n,
        )
    indices = str(attrs.dtype) if op == "relax.argsort" else ""
    return Order(outer, n, inner, dtype, bool(attrs.descending), not indices, indices)


def key_of(value: Expr, order: Order, lanes: int = 1) -> Expr:
    """An integer of dtype `order.key` for an element (`order.compared`), smaller where the element comes earlier."""
    kind = order.key
    many = f"{kind}x{lanes}" if lanes > 1 else kind

    def const(number: int) -> Expr:
        return spread(tirx.const(number, kind), lanes)

    if "float" in order.dtype:
        # In integers throughout: TVM takes `x == x` for true.
        bits = tirx.reinterpret(many, value)
        top, infinity = (2**63 - 1, 0x7FF << 52) if kind == "int64" else (2**31 - 1, 0xFF << 23)
        magnitude = tirx.bitwise_and(bits, const(top))
        # Of zero, both signs become 0; of NaN, both the greatest.
        key = tirx.Select(bits < const(0), const(0) - magnitude, magnitude)
        key = tirx.Select(magnitude > const(infinity), const(top), key)
    elif order.dtype == "uint64":
        key = tirx.bitwise_xor(tirx.reinterpret(many, value), const(-(2**63)))
    else:
        key = value if order.dtype == kind else value.astype(many)
    return tirx.bitwise_xor(key, const(-1)) if order.descending else key


def build(order: Order, target: Target) -> PrimFunc:
    """The kernel: x (outer, n, inner), then values and indices (outer, kept, inner) as wanted, then `order.scratch`."""
    size, lines = order.outer * order.n * order.inner, order.outer * order.inner
    kept = lines * order.kept
    buffers = [("x", size, order.dtype)]
    buffers += [("values", kept, order.dtype)] * order.values
    buffers += [("indices", kept, order.indices)] * bool(order.indices)
    wanted = len(buffers) - 1

    def body(x: Any, *rest: Any) -> None:
        results, scratch = rest[:wanted], rest[wanted:]
        with T.serial(0, lines) as line, T.sblock("line"):
            row, column = line // order.inner, line % order.inner
            base = T.bind(row * (order.n * order.inner) + column)
            to = T.bind(row * (order.kept * order.inner) + column)

            def key_at(t: Expr) -> Expr:
                return key_of(load(x, base + t * order.inner, 1, order.compared), order)

            start = _WAYS[order.way](order, *scratch, key_at, target)
            with T.serial(0, order.kept) as t:
                place = T.bind(scratch[1][start + t])
                at = to + t * order.inner
                if order.values:
                    T.buffer_store(results[0], tirx.BufferLoad(x, [base + place * order.inner]), [at])
                if order.indices:
                    T.buffer_store(results[-1], place.astype(order.indices), [at])

    return prim_func([*buffers, *order.scratch], body)


def _few(order: Order, keys: Any, places: Any, key_at: Any, target: Target) -> int:
    """Count for each element how many come before it; where in the scratch the sorted line lies then."""
    n, kind = order.n, order.key
    with T.serial(0, n) as t:
        T.buffer_store(keys, key_at(t), [t])
    lanes = target.isa.lanes(64 if kind == "int64" else 32)

    def ranks(first: Expr, width: int) -> None:
        own = T.bind(load(keys, first, width, kind))
        count = T.sblock_alloc_buffer((width,), kind, scope="global")
        store(count, 0, splat(0, width, kind), width, kind)

        def add(before: Expr) -> None:
            one, none = (splat(number, width, kind) for number in (1, 0))
            store(count, 0, load(count, 0, width, kind) + tirx.Select(before, one, none), width, kind)

        with T.serial(0, first) as j:
            add(spread(T.bind(keys[j]), width) <= own)
        for j in range(width):  # among themselves: equal ones keep their order
            other = spread(T.bind(keys[first + j]), width)
            if width == 1:
                continue
            later = tirx.Ramp(tirx.const(0, kind), tirx.const(1, kind), width) > splat(j, width, kind)
            add(tirx.Select(later, other <= own, other < own))
        with T.serial(0, n - width - first) as t:
            add(spread(T.bind(keys[first + width + t]), width) < own)
        for lane in range(width):
            T.buffer_store(places, first + lane, [count[lane].astype("int32")])

    if n >= lanes:
        with T.serial(0, n // lanes) as i:
            ranks(i * lanes, lanes)
    if n % lanes:
        with T.serial(0, n % lanes) as i:
            ranks(n // lanes * lanes + i, 1)
    return 0


def _digits(order: Order, keys: Any, places: Any, counts: Any, key_at: Any, target: Target) -> Expr:
    """Sort a line byte by byte; where in the scratch it lies then."""
    n, kind, width = order.n, order.key, order.key_bytes

    def digit(key: Expr, byte: int) -> Expr:
        """The bucket of a key: its byte, the sign of the uppermost turned round."""
        bits = tirx.bitwise_and(tirx.shift_right(key, tirx.const(8 * byte, kind)), tirx.const(DIGIT - 1, kind))
        bits = bits.astype("int32") + DIGIT * byte
        return tirx.bitwise_xor(bits, tirx.const(DIGIT // 2, "int32")) if byte == width - 1 else bits

    lanes = target.isa.lanes(32)
    with T.serial(0, DIGIT * width // lanes) as i:
        store(counts, i * lanes, splat(0, lanes, "int32"), lanes, "int32")
    with T.serial(0, n) as t:
        key = T.bind(key_at(t))
        T.buffer_store(keys, key, [t])
        T.buffer_store(places, t, [t])
        for byte in range(width):
            bucket = T.bind(digit(key, byte))
            T.buffer_store(counts, counts[bucket] + 1, [bucket])
    state = T.sblock_alloc_buffer((2,), "int32", scope="global")  # where the line lies; the next bucket's start
    T.buffer_store(state, tirx.const(0, "int32"), [0])
    for byte in range(width):
        source = T.bind(state[0])
        with T.If(counts[digit(keys[source], byte)] < n), T.Then():
            to = T.bind(n - source)
            T.buffer_store(state, to, [1])
            with T.serial(0, DIGIT) as i:
                before = T.bind(state[1])
                T.buffer_store(state, before + counts[i + DIGIT * byte], [1])
                T.buffer_store(counts, before, [i + DIGIT * byte])
            with T.serial(0, n) as t:
                key = T.bind(keys[source + t])
                bucket = T.bind(digit(key, byte))
                at = T.bind(counts[bucket])
                T.buffer_store(counts, at + 1, [bucket])
                T.buffer_store(keys, key, [at])
                T.buffer_store(places, places[source + t], [at])
            T.buffer_store(state, to, [0])
    return T.bind(state[0])


def _heap(order: Order, keys: Any, places: Any, key_at: Any, target: Target) -> int:
    """Bring the k first elements of a line into order; where in the scratch they lie then."""
    k, n = order.k, order.n
    hole = T.sblock_alloc_buffer((2,), "int32", scope="global")  # where it is; the heap's size, 0: it has settled

    def later(key: Expr, place: Expr, than_key: Expr, than_place: Expr) -> Expr:
        return tirx.any(key > than_key, tirx.all(key == than_key, place > than_place))

    def sift(root: Expr, size: Expr, key: Expr, place: Expr) -> None:
        """Put an element into the hole at `root`, after everything below that comes later has moved up."""
        T.buffer_store(hole, root, [0])
        T.buffer_store(hole, size, [1])
        with T.While(hole[0] * 2 + 1 < hole[1]):
            left = T.bind(hole[0] * 2 + 1)
            right = T.bind(tirx.min(left + 1, size - 1))
            child = T.bind(tirx.Select(later(keys[right], places[right], keys[left], places[left]), right, left))
            with T.If(later(keys[child], places[child], key, place)):
                with T.Then():
                    T.buffer_store(keys, keys[child], [hole[0]])
                    T.buffer_store(places, places[child], [hole[0]])
                    T.buffer_store(hole, child, [0])
                with T.Else():
                    T.buffer_store(hole, tirx.const(0, "int32"), [1])
        T.buffer_store(keys, key, [hole[0]])
        T.buffer_store(places, place, [hole[0]])

    with T.serial(0, k) as t:
        T.buffer_store(keys, key_at(t), [t])
        T.buffer_store(places, t, [t])
    with T.serial(0, k // 2) as t:
        root = T.bind(k // 2 - 1 - t)
        sift(root, tirx.const(k, "int32"), T.bind(keys[root]), T.bind(places[root]))
    with T.serial(0, n - k) as t:
        key = T.bind(key_at(k + t))
        with T.If(key < keys[0]), T.Then():  # an equal one comes later by its index, and stays out
            sift(tirx.const(0, "int32"), tirx.const(k, "int32"), key, k + t)
    with T.serial(0, k - 1) as t:
        end = T.bind(k - 1 - t)
        key, place = T.bind(keys[end]), T.bind(places[end])
        T.buffer_store(keys, keys[0], [end])
        T.buffer_store(places, places[0], [end])
        sift(tirx.const(0, "int32"), end, key, place)
    return 0


_WAYS: dict[str, Callable[..., Expr]] = {"few": _few, "heap": _heap, "digits": _digits}


def reference(x: np.ndarray, order: Order) -> tuple[np.ndarray, np.ndarray]:
    """Values and indices along axis 1 of [outer, n, inner]."""
    # With ranks for values every order is one of integers; NaN has the last rank in numpy too.
    ranks = np.unique(x.astype("float64") if "float" in order.dtype else x, return_inverse=True, equal_nan=True)[1]
    ranks = ranks.reshape(x.shape).astype("int64")
    indices = np.argsort(-ranks if order.descending else ranks, axis=1, kind="stable")[:, : order.kept]
    return np.take_along_axis(x, indices, 1), indices
