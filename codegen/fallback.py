"""Everything that no template takes: TVM's own legalisation, its fusion, and a generic schedule."""

from __future__ import annotations

from tvm import ir, relax
from tvm.ir import IRModule
from tvm.tirx import PrimFunc

from graphopt.codegen.half import widen_sums

# Reshapes stay operators: they name bytes that lie there already, and no kernel is called for them.
FREE = ["relax.reshape"]


def legalise(module: IRModule) -> IRModule:
    """Turn every operator left in `main` into a TIR function, and fuse chains of them."""
    t = relax.transform
    passes = [
        t.LegalizeOps(skip_ops=FREE),
        t.AnnotateTIROpPattern(),
        t.FuseOps(),
        t.FuseTIR(),
        t.DeadCodeElimination(),
    ]
    return ir.transform.Sequential(passes)(widen_sums(module))


def functions(module: IRModule) -> dict[str, PrimFunc]:
    """The TIR functions of a module by name, in a stable order."""
    found = {gv.name_hint: func for gv, func in module.functions.items() if isinstance(func, PrimFunc)}
    return dict(sorted(found.items()))
