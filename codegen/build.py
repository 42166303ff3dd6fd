"""TIR functions to one object file, with a plain C interface.

TVM's own calling convention packs every argument into a DLTensor and needs its runtime. Here each kernel becomes

    int32_t name(T0 *arg0, T1 *arg1, ...)      0, or the error of a parallel region

so that the artefact needs nothing but the few symbols of `runtime/`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import IRModule, PointerType, PrimType
from tvm.tirx import PrimFunc

from graphopt.codegen.kernels.nan import PropagateNan
from graphopt.codegen.kernels.soft_half import SoftenHalf
from graphopt.codegen.kernels.tir_rewrite import Rewriter
from graphopt.codegen.kernels.vector_math import ExpandMath
from graphopt.targets.target import Target

# What stands in TVM's table as kDeviceKernelLaunch is, to its LLVM code generator, a function with plain arguments.
PLAIN_C = 2
CPU_DEVICE = 1


def llvm_target(target: Target) -> tvm.target.Target:
    """TVM's description of the target's host processor."""
    return tvm.target.Target(target.llvm)


def lower_tir(module: IRModule, target: Target) -> IRModule:
    """Scheduled TIR to loops over flat buffers and scalars, still one function per kernel."""
    t, s = tirx.transform, s_tir.transform
    passes = [
        t.BindTarget(llvm_target(target)),
        s.CanonicalizeLoop(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        s.CompactBufferAllocation(),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.BF16ComputeLegalize(),
        t.NarrowDataType(32),
        s.LoopPartition(),
        t.VectorizeLoop(True),
        ExpandMath(target),
        t.StorageRewrite(),
        t.UnrollLoop(),
        s.RenormalizeSplitPattern(),
        t.StmtSimplify(),
        t.RemoveNoOp(),
        s.RewriteUnsafeSelect(),
        t.CommonSubexprElim(),
        PropagateNan(target),  # last: what it writes is not to be simplified, nor shared between statements
    ]
    return tvm.ir.transform.Sequential(passes)(module)


def plain_c(name: str, func: PrimFunc) -> PrimFunc:
    """Give a lowered function raw pointers for arguments and an int32 for its result."""
    pointers = [tirx.Var(param.name, PointerType(param.ty.dtype)) for param in func.params]
    # Some of TVM's operators leave the offset of a tensor in its storage open; ours begin where the pointer says.
    offsets = {p.ty.elem_offset for p in func.params if isinstance(p.ty.elem_offset, tirx.Var)}
    body: list[tirx.Stmt] = [tirx.Bind(offset, tirx.const(0, offset.ty.dtype)) for offset in offsets]
    body += [tirx.DeclBuffer(param, data=pointer) for param, pointer in zip(func.params, pointers, strict=True)]
    body.append(_WithoutPragmas().stmt(func.body))
    body.append(tirx.Return(tirx.const(0, "int32")))
    zero = tirx.const(0, "int32")
    on_device = tirx.AttrStmt(zero, "device_id", zero, tirx.SeqStmt(body))
    on_device = tirx.AttrStmt(zero, "device_type", tirx.const(CPU_DEVICE, "int32"), on_device)
    plain = PrimFunc(pointers, on_device, PrimType("int32"), func.attrs)
    return plain.with_attr("calling_conv", PLAIN_C).with_attr("global_symbol", name)


class _WithoutPragmas(Rewriter):
    """TVM's scatters mark what is sequential with a pragma that its LLVM code generator then complains of."""

    def stmt(self, s: Any) -> Any:
        s = super().stmt(s)
        return s.body if isinstance(s, tirx.AttrStmt) and s.attr_key == "pragma_scope" else s


def build_llvm(kernels: Mapping[str, PrimFunc], target: Target) -> tvm.runtime.Module:
    """Compile kernels for the target's host processor; `inspect_source("asm")` of the result shows the assembly.

    Args:
        kernels: C symbol to scheduled TIR function; buffers become pointers in the order of the parameters.
        target: any target; a CUDA target's host side is meant.
    """
    module = IRModule({name: func.with_attr("global_symbol", name) for name, func in kernels.items()})
    lowered = lower_tir(module, target)
    plain = IRModule({gv.name_hint: plain_c(gv.name_hint, func) for gv, func in lowered.functions.items()})
    # With a prefix TVM calls the runtime's symbols directly, and not through pointers that nobody sets.
    plain = plain.with_attr("system_lib_prefix", "graphopt_")
    t = tirx.transform
    passes = [t.BF16StorageLegalize(), t.LowerTVMBuiltin(), SoftenHalf(target), t.LowerIntrin()]
    plain = tvm.ir.transform.Sequential(passes)(plain)
    return tvm.get_global_func("target.build.llvm")(plain, llvm_target(target))


def object_code(library: tvm.runtime.Module) -> bytes:
    """The relocatable object file of a compiled library."""
    # In memory: where a disk is full, LLVM ends the whole process instead of raising an error.
    descriptor = os.memfd_create("kernels.o")
    try:
        library.write_to_file(f"/proc/self/fd/{descriptor}", "o")
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:
            return file.read()
    finally:
        os.close(descriptor)


def build_object(kernels: Mapping[str, PrimFunc], target: Target, path: Path) -> None:
    """Write the kernels as one relocatable object file."""
    path.write_bytes(object_code(build_llvm(kernels, target)))
