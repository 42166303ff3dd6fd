"""Drop given segments of tokens from a block on: the screenshots of earlier steps, a prompt that has done its work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from graphopt.edit import Edit
from graphopt.errors import BadOption
from graphopt.passes.tokens.base import TokenReduction
from graphopt.passes.tokens.reducers import Listed, Reducer
from graphopt.passes.tokens.sites import Where


@dataclass(frozen=True)
class DropSegments(TokenReduction):
    """Let the blocks behind one run without the tokens of some segments; the same ones for every input.

        before  screenshot, action, screenshot, action, screenshot, text -> 36 layers
        after   ... -> 6 layers -> action, action, screenshot, text -> 30 layers

    Positions are kept. Keys and values that leave the program are those of the tokens that a layer has.

    segments: START:STOP, one or more.
    sites: the block, from 0, at whose end they go.

    Source: the history compression of Li et al., HiconAgent, arXiv:2512.01763.
    """

    name: ClassVar[str] = "drop-segments"

    segments: tuple[str, ...] = ()
    sites: tuple[int, ...] | None = (5,)
    where: Where = "block"
    outputs: Literal["restore", "shrink"] = "shrink"

    def check(self) -> None:
        if not self.segments or any(not re.fullmatch(r"\d+:\d+", each.strip()) for each in self.segments):
            raise BadOption(what=f"{self.name}: segments={self.segments}", way_out="give START:STOP;START:STOP")
        if self.tokens is None:
            raise AssertionError("apply sets the tokens and counts")
        super().check()

    def apply(self, edit: Edit) -> None:
        """See Pass. Raises BadOption."""
        from dataclasses import replace

        if self.tokens is None and self.segments:
            gone = self.gone()
            size = max(gone) + 1
            low = min(gone)
            if len(gone) == size - low:  # one segment: a neighbour that stays makes it a choice
                low, size = (low - 1, size) if low else (low, size + 1)
            filled = replace(self, tokens=f"{low}:{size}", counts=(size - low - len(gone),))
            filled.apply(edit)
            return
        super().apply(edit)

    def gone(self) -> set[int]:
        """The places that go."""
        found: set[int] = set()
        for each in self.segments:
            start, _, stop = each.partition(":")
            found |= set(range(int(start), int(stop)))
        return found

    @property
    def made_reducer(self) -> Reducer:
        low, _, high = (self.tokens or "0:0").partition(":")
        gone = self.gone()
        return Listed(tuple(place - int(low) for place in range(int(low), int(high)) if place not in gone))
