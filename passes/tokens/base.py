"""Passes that let later blocks run on fewer tokens: where, by what score, what becomes of the rest, how many stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.cost.formulas import counts as cost_of
from graphopt.cost.formulas import numbers
from graphopt.cut import Kept, Positions, cut
from graphopt.edit import Edit
from graphopt.errors import BadOption, CannotShrink, Decline, NothingToCut
from graphopt.inline import inline
from graphopt.orders import Orders
from graphopt.passes.base import Pass
from graphopt.passes.checks import check_share
from graphopt.passes.named import named_in, near
from graphopt.passes.sizes import limit, nothing, unreachable
from graphopt.passes.tokens import reducers, scores
from graphopt.passes.tokens.attention import Attention, add_to_keys, attentions
from graphopt.passes.tokens.following import computed_early
from graphopt.passes.tokens.protect import span_of
from graphopt.passes.tokens.schedule import SCHEDULES, Schedule
from graphopt.passes.tokens.segments import Segments, segments_of
from graphopt.passes.tokens.sites import Site, Where, blocks, sites, streams
from graphopt.passes.tokens.view import View, heads, repeated
from graphopt.place import place
from graphopt.program import Program
from graphopt.region import Region, Span, region_of
from graphopt.token_trace import add_outputs, mark


@dataclass(frozen=True)
class TokenReduction(Pass):
    """Choose tokens by a score at some places of a residual stream, and let everything behind run on these. Lossy.

    budget: what the whole program may cost, of FLOPs or multiply-adds; or
    keep: the share of the tokens that is left behind the last place; or
    counts: how many tokens stay at each place, those that cannot go (class tokens) not counted.
    schedule: how counts fall from place to place: constant (as many go everywhere), linear (from twice as many to
        none), cosine, ratio (the same share everywhere), last (all at the first place).
    score: how much a token matters, such as class-attention or `pagerank:steps=3`; where the reducer wants scores.
    reducer: what becomes of the others: top-k, bipartite, ...
    where: "attention": between attention and what follows it, "block": behind whole blocks, "input": once, in front.
    sites: the blocks, from 0, that have a place; all but the last for "block", all for "attention", if none are named.
    tokens: START:STOP of the tokens that may go; all but class tokens where it is not said.
    positions: "keep": tokens keep their place in tables of positions and in masks; "renumber": they move up.
    outputs: "restore": outputs that have the tokens get all of them back; "shrink": they leave with fewer.
    stream: which of several sequences of tokens, from 0 (a vision tower, a language model); the one with most blocks.
    until: the block at whose end all tokens come back.
    proportional: attention counts a merged token as often as it has tokens; not for models trained with merging.
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
            reason = (
                "; ".join(str(each.reason) for each in job.declined) or f"there is no {self.meets} in a residual block"
            )
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
        if not edit.changed and min(wanted) < job.span.size:
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
            if any(b > a for a, b in zip([span, *found], found, strict=False)) or min(found) < 1:
                raise BadOption(
                    what=f"{self.name}: counts={found} of {span} tokens", way_out="give counts that fall, from 1"
                )
            return found
        return self.falling(edit, job, SCHEDULES[self.schedule])

    def falling(self, edit: Edit, job: Job, schedule: Schedule) -> list[int]:
        """The counts of a schedule that end with `keep`, or are within the budget. Raises as `wanted`."""
        keep = self.default_keep if self.keep is None and self.budget is None else self.keep
        if keep is not None:
            span = job.span.size
            return schedule.ending(span, len(job.places), max(1, int(keep * span)), job.reducer.least)
        return self.solved(edit, job, schedule)

    def solved(self, edit: Edit, job: Job, schedule: Schedule) -> list[int]:
        """The most tokens with which the program is within the budget."""
        budget = self.budget
        assert budget is not None
        if budget.kind not in ("flops", "macs"):
            raise BadOption(
                what=f"{self.name} has a budget of {budget.kind}", way_out="give --flops or --macs, keep or counts"
            )
        allowed = limit(edit.program, budget)
        whole = limit(edit.program, Budget(budget.kind, 1.0))
        model, span, number = job.segments(budget.kind), job.span.size, len(job.places)
        least = job.reducer.least
        extra, found = 0, None
        for _ in range(6):  # what choosing and folding cost is known when they are there, and changes little
            found = schedule.within(span, number, least, partial(_fits, model, allowed - extra))
            if found is None:
                floor = schedule.ending(span, number, 1, least)
                raise unreachable(edit.program.name, budget, model(floor) + extra, whole)
            trial = job.again()
            trial.run(found)
            now = trial.total(budget.kind)
            if now <= allowed:
                return found
            extra = max(trial.added(budget.kind), extra + 1)
        raise unreachable(edit.program.name, budget, model(found or ()) + extra, whole)


def _fits(model: Segments, allowed: float, wanted: Sequence[int]) -> bool:
    return model(wanted) <= allowed


@dataclass(frozen=True)
class Places:
    """Of the stream that a pass would reduce: its number, how many blocks it has, which tokens may go."""

    stream: int
    blocks: int
    span: Span


def places_of(options: TokenReduction, program: Program) -> Places:
    """Where a pass would reduce tokens. Raises NothingToCut."""
    job = options.job(Edit(program))
    if not job.places:
        reason = (
            "; ".join(str(each.reason) for each in job.declined) or f"there is no {options.meets} in a residual block"
        )
        raise NothingToCut(file=program.name, kind="flops", asked="fewer tokens", name=options.name, reason=reason)
    return Places(job.stream, job.blocks, job.span)


class Job:
    """One run over a graph."""

    def __init__(self, options: TokenReduction, edit: Edit) -> None:
        self.options, self.edit = options, edit
        self.reducer, self.score = options.made_reducer, options.made_score
        self.places: list[Site] = []
        self.until: Node | None = None
        self.stream = self.blocks = 0
        self.chain: list[Attention] = []  # of the stream's blocks
        self.orders = Orders()
        self.attentions = attentions(edit)
        self.prepare()

    def prepare(self) -> None:
        """Find the places, and the tokens that may go. Raises BadOption."""
        options = self.options
        axes = infer(self.edit.program)
        found, self.declined = blocks(self.edit, axes)
        if not found:
            return
        groups = streams(found)
        if options.stream is not None and not 0 <= options.stream < len(groups):
            raise BadOption(what=f"{options.name}: stream={options.stream}", way_out=f"there are {len(groups)}, from 0")
        longest = max(range(len(groups)), key=lambda n: (len(groups[n]), n))
        self.stream = longest if options.stream is None else options.stream
        found = groups[self.stream]
        if options.until is not None:
            if not 0 <= options.until < len(found):
                raise BadOption(
                    what=f"{options.name}: until={options.until}", way_out=f"blocks are 0 to {len(found) - 1}"
                )
            self.until = found[options.until].end
        self.blocks, self.chain = len(found), [block.attention for block in found]
        every = sites(found, options.where)
        last = len(found) - 1
        numbers_ = options.default_sites(len(found)) if options.sites is None else options.sites
        if unknown := [n for n in numbers_ if not 0 <= n <= last]:
            raise BadOption(what=f"{options.name}: sites={unknown}", way_out=f"blocks are 0 to {last}")
        self.places = [site for site in every if options.where == "input" or site.block in numbers_]
        if self.places:
            self.span = span_of(axes, self.places[0], options.tokens)
            if self.reducer.scored and self.score.look == "following":
                self.places = [site for site in self.places if site.following is not None]

    def region(self, site: Site, span: Span) -> Region:
        """What runs on fewer tokens behind a place."""
        return region_of(
            self.edit,
            site.at,
            span,
            ordered=self.reducer.ordered or self.options.positions == "renumber",
            at_stream=self.reducer.drops,
            shrinks=lambda _: self.options.outputs == "shrink",
            until=self.until,
        )

    def cut(self, region: Region, kept: Kept) -> None:
        """Let a region run on the kept tokens."""
        cut(self.edit, region, kept, positions=self.options.positions, orders=self.orders)

    def again(self) -> Job:
        """The same job on a graph of its own."""
        job = type(self)(self.options, Edit(self.edit.program))
        job.reducer = self.reducer
        return job

    def segments(self, kind: str) -> Segments:
        """The cost of the program by the tokens between places."""
        job = self.again()
        first = job.region(job.places[0], job.span)
        return segments_of(job.edit, first, [site.at for site in job.places], kind)

    def total(self, kind: str) -> int:
        """FLOPs or multiply-adds of the graph as it is."""
        return _cost([node for node in self.edit.graph.nodes if node.op == "call_function"], kind)

    def added(self, kind: str) -> int:
        """What choosing tokens, folding them and bringing them back costs."""
        alive = set(self.edit.graph.nodes)
        return _cost([node for node in self.edit.inserted if node in alive], kind)

    def run(self, wanted: Sequence[int]) -> None:
        """Reduce to as many tokens at each place."""
        span, size = self.span, None
        sized: dict[Node, tuple[Attention, Node, Span]] = {}
        now = span.size
        for number, (site, count) in enumerate(zip(self.places, wanted, strict=True)):
            if count >= now:
                continue
            if count < self.reducer.least(now):
                raise BadOption(
                    what=f"{self.options.name}: {count} of {now} tokens at {site.name}",
                    way_out=f"{self.reducer.name} leaves at least {self.reducer.least(now)}",
                )
            here = replace(span, dim=site.dim).of(now)
            region = self.region(site, here)
            if not region.nodes:
                self.declined.append(Decline(place(site.at), "nothing behind it can do with fewer tokens"))
                continue
            kept = self.choose(site, here, region, size, count, self.reducer.at(number))
            self.cut(region, kept)
            mark(self.edit, kept, now)
            self.edit.count("place")
            self.edit.details.append({"block": site.block, "name": site.name, "tokens": now, "kept": count})
            for reader, reason in {(each.where, each.reason) for each in region.blocked}:
                self.declined.append(Decline(reader, f"gets all tokens: {reason}"))
            now = count
            if self.reducer.sized:
                size = kept.size
                inside = set(region.nodes)
                for attention in self.attentions:
                    if attention.node in inside and size is not None:
                        sized[attention.node] = (attention, size, Span(0, here.start, here.start + count))
        if self.options.proportional:
            for attention, own, where in sized.values():
                add_to_keys(self.edit, attention, self.bias(attention, own, where))
        self.finish()
        self.edit.graph.eliminate_dead_code()

    def finish(self) -> None:
        """What is done when all places are."""

    def bias(self, attention: Attention, size: Node, where: Span) -> Node:
        """The logarithm of how many tokens each key stands for, (b, keys)."""
        keys = int(attention.key.meta["val"].shape[-1 if attention.turned else -2])

        def log(size: Tensor) -> Tensor:
            behind = keys - where.stop
            return torch.nn.functional.pad(size.log(), (where.start, behind)) if where.start or behind else size.log()

        return inline(self.edit, log, size, like=attention.node)

    def choose(
        self, site: Site, here: Span, region: Region, size: Node | None, count: int, reducer: reducers.Reducer
    ) -> Kept:
        """Insert what decides which tokens stay."""
        score = self.score

        def chosen(view: View) -> Kept:
            return reducer(view, score(view) if reducer.scored else None, count)

        return self.look(site, here, region, size, chosen)

    def look(
        self, site: Site, here: Span, region: Region, size: Node | None, function: Callable[..., Any], *more: Any
    ) -> Any:
        """Insert what `function` makes of the view of a place, and of `more`, in front of its region."""
        first, x = region.nodes[0], site.at
        attention = site.attention
        if self.reducer.scored and self.score.look == "following":
            attention = site.following
        given: dict[str, Any] = {}
        if attention is not None:
            given = {"query": attention.query, "key": attention.key, "value": attention.value, "mask": attention.mask}
            if not attention.fused and attention is not site.following:
                given["map"] = attention.node
            if attention is site.following:
                last = isinstance(self.score, scores.LastAttention)
                given = computed_early(self.edit, site.at, site.dim, given, first, last=last)
        turned = attention.turned if attention is not None else False
        fixed: dict[str, Any] = {
            "scale": attention.scale if attention is not None else 1.0,
            "causal": attention is not None and attention.causal,
            "proportional": self.options.proportional,
            "start": here.start,
            "stop": here.stop,
        }

        def seen(x: Tensor, given: dict[str, Any], size: Tensor | None, more: tuple[Any, ...]) -> Any:
            x = x[None] if here.dim == 0 else x if here.dim == 1 else x.movedim(here.dim, 1)
            samples = x.shape[0]
            own = {name: value for name, value in given.items() if value is not None}
            if turned and "key" in own:
                own["key"] = own["key"].transpose(-1, -2)
            own = {name: value if name == "mask" else heads(value, samples) for name, value in own.items()}
            if "key" in own:
                own |= {name: repeated(own[name], own["query"].shape[1]) for name in ("key", "value")}
            return function(View(x, size=size, **fixed, **own), *more)

        try:
            return inline(self.edit, seen, x, given, size, more, like=first)
        except AssertionError as problem:
            raise CannotShrink(axis=site.name, reason=str(problem)) from problem


def _cost(calls: Sequence[Node], kind: str) -> int:
    return sum(int(getattr(cost_of(node, numbers), kind)) for node in calls)
