"""What becomes of tokens: which stay, and what the others are merged into. The table is the registry."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from graphopt.cut import Kept, add_rows, rows
from graphopt.passes.tokens.view import View


@dataclass(frozen=True)
class Reducer(ABC):
    """Chooses `count` tokens of a span.

    `scored` says whether it wants scores; `ordered` whether tokens that stay keep their order; `drops` whether some
    leave no trace, so that all tokens come back in the stream as it was; `sized` whether it counts what each token
    stands for, for proportional attention.
    """

    name: ClassVar[str]
    scored: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    sized: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, view: View, scores: Tensor | None, count: int) -> Kept:
        """Which tokens stay, and what becomes of the others. `scores` (b, span)."""

    def least(self, span: int) -> int:
        """How many of `span` tokens must stay at one place."""
        return 1

    def at(self, place: int) -> Reducer:
        """The reducer of one place, counted from 0."""
        return self


@dataclass(frozen=True)
class TopK(Reducer):
    """The tokens of the highest scores stay, in their order; the others are dropped."""

    name: ClassVar[str] = "top-k"
    scored: ClassVar[bool] = True
    ordered: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    sized: ClassVar[bool] = False

    def __call__(self, view: View, scores: Tensor | None, count: int) -> Kept:
        assert scores is not None
        return Kept(index=scores.topk(count, -1).indices.sort(-1).values)


@dataclass(frozen=True)
class Listed(Reducer):
    """The same tokens go for every sample.

    gone: their places in the span.
    """

    name: ClassVar[str] = "listed"
    ordered: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    sized: ClassVar[bool] = False
    gone: tuple[int, ...] = ()

    def __call__(self, view: View, scores: Tensor | None, count: int) -> Kept:
        stay = [place for place in range(view.stop - view.start) if place not in self.gone]
        assert len(stay) == count, f"{len(stay)} tokens stay, not {count}"
        return Kept(index=torch.tensor(stay).expand(view.x.shape[0], -1))


@dataclass(frozen=True)
class Bipartite(Reducer):
    """Bipartite soft matching: of every other token the most similar to one of the rest are merged into that.

    Tokens are compared by the cosine of their keys, averaged over heads. Merged tokens are means, weighted by how many
    tokens each stands for. Those that stay of the first half come first, then the second half. At most half of the
    tokens can go at one place.

    features: compare tokens by their features instead of their keys.

    Source: Bolya et al., Token Merging, ICLR 2023, arXiv:2210.09461.
    """

    name: ClassVar[str] = "bipartite"
    features: bool = False

    def __call__(self, view: View, scores: Tensor | None, count: int) -> Kept:
        span = view.stop - view.start
        # Class tokens in front count as places, as published; text does not.
        special = 0 < view.start <= 2
        parity = view.start % 2 if special else 0
        first, second = torch.arange(parity, span, 2), torch.arange(1 - parity, span, 2)
        metric = normalize(view.tokens if self.features else view.metric, dim=-1)
        a, b = metric.index_select(1, first), metric.index_select(1, second)
        best, partner = torch.matmul(a, b.transpose(-1, -2)).max(-1)
        gone = span - count
        order = best.argsort(dim=-1, descending=True)
        stay = order[:, gone:].sort(-1).values if special else order[:, gone:]
        merged = order[:, :gone]
        slots = rows(partner, merged) + (first.shape[0] - gone)
        index = torch.cat([stay * 2 + parity, second.expand(view.x.shape[0], -1)], 1)
        return _merged(view, index, merged * 2 + parity, slots)

    def least(self, span: int) -> int:
        return span - span // 2


@dataclass(frozen=True)
class PruneMerge(Reducer):
    """Prune, then merge: sorted by score, tokens behind the first `through` are dropped, and of these those behind the
    first that stay are merged into the most similar one that stays.

    A merged token is the plain mean of what it stands for; what it counts for in attention grows by the similarity.
    Tokens that stay are sorted by score.

    share: of the tokens that go, how many are dropped, everywhere or place by place, where `through` does not say.
    through: how many tokens are left when some are dropped and none merged, place by place.

    Source: Chen et al., DiffRate, ICCV 2023, arXiv:2305.17997.
    """

    name: ClassVar[str] = "prune-merge"
    scored: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    share: float | tuple[float, ...] = 0.5
    through: tuple[int, ...] = ()

    def left(self, span: int, count: int) -> int:
        """How many of `span` tokens are left when some are dropped and none merged, of a reducer for one place."""
        share = self.share[0] if isinstance(self.share, tuple) else self.share
        through = self.through[0] if self.through else span - round(share * (span - count))
        return min(max(through, count), span)

    def __call__(self, view: View, scores: Tensor | None, count: int) -> Kept:
        assert scores is not None
        through = self.left(view.stop - view.start, count)
        order = scores.argsort(dim=-1, descending=True)
        index, merged = order[:, :count], order[:, count:through]
        size = rows(view.sizes, index)
        if through == count:
            return Kept(index, size=size)
        features = normalize(view.tokens, dim=-1)
        likeness = torch.matmul(rows(features, merged), rows(features, index).transpose(-1, -2))
        best, slots = likeness.max(-1)
        size = add_rows(size, slots, rows(view.sizes, merged) * best)
        return Kept(index, merged, slots, size=size)

    def at(self, place: int) -> PruneMerge:
        share = self.share[place] if isinstance(self.share, tuple) else self.share
        return replace(self, share=share, through=self.through[place : place + 1])


@dataclass(frozen=True)
class Transform(Reducer):
    """Many to many: each new token is a mean of all, weighted by a softmax over the new ones of how alike they are.

    The tokens of the highest scores are centres; of two that are nearly the same, one. Every token is shared out among
    the centres by the cosine of their keys; a centre goes to itself alone. All tokens come back as they were shared
    out.

    tau: the temperature of the softmax; towards 0 it is a merge.
    spread: tokens with a cosine above it to one of a higher score become centres last.
    hard_self: a centre goes to itself alone.

    Source: Zeng et al., Token Transforming, arXiv:2506.05709; the choice of centres and the temperature are ours.
    """

    name: ClassVar[str] = "transform"
    scored: ClassVar[bool] = True
    tau: float = 0.1
    spread: float = 0.95
    hard_self: bool = True

    def __call__(self, view: View, scores: Tensor | None, count: int) -> Kept:
        assert scores is not None
        metric = normalize(view.metric, dim=-1)
        if self.spread < 1:
            alike = torch.matmul(metric, metric.transpose(-1, -2)) > self.spread
            hidden = (alike & (scores[:, None, :] > scores[:, :, None])).any(-1)
            low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
            scores = torch.where(hidden, scores - (high - low) - 1, scores)
        index = scores.topk(count, -1).indices.sort(-1).values
        centres = rows(metric, index)
        shares = (torch.matmul(metric, centres.transpose(-1, -2)) / self.tau).softmax(-1)  # (b, span, count)
        if self.hard_self:
            own = torch.eye(count, dtype=shares.dtype).expand(view.x.shape[0], -1, -1)
            shares = shares.scatter(1, index[..., None].expand(-1, -1, count), own)
        weighted = (shares * view.sizes[..., None]).transpose(-1, -2)
        size = weighted.sum(-1)
        return Kept(index, matrix=weighted / size[..., None], spread=shares, size=size)


@dataclass(frozen=True)
class Contextual(Reducer):
    """The tokens of the highest scores stay, in order; the others are gathered into `context` more, behind them.

    Of the others, evenly spaced ones are targets, and the rest go to the target whose key is most alike.

    context: how many contextual tokens, everywhere or place by place.
    rule: "mean": a contextual token is the mean of its target and all that went there; "add": target + mean of the
        others, twice the norm, as the published code has it.

    Source: Xu et al., VisionDrop, arXiv:2506.22283.
    """

    name: ClassVar[str] = "contextual"
    scored: ClassVar[bool] = True
    drops: ClassVar[bool] = False
    sized: ClassVar[bool] = False
    context: int | tuple[int, ...] = 6
    rule: Literal["mean", "add"] = "mean"

    def at(self, place: int) -> Contextual:
        return replace(self, context=self.context[place]) if isinstance(self.context, tuple) else self

    def __call__(self, view: View, scores: Tensor | None, count: int) -> Kept:
        assert scores is not None
        assert isinstance(self.context, int), "of one place"
        span = view.stop - view.start
        context = min(self.context, count, span - count + self.context)
        order = scores.argsort(dim=-1, descending=True)
        dominant = order[:, : count - context].sort(-1).values
        if not context:
            return Kept(dominant)
        others = order[:, count - context :].sort(-1).values
        step = max(1, others.shape[1] // context)
        places = list(range(0, others.shape[1], step))[:context]
        left = sorted(set(range(others.shape[1])) - set(places))
        targets = others[:, torch.tensor(places)]
        index = torch.cat([dominant, targets], 1)
        if not left:
            return Kept(index)
        rest = others[:, torch.tensor(left)]
        metric = normalize(view.metric, dim=-1)
        nearest = torch.matmul(rows(metric, rest), rows(metric, targets).transpose(-1, -2)).max(-1).indices
        slots = nearest + (count - context)
        if self.rule == "mean":
            return Kept(index, rest, slots)
        goes = one_hot(slots, count).to(view.x.dtype)  # (b, rest, count)
        means = goes / goes.sum(1, keepdim=True).clamp(min=1)
        matrix = one_hot(index, span).to(view.x.dtype)
        return Kept(index, matrix=matrix + torch.matmul(means.transpose(-1, -2), one_hot(rest, span).to(view.x.dtype)))


@dataclass(frozen=True)
class Cluster(Reducer):
    """k-means of the keys: tokens of the highest scores are the first centres, and keep their cluster; a new token is
    the mean of its cluster, weighted by how many tokens each stands for.

    steps: how often centres move before tokens are given to them for good.

    Source: Lloyd's algorithm with cosines, a fixed number of steps; clustering of tokens as in Zeng et al., TCFormer,
    CVPR 2022, arXiv:2204.08680.
    """

    name: ClassVar[str] = "cluster"
    scored: ClassVar[bool] = True
    steps: int = 2

    def __call__(self, view: View, scores: Tensor | None, count: int) -> Kept:
        assert scores is not None
        order = scores.argsort(dim=-1, descending=True)
        index, rest = order[:, :count].sort(-1).values, order[:, count:]
        metric = normalize(view.metric, dim=-1)
        seeds, others = rows(metric, index), rows(metric, rest)
        centres = seeds
        slots = torch.matmul(others, centres.transpose(-1, -2)).max(-1).indices
        for _ in range(self.steps):
            centres = normalize(add_rows(seeds, slots, others), dim=-1)
            slots = torch.matmul(others, centres.transpose(-1, -2)).max(-1).indices
        return _merged(view, index, rest, slots)


@dataclass(frozen=True)
class Pool(Reducer):
    """Average pooling of the grid that the tokens are; all come back as copies of their cell.

    rows, columns: of the grid; a square where they are not said. As many cells as stay, in the shape of the grid.

    Source: the sparse tokens of Chang et al., FlexDiT, arXiv:2412.06028.
    """

    name: ClassVar[str] = "pool"
    ordered: ClassVar[bool] = True
    rows: int = 0
    columns: int = 0

    def __call__(self, view: View, scores: Tensor | None, count: int) -> Kept:
        span = view.stop - view.start
        high = self.rows or math.isqrt(span)
        wide = self.columns or span // high
        divisor = math.isqrt(span // count) if span % count == 0 else 0
        fits = divisor and divisor * divisor * count == span and high % divisor == wide % divisor == 0
        assert high * wide == span, f"{span} tokens are no grid of {high} x {wide}"
        assert fits, f"{count} tokens are no coarser grid of {high} x {wide}"
        place = torch.arange(span)
        cell = (place // wide) // divisor * (wide // divisor) + place % wide // divisor
        samples = view.x.shape[0]
        spread = one_hot(cell, count).to(view.x.dtype).expand(samples, -1, -1)
        weighted = (spread * view.sizes[..., None]).transpose(-1, -2)
        size = weighted.sum(-1)
        corner = torch.arange(count)
        corner = corner // (wide // divisor) * divisor * wide + corner % (wide // divisor) * divisor
        return Kept(corner.expand(samples, -1), matrix=weighted / size[..., None], spread=spread, size=size)


def _merged(view: View, index: Tensor, sources: Tensor, slots: Tensor) -> Kept:
    """Means, weighted by sizes; sizes add up."""
    weight = view.sizes
    size = add_rows(rows(weight, index), slots, rows(weight, sources))
    return Kept(index, sources, slots, weight=weight, size=size)


REDUCERS: dict[str, type[Reducer]] = {
    each.name: each for each in (TopK, Listed, Bipartite, PruneMerge, Transform, Contextual, Cluster, Pool)
}


def make(name: str, **options: Any) -> Reducer:
    """A registered reducer with its options. Raises KeyError, TypeError as `criteria.make`."""
    return REDUCERS[name](**options)
