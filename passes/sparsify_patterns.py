"""Keep whole kernels for groups of outputs: SparseByteNN's patterns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from graphopt.errors import BadOption
from graphopt.passes.sparsify import Sparsify
from graphopt.sparsity import Format


@dataclass(frozen=True)
class SparsifyPatterns(Sparsify):
    """Zero groups of kernels: blocks of N outputs x one input channel x the whole kernel, those that hold the least.

        before  conv (o=8 i=16 3 3)                     2 x 16 groups of 4 kernels
        after   conv (o=8 i=16 3 3)                     keep=0.7: 23 of 32 groups stay, whole

    Outputs are permuted first, through the whole network, so that strong ones share groups; axes that residuals join
    get one permutation. For linear layers and 1 x 1 convolutions this is the same as blocks of N x 1. All layers keep
    the same share by default. A channel that no output reads any more can be pruned; `unused_inputs` counts them.
    Options are those of `Sparsify`; `format` is N x 1.

    Source: Xu et al., "SparseByteNN", arXiv:2310.19509; formulas: Lin et al., "1xN Pattern", arXiv:2105.14713. Differs:
    rows sorted by their norms are where a search for the kept magnitude starts; no fine-tuning here.
    """

    name: ClassVar[str] = "sparsify-patterns"
    kernels: ClassVar[bool] = True

    format: str = "4x1"
    allocation: Literal["global", "uniform", "erk"] = "uniform"
    rearrange: bool = True

    def checked(self) -> Format:
        """See Sparsify."""
        form = super().checked()
        if form.cols > 1 or form.m > 1:
            raise BadOption(what=f"{self.name}: {form} is not N x 1", way_out="give one such as 4x1, 8x1 or 16x1")
        return form
