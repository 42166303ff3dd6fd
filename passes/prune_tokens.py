"""Drop the tokens that matter least, from some blocks on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.tokens.base import TokenReduction


@dataclass(frozen=True)
class PruneTokens(TokenReduction):
    """Let blocks run on the tokens of the highest scores; the others go, for good or until all are wanted again.

        before  x (b, 197, c) -> attention -> mlp -> ...
        after   x (b, 197, c) -> attention -> top-k, gather (b, 120, c) -> mlp -> ...

    What the program adds or multiplies per token later (positions, masks, rotary tables) goes with its token. A head
    that wants all tokens gets them back, the dropped ones as they were where they left.

    Source: Liang et al., EViT, ICLR 2022, arXiv:2202.07800 (class attention, between attention and MLP). Differs: what
    is dropped is not fused into one more token.
    """

    name: ClassVar[str] = "prune-tokens"
