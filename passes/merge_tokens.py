"""Merge tokens that are alike, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.tokens.base import TokenReduction


@dataclass(frozen=True)
class MergeTokens(TokenReduction):
    """Merge the tokens that are most alike, a few in every block, between attention and MLP.

        before  x (b, 197, c) -> attention -> mlp -> ...
        after   x (b, 197, c) -> attention -> match, merge (b, 184, c) -> mlp -> ...

    A merged token is the mean of what it stands for, and attention counts it as often (proportional attention). A head
    that wants all tokens gets each merged one at all of its places.

    Source: Bolya et al., Token Merging, ICLR 2023, arXiv:2210.09461.
    """

    name: ClassVar[str] = "merge-tokens"

    reducer: str = "bipartite"
