"""Drop visual tokens by what other visual tokens think of them, and keep the rest in a few contextual ones."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

from graphopt.errors import BadOption, CannotShrink
from graphopt.passes.pyramid_drop import PyramidDrop
from graphopt.passes.tokens.base import Places, places_of
from graphopt.passes.tokens.reducers import Contextual
from graphopt.program import Program


@dataclass(frozen=True)
class Visiondrop(PyramidDrop):
    """Behind a quarter, a half and three quarters of the layers, keep the visual tokens that visual tokens attend to.

        before  tower of 23 layers -> text, 576 visual, text -> 32 layers
        after   tower of 23 layers -> 42 + 6 -> text, 48 visual, text -> 8 layers -> 30 + 5 -> 8 layers
                -> 22 + 4 -> 8 -> 16 + 3 -> 8          with stages=42+6;30+5;22+4;16+3: 32 tokens a layer

    What is dropped is averaged into contextual tokens behind those that stay. Text plays no part in the ranking. With
    `stages` the first are chosen at the end of the tower, by the attention that its class token pays them in its last
    layer, or the mean of all where it has none; else those of the decoder alone fall. That wants a model which puts
    the image's tokens beside the text's; one that writes them where words say (transformers' LLaVA) is refused.

    stages: DOMINANT+CONTEXTUAL of the tower, and of each place in the decoder; instead of a budget, keep or counts.

    Source: Xu et al., VisionDrop, AAAI 2026, arXiv:2506.22283. Differs: contextual tokens are means, the published sum
    of target and mean is `reducer=contextual:rule=add`; a class token is not among the dominant.
    """

    name: ClassVar[str] = "visiondrop"

    score: str = "span-attention:look=following"
    reducer: str = "contextual"
    stages: tuple[str, ...] = ()

    def __call__(self, program: Program) -> Program:
        """The program after all stages, with a record for the tower and one for the decoder where both are cut.

        Raises:
            BadOption: see `check`; the tower has not the tokens that the decoder has.
            CannotShrink: what stands between tower and decoder wants all tokens.
        """
        if not self.stages:
            return super().__call__(program)
        self.check()
        before = places_of(self, program)
        tower = self.tower(program, before)
        (first, *_), (context, *contexts) = zip(*self.budgets, strict=True)
        left = min(first + context, tower.span.size)
        small = replace(
            self.stage([first + context], [context]),
            stream=tower.stream,
            sites=(tower.blocks - 1,),
            tokens=f"{tower.span.start}:{tower.span.stop}",
            score="class-attention" if tower.span.start else "mean-attention",
        )(program)
        start = before.span.start
        decoder = replace(
            self.stage([a + b for a, b in self.budgets[1:]], contexts),
            stream=before.stream,
            tokens=f"{start}:{start + left}",
        )
        if places_of(decoder, small).tokens != before.tokens - tower.span.size + left:
            reasons = "; ".join(dict.fromkeys(str(each.reason) for each in small.records[-1].declined))
            raise CannotShrink(axis="tokens of the tower", reason=f"the decoder gets all of them: {reasons}")
        return decoder(small) if contexts else small

    def check(self) -> None:
        """Options that contradict each other. Raises BadOption."""
        if not self.stages:
            super().check()
            return
        if wrong := [stage for stage in self.stages if not re.fullmatch(r"[1-9]\d*\+\d+", stage.strip())]:
            raise BadOption(
                what=f"{self.name}: stages has {wrong[0]}", way_out="give DOMINANT+CONTEXTUAL, such as 42+6"
            )
        for option in ("budget", "keep", "counts"):
            if getattr(self, option) is not None:
                raise BadOption(what=f"{self.name} has {option} beside stages", way_out="these say all; leave it out")
        if self.positions != "renumber":
            what = f"{self.name}: positions={self.positions} with stages"
            raise BadOption(what=what, way_out="leave it out: contextual tokens have no place of their own")
        if not isinstance(self.made_reducer, Contextual):
            raise BadOption(what=f"{self.name}: stages with reducer={self.reducer}", way_out="leave the reducer out")

    @property
    def budgets(self) -> list[tuple[int, int]]:
        """Dominant and contextual tokens of each stage."""
        return [(int(a), int(b)) for a, _, b in (stage.partition("+") for stage in self.stages)]

    def stage(self, counts: list[int], contexts: list[int]) -> Visiondrop:
        """The pass for some of the stages."""
        reducer = self.made_reducer
        assert isinstance(reducer, Contextual)
        own = f"contextual:rule={reducer.rule};context=({''.join(f'{each},' for each in contexts)})"
        return replace(self, stages=(), counts=tuple(counts), reducer=own)

    def tower(self, program: Program, decoder: Places) -> Places:
        """The stream in front of the decoder's, which has its visual tokens. Raises BadOption."""
        way_out = "leave stages out: keep, counts or a budget cut the decoder alone"
        if not decoder.stream:
            raise BadOption(what=f"{self.name}: stages, and there is no tower in front of the decoder", way_out=way_out)
        found = places_of(replace(self, stream=decoder.stream - 1, sites=None, tokens=None, score="norm"), program)
        if found.span.size != decoder.span.size:
            sizes = f"{found.span.size} tokens, and the decoder {decoder.span.size} visual ones"
            raise BadOption(what=f"{self.name}: stages, and the tower has {sizes}", way_out=way_out)
        return found
