"""How much each token matters, computed by the program itself for each sample. The table is the registry."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from graphopt.passes.tokens.neurons import core_neurons, matches
from graphopt.passes.tokens.view import View

Look = Literal["own", "following", "neurons", "none"]


@dataclass(frozen=True)
class Score(ABC):
    """A value for each token of a span: (b, span), the higher the more it matters.

    look: at which attention: that of the block it stands in ("own"), that of the next block, whose queries and keys are
        computed for it ("following"), at what its feed-forward part has ("neurons"), or "none".
    """

    name: ClassVar[str]
    look: Look = "own"

    @abstractmethod
    def __call__(self, view: View) -> Tensor:
        """The scores, (b, span)."""


@dataclass(frozen=True)
class ClassAttention(Score):
    """The attention that the class token pays to each, mean over heads: one row of the map.

    token: the place of the class token.

    Source: Liang et al., EViT, ICLR 2022, arXiv:2202.07800.
    """

    name: ClassVar[str] = "class-attention"
    token: int = 0

    def __call__(self, view: View) -> Tensor:
        return view.rows(slice(self.token, self.token + 1)).mean((1, 2))[:, view.start : view.stop]


@dataclass(frozen=True)
class LastAttention(Score):
    """The attention that the last token (of the prompt) pays to each in the next block, mean over heads.

    Its row alone is computed, from the next block's norm and projections, positions included.

    Source: Xing et al., PyramidDrop, CVPR 2025, arXiv:2410.17247.
    """

    name: ClassVar[str] = "last-attention"
    look: Look = "following"

    def __call__(self, view: View) -> Tensor:
        assert view.key is not None or view.map is not None, "there is attention"
        return view.rows(slice(-1, None)).mean((1, 2))[:, view.start : view.stop]


@dataclass(frozen=True)
class MeanAttention(Score):
    """The attention that each token receives from all, mean over heads and queries."""

    name: ClassVar[str] = "mean-attention"

    def __call__(self, view: View) -> Tensor:
        return view.rows(slice(None)).mean((1, 2))[:, view.start : view.stop]


@dataclass(frozen=True)
class SpanAttention(Score):
    """The attention that each token of the span receives from the span: of images by images, whatever the text says.

    Source: Xu et al., VisionDrop, arXiv:2506.22283.
    """

    name: ClassVar[str] = "span-attention"

    def __call__(self, view: View) -> Tensor:
        return view.rows(slice(view.start, view.stop)).mean((1, 2))[:, view.start : view.stop]


@dataclass(frozen=True)
class PageRank(Score):
    """Importance in the graph of attention: `steps` steps of p <- p M from equal p, M the softmax of sharpened logits.

    The share of each head is squared, averaged over heads, and its root taken.

    steps: how often p is passed on.
    sharpness: logits are multiplied by it.
    damping: the share of p that is spread evenly at each step.

    Source: Zhong et al., AIM, ICCV 2025, arXiv:2412.03248.
    """

    name: ClassVar[str] = "pagerank"
    steps: int = 5
    sharpness: float = 10.0
    damping: float = 0.0

    def __call__(self, view: View) -> Tensor:
        assert view.query is not None, "pagerank needs queries and keys"
        sharp = View(
            view.x, view.query, view.key, view.value, view.mask,
            scale=view.scale * self.sharpness, causal=view.causal, start=view.start, stop=view.stop,
        )  # fmt: skip
        chain = sharp.rows(slice(None))
        n = chain.shape[-1]
        p = chain.new_full((*chain.shape[:2], 1, n), 1 / n)
        for _ in range(self.steps):
            p = (1 - self.damping) * torch.matmul(p, chain) + self.damping / n
        return p[:, :, 0].square().mean(1).sqrt()[:, view.start : view.stop]


@dataclass(frozen=True)
class Norm(Score):
    """The Euclidean norm of each token's features."""

    name: ClassVar[str] = "norm"
    look: Look = "none"

    def __call__(self, view: View) -> Tensor:
        return view.tokens.norm(dim=-1)


@dataclass(frozen=True)
class Clipped(Score):
    """The sum over channels of what is positive: how much a state-space scan gives out at each token.

    Source: Zhan et al., token pruning in vision state-space models, NeurIPS 2024, arXiv:2409.18962.
    """

    name: ClassVar[str] = "clipped"
    look: Look = "none"

    def __call__(self, view: View) -> Tensor:
        return view.tokens.relu().sum(-1)


@dataclass(frozen=True)
class Distinct(Score):
    """How unlike the others a token is: one minus the mean cosine of its key with theirs."""

    name: ClassVar[str] = "distinct"

    def __call__(self, view: View) -> Tensor:
        keys = normalize(view.metric, dim=-1)
        return 1 - (keys * keys.mean(1, keepdim=True)).sum(-1)


@dataclass(frozen=True)
class Entropy(Score):
    """How concentrated the attention is that a token pays: the negative entropy of its row, mean over heads."""

    name: ClassVar[str] = "entropy"

    def __call__(self, view: View) -> Tensor:
        rows = view.rows(slice(view.start, view.stop))
        return (rows * (rows + 1e-12).log()).sum(-1).mean(1)


@dataclass(frozen=True)
class CoreMatch(Score):
    """How many of a sentence's core neurons fire for each token; the earlier of two first.

    rho: of the neurons that fire for a token, the share that fires most, and is the token's core.
    beta: of all neurons, the share that is in most tokens' cores, and is the sentence's.

    Source: Wang et al., CoreMatching, ICML 2025, arXiv:2505.19235.
    """

    name: ClassVar[str] = "core-match"
    look: Look = "neurons"
    rho: float = 0.2
    beta: float = 0.4

    def __call__(self, view: View) -> Tensor:
        assert view.hidden is not None, "core-match needs a feed-forward part"
        found = matches(view.hidden, core_neurons(view.hidden, self.rho, self.beta))[:, view.start : view.stop]
        # Whole numbers are often equal. Among equal ones the order is fixed, so that runs agree everywhere.
        return found * found.shape[1] - torch.arange(found.shape[1])


@dataclass(frozen=True)
class Random(Score):
    """The control: a fixed random order, the same for every sample.

    seed: which.
    """

    name: ClassVar[str] = "random"
    look: Look = "none"
    seed: int = 0

    def __call__(self, view: View) -> Tensor:
        count = view.stop - view.start
        order = random.Random(self.seed).sample(range(count), count)
        return torch.tensor(order, dtype=torch.float32).expand(view.x.shape[0], -1)


@dataclass(frozen=True)
class Uniform(Score):
    """Evenly spaced: the first of every so many, in bit-reversed order, so that any number of them is spread out."""

    name: ClassVar[str] = "uniform"
    look: Look = "none"

    def __call__(self, view: View) -> Tensor:
        count = view.stop - view.start
        bits = max(count - 1, 1).bit_length()
        order = [int(f"{place:0{bits}b}"[::-1], 2) for place in range(count)]
        return torch.tensor([-float(rank) for rank in order]).expand(view.x.shape[0], -1)


SCORES: dict[str, type[Score]] = {
    each.name: each
    for each in (
        ClassAttention, LastAttention, MeanAttention, SpanAttention, PageRank, Norm, Clipped, Distinct, Entropy,
        CoreMatch, Random, Uniform,
    )
}  # fmt: skip


def make(name: str, **options: Any) -> Score:
    """A registered score with its options. Raises KeyError, TypeError as `criteria.make`."""
    return SCORES[name](**options)
