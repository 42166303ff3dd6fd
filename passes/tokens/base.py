"""Passes that let later blocks run on fewer tokens: where, by what score, what becomes of the rest, how many stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphopt.budget import Budget
from graphopt.cut import Positions
from graphopt.edit import Edit
from graphopt.errors import BadOption, Decline, NothingToCut
from graphopt.passes.base import Pass
from graphopt.passes.checks import check_share
from graphopt.passes.named import named_in, near
from graphopt.passes.sizes import nothing
from graphopt.passes.tokens import reducers, scores
from graphopt.passes.tokens.budgets import within
from graphopt.passes.tokens.job import Job
from graphopt.passes.tokens.schedule import SCHEDULES, Schedule
from graphopt.passes.tokens.sites import Where
from graphopt.program import Program
from graphopt.region import Span
from graphopt.token_trace import add_outputs


@dataclass(frozen=True)
class TokenReduction(Pass):
    """Choose tokens by a score at some places of a residual stream, and let everything behind run on these. Lossy.

    budget: what the whole program may cost, of FLOPs, multiply-adds or latency (as estimated for the target); or
    keep: the share of the tokens that is left behind the last place; or
    counts: how many tokens stay at each place, those that cannot go (class tokens) not counted.
    schedule: how counts fall from place to place: constant (as many go everywhere), linear (from twice as many to
        none), cosine, ratio (the same share everywhere), last (all at the first place).
    score: how much a token matters, such as class-attention or `pagerank:steps=3`; where the reducer wants scores.
    reducer: what becomes of the others: top-k, bipartite, ...
    where: "attention": between attention and what follows it, "block": behind whole blocks, "input": once, in front.
    sites: the blocks, from 0, that have a place; all but the last for "block", all for "attention", if none are named.
    tokens: START:STOP of the tokens that may go; where it is not said all but class tokens, and the first and last
        ones if the model takes these from the others behind the blocks.
    positions: "keep": tokens keep their place in tables of positions and in masks; "renumber": they move up.
    outputs: "restore": outputs that have the tokens get all of them back; "shrink": they leave with fewer.
    stream: which of several sequences of tokens, from 0 (a vision tower, a language model); the one with most blocks.
    until: the block at whose end all tokens come back.
    proportional: attention counts a merged token as often as it has tokens; not for models trained with merging.
    target: what latency refers to.
    trace: give more outputs, tokens_0, tokens_1, ..., by which `graphopt explain tokens` shows where tokens go.
    """

    lossless: ClassVar[bool] = False

    budget: Budget | None = None
    keep: float | None = None
    counts: tuple[int, ...] | None = None
    schedule: str = "linear"
    score: str = "class-attention"
    reducer: str = "top-k"
    where: Where = "attention"
    sites: tuple[int, ...] | None = None
    tokens: str | None = None
    positions: Positions = "keep"
    outputs: Literal["restore", "shrink"] = "restore"
    proportional: bool = True
    stream: int | None = None
    until: int | None = None
    target: Any = None
    trace: bool = False
    default_keep: ClassVar[float | None] = None
    meets: ClassVar[str] = "attention"  # how tokens meet each other
    schedules: ClassVar[tuple[str, ...]] = tuple(SCHEDULES)

    # The pass ---------------------------------------------------------------------------------------------------------

    def apply(self, edit: Edit) -> None:
        """See Pass. Raises BadOption, BudgetUnreachable, NothingToCut."""
        self.check()
        job = self.job(edit)
        if not job.places:
            reason = job.why_nowhere
            edit.declined += job.declined
            edit.declined.append(Decline(edit.program.name, f"there is no place to reduce tokens at: {reason}"))
            if self.budget is not None:
                raise nothing(edit.program, self.budget, self.name, reason)
            return
        wanted = self.wanted(edit, job)
        model = job.segments("flops")(wanted)
        job.run(wanted)
        if self.trace:
            add_outputs(edit)
        edit.details.append({"model_flops": model, "reduction_flops": job.added("flops")})
        edit.declined += job.declined
        if min(wanted) >= job.span.size:
            edit.declined.append(Decline(edit.program.name, f"all {job.span.size} tokens stay, as was asked"))
        elif not edit.changed:
            reasons = dict.fromkeys(str(each.reason) for each in job.declined)
            edit.note(f"no tokens could be reduced: {'; '.join(reasons)}")

    def job(self, edit: Edit) -> Job:
        """The run over a graph."""
        return Job(self, edit)

    def check(self) -> None:
        """Options that contradict each other. Raises BadOption."""
        given = [name for name in ("budget", "keep", "counts") if getattr(self, name) is not None]
        if len(given) != 1 and (given or self.default_keep is None):
            raise BadOption(
                what=f"{self.name} takes one of budget, keep and counts", way_out="give --flops 0.6, keep=0.5 or counts"
            )
        check_share(self.name, "keep", self.keep)
        if self.schedule not in self.schedules:
            way_out = f"{near(self.schedule, self.schedules)}known are: {', '.join(self.schedules)}"
            raise BadOption(what=f"{self.name}: there is no schedule {self.schedule}", way_out=way_out)

    def default_sites(self, blocks: int) -> Sequence[int]:
        """The blocks that have a place where the user names none."""
        return range(blocks - 1 if self.where == "block" else blocks)

    @property
    def made_reducer(self) -> reducers.Reducer:
        """The reducer with its options. Raises BadOption."""
        return named_in("reducer", self.reducer, reducers.REDUCERS)

    @property
    def made_score(self) -> scores.Score:
        """The score with its options. Raises BadOption."""
        return named_in("score", self.score, scores.SCORES)

    def wanted(self, edit: Edit, job: Job) -> list[int]:
        """How many tokens of the span stay at each place. Raises BadOption, BudgetUnreachable."""
        span, number = job.span.size, len(job.places)
        if self.counts is not None:
            if len(self.counts) != number:
                raise BadOption(
                    what=f"{self.name}: {len(self.counts)} counts for {number} places", way_out="name as many, or sites"
                )
            found = [int(count) for count in self.counts]
            if not 1 <= min(found) <= max(found) <= span:
                reason = f"{max(found)} is more than {span}" if max(found) > span else "one token stays at least"
                raise BadOption(
                    what=f"{self.name}: counts={_listed(found)} of {span} tokens: {reason}",
                    way_out=f"give counts from {span} down to 1",
                )
            if found != sorted(found, reverse=True):
                raise BadOption(
                    what=f"{self.name}: counts={_listed(found)}: tokens that are gone do not come back",
                    way_out="give counts that fall from place to place",
                )
            return found
        return self.falling(edit, job, SCHEDULES[self.schedule])

    def falling(self, edit: Edit, job: Job, schedule: Schedule) -> list[int]:
        """The counts of a schedule that end with `keep`, or are within the budget. Raises as `wanted`."""
        keep = self.default_keep if self.keep is None and self.budget is None else self.keep
        if keep is not None:
            span = job.span.size
            return schedule.ending(span, len(job.places), max(1, int(keep * span)), job.reducer.least)
        return within(self, edit, job, schedule)


def _listed(counts: Sequence[int]) -> str:
    return ",".join(map(str, counts))


@dataclass(frozen=True)
class Places:
    """Of the stream that a pass would reduce: its number, how many blocks and tokens it has, which tokens may go."""

    stream: int
    blocks: int
    tokens: int
    span: Span


def places_of(options: TokenReduction, program: Program) -> Places:
    """Where a pass would reduce tokens. Raises NothingToCut."""
    job = options.job(Edit(program))
    if not job.places:
        raise NothingToCut(
            file=program.name, kind="flops", asked="fewer tokens", name=options.name, reason=job.why_nowhere
        )
    first = job.places[0]
    return Places(job.stream, job.blocks, int(first.at.meta["val"].shape[first.dim]), job.span)
