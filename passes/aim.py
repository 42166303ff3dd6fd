"""Merge visual tokens in front of a language model, then drop them inside it, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.merge_tokens import MergeTokens
from graphopt.passes.prune_tokens import PruneTokens
from graphopt.passes.tokens.base import TokenReduction, places_of
from graphopt.passes.tokens.sequence import TokenSequence
from graphopt.program import Program


@dataclass(frozen=True)
class Aim(TokenSequence):
    """Two merges of like ones leave a quarter of the visual tokens; from a layer on, an eighth more goes each time.

        before  text, 196 visual, text -> 28 layers
        after   text, 49 visual, text -> 14 layers -> 42 visual -> layer -> 36 -> ... -> 1

    Merges are plain means. In the decoder the importance of a token is its PageRank in the graph of attention. Text
    stays. For prefill; positions of what was merged are given anew, those in the decoder are kept.

    tokens: START:STOP of the visual tokens, where they cannot be told.
    merged: the share of the visual tokens that the two merges leave; at least a quarter.
    first: the layer, from 0, behind which the first are dropped; half-way if it is not said.
    layers: behind how many layers all are gone but one.

    Source: Zhong et al., AIM, ICCV 2025, arXiv:2412.03248. Differs: one visual token always stays; ranks are those of
    the tokens that are left, where the published code masks and goes on counting the others.
    """

    name: ClassVar[str] = "aim"

    merged: float = 0.25
    first: int | None = None
    layers: int = 8

    def steps(self, program: Program) -> Sequence[TokenReduction]:
        places = places_of(PruneTokens(where="block", keep=1.0, tokens=self.tokens), program)
        blocks, span = places.blocks, places.span
        half = -(-span.size // 2)
        left = max(round(self.merged * span.size), half - half // 2)
        steps: list[TokenReduction] = []
        now = span.size
        for count in dict.fromkeys((max(half, left), left)):
            if count < now:
                steps.append(
                    MergeTokens(
                        reducer="bipartite:features=true",
                        where="input",
                        counts=(count,),
                        positions="renumber",
                        proportional=False,
                        outputs="shrink",
                        stream=places.stream,
                        tokens=f"{span.start}:{span.start + now}",
                    )
                )
                now = count
        first = blocks // 2 if self.first is None else self.first
        sites = range(first, min(first + self.layers, blocks - 1))
        counts = [max(1, int(left * (1 - (number + 1) / self.layers))) for number in range(len(sites))]
        if counts:
            steps.append(
                PruneTokens(
                    score="pagerank",
                    where="block",
                    sites=tuple(sites),
                    counts=tuple(counts),
                    outputs="shrink",
                    stream=places.stream,
                    tokens=f"{span.start}:{span.start + left}",
                )
            )
        return steps
