"""Drop visual tokens of a vision-language model in stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from graphopt.cut import Positions
from graphopt.passes.tokens.base import TokenReduction
from graphopt.passes.tokens.sites import Where


@dataclass(frozen=True)
class PyramidDrop(TokenReduction):
    """Behind a quarter, a half and three quarters of the decoder's layers, halve the visual tokens.

        before  text, 576 visual, text -> 32 layers
        after   text, 576 visual, text -> 8 layers -> 288 visual -> 8 layers -> 144 visual -> 8 -> 72 -> 8

    They are ranked by the attention that the last token pays them in the next layer, whose query is computed for this
    token alone. Text stays. With `positions=renumber`, as published, those that stay move up; with `keep` they are
    where they were, which is the same as masking the others out; the way for positions in rows (M-RoPE), whose first
    places are text and the top of the image. Keys and values that leave the program are those of the tokens that a
    layer has, with `outputs=shrink`. For prefill.

    keep: the share of the visual tokens that is left behind the last stage; an eighth.

    Source: Xing et al., PyramidDrop, CVPR 2025, arXiv:2410.17247.
    """

    name: ClassVar[str] = "pyramid-drop"
    default_keep: ClassVar[float | None] = 0.125

    score: str = "last-attention"
    schedule: str = "ratio"
    where: Where = "block"
    positions: Positions = "renumber"
    outputs: Literal["restore", "shrink"] = "shrink"

    def default_sites(self, blocks: int) -> Sequence[int]:
        return quarters(blocks)


def quarters(blocks: int) -> list[int]:
    """The blocks at whose ends a quarter, a half and three quarters of all have run; of 6 blocks 1, 3 and 4: 0, 2, 3.

    Rounded down, as the published counts of tokens are: 8, 16 and 24 of 32 layers are the same either way.
    """
    return sorted({max(1, blocks * part // 4) - 1 for part in (1, 2, 3)})
