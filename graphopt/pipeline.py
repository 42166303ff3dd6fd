"""The whole way, in one list: capture, canonicalise, tune, lower, link, verify, bundle."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.bundle import Bundle, keep_while, load, new_bundle, open_runner, seal
from graphopt.calibration import Calibration, Source, calibration
from graphopt.capture import capture
from graphopt.cost import summary
from graphopt.errors import BadOption, CannotWrite, ToolMissing
from graphopt.export import export
from graphopt.manifest import NOT_VERIFIED, Manifest, Verification, versions
from graphopt.options import Options, check_output
from graphopt.program import Program
from graphopt.staging import reason_of
from graphopt.tuning import records_of, tuned
from graphopt.verify import Run, Sample, counted, filled, round_up, samples_of, verify

if TYPE_CHECKING:
    from graphopt.codegen.artefact import Artefact
    from graphopt.codegen.kernel_times import KernelTimes
    from graphopt.cost import LatencyTable
    from graphopt.optimize import Outcome
    from graphopt.record import Record
    from graphopt.targets.target import Target

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True)
class Result:
    """A finished compilation: the bundle, what was asked for, every file that was written, and what was cut before."""

    bundle: Bundle
    output: Path | None
    written: tuple[Path, ...]
    reduced: Outcome | None = None


@dataclass(frozen=True)
class Plan:
    """What a compilation would do, one line a step, and what it would lack here."""

    steps: tuple[str, ...]
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"steps": list(self.steps), "missing": list(self.missing)}


def compile(
    source: Any,
    *,
    target: str = "cpu",
    example_inputs: Any = None,
    output: str | os.PathLike[str] | None = None,
    verify: bool = True,
    calibration: Source = None,
    dump_dir: str | os.PathLike[str] | None = None,
    canonicalise: bool = True,
    passes: Sequence[Any] = (),
    recipe: Any = None,
    budget: Mapping[str, Any] | None = None,
    name: str | None = None,
    input_shapes: Mapping[str, Any] | None = None,
    model_factory: str | None = None,
    unsafe_load: bool = False,
    tune: float | None = None,
    records: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Compile a model ahead of time, check the result against PyTorch, and write it.

    Args:
        source: a Program, an nn.Module, an exported program, or the path of a model file.
        target: "cpu", "wasm", "arm:cortex-a76", "cuda:sm_90", ...; `graphopt targets` lists them.
        example_inputs: as `capture` takes them; not with a Program, which brings its own.
        output: where to write. The suffixes .so, .a and .wasm give a library with what belongs to it beside, any other
            name a bundle folder. None: a temporary bundle that goes when it is no longer used.
        verify: run what was compiled and compare it with PyTorch.
        calibration: inputs to check on: a .npz file, an iterable of tensors, or "package.module:function", which gives
            one; `graphopt.calibration.calibration` has more. The example inputs where None.
        dump_dir: a folder for the program's text after every phase.
        canonicalise: run the lossless passes first.
        passes, recipe, budget: what shall be cut before, as `optimize` takes them (`budget={"flops": 0.5}`); lossy, so
            only when asked for. The bundle is then held to what the reduced program computes in PyTorch, and the
            manifest's records say what was cut.
        name: the prefix of C symbols and file names; by default the program's.
        input_shapes, model_factory, unsafe_load: as `capture` takes them.
        tune: seconds for timing the dense and the sparse kernel of layers whose weights have zeros; choices between
            them then go by that instead of estimates. The target must run here.
        records: a file of such times. It is read, and with `tune` made or added to; equal records give equal bundles.
        progress: hears what is done now.

    Returns:
        The bundle, loaded from what was written.

    Raises:
        VerificationFailed: it does not compute what PyTorch computes; nothing is written.
        BadRecords: `records` are none, or those of another target or machine.
        UnknownTarget, UnsupportedOp, ToolMissing, BadOption: it cannot be compiled so.
        OutputInTheWay, CannotWrite: it cannot be written there; nothing is left half-written.
        GraphoptError: any of those that `capture` raises.
    """
    from graphopt.optimize import reduction

    options = Options(
        target=target,
        output=output,
        example_inputs=example_inputs,
        input_shapes=input_shapes,
        model_factory=model_factory,
        unsafe_load=unsafe_load,
        name=name,
        calibration=calibration,
        verify=verify,
        canonicalise=canonicalise,
        dump_dir=dump_dir,
        tune=tune,
        records=records,
        reduction=reduction(passes, recipe, budget or {}),
    )
    return build(source, options, progress=progress).bundle


def build(source: Any, options: Options, *, progress: Progress | None = None) -> Result:
    """Carry out a compilation; `compile` says what is raised."""
    target = check_options(options)
    check_tools(target, run=options.verify)
    table = records_of(options, target)
    step = progress or _silent
    if options.output is not None and options.kind == "bundle":
        with new_bundle(options.output) as stage:
            reduced = run_phases(source, options, target, table, stage, step)
        bundle = load(options.output)
        return Result(bundle, Path(options.output), tuple(sorted(bundle.path.iterdir())), reduced)
    folder = tempfile.TemporaryDirectory(prefix="graphopt-")
    try:
        stage = Path(folder.name)
        reduced = run_phases(source, options, target, table, stage, step)
        bundle = keep_while(load(stage), folder)
        if options.output is None:
            return Result(bundle, None, (), reduced)
        return Result(bundle, Path(options.output), export(bundle, options.output, options.kind), reduced)
    except BaseException:
        folder.cleanup()
        raise


def run_phases(
    source: Any, options: Options, target: Target, table: LatencyTable | None, stage: Path, step: Progress
) -> Outcome | None:
    """Fill the empty folder `stage` with a bundle: the pipeline. Returns what was cut, None where nothing was to be.

    Kernels are chosen by the times in `table`, where there is one.
    """
    dump = Dump(options.dump_dir)
    step("capturing")
    captured = _captured(source, options)
    dump("captured.txt", str(captured))
    data = _calibration(captured, options)
    samples = samples_of(captured, data)
    outcome = _reduced(captured, options, data, target, dump, step)
    reduced = captured if outcome is None else outcome.after
    step("canonicalising")
    program = _canonicalised(reduced, options, dump, step)
    times = None if table is None else tuned(program, options, target, table, step)
    step(f"lowering for {target}")
    artefact = _lowered(program, target, times, dump, step)
    step("linking")
    _linked(artefact, target, dump, stage)
    manifest = describe(program, artefact, target)
    seal(stage, manifest)
    if options.verify:
        step("verifying")
        manifest = replace(
            manifest, verification=_verified(reduced, manifest, target, filled(samples, reduced), stage, step)
        )
    step("writing")
    seal(stage, manifest)
    return outcome


# Before anything is done ---------------------------------------------------------------------------------------------


def check_options(options: Options) -> Target:
    """The target, having refused what cannot work and warned of what is unwise. Raises as `check_output` does."""
    from graphopt import targets

    target = check_output(options)
    if text := targets.warning(target):
        log.warning(text)
    return target


def check_tools(target: Target, *, run: bool) -> None:
    """Raises ToolMissing where the linker, or with `run` all that could run the target, is not installed here."""
    from graphopt import targets
    from graphopt.targets.zig import zig_installed

    if not zig_installed():
        raise ToolMissing(tool="ziglang", purpose=f"link for {target}", install="pip install ziglang")
    if run and not targets.runners_of(target):
        targets.open_runner(Path(), None, target)  # raises, with what is to be installed


def plan(source: Any, options: Options, *, progress: Progress | None = None) -> Plan:
    """Say what `build` would do. The model is captured, so its faults show; nothing is written."""
    from graphopt import targets
    from graphopt.passes import CANONICALISE

    target = check_options(options)
    records_of(options, target)  # refuses what it has to
    (progress or _silent)("capturing")
    program = _captured(source, options)
    samples = samples_of(program, _calibration(program, options))
    cost = summary(program)
    runners = " and ".join(targets.runners_of(target)) or "nothing that is installed"
    steps = [
        f"capture {program.name}: {', '.join(map(str, program.inputs))} -> {', '.join(map(str, program.outputs))}, "
        f"{len(cost.rows)} operators, {cost.total.flops:,} FLOPs, {cost.total.params:,} parameters",
        *([f"reduce: {_passes_text(options.reduction)}"] if options.reduction is not None else []),
        f"canonicalise: {', '.join(CANONICALISE)}" if options.canonicalise else "canonicalise: left out",
        *_tuning_text(options),
        f"lower for {target} ({target.isa.name}, {target.isa.vector_bits} bits)",
        f"link for {target.zig}",
        f"verify: run on {counted(samples)} with {runners}, compare with PyTorch"
        if options.verify
        else "verify: left out, and the manifest says so",
        f"write {options.kind} {options.output}" if options.output is not None else "keep a temporary bundle",
    ]
    missing = targets.missing_for(target, run=options.verify)
    return Plan(tuple(steps), tuple(missing))


def _tuning_text(options: Options) -> list[str]:
    known = "" if options.records is None else f" that {options.records} does not have"
    if options.tune is not None:
        return [f"time the kernels of layers with zeros{known}, for up to {options.tune:g} s"]
    return [] if options.records is None else [f"choose kernels by the times in {options.records}"]


# The phases ----------------------------------------------------------------------------------------------------------


def _captured(source: Any, options: Options) -> Program:
    if isinstance(source, Program):
        if options.example_inputs is not None or options.input_shapes:
            raise BadOption(
                what="a Program brings its own inputs, and others were given",
                way_out="give example inputs to `capture`, or compile the module instead of the Program",
            )
        return source.replace(name=options.name_wanted) if options.name_wanted else source
    return capture(
        source,
        options.example_inputs,
        input_shapes=options.input_shapes,
        model_factory=options.model_factory,
        unsafe_load=options.unsafe_load,
        name=options.name_wanted,
    )


def _calibration(program: Program, options: Options) -> Calibration | None:
    return None if options.calibration is None else calibration(options.calibration, program, finite=False)


def _passes_text(reduction: Any) -> str:
    from graphopt.optimize import described

    return described(reduction)


def _reduced(
    program: Program, options: Options, data: Calibration | None, target: Target, dump: Dump, step: Progress
) -> Outcome | None:
    """Run the lossy passes that were asked for; None where there are none."""
    if options.reduction is None:
        return None
    from graphopt.optimize import reduce

    done = reduce(program, options.reduction, calibration=data, target=target, progress=step)
    dump("reduced.txt", str(done.after))
    return done


def _canonicalised(program: Program, options: Options, dump: Dump, step: Progress) -> Program:
    from graphopt.passes import CANONICALISE
    from graphopt.passes.base import run_passes

    if not options.canonicalise:
        return program
    program = run_passes(program, CANONICALISE, progress=lambda name, *_: step(f"canonicalising: {name}"))
    dump("canonical.txt", str(program))
    return program


def _lowered(program: Program, target: Target, times: KernelTimes | None, dump: Dump, step: Progress) -> Artefact:
    from graphopt.codegen.lower import compile_program

    return compile_program(program, target, times=times, dump=dump, progress=lambda text: step(f"lowering: {text}"))


def _linked(artefact: Artefact, target: Target, dump: Dump, stage: Path) -> None:
    from graphopt.targets import toolchain

    toolchain.link(artefact, target, "bundle", stage)
    dump("linked.txt", "".join(f"{file.stat().st_size:>12} {file.name}\n" for file in sorted(stage.iterdir())))


def _verified(
    program: Program, manifest: Manifest, target: Target, samples: Sequence[Sample], stage: Path, step: Progress
) -> Verification:
    """Run the files in `stage` with everything that can run them here."""
    from graphopt import targets

    with ExitStack() as stack:
        runners: dict[str, Run] = {}
        # Where nothing can run it, opening whatever comes first says what to install.
        for name in targets.runners_of(target) or (None,):
            runner = stack.enter_context(closing(open_runner(stage, manifest, runner=name)))
            runners[name or "unknown"] = runner.run
        step(f"verifying with {', '.join(runners)}")
        return verify(program, manifest.name, runners, samples)


def describe(program: Program, artefact: Artefact, target: Target) -> Manifest:
    """The manifest of an artefact, still without files and not verified."""
    cost = summary(program)
    return Manifest(
        name=artefact.name,
        target={
            "spec": target.spec,
            "kind": target.kind,
            "isa": target.isa.name,
            "triple": target.zig,
            "cpu": target.zig_cpu,
            "arch": target.arch,
            "features": ",".join(target.features),
        },
        inputs=artefact.inputs,
        outputs=artefact.outputs,
        flops=cost.total.flops,
        params=cost.total.params,
        weights_bytes=len(artefact.weights),
        workspace_bytes=artefact.workspace_bytes,
        kernels=tuple({**asdict(kernel), "parameters": dict(kernel.parameters)} for kernel in artefact.kernels),
        declined=tuple(asdict(decline) for decline in artefact.declined),
        sparse_weights=tuple(asdict(entry) for entry in artefact.sparse_weights),
        records=tuple(map(_rounded, program.records)),
        versions=versions(),
        verification=NOT_VERIFIED,
    )


def _rounded(record: Record) -> Record:
    error = record.max_abs_error
    return record if error is None else replace(record, max_abs_error=round_up(error))


class Dump:
    """Writes the program's text after each phase to numbered files in a folder, which is made if need be."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._count = 0

    def __call__(self, name: str, text: str) -> None:
        """Write `text` to the next number. Raises CannotWrite."""
        if self._folder is None:
            return
        file = self._folder / f"{self._count:02d}-{name}"
        self._count += 1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file.write_text(text if text.endswith("\n") else f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise CannotWrite(file=file, reason=reason_of(error)) from error
