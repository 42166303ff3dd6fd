"""Fewer tokens, less time? A vision transformer dense and with its tokens reduced, in one run, in turns, one thread.

    python -m benchmarks.tokens                                   # cpu and wasm
    python -m benchmarks.tokens --target cpu --pass merge-tokens --share 0.6 --peers

The realised efficiency is the speed-up divided by the FLOPs ratio. With `--peers`, Token Merging written in PyTorch
merges as many tokens in the same blocks, eager and by torch.compile. Prints a table and writes JSON; pin it to one
processor (`taskset -c 1`).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graphopt
from benchmarks.reduction import compiled
from graphopt import targets
from graphopt.arrays import to_numpy
from graphopt.bench import RIVALS, in_turns, timed_in_turns
from graphopt.optimize import plan, reduce, sizes
from tests.models import ZOO
from tests.tome import MergedVisionTransformer

PASSES = ("merge-tokens", "prune-tokens")


def measure(model: str, target: str, name: str, share: float, seconds: float, peers: bool) -> dict[str, Any]:
    """Reduce the tokens of one model, compile it and the dense one, and time them, and PyTorch's Token Merging."""
    module, inputs = ZOO[model]()
    program = graphopt.capture(module, inputs, name=model)
    done = reduce(program, plan([name], None, {"flops": share}), target=targets.resolve(target))
    arrays = {key: to_numpy(value) for key, value in (program.example_inputs or {}).items()}
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bundles = compiled({"dense": program, "reduced": done.after}, target, Path(scratch))
        times["dense"], times["reduced"] = in_turns(bundles, arrays, seconds=seconds)
        if peers and target.startswith("cpu"):
            removed = [0] * len(module.blocks)
            for record in done.records:
                for row in record.details:
                    if "kept" in row:
                        removed[row["block"]] = row["tokens"] - row["kept"]
            merged = graphopt.capture(MergedVisionTransformer(module, removed).eval(), inputs, name=f"{model}_tome")
            runs = {
                "torch, dense": RIVALS["torch"](program, arrays, 1),
                "torch, ToMe": RIVALS["torch"](merged, arrays, 1),
                "torch.compile, dense": RIVALS["torch-compile"](program, arrays, 1),
                "torch.compile, ToMe": RIVALS["torch-compile"](merged, arrays, 1),
            }
            own, arrays_ = bundles[1], arrays
            every = [*runs.values(), lambda: own.run(arrays_)]
            found = timed_in_turns(every, seconds=seconds)
            times |= dict(zip([*runs, "reduced, from Python"], found, strict=True))
        for bundle in bundles:
            bundle.close()
    before, after = sizes(done.captured), sizes(done.after)
    return {
        "model": model,
        "target": target,
        "pass": name,
        "flops_ratio": before["flops"] / after["flops"],
        "ms": {label: seconds_ * 1e3 for label, seconds_ in times.items()},
        "speed_up": times["dense"] / times["reduced"],
        "places": [row for record in done.records for row in record.details if "kept" in row],
    }


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_s", help="default: deit_s")
    parser.add_argument("--target", action="append", help="default: cpu and wasm")
    parser.add_argument("--pass", dest="passes", action="append", help="default: " + ", ".join(PASSES))
    parser.add_argument("--share", type=float, default=0.6, help="of the FLOPs that stays (default: 0.6)")
    parser.add_argument("--peers", action="store_true", help="time PyTorch too, on the cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="per engine (default: 5)")
    parser.add_argument("-o", "--output", type=Path, default=Path("tokens.json"), help="default: tokens.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(
        "target", "pass", "engine", "ms", "dense / this", "FLOPs ratio", "realised", title="tokens, one thread"
    )
    rows = []
    for target in options.target or ["cpu", "wasm"]:
        for name in options.passes or PASSES:
            row = measure(options.model, target, name, options.share, options.seconds, options.peers)
            rows.append(row)
            for engine, ms in row["ms"].items():
                ratio, speed = row["flops_ratio"], row["ms"]["dense"] / ms
                realised = f"{speed / ratio:.2f}" if engine == "reduced" else ""
                table.add_row(target, name, engine, f"{ms:.2f}", f"{speed:.2f}", f"{ratio:.2f}", realised)
            report = {"machine": platform.processor() or platform.machine(), "rows": rows}
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
