"""One layer alone: the share of the ideal (dense time x density) that its sparse kernel reaches, and the break-even.

The layer is a 1x1 convolution with ReLU, as a network has it: what it takes is the time of a chain of COUNT of them
less that of one, divided by COUNT - 1, so that the ends of the program, where layouts may change, do not count.
"""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

import graphopt
from benchmarks.peers.export import Case
from benchmarks.sparse.contest import TARGETS, Settings, density, make_case
from benchmarks.sparse.turns import Contestant, bundle_turn, in_turns
from graphopt.arrays import to_numpy
from graphopt.errors import BadOption

COUNT = 9
ZEROS = {
    "unstructured": (30, 40, 50, 60, 70, 80, 90, 95),
    "4x1": (10, 15, 20, 25, 30, 40, 50, 70, 80, 90, 95),
}
MORE = (80, 90)  # zeros of other formats
# Faster by less than this is no gain but noise.
GAIN = 1.02


def size_of(text: str) -> tuple[int, int]:
    """Channels and pixels of "512x512x196": outputs x inputs x pixels.

    Raises:
        BadOption: it is something else, or outputs and inputs differ: the layer follows itself.
    """
    with contextlib.suppress(ValueError):
        outputs, inputs, pixels = map(int, text.split("x"))
        if outputs == inputs:
            return outputs, pixels
    raise BadOption(
        what=f"--layer {text}", way_out="say outputs x inputs x pixels, outputs and inputs alike: 512x512x196"
    )


def measure(text: str, kind: str, formats: list[str], settings: Settings) -> dict[str, Any]:
    """Time the layer dense and with zeros, each sparse one in turns with the dense one, for all targets of `kind`."""
    width, pixels = size_of(text)
    rows = []
    for target in TARGETS[kind]:
        with contextlib.ExitStack() as always:
            dense = _chains(width, pixels, "unstructured", 0, target, settings, always)
            for form in formats:
                for zeros in ZEROS.get(form, (50,) if ":" in form else MORE):
                    with contextlib.ExitStack() as stack:
                        sparse = _chains(width, pixels, form, zeros, target, settings, stack)
                        in_turns([one for _, one in (*dense, *sparse)], settings.seconds)
                    dense_us, sparse_us = _one(dense), _one(sparse)
                    kept = density(sparse[1][0])
                    rows.append(
                        {
                            "target": target,
                            "format": form,
                            "zeros": zeros,
                            "density": kept,
                            "dense_us": dense_us,
                            "sparse_us": sparse_us,
                            "dense_gflops": 2e-3 * width * width * pixels / dense_us,
                            "speed_up": dense_us / sparse_us,
                            "share_of_ideal": dense_us * kept / sparse_us,
                        }
                    )
    return {"layer": text, "kind": kind, "rows": rows, "break_even": break_even(rows)}


def break_even(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """For each target and format the percentage of zeros from which on sparse is faster; None where it never is.

    Between two measured points, the line that joins them decides.
    """
    found: dict[str, float | None] = {}
    for key in dict.fromkeys((row["target"], row["format"]) for row in rows):
        points = sorted((r["zeros"], r["speed_up"]) for r in rows if (r["target"], r["format"]) == key)
        if len(points) < 3:
            continue
        name = " ".join(key)
        found[name] = None
        slow = [i for i, (_, gain) in enumerate(points) if gain < GAIN]
        first = slow[-1] + 1 if slow else 0
        if first == len(points):
            continue
        (z1, g1) = points[first]
        if first:
            (z0, g0) = points[first - 1]
            z1 = z0 + (z1 - z0) * (GAIN - g0) / (g1 - g0)
        found[name] = round(z1, 1)
    return found


def _chains(
    width: int, pixels: int, form: str, zeros: int, target: str, settings: Settings, stack: contextlib.ExitStack
) -> list[tuple[Case, Contestant]]:
    """Chains of one and of COUNT layers, compiled and opened."""
    chains = []
    for count in (1, COUNT):
        case = make_case(f"chain-{width}x{pixels}-{count}", form, zeros, settings)
        settings.say(f"{case.label}: graphopt compiles for {target}")
        output = settings.folder / f"{case.label}.bundle"
        graphopt.compile(case.program, target=target, output=output, verify=False).close()
        stack.callback(shutil.rmtree, output)
        bundle = stack.enter_context(graphopt.load(output, threads=1))
        inputs = {name: to_numpy(value) for name, value in case.inputs.items()}
        chains.append((case, Contestant("graphopt", case.label, bundle_turn(bundle, inputs))))
    return chains


def _one(chains: list[tuple[Case, Contestant]]) -> float:
    """Microseconds of one layer."""
    short, long = (min(one.samples) for _, one in chains)
    return (long - short) / (COUNT - 1) * 1e6
