"""A program to an artefact: prepare, select, legalise, build, write out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from tvm.tirx import PrimFunc

from graphopt.codegen.artefact import Artefact, KernelInfo
from graphopt.codegen.build import build_llvm
from graphopt.codegen.entry import write_entry
from graphopt.codegen.fallback import functions, legalise
from graphopt.codegen.kernels.elementwise import hoist_scratch, schedule
from graphopt.codegen.prepare import prepare
from graphopt.codegen.select import select
from graphopt.codegen.steps import read_steps
from graphopt.program import Program, identifier
from graphopt.targets.target import Target

Dump = Callable[[str, str], None]  # name of a phase, as "relax.py", and its text
Progress = Callable[[str], None]  # what is done now


def _silent(*_: str) -> None:
    pass


def compile_program(
    program: Program, target: Target, *, dump: Dump = _silent, progress: Progress = _silent
) -> Artefact:
    """Lower a program; nothing is written but temporary files.

    Args:
        program: static shapes.
        target: any.
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
    module = prepare(program, target)
    dump("relax.py", module.script())
    progress("choosing kernels")
    selection = select(module, target)
    dump("selected.py", selection.module.script())
    progress("legalising the rest")
    module = legalise(selection.module)
    dump("lowered.py", module.script())

    kernels: dict[str, PrimFunc] = {}  # by C symbol
    symbols: dict[str, str] = {}  # C symbol of each kernel named in `main`
    scratch: dict[str, tuple[int, ...]] = {}
    templates: dict[str, str] = {}
    by_key: dict[object, str] = {}
    for name, call in selection.calls.items():
        key = (type(call), call.key)
        if key not in by_key:
            by_key[key] = f"{program.name}_{identifier(call.name)}_{len(kernels)}"
            kernels[by_key[key]] = call.kernel
        symbols[name] = by_key[key]
        scratch[name] = call.scratch_bytes
        templates[name] = call.name
    for name, func in functions(module).items():
        symbols[name] = f"{program.name}_{identifier(name)}_{len(kernels)}"
        scheduled, scratch[name] = hoist_scratch(schedule(func, target))
        kernels[symbols[name]] = scheduled

    constants = {name: call.constants for name, call in selection.calls.items()}
    steps = read_steps(module["main"], constants, scratch)
    progress(f"compiling {len(kernels)} kernels")
    library = build_llvm(kernels, target)
    dump("kernels.s", library.inspect_source("asm"))
    entry = write_entry(program.name, steps, symbols, program.inputs, program.outputs)
    dump(f"{program.name}.c", entry.source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.o"
        library.write_to_file(str(path))
        kernel_object = path.read_bytes()
    infos = []
    for step in steps.steps:
        call = selection.calls.get(step.kernel)
        what = templates.get(step.kernel, step.kernel)
        parameters = call.parameters if call else {}
        infos.append(KernelInfo(symbols[step.kernel], "tvm" if call is None else what, step.kernel, parameters))
    return Artefact(
        name=program.name,
        sources={f"{program.name}.c": entry.source, f"{program.name}.h": entry.header},
        objects={"kernels.o": kernel_object},
        weights=entry.weights,
        inputs=program.inputs,
        outputs=program.outputs,
        workspace_bytes=entry.workspace_bytes,
        kernels=tuple(infos),
        declined=selection.declined,
    )
