"""Remove channels, neurons and heads together until a budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.axes import ROLES
from graphopt.errors import BadOption
from graphopt.passes.reduction import Reduction


@dataclass(frozen=True)
class Prune(Reduction):
    """Shrink whatever may be shrunk but the residual stream of transformers, all under one budget.

        before  conv (o=64 ..), q (h=12 d=64, ..), up (n=3072, ..)
        after   conv (o=40 ..), q (h=9 d=64, ..), up (n=1800, ..)

    What the budget asks for comes from where it loses least, whatever kind it is: that is what the allocation decides
    on. `axes` are the roles that take part. The width of residual streams couples every layer; prune-embeddings cuts
    that.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv:2301.12900. Differs: axes instead
    of groups of layers.
    """

    name: ClassVar[str] = "prune"
    roles: ClassVar[tuple[str, ...]] = ("channel", "neuron", "head", "query_group")

    axes: tuple[str, ...] = ("channel", "neuron", "head", "query_group")

    @property
    def cut_roles(self) -> tuple[str, ...]:
        """See Reduction."""
        return self.axes

    def check(self) -> None:
        """See Reduction."""
        super().check()
        if unknown := [role for role in self.axes if role not in ROLES]:
            what = f"prune: there are no axes of role {', '.join(unknown)}"
            raise BadOption(what=what, way_out=f"roles are {', '.join(ROLES)}")
