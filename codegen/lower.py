"""A program to an artefact: prepare, select, legalise, build, write out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tvm.ir import IRModule
from tvm.tirx import PrimFunc

from graphopt.codegen.artefact import Artefact, KernelInfo
from graphopt.codegen.build import build_llvm, object_code
from graphopt.codegen.entry import write_entry
from graphopt.codegen.fallback import functions, legalise
from graphopt.codegen.kernel_times import KernelTimes
from graphopt.codegen.kernels.elementwise import hoist_scratch, schedule
from graphopt.codegen.prepare import prepare
from graphopt.codegen.select import Selection, select
from graphopt.codegen.steps import read_steps
from graphopt.program import Program
from graphopt.spec import identifier
from graphopt.targets.runner import Outside
from graphopt.targets.target import Target

Dump = Callable[[str, str], None]  # name of a phase, as "relax.py", and its text
Progress = Callable[[str], None]  # what is done now


def _silent(*_: str) -> None:
    pass


def compile_program(
    program: Program,
    target: Target,
    *,
    times: KernelTimes | None = None,
    dump: Dump = _silent,
    progress: Progress = _silent,
) -> Artefact:
    """Lower a program; nothing is written but temporary files.

    Args:
        program: static shapes.
        target: any.
        times: measurements that the choice between dense and sparse kernels goes by; estimates where it has none.
        dump: called after every phase with the program as text.
        progress: called before every phase.

    Raises:
        UnsupportedOp: an operator that neither a template nor TVM can express, with its place.
    """
    if target.kind == "cuda":
        # Imported here: what it needs of NVIDIA's is an extra.
        from graphopt.codegen.cuda.lower import compile_program as compile_for_gpu

        return compile_for_gpu(program, target, dump=dump, progress=progress)
    progress("importing")
    module, sparse_weights = prepare(program, target, times)
    dump("relax.py", module.script())
    artefact = compile_module(program, module, target, dump=dump, progress=progress)
    return replace(artefact, sparse_weights=sparse_weights)


def compile_module(
    outside: Outside, module: IRModule, target: Target, *, dump: Dump = _silent, progress: Progress = _silent
) -> Artefact:
    """As `compile_program`, from what `prepare` makes. `outside` is what it looks like from the outside."""
    progress("choosing kernels")
    selection = select(module, target)
    dump("selected.py", selection.module.script())
    progress("legalising the rest")
    module = legalise(selection.module)
    dump("lowered.py", module.script())

    kernels = _name_kernels(outside.name, selection, functions(module), target)
    constants = {name: chosen.call.constants for name, chosen in selection.calls.items()}
    steps = read_steps(module["main"], constants, kernels.scratch)
    progress(f"compiling {len(kernels.functions)} kernels")
    library = build_llvm(kernels.functions, target)
    dump("kernels.s", library.inspect_source("asm"))
    entry = write_entry(outside.name, steps, kernels.symbols, outside.inputs, outside.outputs)
    dump(f"{outside.name}.c", entry.source)
    return Artefact(
        name=outside.name,
        sources={f"{outside.name}.c": entry.source, f"{outside.name}.h": entry.header},
        objects={"kernels.o": object_code(library)},
        weights=entry.weights,
        inputs=outside.inputs,
        outputs=outside.outputs,
        workspace_bytes=entry.workspace_bytes,
        kernels=tuple(_describe(step.kernel, kernels, selection) for step in steps.steps),
        declined=selection.declined,
    )


@dataclass(frozen=True)
class _Kernels:
    """The functions to compile by C symbol; symbol and scratch sizes of every kernel that `main` names."""

    functions: dict[str, PrimFunc]
    symbols: dict[str, str]
    scratch: dict[str, tuple[int, ...]]


def _name_kernels(prefix: str, selection: Selection, rest: Mapping[str, PrimFunc], target: Target) -> _Kernels:
    """Give every distinct kernel a C symbol: the templates' calls, equal ones sharing one, and scheduled, the rest."""
    kernels = _Kernels({}, {}, {})
    by_key: dict[object, str] = {}
    for name, chosen in selection.calls.items():
        call = chosen.call
        symbol = by_key.setdefault(
            (chosen.template, call.key), f"{prefix}_{identifier(call.name)}_{len(kernels.functions)}"
        )
        kernels.functions.setdefault(symbol, call.kernel)
        kernels.symbols[name], kernels.scratch[name] = symbol, call.scratch_bytes
    for name, func in rest.items():
        symbol = f"{prefix}_{identifier(name)}_{len(kernels.functions)}"
        kernels.functions[symbol], kernels.scratch[name] = hoist_scratch(schedule(func, target))
        kernels.symbols[name] = symbol
    return kernels


def _describe(kernel: str, kernels: _Kernels, selection: Selection) -> KernelInfo:
    """A step for reports. What TVM's legalisation made is named after the operators that it fused."""
    chosen = selection.calls.get(kernel)
    if chosen is None:
        return KernelInfo(kernels.symbols[kernel], "tvm", kernel.removeprefix("fused_").rstrip("0123456789"))
    return KernelInfo(kernels.symbols[kernel], chosen.template, chosen.operators, chosen.call.parameters)
