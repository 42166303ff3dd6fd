"""OPTIN: heads and neurons of a transformer in one shot, without labels or training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.reduction import Reduction


@dataclass(frozen=True)
class Optin(Reduction):
    """Cut heads and neurons by how far features bend without them, in the best split of the budget between the two.

        before  every layer: 12 heads, 3072 neurons
        after   layer by layer: 5 to 12 heads, 900 to 3000 neurons

    Score: the trajectory error of the features behind, and the divergence of the output (criterion optin). Allocation:
    for each number of heads that stay the best neurons that fit; the best of all (two-lists). The paper's budget is in
    multiply-adds: --macs 0.6.

    Source: Khaki and Plataniotis, "The Need for Speed: Pruning Transformers with One Recipe", ICLR 2024,
    arXiv:2403.17921. Differs: heads and neurons are rounded to what the target wants unless step=1; reduction of tokens
    is a pass of its own.
    """

    name: ClassVar[str] = "optin"
    roles: ClassVar[tuple[str, ...]] = ("head", "neuron", "channel")

    criterion: str = "optin"
    allocation: str = "two-lists"
