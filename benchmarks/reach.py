"""How far graphopt reaches: every architecture and every model of the tests through every stage.

    python -m benchmarks.reach                                # all of them; prints a table and writes JSON
    python -m benchmarks.reach mixtral hard-mamba --skip compile

Models are those of `tests/architectures.py` by their names, TINY of `tests/models.py` as `tiny-NAME`, and HARD of
`tests/hard_nets.py` as `hard-NAME`. Whether their axes are right shows on a random cut of all of them at once, in
float64, against the masked program; then the model is pruned to half of its FLOPs, and what is left is compiled.

A row says which stages a model passed and why it stopped where it did. Each model runs in a process of its own with a
time limit, so that one which hangs or crashes is a row like any other. A stage is a line in STAGES: a name, and a
function that reads and fills a State; what it raises is the reason of the failure, and later stages are left out (but
not after `equal`).
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.architectures import ARCHITECTURES
from tests.hard_nets import HARD
from tests.models import TINY

MODELS: dict[str, Callable[[], Any]] = {
    **{f"tiny-{name}": build for name, build in TINY.items()},
    **ARCHITECTURES,
    **{f"hard-{name}": build for name, build in HARD.items()},
}
# What the budget is asked for, one after another, until it is reached.
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"axes": ("channel", "neuron", "head", "query_group", "head_dim", "embedding")},
    {"axes": ("channel", "neuron", "head", "query_group", "head_dim", "embedding"), "min_keep": 0.02, "step": 1},
)

# How far a cut program may be from the masked one, in float64, as a share of the largest value of an output.
EQUAL = 1e-8

SHOWN = ("nodes", "free", "flops")
# Loaded once, by the process that the models' processes are copies of.
PRELOADED = (
    "torch",
    "transformers",
    "graphopt",
    "graphopt.axes",
    "graphopt.codegen.lower",
    "graphopt.targets.run_native",
    "tests.hf_models",
    "tests.masking",
)


@dataclass
class State:
    """What stages hand on; `facts` are written out beside the verdict."""

    name: str
    program: Any = None
    axes: Any = None
    facts: dict[str, Any] = field(default_factory=dict)


def capture(state: State) -> None:
    """Build the model, and its graph."""
    import graphopt

    module, inputs = MODELS[state.name]()
    state.program = graphopt.capture(module, inputs, name=re.sub(r"\W", "_", state.name))
    state.facts["nodes"] = len(state.program.graph.nodes)


def infer(state: State) -> None:
    """Find the axes; what no rule covers is a fact, not a failure."""
    from graphopt.axes import infer as infer_axes
    from graphopt.passes import PREPARE
    from graphopt.passes.base import run_passes

    state.axes = infer_axes(run_passes(state.program, PREPARE, check=False))
    state.facts["free"] = len(state.axes.free())
    state.facts["unknown"] = [decline.reason for decline in state.axes.unknown]


def equal(state: State) -> None:
    """A random part of every free axis, all at once: what is left computes what the masked program does."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import graphopt
    from tests.masking import masked_run

    axes, generator = state.axes, torch.Generator().manual_seed(0)
    keep = {}
    for atom in axes.free():
        step = axes.multiple(atom)
        stays = step * int(torch.randint(1, atom.extent // step + 1, (), generator=generator))
        keep[atom] = torch.randperm(atom.extent, generator=generator)[:stays].sort().values
    small, inputs = graphopt.shrink(axes, keep), axes.program.example_inputs
    with sdpa_kernel(SDPBackend.MATH), _float64():
        wanted, got = masked_run(axes, keep, inputs), small.run(inputs)
    error = 0.0
    for name, value in wanted.items():
        assert got[name].shape == value.shape, f"{name} has another shape"
        assert value.isfinite().all(), f"{name} is not finite where it is masked"
        apart = (got[name].double() - value.double()).abs().max() if value.numel() else torch.tensor(0.0)
        error = max(error, float(apart / value.double().abs().max().clamp(min=1e-3)))
    state.facts["mask_error"] = error
    assert error <= EQUAL, f"off by {error:.1e} from the masked program"


def _float64() -> Any:
    """Calls of operators compute in float64 where they would in float32, and where a program asks for that."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_map

    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.double() if value.dtype is torch.float32 else value
        return torch.float64 if value is torch.float32 else value

    class Wide(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not isinstance(func, torch._ops.OpOverload):
                return func(*args, **(kwargs or {}))
            return tree_map(wide, func(*tree_map(wide, args), **tree_map(wide, kwargs or {})))

    return Wide()


def prune(state: State) -> None:
    """Cut to half of the FLOPs; where channels, neurons and heads are too few, the width of the stream as well."""
    from graphopt import targets
    from graphopt.errors import BudgetUnreachable
    from graphopt.optimize import plan, reduce, sizes

    for number, options in enumerate(ATTEMPTS):
        try:
            recipe = plan(("prune",), None, {"flops": 0.5, "criterion": "l2", **options})
            done = reduce(state.program, recipe, target=targets.resolve("cpu"))
        except BudgetUnreachable:
            if number == len(ATTEMPTS) - 1:
                raise
        else:
            break
    state.facts["attempt"] = number + 1
    state.facts["flops"] = round(sizes(done.after)["flops"] / sizes(done.before)["flops"], 4)
    assert state.facts["flops"] <= 0.5 + 1e-4, f"{state.facts['flops']} of the FLOPs are left"
    state.program = done.after


def compile(state: State) -> None:
    """Compile for this machine; the bundle is verified against PyTorch."""
    import graphopt

    with graphopt.compile(state.program, target="cpu") as bundle:
        verification = bundle.manifest.verification
        assert verification.passed, str(verification)
        state.facts["max_rel_error"] = verification.max_rel_error


STAGES: tuple[tuple[str, Callable[[State], None]], ...] = (
    ("capture", capture),
    ("infer", infer),
    ("equal", equal),
    ("prune", prune),
    ("compile", compile),
)


# One model, in a process of its own ----------------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return text if hasattr(error, "code") else f"{type(error).__name__}: {text}"


def _run(name: str, skipped: list[str], pipe: Connection) -> None:
    """Send (stage, verdict) before and after each stage: None, then what came of it."""
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    state = State(name)
    for stage, function in STAGES:
        if stage in skipped:
            continue
        pipe.send((stage, None))
        start = time.perf_counter()
        verdict: dict[str, Any] = {"ok": True}
        try:
            function(state)
        except Exception as error:  # whatever it is, it is a row
            verdict = {"ok": False, "reason": _reason(error)}
        pipe.send((stage, verdict | {"seconds": round(time.perf_counter() - start, 2)}))
        if not verdict["ok"] and stage != "equal":  # what is not equal is known, and the other stages can go on
            break
    pipe.send((None, state.facts))


def measure(name: str, skipped: list[str], seconds: float) -> dict[str, Any]:
    """One row: the facts, and per stage that was begun whether it passed, why not, and how long it took."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(name, skipped, there), daemon=True)
    start = time.monotonic()
    process.start()
    there.close()
    row: dict[str, Any] = {"model": name, "stages": {}}
    running = "capture"
    while True:
        try:
            if not here.poll(max(0.0, start + seconds - time.monotonic())):
                process.kill()
                row["stages"][running] = {"ok": False, "reason": f"not done within {seconds:g} s"}
                break
            stage, verdict = here.recv()
        except EOFError:
            process.join()
            row["stages"][running] = {"ok": False, "reason": f"the process died, exit code {process.exitcode}"}
            break
        if stage is None:
            row |= verdict
            break
        running = stage
        if verdict is not None:
            row["stages"][stage] = verdict
    process.join()
    return row | {"seconds": round(time.monotonic() - start, 2)}


def _shown(row: dict[str, Any], stages: list[str]) -> list[str]:
    verdicts = row["stages"]
    marks = ["-" if s not in verdicts else "ok" if verdicts[s]["ok"] else "[red]failed[/]" for s in stages]
    reason = next((verdict["reason"] for verdict in verdicts.values() if not verdict["ok"]), "")
    return [
        row["model"],
        *(str(row.get(fact, "")) for fact in SHOWN),
        *marks,
        f"{row['seconds']:.1f}",
        reason.replace("[", r"\["),
    ]


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage for stage, _ in STAGES]
    parser.add_argument("model", nargs="*", help="default: all of them")
    parser.add_argument("--skip", action="append", choices=names[1:], default=[], help="leave a stage out")
    parser.add_argument("--seconds", type=float, default=180.0, help="per model, at most (default: 180)")
    parser.add_argument("-o", "--output", type=Path, default=Path("reach.json"), help="default: reach.json")
    options = parser.parse_args()
    if unknown := [name for name in options.model if name not in MODELS]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(sorted(MODELS))}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # only configurations are read
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    stages = [name for name in names if name not in options.skip]
    console, rows = Console(), []
    table = Table("model", *SHOWN, *stages, "seconds", "reason", title="reach")
    for name in options.model or MODELS:
        rows.append(measure(name, options.skip, options.seconds))
        cells = _shown(rows[-1], stages)
        table.add_row(*cells)
        console.print(*cells, highlight=False, soft_wrap=True)
        report = {"machine": platform.processor() or platform.machine(), "rows": rows}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table)
    for row in rows:
        if row.get("unknown"):
            console.print(row["model"], "has no rule for", *row["unknown"], sep="\n  ", highlight=False, markup=False)
    for stage in stages:
        passed = sum(row["stages"].get(stage, {}).get("ok", False) for row in rows)
        console.print(f"{stage}: {passed} of {len(rows)}", highlight=False)


if __name__ == "__main__":
    main()
