"""Where kernels can be timed: what runs a target here at its own speed, and on which machine that is."""

from __future__ import annotations

import platform
from pathlib import Path

from graphopt.targets.runner import runners_of
from graphopt.targets.target import Target

# How long they take says nothing of the device that they stand for.
_EMULATORS = {"qemu", "emulated_gpu"}


def timing_runner(target: Target) -> str:
    """The name of the fastest runner that runs `target` here and does not emulate it; empty where there is none."""
    return next((name for name in runners_of(target) if name not in _EMULATORS), "")


def machine(target: Target) -> str:
    """What times that are measured here depend on, besides the target: the processor and what it executes with."""
    runner = timing_runner(target)
    engine = "" if runner in ("native", "") else f" in {runner}"
    return f"{_processor()}, {target.isa.name}{engine}"


# What /proc/cpuinfo says of a processor, in order: clouds often tell no more of its name than the first words.
_FIELDS = ("model name", "cpu family", "model", "CPU implementer", "CPU part")


def _processor() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = [facts[_FIELDS[0]]] if _FIELDS[0] in facts else []
    return " ".join([*name, *(f"{key} {facts[key]}" for key in _FIELDS[1:] if key in facts)]) or platform.machine()
