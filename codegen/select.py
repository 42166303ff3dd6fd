"""Choose a kernel template for each piece of the graph that has one."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.dataflow import Dataflow, is_tensor, op_of
from graphopt.codegen.kernels import templates
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.rebuild import rebuild
from graphopt.codegen.views import RESHAPES
from graphopt.errors import Decline
from graphopt.targets.target import Target


@dataclass(frozen=True)
class Chosen:
    """A template's call, and what it stands for."""

    template: str
    operators: str  # "conv2d + add + relu"
    call: KernelCall


@dataclass(frozen=True)
class Selection:
    """The module with chosen pieces as calls of external kernels, and what those calls mean."""

    module: IRModule
    calls: dict[str, Chosen]  # name of the external function in the module to its call
    declined: tuple[Decline, ...]  # why no template took an operator that some template looked at


def select(module: IRModule, target: Target) -> Selection:
    """Let the templates look at every operator, in program order; the first that accepts one takes it."""
    flow = Dataflow(module["main"])
    by_anchor: dict[str, list[Template]] = {}
    for template in templates():
        for anchor in template.anchors:
            by_anchor.setdefault(anchor, []).append(template)

    taken: set[relax.Var] = set()
    at: dict[relax.Var, Chosen] = {}
    declined: list[Decline] = []
    for binding in flow.bindings:
        if binding.var in taken:
            continue
        refusals = []
        for template in by_anchor.get(op_of(binding.value), ()):
            result = template.match(flow, binding, target)
            if isinstance(result, Decline):
                refusals.append(Decline(f"{template.name}: {result.where}", result.reason))
            elif taken.isdisjoint(result.covers):
                taken.update(result.covers)
                at[result.output] = Chosen(template.name, _operators(flow, result), result)
                break
        else:
            declined += refusals

    names = {var: f"call{i}" for i, var in enumerate(at)}

    def rewrite(binding: relax.VarBinding, value: relax.Expr, _: relax.BlockBuilder) -> relax.Expr:
        if binding.var not in at:
            return value
        kinds = [binding.var.ty] if is_tensor(binding.var) else list(binding.var.ty.fields)
        inputs = relax.Tuple(list(at[binding.var].call.inputs))
        return relax.call_dps_packed(names[binding.var], inputs, out_ty=kinds)

    module = rebuild(module, rewrite)
    # A kernel that reads through a transpose leaves it without readers, and its call was not written.
    written = {b.value.args[0].global_symbol for b in Dataflow(module["main"]).bindings if op_of(b.value) == _CALL}
    calls = {names[var]: chosen for var, chosen in at.items() if names[var] in written}
    return Selection(module, calls, tuple(declined))


_CALL = "relax.call_dps_packed"


def _operators(flow: Dataflow, call: KernelCall) -> str:
    """The operators that a call covers, in program order; those that only look differently at a value left out."""
    names = [op_of(flow.value(var)) for var in sorted(call.covers, key=flow.position.__getitem__)]
    return " + ".join(n.removeprefix("relax.").removeprefix("nn.") for n in names if n and n not in RESHAPES)
