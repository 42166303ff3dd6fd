"""Drop given segments of tokens from a block on: the screenshots of earlier steps, a prompt that has done its work."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphopt.edit import Edit
from graphopt.errors import BadOption
from graphopt.passes.tokens.base import TokenReduction
from graphopt.passes.tokens.job import Job
from graphopt.passes.tokens.reducers import Listed, Reducer
from graphopt.passes.tokens.sites import Where


@dataclass(frozen=True)
class DropSegments(TokenReduction):
    """Let the blocks behind one run without the tokens of some segments; the same ones for every input.

        before  screenshot, action, screenshot, action, screenshot, text -> 36 layers
        after   ... -> 6 layers -> action, action, screenshot, text -> 30 layers

    Positions are kept. Keys and values that leave the program are those of the tokens that a layer has.

    segments: START:STOP, one or more.
    sites: the block, from 0, at whose end they go; with `where=input` they go in front of the first.

    Source: the history compression of Li et al., HiconAgent, arXiv:2512.01763.
    """

    name: ClassVar[str] = "drop-segments"

    segments: tuple[str, ...] = ()
    sites: tuple[int, ...] | None = (5,)
    where: Where = "block"
    outputs: Literal["restore", "shrink"] = "shrink"

    def check(self) -> None:
        """Options that contradict each other. Raises BadOption."""
        if not self.gone or not all(_bounds(each) for each in self.segments):
            shown = ";".join(self.segments) or "none"
            raise BadOption(what=f"{self.name}: segments={shown}", way_out="give START:STOP;START:STOP")
        for name in ("budget", "keep", "counts", "tokens"):
            if getattr(self, name) is not None:
                raise BadOption(
                    what=f"{self.name} has {name} beside its segments", way_out="these say all; leave it out"
                )

    def job(self, edit: Edit) -> Job:
        low, high = self.around
        return Job(replace(self, tokens=f"{low}:{high}"), edit)

    def wanted(self, edit: Edit, job: Job) -> list[int]:
        return [job.span.size - len(self.gone)] * len(job.places)

    @property
    def gone(self) -> set[int]:
        """The places that go."""
        return {place for each in self.segments if (bounds := _bounds(each)) for place in range(*bounds)}

    @property
    def around(self) -> tuple[int, int]:
        """The first and the end of the tokens that are chosen from: of the segments, between them, one that stays."""
        low, high = min(self.gone), max(self.gone) + 1
        if len(self.gone) < high - low:
            return low, high
        return (low - 1, high) if low else (low, high + 1)

    @property
    def made_reducer(self) -> Reducer:
        return Listed(tuple(place - self.around[0] for place in sorted(self.gone)))


def _bounds(segment: str) -> tuple[int, int] | None:
    """START and STOP; None where they are none."""
    found = re.fullmatch(r"(\d+):(\d+)", segment.strip())
    return (int(found[1]), int(found[2])) if found and int(found[1]) < int(found[2]) else None
