"""Engines in turns: each runs a few times and then waits for the others, so that the machine's drift hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.peers.registry import PeerFailed
from graphopt.bundle import Bundle
from graphopt.errors import GraphoptError

# Runs per turn: as many as take about this long, within bounds.
TURN_S = 0.04
LEAST, MOST = 3, 20


@dataclass
class Contestant:
    """An engine with a model in it. `turn(n)` gives the seconds of n runs, after one that is not counted."""

    engine: str
    weights: str  # "dense" or the format of its zeros
    turn: Callable[[int], Sequence[float]]
    difference: float = 0.0  # of its outputs to PyTorch's, as a share of the largest value
    samples: list[float] = field(default_factory=list)
    failure: str = ""  # why it runs no more

    def run(self, runs: int) -> Sequence[float]:
        """A turn; nothing from one that has failed."""
        if self.failure:
            return ()
        try:
            return self.turn(runs)
        except (PeerFailed, GraphoptError) as error:
            self.failure = str(error).splitlines()[0]
            return ()

    def to_json(self) -> dict[str, Any]:
        """Times in milliseconds."""
        return {
            "engine": self.engine,
            "weights": self.weights,
            "min_ms": min(self.samples) * 1e3,
            "median_ms": median(self.samples) * 1e3,
            "runs": len(self.samples),
            "difference": self.difference,
        }


def bundle_turn(bundle: Bundle, inputs: dict[str, Any]) -> Callable[[int], Sequence[float]]:
    """A bundle's turn: timed inside of what runs it, so that copies to another process are not counted."""
    once = min(bundle.time(inputs, 0.2))

    def turn(runs: int) -> Sequence[float]:
        times = bundle.time(inputs, (runs + 0.5) * once)
        return times[1:] or times

    return turn


def in_turns(contestants: Sequence[Contestant], seconds: float, rounds: int = 4) -> None:
    """Fill the samples of all: for `seconds` a contestant, at least `rounds` rounds. The samples before are dropped."""
    runs = []
    for one in contestants:
        once = min(one.run(2), default=TURN_S)
        runs.append(min(MOST, max(LEAST, round(TURN_S / once))))
        one.samples = []
    end = time.perf_counter() + seconds * len(contestants)
    done = 0
    while done < rounds or time.perf_counter() < end:
        for one, count in zip(contestants, runs, strict=True):
            one.samples += one.run(count)
        done += 1
