"""Instructions per inference on 64-bit ARM, counted under qemu: what zeros save where no ARM processor is at hand.

    python -m benchmarks.instructions                              # MobileNet-V1: dense, and 90 % zeros in each format
    python -m benchmarks.instructions --format 4x1 --kernels       # the kernels that execute most of them, too

Zeros are those of `benchmarks.sparse`: whole blocks at random in the 1x1 convolutions, equal in every process. A
program runs a bundle n and 2n times on one thread, a plugin of qemu counts, and the difference is n inferences. Counts
are exact, however busy the machine is. They know nothing of caches and memory, so they flatter scattered loads: they
are no times. Prints a table and writes JSON. Needs qemu with plugins (Debian's qemu-user; qemu-user-static has none).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import graphopt
from benchmarks.sparse.models import MODELS, load, sparsify
from graphopt.bundle import Bundle
from graphopt.targets import resolve
from graphopt.targets.run_qemu import QEMU, SYSROOT, why_not
from graphopt.targets.runner import spec_bytes
from graphopt.targets.target import Target
from graphopt.targets.toolchain import LIBRARIES, runtime_folder, symbols_of
from graphopt.targets.zig import zig

FORMATS = ("unstructured", "4x1", "8x1", "16x1")
PLUGIN, PROGRAM = "instructions_plugin.c", "instructions_main.c"
# Instructions and fmla.4s of one inference by LiteRT's wheel for aarch64 (XNNPACK), dense, on one thread of qemu's
# cortex-a76. Its root file system needs the /proc/cpuinfo and /sys/devices/system/cpu of an ARM processor.
PEER = "LiteRT/XNNPACK dense"
PEERS = {"mobilenet_v1": (210_700_000, 144_900_000)}

Counts = dict[str, tuple[int, int]]  # function to instructions and fmla.4s


def build(bundle: Bundle, target: Target, folder: Path) -> list[str]:
    """Compile the plugin and a program around the bundle's static library; the command that runs them."""
    name, here = bundle.name, Path(__file__).parent
    for source in (here / PLUGIN, here / PROGRAM, runtime_folder() / "runtime.h", bundle.path / f"lib{name}.a"):
        shutil.copyfile(source, folder / source.name)
    shutil.copyfile(bundle.path / f"{name}.h", folder / "model.h")
    plugin = ["cc", "-shared", "-fPIC", "-O2", "-fno-sanitize=all", PLUGIN, "-Wl,-z,undefs", "-o", "instructions.so"]
    zig(plugin, folder, name=name, target="this machine", purpose="compile a plugin of qemu")
    # Dynamic where Debian's libc for ARM is installed, else with musl: kernels and counts are the same.
    dynamic = (SYSROOT / "lib" / "ld-linux-aarch64.so.1").is_file()
    machine = [target.zig] if dynamic else ["aarch64-linux-musl", "-static"]
    options = [symbols_of(name), "-std=gnu11", "-O2", "-fno-sanitize=all"]
    for what, specs in (("INPUT", bundle.manifest.inputs), ("OUTPUT", bundle.manifest.outputs)):
        options.append(f"-D{what}_BYTES=" + "".join(f"{spec_bytes(spec)}," for spec in specs))
    zig(
        ["cc", "-target", *machine, *options, PROGRAM, f"lib{name}.a", *LIBRARIES, "-o", "main"],
        folder,
        name=name,
        target=target.spec,
        purpose="link a program",
    )
    qemu = [QEMU, "-cpu", target.llvm["mcpu"], *(["-L", str(SYSROOT)] if dynamic else [])]
    return [*qemu, "-d", "plugin", "-plugin", f"./instructions.so,out=counts,prefix={name}_", "./main"]


def executed(command: Sequence[str], weights: Path, runs: int, folder: Path) -> Counts:
    """What the program executes in `runs` inferences, by function."""
    (folder / "counts").unlink(missing_ok=True)
    done = subprocess.run([*command, str(weights), str(runs)], cwd=folder, capture_output=True, text=True)
    if done.returncode or not (folder / "counts").is_file():
        raise SystemExit(f"{QEMU} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    counts: Counts = {}
    for line in (folder / "counts").read_text().splitlines():
        name, instructions, fmla = line.rsplit(" ", 2)
        counts[name] = (int(instructions), int(fmla))
    return counts


def per_inference(bundle: Bundle, target: Target, runs: int = 1) -> Counts:
    """Instructions and fmla.4s of one inference, by function; those that `runs` more inferences do not execute left
    out."""
    with tempfile.TemporaryDirectory(prefix="graphopt-instructions-") as work:
        folder = Path(work)
        command = build(bundle, target, folder)
        weights = (bundle.path / "weights.bin").resolve()
        once, twice = (executed(command, weights, n * runs, folder) for n in (1, 2))
    counts = {}
    for name, after in twice.items():
        before = once.get(name, (0, 0))
        counts[name] = ((after[0] - before[0]) // runs, (after[1] - before[1]) // runs)
    return {name: found for name, found in counts.items() if found[0]}


def measure(model: str, form: str, zeros: float, target: Target, runs: int, verify: bool) -> dict[str, Any]:
    """Compile one model and count."""
    with tempfile.TemporaryDirectory() as scratch:
        module, inputs = load(model, Path(scratch))
        if form != "dense":
            sparsify(model, module, form, zeros)
        program = graphopt.capture(module, inputs, name=model)
        place = Path(scratch) / f"{model}.bundle"
        with graphopt.compile(program, target=target.spec, output=place, verify=verify) as bundle:
            counts = per_inference(bundle, target, runs)
    kernels = sorted(counts.items(), key=lambda entry: -entry[1][0])
    return {
        "model": model,
        "format": form,
        "zeros": 0.0 if form == "dense" else zeros,
        "instructions": sum(instructions for instructions, _ in counts.values()),
        "fmla_4s": sum(fmla for _, fmla in counts.values()),
        "kernels": {name.removeprefix(f"{model}_"): {"instructions": i, "fmla_4s": f} for name, (i, f) in kernels},
    }


def totals(rows: list[dict[str, Any]], target: Target) -> Table:
    """One line per model and format, the peer's beside it."""
    headings = ("model", "zeros", "instructions", "fmla.4s", "share of fmla", f"{PEER} / this")
    table = Table(*headings, title=f"one inference on {target}, one thread, counted under qemu")
    for column in table.columns[2:]:
        column.justify = "right"

    def line(model: str, what: str, instructions: int, fmla: int) -> None:
        peer = PEERS.get(model, (0, 0))[0]
        ratio = f"{peer / instructions:.2f}" if peer else "-"
        counts = (f"{instructions / 1e6:.1f} M", f"{fmla / 1e6:.1f} M", f"{fmla / instructions:.0%}")
        table.add_row(model, what, *counts, ratio)

    for model in dict.fromkeys(row["model"] for row in rows):
        if model in PEERS:
            line(model, PEER, *PEERS[model])
        for row in rows:
            if row["model"] == model:
                what = row["format"] if row["format"] == "dense" else f"{row['zeros']:.0%} {row['format']}"
                line(model, what, row["instructions"], row["fmla_4s"])
    return table


def by_kernel(row: dict[str, Any], count: int = 25) -> Table:
    """The functions that execute most."""
    table = Table("function", "instructions", "fmla.4s", "share of fmla", title=f"{row['model']} {row['format']}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, entry in list(row["kernels"].items())[:count]:
        instructions, fmla = entry["instructions"], entry["fmla_4s"]
        table.add_row(name, f"{instructions:,}", f"{fmla:,}", f"{fmla / instructions:.0%}")
    return table


def main() -> None:
    """Parse the command line, count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="default: mobilenet_v1")
    parser.add_argument("--format", action="append", help="default: dense, " + ", ".join(FORMATS))
    parser.add_argument("--zeros", type=int, default=90, help="percent, in formats that do not say it (default: 90)")
    parser.add_argument("--target", default="arm:cortex-a76", help="default: arm:cortex-a76")
    parser.add_argument("--runs", type=int, default=1, help="n, of n and 2n inferences (default: 1)")
    parser.add_argument("--kernels", action="store_true", help="print the functions that execute most")
    parser.add_argument("--no-verify", action="store_true", help="do not compare results with PyTorch first")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("instructions.json"), help="default: instructions.json"
    )
    options = parser.parse_args()
    target = resolve(options.target)
    if target.kind != "arm":
        raise SystemExit(f"{target}: only ARM is counted")
    if reason := why_not(target):
        raise SystemExit(f"nothing can be counted: {reason}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    peers = {m: {"instructions": i, "fmla_4s": f} for m, (i, f) in PEERS.items()}
    report: dict[str, Any] = {"target": target.spec, "peer": {PEER: peers}, "rows": []}
    console = Console(width=None if os.isatty(1) else 160)
    for model in options.model or ["mobilenet_v1"]:
        for form in options.format or ["dense", *FORMATS]:
            row = measure(model, form, options.zeros / 100, target, options.runs, not options.no_verify)
            report["rows"].append(row)
            options.output.write_text(json.dumps(report, indent=1) + "\n")
            if options.kernels:
                console.print(by_kernel(row))
    console.print(totals(report["rows"], target))


if __name__ == "__main__":
    main()
