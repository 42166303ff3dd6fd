"""What token reduction adds to a program, in the spellings that occur: gathers, scatters, similarities, sorts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Samples, tokens, channels, tokens kept, tokens that are merged; kept, merged <= tokens."""

    b: int
    n: int
    c: int
    kept: int
    merged: int


def data(sizes: Sizes) -> dict[str, Tensor]:
    """Small integers, so that sums are exact and many elements equal; duplicates among `slots`, none in `index`."""
    b, n, c, kept, merged = sizes.b, sizes.n, sizes.c, sizes.kept, sizes.merged
    g = torch.Generator().manual_seed(n * c + kept)

    def small(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=g).float() / 2

    return {
        "x": small(b, n, c),
        "index": torch.stack([torch.randperm(n, generator=g)[:kept] for _ in range(b)]),
        "slots": torch.randint(0, kept, (b, merged), generator=g),
        "scores": small(b, n),
        "key": small(b, 2, n, 8),
    }


Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], "Tensor | tuple[Tensor, ...]"]


def _rows(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])


def _masked(scores: Tensor) -> Tensor:
    first = torch.arange(scores.shape[-2])[:, None] == 0
    return torch.where(first, -torch.inf, scores)


def _halves(x: Tensor) -> Tensor:
    return x[:, ::2] @ x[:, 1::2].transpose(-1, -2)


# Functions of x (b, n, c), index (b, kept), slots (b, merged), scores (b, n), key (b, 2, n, 8).
FORMS: dict[str, Form] = {
    "gather by index": lambda x, i, s, w, k: x[torch.arange(x.shape[0])[:, None], i],
    "gather": lambda x, i, s, w, k: x.gather(1, _rows(i, x)),
    "gather heads": lambda x, i, s, w, k: k.gather(2, i[:, None, :, None].expand(-1, 2, -1, 8)),
    "gather sizes": lambda x, i, s, w, k: w.gather(1, i),
    "select": lambda x, i, s, w, k: x.index_select(1, i[0]),
    "mask on both sides": lambda x, i, s, w, k: (k[0, 0] @ k[0, 1].T).index_select(0, i[0]).index_select(1, i[0]),
    "scatter_add": lambda x, i, s, w, k: x[:, : i.shape[1]].scatter_add(1, _rows(s, x), x[:, : s.shape[1]]),
    "scatter_add to zeros": lambda x, i, s, w, k: torch.zeros(x.shape[0], i.shape[1], x.shape[2]).scatter_add(
        1, _rows(s, x), x[:, : s.shape[1]]
    ),
    "scatter_add of sizes": lambda x, i, s, w, k: w[:, : i.shape[1]].scatter_add(1, s, w[:, : s.shape[1]]),
    "index_add": lambda x, i, s, w, k: x[:, : i.shape[1]].index_add(1, s[0], x[:, : s.shape[1]]),
    "index_put": lambda x, i, s, w, k: x.index_put((torch.arange(x.shape[0])[:, None], i), x[:, : i.shape[1]]),
    "negative places": lambda x, i, s, w, k: x.index_put((torch.tensor(-1),), x[0] + 1, accumulate=True),
    "amax": lambda x, i, s, w, k: x[:, : i.shape[1]].scatter_reduce(1, _rows(s, x), x[:, : s.shape[1]], "amax"),
    "scatter back": lambda x, i, s, w, k: x.scatter(1, _rows(i, x), x[:, : i.shape[1]] + 1),
    "segment mean": lambda x, i, s, w, k: (
        torch.zeros(x.shape[0], i.shape[1], x.shape[2]).scatter_add(1, _rows(s, x), x[:, : s.shape[1]])
        / torch.zeros(x.shape[0], i.shape[1]).scatter_add(1, s, w[:, : s.shape[1]].abs()).clamp_min(1)[..., None]
    ),
    "most similar": lambda x, i, s, w, k: _halves(x).max(-1),
    "most similar, masked": lambda x, i, s, w, k: _masked(_halves(x)).max(-1),
    "greatest": lambda x, i, s, w, k: x.max(-1),
    "topk of few": lambda x, i, s, w, k: w.topk(1)[0] + w.topk(min(3, w.shape[1]))[0].sum(),
    "argsort": lambda x, i, s, w, k: w.argsort(dim=-1, descending=True, stable=True),
    "sort": lambda x, i, s, w, k: w.sort(dim=-1, stable=True),
    "restore order": lambda x, i, s, w, k: i.sort(-1),
    "class attention": lambda x, i, s, w, k: (k[:, :, :1] @ k.transpose(-1, -2) * 0.125).softmax(-1).mean(1),
}


class Tokens(nn.Module):
    """All forms, or some, of the same inputs."""

    def __init__(self, names: tuple[str, ...] = tuple(FORMS)) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor, index: Tensor, slots: Tensor, scores: Tensor, key: Tensor) -> list[Tensor]:
        results: list[Tensor] = []
        for name in self.names:
            result = FORMS[name](x, index, slots, scores, key)
            results += [result] if isinstance(result, Tensor) else list(result)
        return results
