"""Drop the tokens of a vision state-space model that its scans say least about, and keep the geometry of its scans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node

from graphopt.axes import infer
from graphopt.cost.formulas import base_name
from graphopt.cut import Kept
from graphopt.edit import Edit
from graphopt.errors import BadOption
from graphopt.inline import inline
from graphopt.passes.tokens import reducers
from graphopt.passes.tokens.base import TokenReduction
from graphopt.passes.tokens.job import Job
from graphopt.passes.tokens.protect import span_of
from graphopt.passes.tokens.scans import Decay, bridge, decays, scans
from graphopt.passes.tokens.schedule import Schedule
from graphopt.passes.tokens.sites import Site, Where
from graphopt.passes.tokens.view import View, single
from graphopt.region import Region, Span


@dataclass(frozen=True)
class PruneScanTokens(TokenReduction):
    """Behind a few blocks, keep the tokens that the scan gives most for; every direction visits them in its own order.

        before  x (b, 197, c) -> 24 x [scan left to right + scan right to left]
        after   x (b, 197, c) -> 5 blocks -> top-k of relu(y).sum (b, 157, c) -> 5 blocks -> ...

    y is what the scans of a block give together. A direction that visits tokens by a stored permutation, or backwards,
    visits those that stay in the order that they had in it; what it adds by place is looked up. A class token in the
    middle stays, in the middle of those that stay, whose number is odd with it. Convolutions along the tokens slide
    over those that stay. Without budget, keep or counts, each place keeps four fifths.

    align: at a place whose token is gone the state of a scan decays by what the token before it says, and takes nothing
        in; else tokens that stay are neighbours. Where the decay is an exponential, of a sum or at each step.

    Source: Zhan et al., "Exploring Token Pruning in Vision State Space Models", NeurIPS 2024, arXiv:2409.18962.
    Differs: which D decays at a place that is gone is not published; y is not the flipped one of a backward scan.
    """

    name: ClassVar[str] = "prune-scan-tokens"
    meets: ClassVar[str] = "scan by cumulative sums, or step by step with equal steps whose state is read nowhere else,"

    score: str = "clipped"
    schedule: str = "ratio"
    where: Where = "block"
    align: bool = True

    def check(self) -> None:
        """Options that contradict each other. Raises BadOption."""
        if self.where != "block":
            raise BadOption(what=f"{self.name}: where={self.where}", way_out="its places are behind blocks")
        if self.made_score.look != "none":
            raise BadOption(
                what=f"{self.name}: score={self.score}", way_out="no attention is there: give clipped, norm"
            )
        if not (self.made_reducer.drops and self.made_reducer.ordered):
            way_out = "neighbours in a scan are none in the image: tokens are dropped, by top-k"
            raise BadOption(what=f"{self.name}: reducer={self.reducer}", way_out=way_out)
        if self.given:
            super().check()

    @property
    def given(self) -> bool:
        """Whether the user says how many tokens stay."""
        return any(each is not None for each in (self.budget, self.keep, self.counts))

    def default_sites(self, blocks: int) -> Sequence[int]:
        """Behind 5, 10 and 15 of 24 blocks."""
        return sorted({max(blocks * part // 24, 1) - 1 for part in (5, 10, 15)})

    def job(self, edit: Edit) -> Job:
        return ScanJob(self, edit)

    def wanted(self, edit: Edit, job: Job) -> list[int]:
        """See TokenReduction; with a class token in the middle an even number on top of it."""
        found = super().wanted(edit, job)
        return [count - count % 2 for count in found] if job.span.hole is not None else found

    def falling(self, edit: Edit, job: Job, schedule: Schedule) -> list[int]:
        if self.given:
            return super().falling(edit, job, schedule)
        found, now = [], job.span.size
        for _ in job.places:  # four fifths of those beside the class token, and it; an odd number in all
            whole = math.ceil(0.8 * now)
            now = min(now, whole if job.span.hole is None else whole + (whole + 1) % 2 - 1)
            found.append(now)
        return found


class ScanJob(Job):
    """Blocks with scans instead of attention."""

    options: PruneScanTokens
    compact: ClassVar[bool] = True

    def prepare(self) -> None:
        """Find the blocks and the places behind them. Raises BadOption."""
        found, self.declined = scans(self.edit)
        self.decays: dict[Node, Decay] = {}
        if not found:
            return
        chosen = self.numbers([scan.total for scan in found])
        self.scans = {number: scan for number, scan in enumerate(found) if number in chosen}
        self.places = [Site(n, scan.name, scan.total, scan.dim, None, None) for n, scan in self.scans.items()]
        if not self.places:
            return
        first = self.places[0]
        hole = middle_of(first) if self.options.tokens is None else None
        size = int(first.at.meta["val"].shape[first.dim])
        self.span = (
            span_of(infer(self.edit.program), first, self.options.tokens)
            if hole is None
            else Span(first.dim, 0, size, hole)
        )

    def choose(
        self, site: Site, here: Span, region: Region, size: Node | None, count: int, reducer: reducers.Reducer
    ) -> Kept:
        score = self.score

        def chosen(x: Tensor, y: Tensor) -> Kept:
            if here.dim != 1:
                x, y = x.movedim(here.dim, 1), y.movedim(here.dim, 1)
            x, y = single(here.chosen(x)), single(here.chosen(y))
            given = y if score.name == "clipped" else x
            return reducer(View(x, start=0, stop=here.size), score(View(given, start=0, stop=here.size)), count)

        kept: Kept = inline(self.edit, chosen, site.at, self.scans[site.block].output, like=region.nodes[0])
        return kept

    def cut(self, region: Region, kept: Kept) -> None:
        super().cut(region, kept)
        self.decays |= {each.node: each for each in decays(region, self.orders.places)}

    def finish(self) -> None:
        for decay in self.decays.values() if self.options.align else ():
            bridge(self.edit, decay)
            self.edit.count("aligned scan")


def middle_of(site: Site) -> int | None:
    """The place of a token of its own between two halves of others, which the stream was put together from."""
    node = site.at
    size = int(node.meta["val"].shape[site.dim])
    for each in reversed(list(node.graph.nodes)[: list(node.graph.nodes).index(node)]):
        if base_name(each) != "cat" or each.meta["val"].shape != node.meta["val"].shape:
            continue
        parts: Any = each.args[0]
        sizes = [int(part.meta["val"].shape[site.dim]) for part in parts]
        if sum(sizes) == size and len(sizes) == 3 and sizes[1] == 1 < min(sizes[0], sizes[2]):
            return sizes[0]
    return None
