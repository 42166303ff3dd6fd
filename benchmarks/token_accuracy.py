"""What fewer tokens cost in accuracy: a small transformer on drawn letters, each method, at shares of its FLOPs.

    python -m benchmarks.token_accuracy             # prints a table, writes JSON and Markdown

The network (`tests/glyphs.py`) is reduced as it is, without training, and answers the 512 held-out images. Random is
the mean of several seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import torch

import graphopt
from graphopt.cost import summary
from graphopt.errors import BudgetUnreachable
from graphopt.optimize import plan, reduce
from graphopt.program import Program
from tests import glyphs

SHARES = (0.8, 0.7, 0.6, 0.5)
SEEDS = range(5)
BATCH = 64
METHODS = {
    "Token Merging": "merge-tokens",
    "DiffRate": "diffrate",
    "Token Transforming": "transform-tokens",
    "top-k by class attention": "prune-tokens",
    "top-k by PageRank of attention": "prune-tokens:score=pagerank:steps=3",
    "evenly spaced (control)": "prune-tokens:score=uniform",
}
CONTROL = "random (control)"


@cache
def program(batch: int = BATCH) -> Program:
    """The network, captured for so many images at once."""
    return graphopt.capture(glyphs.load(), (glyphs.held_out()[0][:batch],), name="glyphs")


def measure(name: str, share: float) -> dict[str, float] | None:
    """Accuracy and the share of FLOPs that really stays, reduced by a pass; None where it cannot go so low."""
    before = program()
    try:
        after = reduce(before, plan([name], None, {"flops": share})).after
    except BudgetUnreachable:
        return None
    stays = summary(after).total.flops / summary(before).total.flops
    return {"accuracy": glyphs.accuracy(after), "stays": stays}


def control(share: float) -> dict[str, float]:
    """The same for tokens that are chosen at random, the mean of several seeds."""
    rows = [measure(f"prune-tokens:score=random:seed={seed}", share) for seed in SEEDS]
    return {key: statistics.mean(row[key] for row in rows if row) for key in ("accuracy", "stays")}


def table(results: dict[str, Any]) -> str:
    """Markdown: a line for each method, a column for each share of the FLOPs."""
    lines = [
        "# Accuracy with fewer tokens",
        "",
        f"Of {glyphs.HELD_OUT} held-out images of letters, by the share of the FLOPs that stays; no training after the "
        f"reduction. Random: mean of {len(SEEDS)} seeds.",
        "",
        "| | 100% | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |",
        "|---" + "|---:" * (len(SHARES) + 1) + "|",
    ]
    for label, rows in results["methods"].items():
        cells = [f"{row['accuracy']:.1%}" if (row := rows[f"{share:g}"]) else "-" for share in SHARES]
        lines.append(f"| {label} | {results['dense']:.1%} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods: dict[str, Any] = {}
    results = {"dense": glyphs.accuracy(glyphs.load()), "methods": methods}
    for label, name in METHODS.items():
        methods[label] = {f"{share:g}": measure(name, share) for share in SHARES}
    methods[CONTROL] = {f"{share:g}": control(share) for share in SHARES}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "token_accuracy.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "token_accuracy.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
