"""Prune tokens, then merge some more, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.tokens.base import TokenReduction


@dataclass(frozen=True)
class DiffRate(TokenReduction):
    """Drop the tokens that the class token looks at least, and merge the next ones into what they are most like.

        before  x (b, 197, c) -> attention -> mlp -> ...
        after   x (b, 197, c) -> attention -> sort, drop, merge (b, 157, c) -> mlp -> ...

    With `reducer="prune-merge:through=(196,190,...)"` and `counts` the published rates of a model can be given.

    Source: Chen et al., DiffRate, ICCV 2023, arXiv:2305.17997.
    """

    name: ClassVar[str] = "diffrate"

    reducer: str = "prune-merge"
