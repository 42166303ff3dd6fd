"""Few visual tokens in early layers, all in the middle, very few at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.prune_tokens import PruneTokens
from graphopt.passes.tokens.base import TokenReduction, places_of
from graphopt.passes.tokens.sequence import TokenSequence
from graphopt.program import Program


@dataclass(frozen=True)
class LvlmCsp(TokenSequence):
    """Cluster, scatter, prune: evenly spaced visual tokens for a third of the layers, all for the next, then a few.

        before  text, 576 visual, text -> 30 layers
        after   text, 144 visual, text -> 10 layers -> 576 -> 10 layers -> 36 -> 10 layers

    The tokens that were left out re-enter as they were. At the end those stay that the last token attends to most in
    the next layer. Positions are kept throughout; keys and values that leave the program are those of the tokens that a
    layer has.

    tokens: START:STOP of the visual tokens, where they cannot be told.
    clustered: the share that runs in the first layers.
    scatter: the layer, from 0, in front of which all come back; a third of them if it is not said.
    prune: the layer in front of which tokens are pruned; two thirds.
    pruned: the share that stays at the end.
    score: by which tokens are chosen for the first layers.

    Source: Chen et al., LVLM_CSP, arXiv:2504.10854; the layers are ours.
    """

    name: ClassVar[str] = "lvlm-csp"

    clustered: float = 0.25
    scatter: int | None = None
    prune: int | None = None
    pruned: float = 0.0625
    score: str = "uniform"

    def steps(self, program: Program) -> Sequence[TokenReduction]:
        places = places_of(PruneTokens(where="block", keep=1.0, tokens=self.tokens), program)
        blocks, span = places.blocks, places.span
        scatter = blocks // 3 if self.scatter is None else self.scatter
        prune = 2 * blocks // 3 if self.prune is None else self.prune
        tokens = f"{span.start}:{span.stop}"
        steps: list[TokenReduction] = []
        # The later first: what is in front of it is as it was then.
        if prune < blocks:
            steps.append(
                PruneTokens(
                    score="last-attention",
                    where="block",
                    sites=(max(prune, 1) - 1,),
                    outputs="shrink",
                    stream=places.stream,
                    tokens=tokens,
                    counts=(max(1, int(self.pruned * span.size)),),
                )
            )
        if scatter > 0:
            steps.append(
                PruneTokens(
                    score=self.score,
                    where="input",
                    until=scatter - 1,
                    outputs="shrink",
                    stream=places.stream,
                    tokens=tokens,
                    counts=(max(1, int(self.clustered * span.size)),),
                )
            )
        return steps
