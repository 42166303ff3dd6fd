"""Scheduled TIR functions to one CUDA C text, and the launches that each function stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Call, IRModule, transform
from tvm.tirx import PrimFunc

from graphopt.codegen.cuda.schedule import tvm_target
from graphopt.targets.target import Target

Extent = tuple[int, int, int]  # along x, y and z

_DYNAMIC_SHARED = "tirx.use_dyn_shared_memory"


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a TIR function."""

    kernel: str  # the kernel's symbol
    arguments: tuple[int, ...]  # places among the function's parameters, in the order of the kernel's own
    grid: Extent  # blocks
    block: Extent  # threads
    dynamic_shared_bytes: int

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return self.block[0] * self.block[1] * self.block[2]


@dataclass(frozen=True)
class Generated:
    """CUDA C for a model's kernels, and how each function launches them."""

    source: str
    launches: Mapping[str, tuple[Launch, ...]]  # by TIR function


def lower_tir(module: IRModule, target: Target) -> IRModule:
    """Scheduled TIR to device functions, and host functions that launch them: TVM's own pipeline up to that point."""
    t, s = tirx.transform, s_tir.transform
    passes = [
        t.BindTarget(tvm_target(target)),
        s.CanonicalizeLoop(),
        s.LowerCrossThreadReduction(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        s.LiftThreadBinding(),
        s.ManifestSharedMemoryLocalStage(),
        s.CompactBufferAllocation(),
        s.LowerAutoCopy(),
        s.UnifyThreadBinding(),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.InjectPermutedLayout(),
        s.AnnotateIrregularLoop(),
        s.InjectSoftwarePipeline(),
        s.TransformMmaBufferLayout(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.BF16ComputeLegalize(),
        t.NarrowDataType(32),
        s.LoopPartition(),
        t.VectorizeLoop(True),
        s.InjectVirtualThread(),
        s.InjectDoubleBuffer(),
        t.StorageRewrite(),
        s.HoistIfThenElse(),
        t.UnrollLoop(),
        s.RenormalizeSplitPattern(),
        t.StmtSimplify(),
        t.RemoveNoOp(),
        s.RewriteUnsafeSelect(),
        t.CommonSubexprElim(),
        t.FP8ComputeLegalize(),
        t.VerifyMemory(),
        s.ThreadSync("shared"),
        s.ThreadSync("shared.dyn"),
        s.ThreadSync("warp"),
        s.InferFragment(),
        s.LowerThreadAllreduce(),
        s.MergeSharedMemoryAllocations(),
        t.SplitHostDevice(),
    ]
    # Loops stay loops with a pragma: nvcc unrolls them as well, from a fraction of the text.
    with transform.PassContext(config={"tirx.UnrollLoop": {"explicit_unroll": False}}):
        return transform.Sequential(passes)(module)


def generate(module: IRModule, target: Target) -> Generated:
    """Write CUDA C for every function of a module.

    Args:
        module: scheduled functions; their parameters are buffers with static shapes.
        target: a CUDA target.
    """
    lowered = lower_tir(module, target)
    named = {gv.name_hint: func for gv, func in lowered.functions.items()}
    device = {name: func for name, func in named.items() if "tirx.kernel_launch_params" in func.attrs}
    launches = {name: tuple(_launches(func, device)) for name, func in named.items() if name not in device}
    t = tirx.transform
    finalise = transform.Sequential(
        [t.FP8StorageLegalize(), t.BF16StorageLegalize(), t.LowerWarpMemory(), t.StmtSimplify(), t.LowerIntrin()]
    )
    kernels = finalise(IRModule({name: device[name] for name in sorted(device)}))
    built = tvm.get_global_func("target.build.cuda")(kernels, tvm_target(target))
    return Generated(_tidy(built.inspect_source()), dict(sorted(launches.items())))


def _launches(host: PrimFunc, device: Mapping[str, PrimFunc]) -> Iterator[Launch]:
    """Read the launches off a host function: it computes nothing, all extents are static."""
    places = {param: i for i, param in enumerate(host.params)}
    calls: list[Call] = []

    def visit(node: Any) -> None:
        if isinstance(node, tirx.DeclBuffer):
            places[node.buffer] = places[_owner(node.data)]
        elif isinstance(node, Call) and getattr(node.op, "name", "") == "tirx.call_ffi_kernel":
            calls.append(node)

    tvm_ffi.structural_walk(host.body, [(tirx.DeclBuffer, visit), (Call, visit)], order="pre")
    for call in calls:
        kernel = str(call.args[0].value)
        order = [str(name) for name in device[kernel].attrs["tirx.kernel_launch_params"]]
        count = len(call.args) - 1 - len(order)
        arguments = tuple(places[_owner(a)] for a in call.args[1 : 1 + count])
        extents = {name: int(value) for name, value in zip(order, call.args[1 + count :], strict=True)}
        shared = extents.pop(_DYNAMIC_SHARED, 0)
        grid, block = (_extent(extents, kind) for kind in ("block", "thread"))
        assert not extents, f"{kernel} is launched with {sorted(extents)}"
        yield Launch(kernel, arguments, grid, block, shared)


def _extent(extents: dict[str, int], kind: str) -> Extent:
    x, y, z = (extents.pop(f"{kind}Idx.{axis}", 1) for axis in "xyz")
    return x, y, z


def _owner(pointer: Any) -> Any:
    """The buffer whose address an expression is."""
    return pointer.args[0] if isinstance(pointer, Call) else pointer


def _tidy(source: str) -> str:
    """Without the kernels' forward declarations (each is followed by its definition) and trailing blanks."""
    source = re.sub(r'^extern "C" __global__ [^{}\n]*\);\n', "", source, flags=re.M)
    return "\n".join(line.rstrip() for line in source.strip().splitlines()) + "\n"
