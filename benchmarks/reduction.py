"""Speed-up over FLOPs reduction: does half the work take half the time? One thread, in one run, in turns.

    python -m benchmarks.reduction                                 # cpu and wasm
    python -m benchmarks.reduction --target cpu --model resnet50 --share 0.5 --against onnxruntime

Each model is cut to a share of its FLOPs by the passes that fit it, compiled, and timed beside the dense bundle. The
realised efficiency is the speed-up divided by the FLOPs ratio. With `--step 1` nothing is rounded to what the target
wants: what odd widths cost. Engines on the cpu get the same two programs. Prints a table and writes JSON; pin it to one
processor (`taskset -c 1`).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import graphopt
from graphopt import targets
from graphopt.arrays import to_numpy
from graphopt.bench import RIVALS, in_turns, timed_in_turns
from graphopt.bundle import Bundle
from graphopt.optimize import plan, reduce, sizes
from graphopt.program import Program
from tests.models import ZOO

# Which passes cut which model.
PASSES = {
    "resnet50": ("prune-channels",),
    "deit_s": ("prune-neurons", "prune-heads"),
    "minilm": ("prune-neurons", "prune-heads"),
    "mobilenet_v2": ("prune-channels",),
}
MODELS = ("resnet50", "deit_s", "minilm")


def program_of(model: str, folder: Path) -> Program:
    """A model at full size, captured; MiniLM with its own weights, the others with random ones."""
    if model != "minilm":
        module, inputs = ZOO[model]()
        return graphopt.capture(module, inputs, name=model)
    from tests.hf_models import minilm

    module, batches = minilm(folder)
    return graphopt.capture(module, batches[0], name=model)


def compiled(programs: Mapping[str, Program], target: str, folder: Path) -> list[Bundle]:
    """Checked bundles of programs, one thread each, in `folder` by their labels."""
    for label, item in programs.items():
        graphopt.compile(item, target=target, output=folder / f"{label}.bundle").close()
    return [graphopt.load(folder / f"{label}.bundle", threads=1) for label in programs]


def measure(model: str, target: str, share: float, step: str, rivals: list[str], seconds: float) -> dict[str, Any]:
    """Cut one model, compile both, and time them; and the engines on the same two programs."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        program = program_of(model, folder)
        options = {"flops": share, "step": step}
        done = reduce(program, plan(PASSES[model], None, options), target=targets.resolve(target))
        bundles = compiled({"dense": program, "cut": done.after}, target, folder)
        inputs = {name: to_numpy(value) for name, value in (program.example_inputs or {}).items()}
        dense, cut = in_turns(bundles, inputs, seconds=seconds)
        engines = {"graphopt": (dense, cut)}
        if target.startswith("cpu"):
            for name in rivals:
                runs = [RIVALS[name](item, inputs, 1) for item in (program, done.after)]
                engines[name] = tuple(timed_in_turns(runs, seconds=seconds))
        for bundle in bundles:
            bundle.close()
    before, after = sizes(done.captured), sizes(done.after)
    return {
        "model": model,
        "target": target,
        "passes": list(PASSES[model]),
        "step": step,
        "flops_ratio": before["flops"] / after["flops"],
        "params_ratio": before["params"] / after["params"],
        "engines": {
            name: {"dense_ms": a * 1e3, "cut_ms": b * 1e3, "speed_up": a / b} for name, (a, b) in engines.items()
        },
    }


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=sorted(PASSES), help="default: " + ", ".join(MODELS))
    parser.add_argument("--target", action="append", help="default: cpu and wasm")
    parser.add_argument("--share", type=float, default=0.5, help="of the FLOPs that stays (default: 0.5)")
    parser.add_argument("--step", default="auto", help="extents are multiples of it (default: what the target wants)")
    parser.add_argument("--against", action="append", default=[], choices=sorted(RIVALS), help="engines on the cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="per engine (default: 5)")
    parser.add_argument("-o", "--output", type=Path, default=Path("reduction.json"), help="default: reduction.json")
    options = parser.parse_args()
    headings = ("model", "target", "engine", "dense ms", "cut ms", "speed-up", "FLOPs ratio", "realised")
    table = Table(*headings, title=f"cut to {options.share:.0%} of the FLOPs, step {options.step}, one thread")
    rows = []
    for target in options.target or ["cpu", "wasm"]:
        for model in options.model or MODELS:
            row = measure(model, target, options.share, options.step, options.against, options.seconds)
            rows.append(row)
            for engine, t in row["engines"].items():
                times = (f"{t['dense_ms']:.2f}", f"{t['cut_ms']:.2f}", f"{t['speed_up']:.2f}")
                ratio = row["flops_ratio"]
                table.add_row(model, target, engine, *times, f"{ratio:.2f}", f"{t['speed_up'] / ratio:.2f}")
            report = {"machine": platform.processor() or platform.machine(), "rows": rows}
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
