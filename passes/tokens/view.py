"""What scores and reducers see of a place where tokens are reduced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class View:
    """Tensors of one place, traced: shapes are known, values are not.

    `x` (b, n, c) is the stream. Of the attention that scores look at: `query` (all, or only the last), `key` and
    `value` (b, h, n, d), `mask` what is added to its logits or a boolean one, `map` (b, h, n, n) where it is written
    out. `hidden` (b, n, neurons) is what the feed-forward part in front has. `size` (b, span) counts the tokens that
    each stands for; None where they stand for themselves. `proportional`: attention counts each as often.
    """

    x: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    map: Tensor | None = None
    hidden: Tensor | None = None
    size: Tensor | None = None
    scale: float = 1.0
    causal: bool = False
    proportional: bool = True
    start: int = 0
    stop: int = 0

    @property
    def tokens(self) -> Tensor:
        """The tokens that may go, (b, span, c)."""
        return self.x[:, self.start : self.stop]

    @property
    def sizes(self) -> Tensor:
        """How many tokens each of the span stands for, (b, span)."""
        return self.x.new_ones(self.x.shape[0], self.stop - self.start) if self.size is None else self.size

    @property
    def metric(self) -> Tensor:
        """The mean over heads of the span's keys, (b, span, d); its features where there is no attention."""
        if self.key is None:
            return self.tokens
        return self.key.mean(1)[:, self.start : self.stop]

    def rows(self, queries: slice) -> Tensor:
        """Attention that some queries pay to all tokens, (b, h, queries, n): these rows of the map, not all of it."""
        if self.map is not None:
            return self.map[:, :, queries]
        assert self.query is not None, "the score needs attention"
        assert self.key is not None
        query = self.query[:, :, queries]
        logits = torch.matmul(query, self.key.transpose(-1, -2)) * self.scale
        n = self.key.shape[2]
        if self.size is not None and self.proportional:
            logits = logits + pad(self.size.log(), (self.start, n - self.stop))[:, None, None]
        if self.mask is not None:
            mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., queries, :]
            logits = torch.where(mask, logits, -torch.inf) if mask.dtype is torch.bool else logits + mask
        elif self.causal:
            seen = torch.ones(n, n, dtype=torch.bool).tril()[queries]
            logits = torch.where(seen, logits, -torch.inf)
        return logits.softmax(-1)


def single(x: Tensor) -> Tensor:
    """Values of half precision in single: choices are made of sums, and rounding these in between would decide some."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def heads(x: Tensor, samples: int) -> Tensor:
    """Queries, keys or values as (b, h, n, d), however many dimensions samples and heads had."""
    return x if x.dim() == 4 else x.reshape(samples, -1, *x.shape[-2:])


def repeated(key: Tensor, count: int) -> Tensor:
    """Keys for `count` heads of queries, (b, count, n, d)."""
    return key if key.shape[1] == count else key.repeat_interleave(count // key.shape[1], 1)


_STATIC = ("scale", "causal", "proportional", "start", "stop")

pytree.register_dataclass(
    View,
    field_names=[name for name in View.__dataclass_fields__ if name not in _STATIC],
    drop_field_names=list(_STATIC),
)
