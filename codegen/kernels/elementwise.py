"""The generic schedule: for every function that TVM's own legalisation and fusion made, and no template took.

    inline      producers into their readers, unless that would compute something dear many times
    spatial     loops fused as far as all reads stay contiguous, the innermost split to vectors, the rest of it peeled
    transposes  tiles of two axes, so that each cache line is used whole
    reductions  over an outer axis: vectors of results inside the reduced loop; over the innermost: a vector of partial
                sums, folded at the end
    limit       memory bandwidth, or about 15 operations a vector for each transcendental function

What it does not understand stays a plain loop nest, which is correct, and says so at debug level.
Source: the rules of TVM's dlight for CPUs and GPUs, arXiv:1802.04799 for the primitives.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import Call, IRModule
from tvm.tirx import PrimFunc

from graphopt.codegen.kernels.scratch import hoist_scratch
from graphopt.codegen.kernels.tir_rewrite import children, is_load
from graphopt.targets.target import Target

__all__ = ["hoist_scratch", "schedule"]

log = logging.getLogger(__name__)

PARALLEL_ELEMENTS = 1 << 16  # elements below which a second thread costs more than it brings
DEAR_NODES = 40  # expressions larger than this, or with a call of a function, are not computed twice
TILE = 16  # both sides of a transposed tile: a cache line of float32


def schedule(func: PrimFunc, target: Target) -> PrimFunc:
    """A faster function that computes the same; the same function where nothing is known to help."""
    try:
        sch = s_tir.Schedule(IRModule({"main": func}), debug_mask="none")
        _inline(sch)
        for block in _blocks(sch):
            try:
                _schedule_block(sch, block, target)
            except Exception as error:  # each step leaves a correct program, so what was done before stays
                log.debug("block %s keeps its loops: %s", sch.get(block).name_hint, _first_line(error))
        return sch.mod["main"].with_attrs(func.attrs) if func.attrs else sch.mod["main"]
    except Exception as error:
        log.debug("a function keeps its loops: %s", _first_line(error))
        return func


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__


def _blocks(sch: s_tir.Schedule) -> list[Any]:
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def _inline(sch: s_tir.Schedule) -> None:
    """Inline spatial producers, first to last."""
    for block in _blocks(sch):
        stmt = sch.get(block)
        if any(v.iter_type != tirx.IterVar.DataPar for v in stmt.iter_vars) or not isinstance(
            stmt.body, tirx.BufferStore
        ):
            continue
        readers = [sch.get(c) for c in sch.get_consumers(block)]
        if not readers:
            continue
        uses = sum(_reads_of(r, stmt.body.buffer) * _repeats(r, stmt) for r in readers)
        if uses > 1 and _dear(stmt.body.value):
            continue
        try:
            sch.compute_inline(block)
        except Exception as error:
            log.debug("block %s is not inlined: %s", stmt.name_hint, _first_line(error))


def _reads_of(block: s_tir.SBlock, buffer: Any) -> int:
    return sum(1 for e in _nodes(block.body) if is_load(e) and e.source.same_as(buffer))


def _repeats(reader: s_tir.SBlock, producer: s_tir.SBlock) -> int:
    """How often each element of the producer is read, about."""
    size = math.prod(int(v.dom.extent) for v in reader.iter_vars)
    return max(1, size // max(1, math.prod(int(v.dom.extent) for v in producer.iter_vars)))


def _dear(value: Any) -> bool:
    for count, node in enumerate(_nodes(value), 1):
        if count > DEAR_NODES or isinstance(node, tirx.Div):
            return True
        if isinstance(node, Call) and node.op.name not in ("prim.if_then_else", "tirx.reinterpret", "prim.likely"):
            return True
    return False


def _nodes(root: Any) -> Iterator[Any]:
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(children(node))


def _schedule_block(sch: s_tir.Schedule, block: Any, target: Target) -> None:
    stmt = sch.get(block)
    loops = sch.get_loops(block)
    if not loops:
        return
    if not isinstance(stmt.body, tirx.BufferStore):
        raise ValueError("more than one statement")
    kinds = [v.iter_type for v in stmt.iter_vars]
    if len(loops) != len(kinds) or any(k not in (tirx.IterVar.DataPar, tirx.IterVar.CommReduce) for k in kinds):
        raise ValueError("loops that are neither spatial nor a reduction")
    bits = max(
        _bits(stmt.body.buffer.dtype), *(_bits(e.source.dtype) for e in _nodes(stmt.body.value) if is_load(e)), 8
    )
    lanes = max(2, target.isa.vector_bits // min(max(bits, 16), 64))
    if tirx.IterVar.CommReduce in kinds:
        _reduction(sch, block, stmt, loops, lanes, target)
    else:
        _spatial(sch, block, stmt, loops, lanes, target)


def _bits(dtype: Any) -> int:
    return 8 if str(dtype) == "bool" else int(dtype.bits)


def _accesses(stmt: s_tir.SBlock) -> list[tuple[list[Any], list[int]]]:
    """Indices and extents of every element read or written."""
    found = [(list(stmt.body.indices), [int(s) for s in stmt.body.buffer.shape])]
    for e in _nodes(stmt.body.value):
        if is_load(e) and not e.source.same_as(stmt.body.buffer):  # a reduction reads its own result
            found.append((list(e.indices), [int(s) for s in e.source.shape]))
    return found


def _uses(expr: Any, var: Any) -> bool:
    return any(isinstance(n, tirx.Var) and n.same_as(var) for n in _nodes(expr))


def _fusable(stmt: s_tir.SBlock) -> int:
    """How many of the innermost loops every access takes for one: all of them in order at its end, or none."""
    variables = [v.var for v in stmt.iter_vars]
    extents = [int(v.dom.extent) for v in stmt.iter_vars]
    accesses = _accesses(stmt)
    others = [n for n in _nodes(stmt.body.value) if isinstance(n, Call | tirx.Select)]
    best = 1
    for count in range(2, len(variables) + 1):
        tail, sizes = variables[-count:], extents[-count:]

        def fits(
            indices: list[Any], shape: list[int], tail: Any = tail, sizes: Any = sizes, count: int = count
        ) -> bool:
            if not any(_uses(i, v) for i in indices for v in tail):
                return True
            if len(indices) < count or shape[-count + 1 :] != sizes[1:]:
                return False
            ends = all(i.same_as(v) for i, v in zip(indices[-count:], tail, strict=True))
            return ends and not any(_uses(i, v) for i in indices[:-count] for v in tail)

        conditional = any(_uses(c, v) for n in others for c in _conditions(n) for v in tail)
        if conditional or not all(fits(i, s) for i, s in accesses):
            break
        best = count
    return best


def _conditions(node: Any) -> list[Any]:
    if isinstance(node, tirx.Select):
        return [node.condition]
    return [node.args[0]] if node.op.name == "prim.if_then_else" else []


def _spatial(sch: s_tir.Schedule, block: Any, stmt: s_tir.SBlock, loops: list[Any], lanes: int, target: Target) -> None:
    variables = [v.var for v in stmt.iter_vars]
    work = math.prod(int(v.dom.extent) for v in stmt.iter_vars)
    parallel = target.threads and work >= PARALLEL_ELEMENTS
    across = _strided_axis(stmt, variables)
    if across is not None and _transpose(sch, loops, across, lanes, parallel):
        return
    count = _fusable(stmt)
    inner = sch.fuse(*loops[-count:]) if count > 1 else loops[-1]
    outer = list(loops[:-count])
    extent = math.prod(int(v.dom.extent) for v in stmt.iter_vars[-count:])
    step = math.gcd(extent, *_bounds(stmt, variables[-1])) if count == 1 else extent
    if step != extent and step % lanes == 0:
        # A concatenation: its seams become conditions on an outer loop, and each piece is vectors.
        pieces, inner = sch.split(inner, [None, step])
        outer.append(pieces)
        extent = step
    if extent >= lanes:
        if extent % lanes:
            # The rest has a loop of its own: a condition inside would keep TVM from making vectors.
            inner = sch.loop_partition(inner, [extent - extent % lanes, None])[0]
        blocks, vector = sch.split(inner, [None, lanes])
        outer.append(blocks)
        sch.vectorize(vector)
    elif extent == 1 or not outer:
        outer.append(inner)
    else:
        sch.vectorize(inner) if extent in (2, 4) else None
    if parallel and outer:
        _parallelise(sch, outer, extent >= lanes)


def _parallelise(sch: s_tir.Schedule, outer: list[Any], blocks_last: bool) -> None:
    """Run the outermost loops over threads; the loop over vectors joins only where it is alone."""
    spatial = outer[:-1] if blocks_last and len(outer) > 1 else outer
    sch.parallel(sch.fuse(*spatial) if len(spatial) > 1 else spatial[0])


def _bounds(stmt: s_tir.SBlock, var: Any) -> list[int]:
    """Constants with which conditions compare the innermost index."""
    found: list[int] = []
    for node in _nodes(stmt.body.value):
        if isinstance(node, tirx.LT | tirx.LE | tirx.GE | tirx.GT):
            sides = (node.a, node.b)
            constants = [int(s.value) for s in sides if isinstance(s, tirx.IntImm)]
            if constants and any(_uses(s, var) for s in sides):
                found += constants
    return found


def _strided_axis(stmt: s_tir.SBlock, variables: list[Any]) -> int | None:
    """The loop that some read runs along, if the innermost loop jumps in it."""
    last = variables[-1]
    for indices, _ in _accesses(stmt)[1:]:
        if len(indices) < 2 or indices[-1].same_as(last) or not any(_uses(i, last) for i in indices[:-1]):
            continue
        for at, var in enumerate(variables[:-1]):
            if indices[-1].same_as(var):
                return at
    return None


def _transpose(sch: s_tir.Schedule, loops: list[Any], across: int, lanes: int, parallel: bool) -> bool:
    """Tile the innermost loop and the one that the read runs along."""
    wide, long = (int(sch.get(x).extent) for x in (loops[across], loops[-1]))
    rows = next((t for t in (TILE, 8, 4) if wide % t == 0), None)
    columns = next((t for t in (TILE, 8, 4) if long % t == 0 and t >= min(lanes, 4)), None)
    if rows is None or columns is None:
        return False
    a_outer, a_inner = sch.split(loops[across], [None, rows])
    b_outer, b_inner = sch.split(loops[-1], [None, columns])
    rest = [x for i, x in enumerate(loops[:-1]) if i != across]
    sch.reorder(*rest, a_outer, b_outer, a_inner, b_inner)
    if columns > lanes and columns % lanes == 0:
        _, b_inner = sch.split(b_inner, [None, lanes])
    sch.vectorize(b_inner)
    if parallel:
        sch.parallel(sch.fuse(*rest, a_outer) if rest else a_outer)
    return True


def _reduction(
    sch: s_tir.Schedule, block: Any, stmt: s_tir.SBlock, loops: list[Any], lanes: int, target: Target
) -> None:
    reduced = [v.iter_type == tirx.IterVar.CommReduce for v in stmt.iter_vars]
    variables = [v.var for v in stmt.iter_vars]
    work = math.prod(int(v.dom.extent) for v in stmt.iter_vars)
    parallel = target.threads and work >= PARALLEL_ELEMENTS
    spatial = [x for x, r in zip(loops, reduced, strict=True) if not r]
    folded = [x for x, r in zip(loops, reduced, strict=True) if r]
    along = {
        at
        for indices, _ in _accesses(stmt)[1:]
        for at, v in enumerate(variables)
        if len(indices) and indices[-1].same_as(v)
    }
    to = list(stmt.body.indices)
    written = next((at for at, v in enumerate(variables) if to and to[-1].same_as(v)), None)
    if spatial and written is not None and any(not reduced[a] for a in along):
        # Results side by side: vectors of them, the reduced loops outside.
        inner = loops[written]
        extent = int(sch.get(inner).extent)
        rest = [x for x in spatial if not sch.get(x).same_as(sch.get(inner))]
        width = next((w for w in (lanes, lanes // 2, lanes // 4) if w > 1 and extent % w == 0), 0)
        if width:
            blocks, vector = sch.split(inner, [None, width])
            sch.reorder(*rest, blocks, *folded, vector)
            sch.vectorize(vector)  # while it is one block: half of a reduction cannot be checked
            if parallel:
                sch.parallel(sch.fuse(*rest) if len(rest) > 1 else rest[0] if rest else blocks)
            _vectorize_init(sch, sch.decompose_reduction(block, folded[0]))
            return
    last = folded[-1]
    extent = int(sch.get(last).extent)
    simple = len(folded) >= 1 and extent % lanes == 0 and extent > lanes and stmt.init is not None
    if not simple or not any(reduced[a] for a in along):
        if parallel and spatial:
            sch.reorder(*spatial, *folded)
            sch.parallel(sch.fuse(*spatial) if len(spatial) > 1 else spatial[0])
        return
    sch.reorder(*spatial, *folded)
    _, lane = sch.split(last, [None, lanes])
    partial = sch.rfactor(lane, factor_axis=len(spatial))
    if spatial:
        # One result at a time: its partial sums stay in a register.
        sch.compute_at(partial, sch.get_loops(block)[len(spatial) - 1])
    inner_loops = sch.get_loops(partial)[len(spatial) :]
    # compute_at puts spatial loops first, and the lanes are one; without it they stay where they were split off.
    vector = inner_loops[0 if spatial else -1]
    steps = inner_loops[1:] if spatial else inner_loops[:-1]
    sch.reorder(*steps, vector)
    sch.vectorize(vector)
    if parallel and spatial:
        final = sch.get_loops(block)[: len(spatial)]
        sch.parallel(sch.fuse(*final) if len(final) > 1 else final[0])
    steps = sch.get_loops(partial)[-1 - len(steps) : -1]
    _vectorize_init(sch, sch.decompose_reduction(partial, steps[0]))


def _vectorize_init(sch: s_tir.Schedule, init: Any) -> None:
    loop = sch.get_loops(init)[-1]
    if sch.get(loop).kind != tirx.ForKind.VECTORIZED:
        sch.vectorize(loop)
