"""Turn all tokens into fewer, each a mean of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.pyramid_drop import quarters
from graphopt.passes.tokens.base import TokenReduction


@dataclass(frozen=True)
class TransformTokens(TokenReduction):
    """Multiply the tokens with a matrix that is computed from them: pruning and merging are special cases of it.

        before  x (b, 197, c) -> attention -> mlp -> ...
        after   x (b, 197, c) -> attention -> W x (b, 140, c) -> mlp -> ...

    At a quarter, a half and three quarters of the blocks, the same share each time, if nothing else is said. A head
    that wants all tokens gets of each what it was shared out to.

    Source: Zeng et al., Token Transforming, arXiv:2506.05709.
    """

    name: ClassVar[str] = "transform-tokens"

    reducer: str = "transform"
    schedule: str = "ratio"

    def default_sites(self, blocks: int) -> Sequence[int]:
        return quarters(blocks)
