"""From a program to the Relax function that kernels are chosen for: imported, laid out, without idle reshapes."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import ir, relax
from tvm.ir import IRModule

from graphopt.codegen.bounds import guard_indices
from graphopt.codegen.dataflow import Dataflow, dtype_of, is_tensor, op_of
from graphopt.codegen.importer import to_relax
from graphopt.codegen.kernel_times import KernelTimes
from graphopt.codegen.layout import lay_out, untouched
from graphopt.codegen.rebuild import rebuild
from graphopt.codegen.simplify_views import simplify_views
from graphopt.codegen.sparse_weights import SparseWeight, Weights
from graphopt.program import Program
from graphopt.targets.target import Target


def prepare(
    program: Program, target: Target, times: KernelTimes | None = None
) -> tuple[IRModule, tuple[SparseWeight, ...]]:
    """Import the program and bring it into the form that the templates match. Says what zeros in weights led to.

    Static shapes; weights are constants; on processors convolutions are NHWC with OHWI weights, or NCHW where zeros in
    them pay. By estimates, or as measured where `times` has records.

    Raises:
        UnsupportedOp: an operator that cannot be expressed.
    """
    module = to_relax(program)
    passes = [relax.transform.DecomposeOpsForInference(), relax.transform.CanonicalizeBindings()]
    module = guard_indices(fold_constants(ir.transform.Sequential(passes)(module)))
    weights = Weights(program)
    if target.kind == "cuda":
        sparse = untouched(module, target, weights, "there are no sparse kernels for CUDA yet")
    else:
        times = times or KernelTimes(target)
        laid, sparse = lay_out(module, target, weights, times)
        if (dense := times.against(program, picked(sparse))) is not None:
            laid, sparse = lay_out(module, target, weights, dense)
        module = laid
    return tidied(module), sparse


def picked(entries: Sequence[SparseWeight]) -> list[str]:
    """The weights that get a sparse kernel."""
    return [entry.weight for entry in entries if entry.picked]


def tidied(module: IRModule) -> IRModule:
    """What is laid out, without views that have no need to be, and with constants as kernels want them."""
    return fold_constants(simplify_views(module))


def fold_constants(module: IRModule) -> IRModule:
    """Compute what depends on constants only, where `Dataflow.constant` can."""
    flow = Dataflow(module["main"])

    def rewrite(binding: relax.VarBinding, value: relax.Expr, _: relax.BlockBuilder) -> relax.Expr:
        if op_of(value) and is_tensor(binding.var):
            known = flow.constant(binding.var)
            if known is not None:
                return relax.const(known, dtype_of(binding.var))
        return value

    return rebuild(module, rewrite)
