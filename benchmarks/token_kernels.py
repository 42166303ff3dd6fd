"""What token reduction adds to a program, alone: gathers, scatters, similarities, sorts; on one thread, beside PyTorch.

    python -m benchmarks.token_kernels                      # cpu and wasm
    python -m benchmarks.token_kernels --target cpu --only sort

Every form runs on several inputs in one program, so that neither calls nor branches learnt from one input count for
much; times are for one of them, on wasm with the copies into its memory and out of it. Prints a table and writes JSON;
pin it to one processor (`taskset -c 1`).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt.arrays import to_numpy
from graphopt.bench import RIVALS, in_turns, timed_in_turns

COPIES = 8


@dataclass(frozen=True)
class Form:
    """An operation, and what makes its inputs."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[[], tuple[Tensor, ...]]


def _rows(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])


def _similar(key: Tensor) -> tuple[Tensor, Tensor]:
    key = key / key.norm(dim=-1, keepdim=True)
    best, partner = (key[:, ::2] @ key[:, 1::2].transpose(-1, -2)).max(-1)
    return best, partner


def _mean(x: Tensor, slots: Tensor, sizes: Tensor) -> Tensor:
    total = torch.zeros(x.shape[0], x.shape[1] // 2, x.shape[2]).scatter_add(1, _rows(slots, x), x * sizes[..., None])
    return total / torch.zeros(x.shape[0], x.shape[1] // 2).scatter_add(1, slots, sizes).clamp_min(1e-6)[..., None]


def _chosen(b: int, n: int, count: int) -> Tensor:
    return torch.stack([torch.randperm(n)[:count].sort().values for _ in range(b)])


def _forms() -> dict[str, Form]:
    found = {}
    for b, n, c in ((1, 197, 384), (4, 577, 1024)):
        kept, gone = n // 2, n - n // 2
        found |= {
            f"gather {b} x {kept} of {n} x {c}": Form(
                lambda x, i: x.gather(1, _rows(i, x)),
                lambda b=b, n=n, c=c, kept=kept: (torch.randn(b, n, c), _chosen(b, n, kept)),
            ),
            f"scatter_add {b} x {gone} to {kept} x {c}": Form(
                lambda x, s, y: x.scatter_add(1, _rows(s, x), y),
                lambda b=b, c=c, kept=kept, gone=gone: (
                    torch.randn(b, kept, c), torch.randint(0, kept, (b, gone)), torch.randn(b, gone, c)
                ),
            ),
            f"scatter back {b} x {kept} to {n} x {c}": Form(
                lambda x, i, y: x.scatter(1, _rows(i, x), y),
                lambda b=b, n=n, c=c, kept=kept: (torch.randn(b, n, c), _chosen(b, n, kept), torch.randn(b, kept, c)),
            ),
            f"weighted means {b} x {n} to {kept} x {c}": Form(
                _mean,
                lambda b=b, n=n, c=c: (torch.randn(b, n, c), torch.randint(0, n // 2, (b, n)), torch.rand(b, n) + 1),
            ),
        }  # fmt: skip
    for b, n, d in ((1, 197, 64), (4, 1025, 80), (1, 3000, 64)):
        found[f"most similar {b} x {n // 2} x {n // 2}"] = Form(_similar, lambda b=b, n=n, d=d: (torch.randn(b, n, d),))
    for n in (197, 577, 3000):
        found |= {
            f"argsort {n}": Form(
                lambda x: x.argsort(dim=-1, descending=True, stable=True), lambda n=n: (torch.randn(1, n),)
            ),
            f"topk {n // 2} of {n}": Form(lambda x, k=n // 2: x.topk(k), lambda n=n: (torch.randn(1, n),)),
            f"topk 10 of {n}": Form(lambda x: x.topk(10), lambda n=n: (torch.randn(1, n),)),
            f"sort {n // 2} indices": Form(
                lambda x: x.sort(-1), lambda n=n: (torch.randperm(n)[None, : n // 2].clone(),)
            ),
        }
    for b, h, n in ((1, 6, 197), (4, 16, 577)):
        found[f"class attention {b} x {h} x {n}"] = Form(
            lambda q, k: (q @ k.transpose(-1, -2) * 0.125).softmax(-1).mean(1),
            lambda b=b, h=h, n=n: (torch.randn(b, h, 1, 64), torch.randn(b, h, n, 64)),
        )
    return found


class Copies(nn.Module):
    """One form on several inputs, which stand side by side."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, *values: Tensor) -> list[Tensor]:
        width = len(values) // COPIES
        results: list[Tensor] = []
        for i in range(COPIES):
            result = self.form.run(*values[i * width : (i + 1) * width])
            results += [result] if isinstance(result, Tensor) else list(result)
        return results


def measure(name: str, form: Form, targets: list[str], seconds: float) -> dict[str, object]:
    """Microseconds of one form by engine."""
    torch.manual_seed(0)
    inputs = tuple(value for _ in range(COPIES) for value in form.inputs())
    program = graphopt.capture(Copies(form), inputs, name="tokens")
    arrays = {key: to_numpy(value) for key, value in (program.example_inputs or {}).items()}
    (eager,) = timed_in_turns([RIVALS["torch"](program, arrays, 1)], seconds=seconds)
    times = {"torch": eager}
    with tempfile.TemporaryDirectory() as scratch:
        for number, target in enumerate(targets):
            place = Path(scratch) / f"{number}.bundle"
            graphopt.compile(program, target=target, output=place)
            with graphopt.load(place, threads=1) as bundle:
                (times[target],) = in_turns([bundle], arrays, seconds=seconds)
    return {"form": name, "us": {engine: time / COPIES * 1e6 for engine, time in times.items()}}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", help="default: cpu and wasm")
    parser.add_argument("--only", default="", help="forms with this in their name")
    parser.add_argument("--seconds", type=float, default=0.5, help="per form and engine (default: 0.5)")
    parser.add_argument("-o", "--output", type=Path, default=Path("token_kernels.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    targets = options.target or ["cpu", "wasm"]
    table = Table("form", "torch, us", *(f"{t}, us" for t in targets), *(f"torch / {t}" for t in targets))
    rows = []
    for name, form in _forms().items():
        if options.only not in name:
            continue
        row = measure(name, form, targets, options.seconds)
        rows.append(row)
        us: dict[str, float] = row["us"]  # type: ignore[assignment]
        ratios = [f"{us['torch'] / us[t]:.1f}" for t in targets]
        table.add_row(name, f"{us['torch']:.1f}", *(f"{us[t]:.1f}" for t in targets), *ratios)
        report = {"machine": platform.processor() or platform.machine(), "copies": COPIES, "rows": rows}
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
