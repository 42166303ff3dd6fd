"""Buffers that a function allocates, as parameters: the caller plans them with the rest of the memory."""

from __future__ import annotations

import math

from tvm import s_tir
from tvm.tirx import PrimFunc

MOST_STACK_BYTES = 512  # what may stay on the stack; TVM asks its runtime for anything from 1024 bytes on


def hoist_scratch(func: PrimFunc) -> tuple[PrimFunc, tuple[int, ...]]:
    """Turn the larger buffers that the root block allocates into trailing parameters.

    Args:
        func: any function in blocks.

    Returns:
        The function with one more parameter for each such buffer, and the bytes of each.
    """
    realize = func.body
    if not isinstance(realize, s_tir.SBlockRealize):
        return func, ()
    root = realize.block
    sizes = [math.prod(int(d) for d in b.shape) * max(1, int(b.dtype.bits) // 8) for b in root.alloc_buffers]
    large = [(b, size) for b, size in zip(root.alloc_buffers, sizes, strict=True) if size > MOST_STACK_BYTES]
    if not large:
        return func, ()
    kept = [b for b, size in zip(root.alloc_buffers, sizes, strict=True) if size <= MOST_STACK_BYTES]
    block = s_tir.SBlock(
        root.iter_vars, root.reads, root.writes, root.name_hint, root.body, root.init, kept, root.match_buffers,
        root.annotations,
    )  # fmt: skip
    body = s_tir.SBlockRealize(realize.iter_values, realize.predicate, block)
    return PrimFunc([*func.params, *(b for b, _ in large)], body, func.ret_type, func.attrs), tuple(s for _, s in large)
