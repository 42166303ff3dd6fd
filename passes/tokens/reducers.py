"""What becomes of tokens: which stay, and what the others are merged into. The table is the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

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
class Bipartite(Reducer):
    """Bipartite soft matching: of every other token the most similar to one of the rest are merged into that.

    Tokens are compared by the cosine of their keys, averaged over heads. Merged tokens are means, weighted by how many
    tokens each stands for. Those that stay of the first half come first, then the second half. At most half of the
    tokens can go at one place.

    Source: Bolya et al., Token Merging, ICLR 2023, arXiv:2210.09461.
    """

    name: ClassVar[str] = "bipartite"

    def __call__(self, view: View, scores: Tensor | None, count: int) -> Kept:
        span = view.stop - view.start
        # Every other token of all, so that class tokens in front do not change who is compared with whom.
        first = torch.arange(view.start % 2, span, 2)
        second = torch.arange(1 - view.start % 2, span, 2)
        metric = normalize(view.metric, dim=-1)
        a, b = metric.index_select(1, first), metric.index_select(1, second)
        best, partner = torch.matmul(a, b.transpose(-1, -2)).max(-1)
        gone = span - count
        order = best.argsort(dim=-1, descending=True)
        stay = order[:, gone:].sort(-1).values if view.start else order[:, gone:]
        batch = view.x.shape[0]
        sources = order[:, :gone]
        slots = rows(partner, sources) + (first.shape[0] - gone)
        index = torch.cat([stay * 2 + view.start % 2, second.expand(batch, -1)], 1)
        weight = view.sizes
        size = add_rows(rows(weight, index), slots, rows(weight, sources * 2 + view.start % 2))
        return Kept(index, sources * 2 + view.start % 2, slots, weight=weight, size=size)

    def least(self, span: int) -> int:
        return span - span // 2


REDUCERS: dict[str, type[Reducer]] = {each.name: each for each in (TopK, Bipartite)}


def make(name: str, **options: Any) -> Reducer:
    """A registered reducer with its options. Raises KeyError, TypeError as `criteria.make`."""
    return REDUCERS[name](**options)
