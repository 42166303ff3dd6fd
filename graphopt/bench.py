"""Time a bundle against other engines: in one run, in turns, on the same inputs."""

from __future__ import annotations

import difflib
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from graphopt.arrays import Array, to_numpy
from graphopt.bundle import Bundle
from graphopt.errors import BadOption, ToolMissing, UnknownRival
from graphopt.exported import arguments
from graphopt.program import Program
from graphopt.verify import TOLERANCES

Run = Callable[[], Any]


class Rival(Protocol):
    """An adapter: makes `program` ready to run on fixed inputs. One function in RIVALS each."""

    def __call__(self, program: Program, inputs: Mapping[str, Array], threads: int) -> Run:
        """Prepare, and return what runs once and gives the outputs. Raises ToolMissing."""
        ...


@dataclass(frozen=True)
class Timing:
    """Seconds per run of one engine; `ratio` is its minimum divided by that of the bundle: above 1, it is slower."""

    engine: str
    runs: int
    min_seconds: float
    median_seconds: float
    ratio: float
    max_abs_difference: float  # of its outputs to the bundle's

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


def _onnx_missing() -> str:
    return next((name for name in ("onnxruntime", "onnxscript", "onnx") if find_spec(name) is None), "")


def _compiler_missing() -> str:
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    return "" if any(map(shutil.which, names)) else "a C++ compiler"


# What rivals need besides this package: how to find out what is missing, and how to get it.
NEEDS: dict[str, tuple[Callable[[], str], str]] = {
    "onnxruntime": (_onnx_missing, "pip install 'graphopt[onnx]'"),
    "torch-compile": (_compiler_missing, "apt-get install g++"),
}


def check_tools(names: Iterable[str]) -> None:
    """Raises ToolMissing for the first of the rivals that lacks something here; it says which one, and what."""
    for name in names:
        missing, install = NEEDS.get(name, (str, ""))
        if tool := missing():
            raise ToolMissing(tool=tool, purpose=f"compare with {name}", install=install)


def _graph(program: Program, inputs: Mapping[str, Array]) -> tuple[Any, list[Any]]:
    """The graph as a module without state, and all that it takes: weights, then inputs."""
    import torch

    tensors = {s.name: torch.from_numpy(np.array(inputs[s.name])).to(s.torch_dtype) for s in program.inputs}
    return program.exported.graph_module, list(arguments(program.exported, tensors))


def torch_eager(program: Program, inputs: Mapping[str, Array], threads: int) -> Run:
    """The exported graph, run operator by operator."""
    import torch

    torch.set_num_threads(threads)
    module, tensors = _graph(program, inputs)

    def run() -> Any:
        with torch.inference_mode():
            return module(*tensors)

    return run


def torch_compile(program: Program, inputs: Mapping[str, Array], threads: int) -> Run:
    """torch.compile with its default back end; it needs a C++ compiler."""
    import torch

    check_tools(["torch-compile"])
    torch.set_num_threads(threads)
    graph, tensors = _graph(program, inputs)
    module = torch.compile(graph)

    def run() -> Any:
        with torch.inference_mode():
            return module(*tensors)

    return run


def to_onnx(program: Program) -> bytes:
    """The program as an ONNX file, inputs under their own names. Raises ToolMissing."""
    check_tools(["onnxruntime"])
    import logging

    import torch

    # It tells about every optional package that is not there.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names = [spec.name for spec in program.inputs]
    exported = torch.onnx.export(program.exported, input_names=names, dynamo=True, verbose=False)
    assert exported is not None
    return exported.model_proto.SerializeToString()


def onnxruntime(program: Program, inputs: Mapping[str, Array], threads: int) -> Run:
    """onnxruntime's CPU provider with all its graph optimisations, on what torch.onnx makes of the program."""
    check_tools(["onnxruntime"])
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin between runs would slow down whoever's turn is next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(to_onnx(program), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    feed = dict(zip(names, (inputs[spec.name] for spec in program.inputs), strict=True))
    return lambda: session.run(None, feed)


RIVALS: dict[str, Rival] = {"torch": torch_eager, "torch-compile": torch_compile, "onnxruntime": onnxruntime}


def check_rivals(names: Sequence[str]) -> None:
    """Raises UnknownRival where there is no adapter of that name, ToolMissing where one cannot run here."""
    for name in names:
        if name not in RIVALS:
            near = difflib.get_close_matches(name, RIVALS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UnknownRival(rival=name, near=hint, known=", ".join(RIVALS))
    check_tools(names)


def bench(
    bundle: Bundle,
    program: Program | None,
    inputs: Mapping[str, Array],
    rivals: Sequence[str],
    *,
    threads: int = 1,
    seconds: float = 5.0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Timing]:
    """Time the bundle and each rival in turns, so that whatever else the machine does hits all alike.

    Args:
        bundle: opened with as many threads.
        program: the model that the bundle was made from; needed for rivals.
        inputs: arrays by name.
        rivals: keys of RIVALS.
        threads: for each engine.
        seconds: how long each engine runs in all, at least three rounds.
        progress: hears what is done now.

    Returns:
        The bundle's timing, then the rivals' in order.

    Raises:
        UnknownRival: there is no such adapter.
        ToolMissing: a rival or what the bundle runs on is not installed.
        BadOption: rivals are asked for and there is no program, or it is another model.
    """
    check_rivals(rivals)
    if rivals and program is None:
        raise BadOption(
            what="the bundle has no model in it that another engine could run",
            way_out="name the file it was compiled from: --model model.pt2",
        )
    reference = as_list(bundle.run(inputs))
    ready: dict[str, Run] = {}
    differences: dict[str, float] = {}
    for name in dict.fromkeys(rivals):
        progress(f"preparing {name}")
        assert program is not None
        check_same_model(bundle, program)
        ready[name] = run = RIVALS[name](program, inputs, threads)
        run()
        differences[name] = _difference(reference, as_list(run()))
        _check_agreement(name, differences[name], reference)
    progress("timing")
    own = _own(bundle, inputs)
    samples: dict[str, list[float]] = {bundle.target: [], **{name: [] for name in ready}}
    deadline = time.perf_counter() + seconds * len(samples)
    for turn in range(1_000_000):
        if turn >= 3 and time.perf_counter() >= deadline:
            break
        samples[bundle.target] += own()
        for name, run in ready.items():
            samples[name] += _timed(run)
    best = min(samples[bundle.target])
    return [
        Timing(name, len(times), min(times), statistics.median(times), min(times) / best, differences.get(name, 0.0))
        for name, times in samples.items()
    ]


def in_turns(bundles: Sequence[Bundle], inputs: Mapping[str, Array], *, seconds: float) -> list[float]:
    """The least time of one run of each bundle, in seconds, timed in turns for `seconds` a bundle.

    Each gets those of `inputs` that it takes.
    """
    own = [{spec.name: inputs[spec.name] for spec in bundle.manifest.inputs} for bundle in bundles]
    return _least([_own(bundle, given) for bundle, given in zip(bundles, own, strict=True)], seconds)


def timed_in_turns(runs: Sequence[Run], *, seconds: float) -> list[float]:
    """As `in_turns`, for what RIVALS prepare."""
    return _least([lambda run=run: _timed(run) for run in runs], seconds)  # type: ignore[misc]


def _least(turns: Sequence[Callable[[], list[float]]], seconds: float) -> list[float]:
    samples: list[list[float]] = [[] for _ in turns]
    deadline = time.perf_counter() + seconds * len(turns)
    while len(samples[-1]) < 3 * _PER_TURN or time.perf_counter() < deadline:
        for times, turn in zip(samples, turns, strict=True):
            times += turn()
    return [min(times) for times in samples]


# Runs per turn, after one that is not counted: the engine before has filled the caches with its own data.
_PER_TURN = 3


def _timed(run: Run) -> list[float]:
    run()
    times = []
    for _ in range(_PER_TURN):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _own(bundle: Bundle, inputs: Mapping[str, Array]) -> Callable[[], list[float]]:
    """The bundle's own turn: timed inside its runner, so that copies to another process are not counted."""
    once = bundle.time(inputs, 0.0)[0]

    def turn() -> list[float]:
        times = bundle.time(inputs, (_PER_TURN + 0.5) * once)
        return times[1 : 1 + _PER_TURN] or times

    return turn


def check_same_model(bundle: Bundle, program: Program) -> None:
    """Raises BadOption where the program's inputs or outputs are not the bundle's."""
    for what in ("inputs", "outputs"):
        ours, theirs = getattr(bundle.manifest, what), getattr(program, what)
        if ours != theirs:
            texts = (", ".join(map(str, specs)) for specs in (ours, theirs))
            raise BadOption(
                what="the model has other {0} than the bundle: {2}, not {1}".format(what, *texts),
                way_out="name the file that the bundle was compiled from",
            )


def as_list(results: Any) -> list[Array]:
    """The outputs of any engine, in order, as arrays."""
    if isinstance(results, Mapping):
        return [to_numpy(value) for value in results.values()]
    if isinstance(results, list | tuple):
        return [array for item in results for array in as_list(item)]
    return [to_numpy(results)]


def _difference(ours: Sequence[Array], theirs: Sequence[Array]) -> float:
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=False)):
        return float("inf")
    pairs = zip(ours, theirs, strict=True)
    gaps = [np.abs(a.astype(np.float64) - b.astype(np.float64)) for a, b in pairs]
    return max((float(np.nan_to_num(gap, nan=0.0).max()) for gap in gaps if gap.size), default=0.0)


def _check_agreement(name: str, difference: float, reference: Sequence[Array]) -> None:
    scale = max((float(np.abs(a.astype(np.float64)).max()) for a in reference if a.size), default=0.0)
    # Timing two models that compute different things says nothing; the weights may be another training's.
    if difference > 10 * TOLERANCES["bfloat16"].atol * max(scale, 1.0):
        raise BadOption(
            what=f"{name} computes something else than the bundle: outputs differ by {difference:g}",
            way_out="name the file that the bundle was compiled from",
        )


def find_model(bundle: Path) -> Path | None:
    """The model file beside a bundle, by its name: model.bundle was made from model.pt2 or model.pt."""
    for suffix in (".pt2", ".pt", ".pth"):
        if (file := bundle.with_suffix(suffix)).is_file():
            return file
    return None
