"""Drop visual tokens by what other visual tokens think of them, and keep the rest in a few contextual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.pyramid_drop import PyramidDrop


@dataclass(frozen=True)
class Visiondrop(PyramidDrop):
    """Behind a quarter, a half and three quarters of the layers, keep the visual tokens that visual tokens attend to.

        before  text, 576 visual, text -> 32 layers
        after   text, 576 visual, text -> 8 layers -> 281 + 7 visual -> 8 layers -> ...

    What is dropped is averaged into contextual tokens behind those that stay. Text plays no part in the ranking. In the
    tower of a vision-language model (`stream=0`), `score=class-attention`.

    Source: Xu et al., VisionDrop, AAAI 2026, arXiv:2506.22283. Differs: contextual tokens are means, the published sum
    of target and mean is `reducer=contextual:rule=add`.
    """

    name: ClassVar[str] = "visiondrop"

    score: str = "span-attention:look=following"
    reducer: str = "contextual"
