"""Keep N of each M consecutive inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.errors import BadOption
from graphopt.passes.sparsify import Sparsify
from graphopt.sparsity import Format


@dataclass(frozen=True)
class SparsifyNm(Sparsify):
    """Zero all but the N best of each M consecutive inputs, of each output or, with V:N:M, of V outputs together.

        before  linear (o=1 i=8) [[4, 3, 2, 5 | 1, 0, 1, 2]]
        after   linear (o=1 i=8) [[4, 0, 0, 5 | 1, 0, 0, 2]]       2:4
        rearranged               [[4, 3, 0, 0 | 5, 2, 0, 0]]       inputs in the order 0 1 4 5 3 2 6 7: 14 instead of 12

    Inputs are permuted first so that what is large does not meet in one group (and outputs, so that those of a vector
    want the same columns), wherever an axis is free. Where inputs are no multiple of M the last group is smaller and
    keeps up to N. Options are those of `Sparsify`.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378; Pool and Yu, "Channel
    Permutations for N:M Sparsity", NeurIPS 2021; Castro et al., "VENOM", SC 2023, arXiv:2310.02065 (V:N:M). Differs:
    the search deals out one place of each group anew instead of exchanging pairs of channels; the same columns are
    chosen directly for V:N:M.
    """

    name: ClassVar[str] = "sparsify-nm"

    format: str = "2:4"
    rearrange: bool = True

    def checked(self) -> Format:
        """See Sparsify."""
        form = super().checked()
        if form.m == 1:
            raise BadOption(what=f"{self.name}: {form} is not N:M", way_out="give one such as 2:4, 1:4 or 8:2:4")
        return form
