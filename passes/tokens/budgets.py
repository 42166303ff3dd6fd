"""How many tokens may stay so that a program is within a budget, and what to say where no number would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.edit import Edit
from graphopt.errors import BadOption, BudgetUnreachable, Decline, TokensUnreachable
from graphopt.passes.sizes import limit
from graphopt.passes.tokens.job import Job
from graphopt.passes.tokens.schedule import Schedule
from graphopt.program import Program

if TYPE_CHECKING:
    from graphopt.passes.tokens.base import TokenReduction

COUNTED = ("flops", "macs")
_TRIALS = 8  # programs that are made and estimated, each with half the tokens between too many and too few


def within(options: TokenReduction, edit: Edit, job: Job, schedule: Schedule) -> list[int]:
    """The most tokens of a schedule with which the program is within the budget. Raises BadOption, BudgetUnreachable.

    FLOPs are a polynomial of the tokens; latency is estimated of whole programs, so the steps are coarser.
    """
    budget = options.budget
    assert budget is not None
    if budget.kind == "latency":
        return _as_fast(options, edit, job, schedule, budget)
    if budget.kind not in COUNTED:
        raise BadOption(
            what=f"{options.name} takes no budget of {budget.kind}",
            way_out="give --flops, --macs or --latency, keep or counts",
        )
    allowed = limit(edit.program, budget)
    whole = limit(edit.program, Budget(budget.kind, 1.0))
    model, span, number = job.segments(budget.kind), job.span.size, len(job.places)
    least = job.reducer.least
    extra = 0
    for _ in range(6):  # what choosing and folding cost is known when they are there, and changes little
        room = allowed - extra
        found = schedule.within(span, number, least, lambda counts, room=room: model(counts) <= room)  # type: ignore[misc]
        if found is None:
            break
        trial = job.again()
        trial.run(found)
        if trial.total(budget.kind) <= allowed:
            return found
        extra = max(trial.added(budget.kind), extra + 1)
    fewest = schedule.ending(span, number, 1, least)
    trial = job.again()
    trial.run(fewest)
    if (floor := trial.total(budget.kind)) <= allowed:
        return fewest
    raise _unreachable(options, edit.program, job, budget, floor, whole, model.rest)


def _as_fast(options: TokenReduction, edit: Edit, job: Job, schedule: Schedule, budget: Budget) -> list[int]:
    """The most tokens with which the program is estimated to be as fast as the budget wants."""
    from graphopt import targets
    from graphopt.cost import latency_model

    target = options.target
    if target is None:
        raise BadOption(what=f"{options.name}: latency is that on a target", way_out="name one: target=cpu")
    target = targets.resolve(target) if isinstance(target, str) else target
    span, number, least = job.span.size, len(job.places), job.reducer.least

    def seconds(program: Program) -> float:
        return float(latency_model(infer(program), target)({}))

    whole = seconds(edit.program)
    known: dict[tuple[int, ...], float] = {(span,) * number: whole}

    def estimate(counts: Sequence[int]) -> float:
        if tuple(counts) not in known:
            trial = job.again()
            trial.run(counts)
            known[tuple(counts)] = seconds(edit.program.replace(exported=trial.edit.finish()))
        return known[tuple(counts)]

    allowed = budget.limit(whole)
    found = schedule.within(span, number, least, lambda counts: estimate(counts) <= allowed, steps=_TRIALS)
    if found is None:
        floor = estimate(schedule.ending(span, number, 1, least))
        raise _unreachable(options, edit.program, job, budget, floor, whole, None)
    return found


def _unreachable(
    options: TokenReduction, program: Program, job: Job, budget: Budget, least: float, whole: float, rest: float | None
) -> BudgetUnreachable:
    """The error, with what has all tokens whatever stays, and which options would let the program do with less."""
    reasons = []
    if rest is not None:
        reasons.append(f"{rest / whole:.0%} of it runs in front of the first place or beside the stream")
    reasons += left_alone(job.declined)
    ways = []
    if options.until is not None:
        ways.append(f"a later until than {options.until}")
    if options.sites is not None:
        ways.append("more or earlier sites")
    if options.schedule != "last" and len(job.places) > 1:
        ways.append("schedule=last")
    if job.reducer.least(job.span.size) > 1:
        ways.append(f"prune-tokens ({job.reducer.name} takes at most half of the tokens at a place)")
    return TokensUnreachable(
        file=program.name,
        name=options.name,
        kind=budget.kind,
        asked=budget.show(budget.limit(whole), whole),
        least=budget.show(least, whole),
        why=f" ({'; '.join(reasons)})" if reasons else "",
        ways=f", or try {', '.join(ways)}" if ways else "",
    )


def left_alone(declined: Sequence[Decline]) -> list[str]:
    """A phrase for each reason, with the first place and how many more there are."""
    places: dict[str, list[str]] = {}
    for each in declined:
        places.setdefault(each.reason, []).append(each.where)
    return [
        f"{where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''}: {reason}"
        for reason, where in places.items()
    ]
