"""What a cut costs in accuracy: two small networks on handwritten digits, each criterion, with and without repair.

    python -m benchmarks.accuracy                       # both networks; prints a table, writes JSON and Markdown
    python -m benchmarks.accuracy cnn --criterion l2

Each network is cut to a share of its FLOPs and answers the 360 held-out images: as it is then, with its layers fitted
anew on 256 training images without their labels (compensation), and instead after a short fine-tuning on all 1437 with
labels. The random criterion is the mean of several seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import graphopt
from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.calibration import calibration
from graphopt.compensate import compensate
from graphopt.errors import GraphoptError
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.passes.criteria import CRITERIA
from graphopt.passes.prune import Prune
from graphopt.program import Program
from graphopt.shrink import shrink
from tests import digits

LOADERS = {"cnn": digits.load_cnn, "vit": digits.load_vit}
SHARES = (0.7, 0.5, 0.3)
SEEDS = (0, 1, 2)
BATCH = 64
CALIBRATION = 256
EPOCHS, RATE = 4, 2e-3
WAYS = ("plain", "compensated", "fine-tuned")


def fine_tune(program: Program) -> Program:
    """A few epochs of cross-entropy on the training images, the rate falling to zero."""
    torch.manual_seed(0)
    images, labels, _, _ = digits.data()
    module = program.to_module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.01)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))
        for batch in order[: len(images) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(module(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return Program.from_module(module)


def measure(name: str, criterion: str) -> list[dict[str, Any]]:
    """A row for each share: accuracies by way, the share that really stays, seconds. None where it does not apply."""
    images, labels, _, _ = digits.data()
    program = run_passes(graphopt.capture(LOADERS[name](), (images[:BATCH],)), PREPARE, check=False)
    axes = infer(program)
    batches = [(images[n : n + BATCH], labels[n : n + BATCH]) for n in range(0, CALIBRATION, BATCH)]
    data = calibration(batches, program)
    rows = []
    for share in SHARES:
        start = time.perf_counter()
        reduction = Prune(budget=Budget("flops", share), criterion=criterion, calibration=data)
        try:
            wanted = reduction.wanted(axes, [])
            if len(reduction.made_criterion().fallbacks(axes, wanted)) == len(wanted):
                return []
            plan = reduction.plan(axes)
        except GraphoptError as error:
            print(f"{name} {criterion}: {error}")
            continue
        small = shrink(axes, plan.keep)
        seconds = {"plan": time.perf_counter() - start}
        found = {"plain": digits.accuracy(small)}
        for way, repair in (
            ("compensated", lambda: compensate(axes, plan.keep, small, data)),  # noqa: B023
            ("fine-tuned", lambda: fine_tune(small)),  # noqa: B023
        ):
            start = time.perf_counter()
            found[way] = digits.accuracy(repair())
            seconds[way] = time.perf_counter() - start
        stays = flops(small) / flops(program)
        rows.append({"share": share, "stays": stays, "accuracy": found, "seconds": seconds})
    return rows


def flops(program: Program) -> int:
    from graphopt.cost import summary

    return summary(program).total.flops


def of_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of rows that differ in the seed."""
    return {
        "share": rows[0]["share"],
        "stays": statistics.mean(row["stays"] for row in rows),
        **{
            part: {key: statistics.mean(row[part][key] for row in rows) for key in rows[0][part]}
            for part in ("accuracy", "seconds")
        },
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each criterion, a group of columns for each share of the FLOPs."""
    lines = []
    for name, result in results.items():
        lines += [f"## {name}: {result['dense']:.1%} of held-out images before", ""]
        heads = [f"{share:.0%} {way}" for share in SHARES for way in WAYS]
        lines += ["| criterion | " + " | ".join(heads) + " |", "|---" + "|---:" * len(heads) + "|"]
        for criterion, rows in result["criteria"].items():
            by_share = {row["share"]: row["accuracy"] for row in rows}
            cells = [f"{by_share[s][w]:.1%}" if s in by_share else "-" for s in SHARES for w in WAYS]
            lines.append(f"| {criterion} | " + " | ".join(cells) + " |")
        lines.append("")
    note = (
        f"Shares of the FLOPs that stay. compensated: {CALIBRATION} training images without labels. fine-tuned: "
        f"{EPOCHS} epochs on 1437 images with labels, from the plain cut. random: mean of {len(SEEDS)} seeds."
    )
    return "\n".join(["# Accuracy on digits", "", note, "", *lines])


def write(results: dict[str, Any], folder: Path) -> None:
    """JSON and Markdown side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accuracy.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    (folder / "accuracy.md").write_text(table(results))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[[], *LOADERS], default=[])
    parser.add_argument("--criterion", action="append", choices=list(CRITERIA))
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in args.models or list(LOADERS):
        found: dict[str, Any] = {}
        results[name] = {"dense": digits.accuracy(LOADERS[name]()), "criteria": found}
        for criterion in args.criterion or list(CRITERIA):
            if criterion == "random":
                runs = [measure(name, f"random:seed={seed}") for seed in SEEDS]
                rows = [of_seeds(same) for same in zip(*runs, strict=True)]
            else:
                rows = measure(name, criterion)
            if not rows:
                continue
            found[criterion] = rows
            for row in rows:
                shown = ", ".join(f"{way} {row['accuracy'][way]:.1%}" for way in WAYS)
                print(f"{name} {criterion} at {row['stays']:.0%}: {shown}", flush=True)
            write(results, args.output)
    print(table(results))


if __name__ == "__main__":
    main()
