"""Reduce a program under a budget, and say what that did: the lossy half of the pipeline, without code generation."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.calibration import Calibration
from graphopt.calibration import calibration as read_calibration
from graphopt.capture import capture
from graphopt.cost import summary
from graphopt.passes import PREPARE
from graphopt.passes.base import Pass, run_passes
from graphopt.program import Program
from graphopt.recipe import Recipe, Step, parse_step, passes_of, read
from graphopt.record import Record

if TYPE_CHECKING:
    from graphopt.targets.target import Target

log = logging.getLogger(__name__)

Progress = Callable[[str], None]

# What a budget without a pass means: everything that shrinks without touching the width of the residual stream of a
# transformer, cut together.
DEFAULT_PASS = "prune"


@dataclass(frozen=True)
class Agreement:
    """How far one output of the reduced program is from that of the original, over the calibration data.

    `relative_error` is the norm of the difference over the norm of the original; `cosine` the mean cosine of each
    sample's output; `top1` the share of samples whose largest entry is at the same place, for outputs of (b, classes).
    """

    output: str
    relative_error: float
    cosine: float
    top1: float | None
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Outcome:
    """A reduction: the program as it came, prepared, and reduced; the records of the reducing passes; agreement."""

    captured: Program
    before: Program
    after: Program
    records: tuple[Record, ...]
    agreement: tuple[Agreement, ...]
    calibration: Calibration


def optimize(
    source: Any,
    *,
    passes: Sequence[str | Step | Pass] = (),
    recipe: Recipe | str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    calibration: Any = None,
    target: str = "cpu",
    example_inputs: Any = None,
    output: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **budget: Any,
) -> Program:
    """Reduce a model under a budget; the result is a Program again, and may be compiled, trained or reduced further.

        small = graphopt.optimize(model, example_inputs=(x,), passes=["prune-channels"], flops=0.5)

    Args:
        source: a Program, an nn.Module, an exported program, or the path of a model file.
        passes: names, as `--pass` takes them, or passes; none: DEFAULT_PASS.
        recipe: a Recipe or the path of a TOML file, whose passes run before `passes`.
        options: options for all passes that have them (criterion, allocation, ...).
        calibration: data, as `graphopt.calibration.calibration` takes it.
        target: what the result shall run on: extents are rounded to what it likes, latency is that on it.
        example_inputs: as `capture` takes them.
        output: a .pt2 file to write.
        progress: hears what is done now.
        budget: flops, macs, params, bytes or latency: a share (0.5) or an amount ("1.2G", "8ms").

    Raises:
        BudgetUnreachable: there is not that much to cut; gives the least that can be reached.
        UnknownPass, BadRecipe: it cannot be done so.
        GraphoptError: any of those that `capture` raises.
    """
    program = source if isinstance(source, Program) else capture(source, example_inputs)
    done = reduce(
        program,
        plan(passes, recipe, {**(options or {}), **budget}),
        calibration=calibration,
        target=_target(target),
        progress=progress,
    )
    if output is not None:
        done.after.save(output)
    return done.after


def _target(name: str) -> Target:
    from graphopt import targets

    return targets.resolve(name)


def plan(
    passes: Sequence[str | Step | Pass], recipe: Recipe | str | os.PathLike[str] | None, options: Mapping[str, Any]
) -> Recipe | list[Pass]:
    """What shall run, from what the user may give: the passes of the recipe, then `passes`; options of the user's hold
    for all of them, and come before those that the recipe has for all.

    Raises:
        BadRecipe: the recipe file is none.
    """
    if ready := [item for item in passes if isinstance(item, Pass)]:
        assert len(ready) == len(passes), "passes are ready, or by name"
        assert recipe is None, "passes that are ready need no recipe"
        assert not options, "passes that are ready have their options"
        return ready
    steps = tuple(parse_step(item) if isinstance(item, str) else item for item in passes)
    if recipe is None:
        return Recipe(steps or (Step(DEFAULT_PASS, {}),), options, "passes")  # type: ignore[arg-type]
    own = recipe if isinstance(recipe, Recipe) else read(recipe)
    return Recipe((*own.steps, *steps), {**own.shared, **options}, own.name)  # type: ignore[arg-type]


def reduction(
    passes: Sequence[str | Step | Pass], recipe: Recipe | str | os.PathLike[str] | None, options: Mapping[str, Any]
) -> Recipe | list[Pass] | None:
    """As `plan`, and None where nothing was asked for: what is lossy is never done unasked."""
    return plan(passes, recipe, options) if passes or recipe is not None or options else None


def described(recipe: Recipe | Sequence[Pass]) -> str:
    """The passes in a line. Raises UnknownPass and BadRecipe as `passes_of`."""
    passes = passes_of(recipe) if isinstance(recipe, Recipe) else recipe
    return ", ".join(item.name for item in passes)


def reduce(
    program: Program,
    recipe: Recipe | Sequence[Pass],
    *,
    calibration: Any = None,
    target: Target | None = None,
    progress: Progress | None = None,
    dump: Path | None = None,
) -> Outcome:
    """Prepare a program, run the passes, and measure on the calibration data what was lost.

    What the passes have to say without being asked (`remarks`) is logged, too.
    """
    step = progress or (lambda _: None)
    data = read_calibration(calibration, program)
    given = None if data.is_example else data
    passes = passes_of(recipe, calibration=given, target=target) if isinstance(recipe, Recipe) else list(recipe)
    before = run_passes(program, PREPARE, progress=lambda name, *_: step(f"preparing: {name}"))
    after = run_passes(before, passes, progress=lambda name, *_: step(f"reducing: {name}"), dump=dump)
    records = after.records[len(before.records) :]
    for text in remarks(records):
        log.warning("%s", text)
    step("comparing")
    return Outcome(program, before, after, records, agreement(before, after, data), data)


def remarks(records: Sequence[Record]) -> list[str]:
    """What the passes have to say without being asked, each sentence with the pass's name."""
    return [f"{record.name}: {text}" for record in records for text in record.remarks]


def agreement(before: Program, after: Program, data: Calibration) -> tuple[Agreement, ...]:
    """Compare the outputs of two programs on calibration data; of those with fewer tokens the last one.

    Where a pass added inputs there is nothing to compare: the data has none for these.
    """
    if len(after.inputs) > len(before.inputs):
        return ()
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in data:
        wanted, got = before.run(batch), after.run(batch)
        for name, value in wanted.items():
            if not value.is_floating_point() or not value.numel():
                continue
            if value.shape == got[name].shape:
                pairs.setdefault(name, []).append((value.double(), got[name].double()))
                continue
            # It leaves with fewer tokens; the last is the one that the next word comes from.
            shrunk = [dim for dim, (a, b) in enumerate(zip(value.shape, got[name].shape, strict=True)) if a != b]
            if len(shrunk) == 1:
                last, own = (each.select(shrunk[0], -1).double() for each in (value, got[name]))
                pairs.setdefault(f"{name}, last token", []).append((last, own))
    return tuple(_agreement(name, items) for name, items in pairs.items())


def _agreement(name: str, items: list[tuple[Tensor, Tensor]]) -> Agreement:
    apart = math.sqrt(sum(float((got - wanted).square().sum()) for wanted, got in items))
    size = math.sqrt(sum(float(wanted.square().sum()) for wanted, _ in items))
    rows = [(w.reshape(w.shape[0] if w.dim() else 1, -1), g) for w, g in items]
    cosines = torch.cat([torch.cosine_similarity(w, g.reshape(w.shape), dim=1) for w, g in rows])
    top1 = None
    if all(wanted.dim() == 2 and wanted.shape[1] > 1 for wanted, _ in items):
        same = torch.cat([w.argmax(1) == g.argmax(1) for w, g in items])
        top1 = float(same.double().mean())
    relative = apart / size if size else (0.0 if apart == 0 else math.inf)
    return Agreement(name, relative, float(cosines.mean()), top1, len(cosines))


def sizes(program: Program) -> dict[str, int]:
    """FLOPs, those left to sparse kernels, multiply-adds, parameters (elements) and stored bytes of a program."""
    cost = summary(program)
    return {
        "flops": cost.total.flops,
        "sparse_flops": cost.sparse_flops,
        "macs": cost.total.macs,
        "params": cost.total.params,
        "bytes": cost.stored_bytes,
    }


def estimated(done: Outcome, target: Target) -> tuple[float, float]:
    """Seconds that the cost model gives one run before and after, on the target, one thread."""
    from graphopt.axes import infer
    from graphopt.cost import latency_model

    before, after = (latency_model(infer(program), target)({}) for program in (done.before, done.after))
    return before, after


def measured(done: Outcome, target: Target, *, seconds: float = 2.0) -> tuple[float, float] | None:
    """Seconds of one run before and after, compiled for the target, one thread, in turns, the least of many.

    None where the target does not run here at its own speed: the time of an emulator says nothing.
    """
    from graphopt import targets
    from graphopt.arrays import to_numpy
    from graphopt.bench import in_turns
    from graphopt.bundle import load
    from graphopt.pipeline import compile

    if target.kind not in ("cpu", "wasm") or not targets.runners_of(target):
        return None
    inputs = {name: to_numpy(value) for name, value in done.after.completed(done.calibration[0]).items()}
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        bundles = []
        for label, program in (("before", done.captured), ("after", done.after)):
            place = Path(folder) / f"{label}.bundle"
            compile(program, target=target.spec, output=place, verify=False)
            bundles.append(load(place, threads=1))
        before, after = in_turns(bundles, inputs, seconds=seconds)
        for bundle in bundles:
            bundle.close()
    return before, after
