"""Latency of whole models side by side with other engines, one thread, in one run and in turns.

    python -m benchmarks.latency                                   # cpu and wasm, the four models of the table
    python -m benchmarks.latency --target cpu --model resnet50 --against torch --against onnxruntime

Prints a table and writes JSON. Pin it to one processor (`taskset -c 1`), and read ratios of minima: other work on the
machine moves both sides alike. Engines on the cpu are adapters in `graphopt.bench`; onnxruntime-web runs in Node
(`npm install` in benchmarks/node fetches it).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import graphopt
from graphopt.bench import bench, to_onnx
from graphopt.bundle import Bundle
from graphopt.program import Program
from tests.models import ZOO

MODELS = ("mobilenet_v1", "resnet50", "deit_s", "bert")
NODE = Path(__file__).parent / "node"


def cpu(bundle: Bundle, program: Program, rivals: list[str], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds per engine, the bundle's first."""
    inputs = {name: tensor.numpy() for name, tensor in (program.example_inputs or {}).items()}
    rows = bench(bundle, program, inputs, rivals, seconds=seconds)
    return {
        "graphopt" if i == 0 else row.engine: {
            "min_ms": row.min_seconds * 1e3,
            "median_ms": row.median_seconds * 1e3,
            "runs": row.runs,
            "difference": row.max_abs_difference,
        }
        for i, row in enumerate(rows)
    }


def wasm(bundle: Path, program: Program, folder: Path, seconds: float, relaxed: bool) -> dict[str, dict[str, float]]:
    """The same in Node, against onnxruntime-web."""
    if not (NODE / "node_modules").is_dir():
        subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=NODE, check=True, stdout=sys.stderr)
    onnx = folder / "model.onnx"
    onnx.write_bytes(to_onnx(program))
    inputs = []
    for spec in program.inputs:
        file = folder / f"{spec.name}.bin"
        assert program.example_inputs is not None
        np.ascontiguousarray(program.example_inputs[spec.name].numpy()).tofile(file)
        inputs.append({"name": spec.name, "dtype": spec.dtype, "shape": spec.shape, "file": str(file)})
    request = folder / "request.json"
    loader = next(bundle.glob("*.mjs"))
    request.write_text(json.dumps({"bundle": str(loader), "onnx": str(onnx), "inputs": inputs, "seconds": seconds}))
    flags = ["--experimental-wasm-relaxed-simd"] if relaxed else []
    done = subprocess.run(
        ["node", *flags, str(NODE / "latency.mjs"), str(request)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout))


def measure(model: str, target: str, rivals: list[str], seconds: float) -> dict[str, Any]:
    """Compile one model and time it."""
    module, inputs = ZOO[model]()
    program = graphopt.capture(module, inputs, name=model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        start = time.perf_counter()
        bundle = graphopt.compile(program, target=target, output=folder / "model.bundle")
        compiled = time.perf_counter() - start
        if target.startswith("wasm"):
            engines = wasm(folder / "model.bundle", program, folder, seconds, relaxed="relaxed" in target)
        else:
            with graphopt.load(folder / "model.bundle", threads=1) as loaded:
                engines = cpu(loaded, program, rivals, seconds)
        bundle.close()
    return {"model": model, "target": target, "compile_seconds": compiled, "engines": engines}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=sorted(ZOO), help="default: " + ", ".join(MODELS))
    parser.add_argument("--target", action="append", help="default: cpu and wasm")
    parser.add_argument("--against", action="append", help="on the cpu; default: torch and onnxruntime")
    parser.add_argument("--seconds", type=float, default=5.0, help="per engine (default: 5)")
    parser.add_argument("-o", "--output", type=Path, default=Path("latency.json"), help="default: latency.json")
    options = parser.parse_args()
    rows = []
    table = Table("model", "target", "engine", "min ms", "median ms", "time / graphopt", title="latency, one thread")
    for target in options.target or ["cpu", "wasm"]:
        for model in options.model or MODELS:
            row = measure(model, target, options.against or ["torch", "onnxruntime"], options.seconds)
            rows.append(row)
            own = row["engines"]["graphopt"]["min_ms"]
            for engine, t in row["engines"].items():
                times = (f"{t['min_ms']:.2f}", f"{t['median_ms']:.2f}", f"{t['min_ms'] / own:.2f}")
                table.add_row(model, target, engine, *times)
            report = {"machine": platform.processor() or platform.machine(), "rows": rows}
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
