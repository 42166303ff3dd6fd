"""Places for temporaries in one arena, so that a run allocates nothing.

Greedy by size: the largest buffer first, each at the lowest offset where nothing that lives at the same time stands.
Source: Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", MLSys workshop 2020,
arXiv:2001.03288.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from graphopt.codegen.steps import ALIGNMENT, Buffer, StepProgram


@dataclass(frozen=True)
class Plan:
    """Byte offsets in the arena, 64-byte aligned, and how large the arena is."""

    offsets: dict[Buffer, int]
    arena_bytes: int


def aligned(nbytes: int) -> int:
    """Rounded up to a whole number of alignment units."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def plan_memory(program: StepProgram, elsewhere: Iterable[Buffer] = ()) -> Plan:
    """Place every temporary.

    Args:
        program: buffers live from the step that writes them to the last one that reads them; scratch for its step only.
        elsewhere: temporaries that have their place already (outputs that are written where the caller wants them).
    """
    lives = _lifetimes(program)
    for buffer in elsewhere:
        lives.pop(buffer, None)
    order = sorted(lives, key=lambda b: (-b.nbytes, lives[b]))
    offsets: dict[Buffer, int] = {}
    for buffer in order:
        first, last = lives[buffer]
        size, at = aligned(buffer.nbytes), 0
        rivals = ((offsets[o], aligned(o.nbytes)) for o in offsets if lives[o][0] <= last and first <= lives[o][1])
        for offset, extent in sorted(rivals):
            if offset - at >= size:
                break
            at = max(at, offset + extent)
        offsets[buffer] = at
    return Plan(offsets, max((at + aligned(b.nbytes) for b, at in offsets.items()), default=0))


def _lifetimes(program: StepProgram) -> dict[Buffer, tuple[int, int]]:
    lives: dict[Buffer, tuple[int, int]] = {}
    for i, step in enumerate(program.steps):
        for buffer in (*step.results, *step.scratch, *step.arguments):
            if buffer.kind == "temporary":
                first, _ = lives.get(buffer, (i, i))
                lives[buffer] = (first, i)
    for buffer in program.outputs:
        if buffer in lives:
            lives[buffer] = (lives[buffer][0], len(program.steps))
    return lives
