"""One run of a token reduction over a graph: the places, what is chosen there, and what runs on fewer tokens behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import infer
from graphopt.cost.formulas import counts as cost_of
from graphopt.cost.formulas import numbers
from graphopt.cut import Kept, cut, front
from graphopt.edit import Edit
from graphopt.errors import BadOption, CannotShrink, Decline
from graphopt.inline import inline
from graphopt.orders import Orders
from graphopt.passes.tokens import reducers, scores
from graphopt.passes.tokens.attention import Attention, add_to_keys, attentions
from graphopt.passes.tokens.following import computed_early
from graphopt.passes.tokens.protect import span_of
from graphopt.passes.tokens.segments import Segments, segments_of
from graphopt.passes.tokens.sites import Block, Site, blocks, length, sites, streams
from graphopt.passes.tokens.view import View, heads, repeated, single
from graphopt.place import place
from graphopt.region import Region, Span, region_of
from graphopt.token_trace import choices, mark

if TYPE_CHECKING:
    from graphopt.passes.tokens.base import TokenReduction


class Job:
    """One run over a graph. `compact`: convolutions along the tokens slide over those that stay."""

    compact: ClassVar[bool] = False

    def __init__(self, options: TokenReduction, edit: Edit) -> None:
        self.options, self.edit = options, edit
        self.reducer, self.score = options.made_reducer, options.made_score
        self.places: list[Site] = []
        self.until: Node | None = None
        self.stream = self.blocks = 0
        self.whole: set[str] = set()  # of which it was said that they get all tokens
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
        groups = streams(self.edit, found)
        if options.stream is not None and not 0 <= options.stream < len(groups):
            raise BadOption(what=f"{options.name}: stream={options.stream}", way_out=f"there are {len(groups)}, from 0")
        longest = max(range(len(groups)), key=lambda n: (len(groups[n]), length(groups[n]), n))
        self.stream = longest if options.stream is None else options.stream
        found = groups[self.stream]
        numbers_ = self.numbers([block.end for block in found])
        self.chain = [block.attention for block in found]
        every = sites(found, options.where)
        self.places = [site for site in every if options.where == "input" or site.block in numbers_]
        self.places = self.on_one_side(self.places, every)
        if self.places:
            self.span = span_of(axes, self.places[0], options.tokens, every[0], _elsewhere(groups, self.stream))
            self.score = self.score_of(self.score)
            if self.reducer.scored and self.score.look == "following":
                self.places = [site for site in self.places if site.following is not None]
            if self.reducer.scored and self.score.look == "neurons":
                reason = f"{self.score.name} looks at neurons, and no feed-forward part of plain layers ends there"
                self.declined += [Decline(place(site.at), reason) for site in self.places if site.hidden is None]
                self.places = [site for site in self.places if site.hidden is not None]

    def score_of(self, score: scores.Score) -> scores.Score:
        """The score, or where it looks at a class token that is none, since it may go, the attention of all tokens.

        Raises:
            BadOption: it is told which is the class token, and that may go.
        """
        if not isinstance(score, scores.ClassAttention) or not self.reducer.scored or self.options.tokens is not None:
            return score
        if not self.span.start <= score.token < self.span.stop or score.token == self.span.hole:
            return score
        if score != scores.ClassAttention():
            raise BadOption(
                what=f"{self.options.name}: token {score.token} may go like others, it is no class token",
                way_out="give score=mean-attention, or which may go: tokens=START:STOP",
            )
        found = scores.MeanAttention()
        self.edit.note(f"there is no class token: {found.name}, what each token gets from all, stands for {score.name}")
        return found

    def on_one_side(self, places: list[Site], every: list[Site]) -> list[Site]:
        """Places that no earlier pass has reduced tokens between: those behind all of that, where none are named.

        Raises:
            BadOption: such places are named.
        """
        earlier = choices(self.edit)
        sides = {site: tuple(site.at in choice.behind for choice in earlier) for site in every}
        behind = [site for site in places if sides[site] == sides[places[-1]]]
        if behind == places:
            return places
        if self.options.sites is not None:
            border = next(site.block for site in every if sides[site] == sides[behind[0]])
            raise BadOption(
                what=f"{self.options.name}: an earlier pass reduces tokens between sites={places[0].block} and "
                f"{places[-1].block}",
                way_out=f"name sites in front of block {border}, or from there on",
            )
        reason = "an earlier pass reduces tokens behind it; sites can name what is in front of that"
        self.declined += [Decline(place(site.at), reason) for site in places if site not in behind]
        return behind

    def numbers(self, ends: Sequence[Node]) -> Sequence[int]:
        """The blocks that have a place, of those that end so; notes how many there are, and where all tokens come back.

        Raises:
            BadOption: there are no such blocks.
        """
        options, self.blocks = self.options, len(ends)
        chosen = options.default_sites(self.blocks) if options.sites is None else options.sites
        chosen = () if options.where == "input" else chosen  # one place, in front of all blocks
        until = [] if options.until is None else [options.until]
        if list(chosen) != sorted(set(chosen)):
            raise BadOption(
                what=f"{options.name}: sites={','.join(map(str, chosen))}", way_out="name each block once, in order"
            )
        for option, own in (("until", until), ("sites", chosen)):
            if unknown := [number for number in own if not 0 <= number < self.blocks]:
                shown = unknown if option == "sites" else unknown[0]
                raise BadOption(what=f"{options.name}: {option}={shown}", way_out=f"blocks are 0 to {self.blocks - 1}")
        self.until = ends[until[0]] if until else None
        return chosen

    @property
    def why_nowhere(self) -> str:
        """Why there is no place."""
        reasons = "; ".join(dict.fromkeys(str(each.reason) for each in self.declined))
        return reasons or f"there is no {self.options.meets} in a residual block"

    def region(self, site: Site, span: Span) -> Region:
        """What runs on fewer tokens behind a place."""
        found = partial(
            region_of,
            self.edit,
            site.at,
            span,
            ordered=self.reducer.ordered or self.options.positions == "renumber",
            shrinks=lambda _: self.options.outputs == "shrink",
            until=self.until,
            compact=self.compact,
            counted=not self.reducer.drops,
        )
        region = found(at_stream=self.reducer.drops)
        # What is computed of merged tokens comes back at all their places, where it has their form; else they do.
        if not self.reducer.drops and any(region.span_of(node) is None for node, _ in region.ends):
            return found(at_stream=True)
        return region

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
                why = f": {region.blocked[0].reason}" if region.blocked else ""
                self.declined.append(Decline(place(site.at), f"nothing behind it can do with fewer tokens{why}"))
                continue
            kept = self.choose(site, here, region, size, count, self.reducer.at(number))
            self.cut(region, kept)
            mark(self.edit, kept, now)
            self.edit.count("place")
            self.edit.details.append(
                {"block": site.block, "name": site.name, "where": self.options.where, "tokens": now, "kept": count}
            )
            self.say(region.blocked)
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

    def say(self, blocked: Sequence[Decline]) -> None:
        """Note what gets all tokens, each with the first reason: later ones are about what this pass inserted."""
        for each in blocked:
            if each.where not in self.whole:
                self.whole.add(each.where)
                reason = each.reason.removesuffix(f" ({each.where})")
                self.declined.append(Decline(each.where, f"gets all tokens: {reason}"))

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
        if self.reducer.scored and self.score.look == "neurons":
            given["hidden"] = site.hidden
        turned = attention.turned if attention is not None else False
        fixed: dict[str, Any] = {
            "scale": attention.scale if attention is not None else 1.0,
            "causal": attention is not None and attention.causal,
            "proportional": self.options.proportional,
            "start": here.start,
            "stop": here.stop,
        }

        def seen(x: Tensor, given: dict[str, Any], size: Tensor | None, more: tuple[Any, ...]) -> Any:
            x = single(front(x, here.dim))
            samples = x.shape[0]
            own: dict[str, Any] = {name: single(value) for name, value in given.items() if value is not None}
            hidden = front(own.pop("hidden"), here.dim) if "hidden" in own else None
            if turned and "key" in own:
                own["key"] = own["key"].transpose(-1, -2)
            own = {name: value if name == "mask" else heads(value, samples) for name, value in own.items()}
            if "key" in own:
                own |= {name: repeated(own[name], own["query"].shape[1]) for name in ("key", "value")}
            return function(View(x, hidden=hidden, size=size, **fixed, **own), *more)

        try:
            return inline(self.edit, seen, x, given, size, more, like=first)
        except AssertionError as problem:
            raise CannotShrink(axis=site.name, reason=str(problem)) from problem


def _elsewhere(groups: Sequence[list[Block]], own: int) -> str:
    """What an error says of the other sequences of tokens."""
    others = [
        f"stream={n} ({group[0].name} to {group[-1].name}, {length(group)} tokens)"
        for n, group in enumerate(groups)
        if n != own
    ]
    return f"; or take another sequence: {', '.join(others)}" if others else ""


def _cost(calls: Sequence[Node], kind: str) -> int:
    return sum(int(getattr(cost_of(node, numbers), kind)) for node in calls)
