"""How large a program is in the quantity that a budget is about."""

from __future__ import annotations

from graphopt.budget import SLACK, Budget
from graphopt.cost import summary
from graphopt.errors import BadOption, BudgetUnreachable, NothingToCut
from graphopt.program import Program

COUNTED = ("flops", "macs", "params", "bytes")


def amount(program: Program, kind: str) -> float:
    """FLOPs, multiply-adds, parameters (elements) or bytes of stored tensors; what shapes alone tell.

    Raises:
        BadOption: a budget of latency, which has to be measured.
    """
    if kind not in COUNTED:
        raise BadOption(
            what=f"a budget of {kind} is not for this pass", way_out=f"give one of {', '.join(COUNTED)} instead"
        )
    found = summary(program)
    return float(found.stored_bytes if kind == "bytes" else getattr(found.total, kind))


def limit(program: Program, budget: Budget) -> float:
    """The most of `budget.kind` that the program may have. Raises as `amount`."""
    whole = amount(program, budget.kind)
    return budget.amount if budget.absolute else budget.amount * whole


def nothing(program: Program, budget: Budget, name: str, reason: str, *, whole: float | None = None) -> NothingToCut:
    """The error for a pass that finds nothing that it could cut in a program that has `whole` of the budgeted quantity,
    by default its amount. Raises as `amount`.
    """
    whole = amount(program, budget.kind) if whole is None else whole
    asked = budget.show(budget.limit(whole), whole)
    return NothingToCut(file=program.name, kind=budget.kind, asked=asked, name=name, reason=reason)


def short_of(program: Program, budget: Budget, left: float, why: str) -> list[str]:
    """A note where more than SLACK of a budget is not used, with why; none where it is.

    Args:
        program: before the pass.
        left: what the program has of the budgeted quantity after it.
    """
    whole = amount(program, budget.kind)
    allowed = budget.limit(whole)
    if left >= (1 - SLACK) * allowed:
        return []
    return [f"{budget.show(left, whole)} of {budget.show(allowed, whole)} {budget.kind} is used, because {why}"]


def unreachable(name: str, budget: Budget, least: float, whole: float) -> BudgetUnreachable:
    """The error for a program that cannot have less than `least` of the `whole` that it has."""
    asked = budget.show(budget.limit(whole), whole)
    return BudgetUnreachable(file=name, kind=budget.kind, asked=asked, least=budget.show(least, whole))
