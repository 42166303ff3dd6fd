"""A program to an artefact for the GPU: prepare, legalise, schedule, compile, plan memory, write out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm import relax
from tvm.tirx import PrimFunc

from graphopt.codegen.artefact import KernelInfo
from graphopt.codegen.cuda.artefact import CudaArtefact, KernelLaunch, OutputCopy, Place
from graphopt.codegen.cuda.attention import split_attention
from graphopt.codegen.cuda.kernels import Launch, generate
from graphopt.codegen.cuda.launcher import write_sources
from graphopt.codegen.cuda.nvrtc import compile_cuda
from graphopt.codegen.cuda.ordering import compare_all
from graphopt.codegen.cuda.scatter import scatter_in_order
from graphopt.codegen.cuda.schedule import as_module, hoist_global, schedule
from graphopt.codegen.entry import direct_outputs, pack_weights
from graphopt.codegen.fallback import functions, legalise
from graphopt.codegen.memory import plan_memory
from graphopt.codegen.prepare import prepare
from graphopt.codegen.rebuild import rebuild
from graphopt.codegen.steps import Buffer, StepProgram, read_steps
from graphopt.program import Program
from graphopt.spec import identifier
from graphopt.targets.target import Target


def compile_program(
    program: Program,
    target: Target,
    *,
    dump: Callable[[str, str], None] = lambda *_: None,
    progress: Callable[[str], None] = lambda _: None,
) -> CudaArtefact:
    """Lower a program for a CUDA target; no GPU is needed.

    Args:
        program: static shapes.
        target: of kind "cuda".
        dump: called after every phase with a name and the program as text.
        progress: called before every phase.

    Raises:
        ToolMissing: the wheels of the [cuda] extra are not installed.
        UnsupportedOp: an operator that TVM cannot express, or has no thread mapping for.
    """
    progress("importing")
    module, sparse_weights = prepare(program, target)
    dump("relax.py", module.script())
    progress("legalising")
    module = legalise(rebuild(split_attention(module), _threadable))
    dump("lowered.py", module.script())

    progress("scheduling")
    kernels: dict[str, PrimFunc] = {}
    rules: dict[str, str] = {}
    scratch: dict[str, tuple[int, ...]] = {}
    symbols = {name: f"{program.name}_{n}_{identifier(name)[:80]}" for n, name in enumerate(functions(module))}
    for name, func in functions(module).items():
        rules[name], func = schedule(name, func, target)
        kernels[symbols[name]], scratch[name] = hoist_global(func)
    generated = generate(as_module(kernels), target)
    dump(f"{program.name}.cu", generated.source)
    steps = read_steps(module["main"], {}, scratch)
    progress(f"compiling {sum(map(len, generated.launches.values()))} kernels for {target.arch}")
    image = compile_cuda(generated.source, target.arch)

    offsets, weights = pack_weights(steps)
    launches, copies, arena_bytes = _place(steps, {n: generated.launches[s] for n, s in symbols.items()}, offsets)
    nbytes = tuple(b.nbytes for b in steps.inputs), tuple(b.nbytes for b in steps.outputs)
    return CudaArtefact(
        name=program.name,
        sources=write_sources(
            program.name,
            image,
            launches,
            copies,
            (program.inputs, program.outputs),
            nbytes,
            len(weights),
            arena_bytes,
        ),
        objects={},
        weights=weights,
        inputs=program.inputs,
        outputs=program.outputs,
        workspace_bytes=arena_bytes,
        kernels=tuple(KernelInfo(symbols[s.kernel], f"tvm-{rules[s.kernel]}", s.kernel) for s in steps.steps),
        sparse_weights=sparse_weights,
        arch=target.arch,
        cuda_source=generated.source,
        files={
            f"{program.name}.cubin": image.cubin,
            f"{program.name}.ptx": image.ptx.encode(),
            f"{program.name}.cu": generated.source.encode(),
        },
        launches=launches,
        copies=copies,
        input_bytes=nbytes[0],
        output_bytes=nbytes[1],
        usage=image.usage,
    )


def _threadable(binding: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
    """What TVM lowers to loops of one thread, as operators or kernels that many share. One pass: it adds functions."""
    new = compare_all(binding, value, builder)
    return scatter_in_order(binding, value, builder) if new is value else new


def _place(
    program: StepProgram, launches: Mapping[str, tuple[Launch, ...]], weight_at: list[int]
) -> tuple[tuple[KernelLaunch, ...], tuple[OutputCopy, ...], int]:
    """Addresses for every argument of every launch; and how large the arena is, in bytes."""
    direct = direct_outputs(program)
    plan = plan_memory(program, direct)

    def place(buffer: Buffer) -> Place:
        if buffer in direct:
            return Place("output", direct[buffer])
        if buffer.kind == "input":
            return Place("input", buffer.index)
        if buffer.kind == "weight":
            return Place("weight", offset=weight_at[buffer.index])
        return Place("arena", offset=plan.offsets[buffer])

    placed = []
    for step in program.steps:
        buffers = (*step.arguments, *step.results, *step.scratch)
        for launch in launches[step.kernel]:
            arguments = tuple(place(buffers[i]) for i in launch.arguments)
            placed.append(
                KernelLaunch(launch.kernel, launch.grid, launch.block, launch.dynamic_shared_bytes, arguments)
            )
    copies = tuple(OutputCopy(i, place(b)) for i, b in enumerate(program.outputs) if direct.get(b) != i)
    return tuple(placed), copies, plan.arena_bytes
