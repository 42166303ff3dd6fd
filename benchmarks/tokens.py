"""Fewer tokens, less time? A model dense and with its tokens reduced, in one run, in turns, one thread.

    python -m benchmarks.tokens                                   # DeiT-S, cpu and wasm
    python -m benchmarks.tokens --model dit_s --model llava       # a diffusion transformer, vision and language
    python -m benchmarks.tokens --target cpu --pass merge-tokens --share 0.6 --peers

The realised efficiency is the speed-up divided by the FLOPs ratio. With `--peers`, Token Merging written in PyTorch
merges as many tokens in the same blocks of DeiT-S, eager and by torch.compile. Prints a table and writes JSON; pin it
to one processor (`taskset -c 1`).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import graphopt
from benchmarks.reduction import compiled
from graphopt import targets
from graphopt.arrays import to_numpy
from graphopt.bench import RIVALS, in_turns, timed_in_turns
from graphopt.optimize import plan, reduce, sizes
from tests.hf_vision_language import TEXT, VISION, hf_example, hf_llava
from tests.models import ZOO
from tests.token_models import Dit, PlainMamba
from tests.tome import MergedVisionTransformer


def dit_s() -> tuple[nn.Module, dict[str, Any]]:
    """DiT-S/2 on a latent of 32 x 32: 256 tokens."""
    model = Dit(dim=384, heads=6, layers=12, side=32, channels=4, classes=1000)
    return model, {"x": torch.randn(1, 4, 32, 32), "t": torch.tensor([300.0]), "y": torch.tensor([7])}


def plain_mamba() -> tuple[nn.Module, dict[str, Any]]:
    """Four ways through 14 x 14 tokens, 12 blocks."""
    return PlainMamba(side=14, dim=192, inner=384, layers=12), {"x": torch.randn(1, 3, 56, 56)}


def llava() -> tuple[nn.Module, dict[str, Any]]:
    """The prefill of a small LLaVA: 576 visual tokens, a tower of 4 layers and a decoder of 12."""
    vision = {**VISION, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    vision |= {"image_size": 336, "patch_size": 14}
    text = {**TEXT, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
    text["max_position_embeddings"] = 1024
    return hf_llava(vision=vision, text=text), hf_example(vision=vision)


# How a model is made, and the passes that are for it.
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], tuple[str, ...]]] = {
    "deit_s": (ZOO["deit_s"], ("merge-tokens", "prune-tokens")),
    "dit_s": (dit_s, ("merge-tokens", "flexdit:poolings=2,modules=2,sparse=2")),
    "plain_mamba": (plain_mamba, ("prune-scan-tokens",)),
    "llava": (llava, ("pyramid-drop:tokens=4:580", "visiondrop:tokens=4:580")),
}
# These have as many tokens as their options say, whatever the budget.
WITHOUT_BUDGET = "flexdit"


def measure(model: str, target: str, name: str, share: float, seconds: float, peers: bool) -> dict[str, Any]:
    """Reduce the tokens of one model, compile it and the dense one, and time them, and PyTorch's Token Merging."""
    torch.manual_seed(0)
    module, inputs = MODELS[model][0]()
    program = graphopt.capture(module.eval(), inputs, name=model)
    budget = {} if name.startswith(WITHOUT_BUDGET) else {"flops": share}
    done = reduce(program, plan([name], None, budget), target=targets.resolve(target))
    arrays = {key: to_numpy(value) for key, value in (program.example_inputs or {}).items()}
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bundles = compiled({"dense": program, "reduced": done.after}, target, Path(scratch))
        times["dense"], times["reduced"] = in_turns(bundles, arrays, seconds=seconds)
        if peers and target.startswith("cpu") and model == "deit_s":
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
    parser.add_argument("--model", action="append", choices=MODELS, help="default: deit_s")
    parser.add_argument("--target", action="append", help="default: cpu and wasm")
    parser.add_argument("--pass", dest="passes", action="append", help="default: those that are for the model")
    parser.add_argument("--share", type=float, default=0.6, help="of the FLOPs that stays (default: 0.6)")
    parser.add_argument("--peers", action="store_true", help="time PyTorch too, on the cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="per engine (default: 5)")
    parser.add_argument("-o", "--output", type=Path, default=Path("tokens.json"), help="default: tokens.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(
        "model", "target", "pass", "engine", "ms", "dense / this", "FLOPs ratio", "realised", title="tokens, one thread"
    )
    rows = []
    for model, target in product(options.model or ["deit_s"], options.target or ["cpu", "wasm"]):
        for name in options.passes or MODELS[model][1]:
            row = measure(model, target, name, options.share, options.seconds, options.peers)
            rows.append(row)
            for engine, ms in row["ms"].items():
                ratio, speed = row["flops_ratio"], row["ms"]["dense"] / ms
                realised = f"{speed / ratio:.2f}" if engine == "reduced" else ""
                table.add_row(model, target, name, engine, f"{ms:.2f}", f"{speed:.2f}", f"{ratio:.2f}", realised)
            report = {"machine": platform.processor() or platform.machine(), "rows": rows}
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
