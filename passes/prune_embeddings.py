"""Make the residual stream of a transformer narrower until a budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.reduction import Reduction


@dataclass(frozen=True)
class PruneEmbeddings(Reduction):
    """Shrink the width that all blocks share: embeddings, norms, and the inputs and outputs of every layer.

        before  word (words, e=768), norm (e=768), q (.., e=768), out (e=768, ..), up (.., e=768), down (e=768, ..)
        after   word (words, e=512), norm (e=512), q (.., e=512), out (e=512, ..), up (.., e=512), down (e=512, ..)

    Layer norms take their statistics over what is kept, so the result is not the program with zeros in place of the
    dropped features, but that with norms that ignore them. Networks without residual streams have one such axis for
    each embedding. An encoder whose last hidden state is the output keeps its width: it is pinned.

    Source: the EMB class of Yang et al., NViT, CVPR 2023, arXiv:2110.04869. Differs: any criterion and allocation.
    """

    name: ClassVar[str] = "prune-embeddings"
    roles: ClassVar[tuple[str, ...]] = ("embedding",)
