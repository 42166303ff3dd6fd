"""graphopt on sparse models beside its peers: one run, one thread, engines in turns.

    benchmarks/peers/setup.sh FOLDER                      # once: the peers' environments
    python -m benchmarks.sparse --peers FOLDER            # all models, formats and shares of zeros: hours
    python -m benchmarks.sparse --peers FOLDER --kind cpu --model mobilenet_v1 --format 4x1 --zeros 90
    python -m benchmarks.sparse --layer 512x512x196       # one layer: share of the ideal, break-even

Zeros are whole blocks at random, the same for all engines: in the 1x1 convolutions of the MobileNets, in all
convolutions of ResNet-50 but the stem, in all linear layers of the encoders of DeiT-S and MiniLM. Every row is measured
with the dense model in all engines beside it, so that its ratios are of one and the same minutes. Peers without kernels
for zeros run the dense weights only, unless --same-weights is given; those with kernels run unstructured zeros beside
the blocks. LiteRT.js gets zeros in the classifier of a MobileNet besides: it runs all of a model sparse or nothing, by
the zeros in all of it.

Prints tables, writes JSON after every row, and draws one plot (`pip install 'graphopt[report]'`). A peer that is not
installed is a line that says how to get it.

Compare minima, and only of an idle processor: where a median is far above its minimum, something else ran on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.peers.registry import PEERS
from benchmarks.sparse import layer
from benchmarks.sparse.contest import TARGETS, Contest, Settings
from benchmarks.sparse.models import FORMATS, MODELS, ZEROS
from benchmarks.sparse.report import layer_table, model_table, plot, ratio_table, ratios
from graphopt.sparsity import parse_format


def cases(formats: list[str], zeros: list[int]) -> list[tuple[str, int]]:
    """Formats with shares of zeros, fewest first. N:M formats say their share themselves."""
    found = [("dense", 0)] if 0 in zeros else []
    for text in formats:
        form = parse_format(text)
        own = [round(100 * (1 - form.n / form.m))]
        found += [(text, percent) for percent in (own if form.m > 1 else zeros) if percent]
    return sorted(found, key=lambda case: case[1])


def machine() -> dict[str, str]:
    """What it was measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    names = {"model name": "cpu", "cpu family": "family", "model": "model"}
    found = {names[key.strip()]: value.strip() for key, value in fields.items() if key.strip() in names}
    return {"cpu": cpu, **found, "system": platform.platform(), "python": platform.python_version()}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=TARGETS, help="default: cpu and wasm")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--format", action="append", help="default: " + ", ".join(FORMATS))
    parser.add_argument("--zeros", action="append", type=int, help="percent; default: " + ", ".join(map(str, ZEROS)))
    parser.add_argument("--peer", action="append", choices=PEERS, help="default: all but inductor")
    parser.add_argument("--peers", type=Path, help="where setup.sh put them (default: GRAPHOPT_PEERS)")
    parser.add_argument("--same-weights", action="store_true", help="peers without kernels for zeros run them, too")
    parser.add_argument("--peers-only", action="store_true", help="leave graphopt out")
    parser.add_argument("--layer", metavar="OxIxP", help="outputs x inputs x pixels of one 1x1 convolution")
    parser.add_argument("--seconds", type=float, default=2.0, help="per engine and row (default: 2)")
    parser.add_argument("--processor", type=int, help="the one to run on (default: the last that it may use)")
    parser.add_argument("-o", "--output", type=Path, default=Path("sparse.json"), help="default: sparse.json")
    parser.add_argument("--plot", type=Path, help="default: beside the JSON")
    return parser.parse_args()


def main() -> None:
    """Parse the command line, measure, print, write and draw."""
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 180)
    if hasattr(os, "sched_setaffinity"):
        one = max(os.sched_getaffinity(0)) if options.processor is None else options.processor
        os.sched_setaffinity(0, {one})
    warnings.filterwarnings("ignore")
    environments = options.peers or (Path(os.environ["GRAPHOPT_PEERS"]) if "GRAPHOPT_PEERS" in os.environ else None)
    names = options.peer or [name for name, peer in PEERS.items() if peer.default]
    settings = Settings(
        peers=names,
        folder=Path(),
        environments=environments.resolve() if environments else None,
        seconds=options.seconds,
        same_weights=options.same_weights,
        own=not options.peers_only,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    settings.missing = {name: why for name in names if (why := PEERS[name].why_not(settings.environments))}
    report: dict[str, Any] = {"machine": machine(), "missing": settings.missing, "rows": []}
    with tempfile.TemporaryDirectory(prefix="graphopt-sparse-") as scratch:
        settings.folder = Path(scratch)
        if options.layer:
            measure_layer(options, settings, report, console)
        else:
            measure_models(options, settings, report, console)


def measure_layer(options: argparse.Namespace, settings: Settings, report: dict[str, Any], console: Console) -> None:
    """The command with --layer."""
    del report["missing"]
    for kind in options.kind or TARGETS:
        result = layer.measure(options.layer, kind, options.format or list(FORMATS), settings)
        report["rows"].append(result)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        console.print(layer_table(result))


def measure_models(options: argparse.Namespace, settings: Settings, report: dict[str, Any], console: Console) -> None:
    """The command without."""
    rows = report["rows"]
    for kind in options.kind or TARGETS:
        for model in options.model or MODELS:
            with Contest(model, kind, settings) as contest:
                for form, zeros in cases(options.format or list(FORMATS), options.zeros or list(ZEROS)):
                    row = contest.row(form, zeros)
                    rows.append(row | {"times_faster": ratios(row)})
                    options.output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(model_table(rows, settings.missing))
    if not options.peers_only:
        console.print(ratio_table(rows))
    try:
        plot(rows, options.plot or options.output.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed: pip install 'graphopt[report]'", file=sys.stderr)


if __name__ == "__main__":
    main()
