"""A thread mapping for every TIR function: dlight's rules, tried in order, with two corrections.

* dlight's matrix product would switch to tensor cores for float16 through `Schedule.tensorize`, which kills the process
  in TVM 0.27. It does so from sm_70 on only, so its rules are told of an sm_61; the code is compiled for the real one.
* That rule writes its inner product out element by element. Here the loops stay loops, marked for nvcc to unroll:
  the same machine code from a tenth of the text, which compiles faster and which the CPU check can build too.
"""

from __future__ import annotations

import math

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import IRModule
from tvm.s_tir.dlight.base import ScheduleRule
from tvm.s_tir.dlight.gpu import GEMV, Fallback, GeneralReduction, Matmul, Reduction
from tvm.target import Target as TvmTarget
from tvm.tirx import PrimFunc

from graphopt.errors import UnsupportedOp
from graphopt.targets.cuda import gpu_of
from graphopt.targets.target import Target

# Threads of a block where nothing else decides: full occupancy on every architecture, and small tensors still spread
# over several multiprocessors.
THREADS = 256
# Output elements from which a matrix product takes the large tile: enough blocks of it to fill about 100
# multiprocessors.
LARGE_PRODUCT = 100 * 64 * 128
# Elements that a single thread adds up where a block of threads could share the work.
SHORT_SUM = 64


def tvm_target(target: Target) -> TvmTarget:
    """TVM's description of the GPU, with the host's."""
    gpu = gpu_of(target)
    return _tvm_target(target.arch, gpu.static_shared_bytes, gpu.threads_per_block, target)


def _tvm_target(arch: str, shared_bytes: int, threads: int, target: Target) -> TvmTarget:
    limits = {
        "max_shared_memory_per_block": shared_bytes,
        "max_threads_per_block": threads,
        "max_num_threads": threads,
        "thread_warp_size": 32,
    }
    return TvmTarget({"kind": "cuda", "arch": arch, **limits}, host=TvmTarget(target.llvm))


class TiledProduct(Matmul):
    """C[s, i, j] += A[s, i, k] * B[s, j, k] in tiles through shared memory; convolutions too, as implicit products.

    limit: tile_i * tile_j * tile_k multiply-adds for (tile_i + tile_j) * tile_k elements fetched per step of k.
    """

    def __init__(self, elements: int) -> None:
        """Args: elements: of the output, to choose the tile."""
        self.elements = elements

    def get_configs(self, target: TvmTarget) -> Matmul.Config:
        """Tile sizes: 32 x 64 by 128 threads, or 64 x 128 by 128 threads where there is enough work."""
        micro = 8 if self.elements >= LARGE_PRODUCT else 4
        return Matmul.Config(
            block_size_x=8,
            block_size_y=16,
            micro_size_x=micro,
            micro_size_y=micro,
            micro_size_k=16,
            vector_size=1,
            unroll=0,
            use_shared=True,
            storage_align=True,
        )

    def apply(self, func: PrimFunc, target: TvmTarget, tunable: bool) -> s_tir.Schedule | None:
        """Schedule `func`; None where it is no such product."""
        schedule = super().apply(func, target, tunable)
        if schedule is None:
            return None
        for block in schedule.get_child_blocks(schedule.get_sblock("root")):
            loops = schedule.get_loops(block)
            if schedule.get(block).name_hint.endswith("_update"):
                loops = loops[-3:]  # k, i and j within a thread's tile
            else:
                first = next((n for n, loop in enumerate(loops) if _is(schedule, loop, "threadIdx.x")), len(loops))
                loops = loops[first + 1 :]
            for loop in loops:
                serial = int(schedule.get(loop).kind) == int(tirx.ForKind.SERIAL)
                if serial and not _is_outer_step(schedule, block, loop):
                    schedule.unroll(loop)
        return schedule


def _is(schedule: s_tir.Schedule, loop: s_tir.schedule.LoopRV, thread: str) -> bool:
    binding = schedule.get(loop).thread_binding
    return binding is not None and binding.thread_tag == thread


def _is_outer_step(schedule: s_tir.Schedule, block: s_tir.schedule.SBlockRV, loop: s_tir.schedule.LoopRV) -> bool:
    """Whether the loop is the one over tiles of k, which holds the fetches into shared memory as well."""
    extent = schedule.get(loop).extent
    return int(extent) > 16 or len(schedule.get_child_blocks(loop)) > 1


def reductions(func: PrimFunc) -> list[int]:
    """How many elements each reducing block of a function adds up (or multiplies, or takes the largest of)."""
    found: list[int] = []

    def visit(block: s_tir.SBlock) -> None:
        extents = [int(v.dom.extent) for v in block.iter_vars if int(v.iter_type) == int(tirx.IterVar.CommReduce)]
        if extents:
            found.append(math.prod(extents))

    tvm_ffi.structural_walk(func.body, (s_tir.SBlock, visit), order="pre")
    return found


def threaded(func: PrimFunc) -> bool:
    """Whether some loop is bound to threads already."""
    found: list[bool] = []
    tvm_ffi.structural_walk(
        func.body, (tirx.For, lambda loop: found.append(loop.thread_binding is not None)), order="pre"
    )
    return any(found)


def rules(func: PrimFunc) -> list[tuple[str, ScheduleRule]]:
    """What is tried on a function, in this order; the last takes everything."""
    elements = math.prod(int(d) for d in func.params[-1].ty.shape)
    sums = reductions(func)
    # A depthwise convolution or a pooling adds up a handful of elements: a thread does that faster than a block can.
    short = [("window", Fallback())] if len(sums) == 1 and sums[0] <= SHORT_SUM else []
    return [
        ("gemv", GEMV()),
        ("product", TiledProduct(elements)),
        *short,
        ("reduction", Reduction()),
        ("general-reduction", GeneralReduction()),
        ("elementwise", Fallback()),
    ]


def schedule(name: str, func: PrimFunc, target: Target) -> tuple[str, PrimFunc]:
    """Bind a function's loops to blocks and threads.

    Returns:
        The rule that took it, and the scheduled function.

    Raises:
        UnsupportedOp: no rule could, with what the last one said.
    """
    if threaded(func):
        return "given", func
    small = _tvm_target("sm_61", gpu_of(target).static_shared_bytes, THREADS, target)
    reason = "no schedule rule applies"
    for rule_name, rule in rules(func):
        try:
            with small:
                result = rule.apply(func, small, False)
        except Exception as error:
            # The rules are written for common shapes and fail in many ways on others; the next one takes those.
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            continue
        if result is not None:
            first = result[0] if isinstance(result, list) else result
            return rule_name, first.mod["main"]
    raise UnsupportedOp(op=name, where="the lowered program", reason=f"it has no thread mapping: {reason}")


def hoist_global(func: PrimFunc) -> tuple[PrimFunc, tuple[int, ...]]:
    """Turn temporaries in global memory into parameters behind the others, and give their sizes in bytes."""
    realize = func.body
    block = realize.block
    found = [b for b in block.alloc_buffers if b.scope() in ("", "global")]
    if not found:
        return func, ()
    kept = [b for b in block.alloc_buffers if b.scope() not in ("", "global")]
    block = s_tir.SBlock(
        block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init, kept,
        block.match_buffers, block.annotations,
    )  # fmt: skip
    body = s_tir.SBlockRealize(realize.iter_values, realize.predicate, block)
    hoisted = PrimFunc([*func.params, *found], body, func.ret_type, func.attrs)
    sizes = tuple(math.prod(int(d) for d in b.shape) * _bytes(str(b.dtype)) for b in found)
    return hoisted, sizes


def _bytes(dtype: str) -> int:
    bits = 8 if dtype == "bool" else int("".join(c for c in dtype if c.isdigit()))
    return max(1, bits // 8)


def as_module(functions: dict[str, PrimFunc]) -> IRModule:
    """One module, functions under their names as symbols."""
    return IRModule({name: func.with_attr("global_symbol", name) for name, func in functions.items()})
