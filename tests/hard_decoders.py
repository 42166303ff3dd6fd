"""Decoders with grouped queries, in the ways that they are written, for the table in `hard_nets.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.transformer_nets import RMSNorm, rotate


@dataclass(frozen=True)
class Style:
    """How a decoder is written; all of them are the same idea."""

    attention: str = "gqa"  # a method of GroupedAttention
    rotary: str = "half"  # or "interleaved"
    feed: str = "separate"  # or "swiglu" (fused), "geglu" (fused)
    fused: bool = False  # one projection for q, k and v, which have different sizes
    groups: int = 2
    norm_heads: bool = False  # q and k are normed head by head
    tied: bool = False


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs, as GPT-J and the first LLaMA have it; (b, h, n, d) by (n, d / 2)."""
    left, right = x[..., ::2], x[..., 1::2]
    return torch.stack([left * cos - right * sin, left * sin + right * cos], -1).flatten(-2)


class GroupedAttention(nn.Module):
    """Several query heads share a head of keys and values; the heads are wider than dim / heads."""

    def __init__(self, dim: int, heads: int, size: int, style: Style) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.style = heads, style.groups, size, style
        sizes = [heads * size, style.groups * size, style.groups * size]
        self.sizes = sizes
        self.project = nn.ModuleList(
            [nn.Linear(dim, sum(sizes), bias=False)] if style.fused else [nn.Linear(dim, o, bias=False) for o in sizes]
        )
        self.norms = nn.ModuleList([RMSNorm(size), RMSNorm(size)] if style.norm_heads else [])
        self.out = nn.Linear(heads * size, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, _ = x.shape
        parts = self.project[0](x).split(self.sizes, -1) if self.style.fused else [p(x) for p in self.project]
        q, k, v = (part.view(b, n, -1, self.size) for part in parts)
        if self.style.norm_heads:
            q, k = (norm(t) for norm, t in zip(self.norms, (q, k), strict=True))
        turn = rotate if self.style.rotary == "half" else rotate_pairs
        q, k = (turn(t.transpose(1, 2), cos, sin) for t in (q, k))
        y = getattr(self, self.style.attention)(q, k, v.transpose(1, 2))
        return self.out(y.reshape(b, n, self.heads * self.size))

    def gqa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def repeat(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def expand(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, g, n, d = k.shape
        k, v = (t[:, :, None].expand(b, g, self.heads // g, n, d).reshape(b, self.heads, n, d) for t in (k, v))
        mask = torch.full((n, n), float("-inf")).triu(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None]).transpose(1, 2)

    def einsum(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, n, d = q.shape
        q = q.reshape(b, self.groups, self.heads // self.groups, n, d)
        scores = torch.einsum("bgrnd,bgmd->bgrnm", q, k) / d**0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        return torch.einsum("bgrnm,bgmd->bngrd", scores.softmax(-1, dtype=torch.float32), v)

    def matmul(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, d = q.shape[2:]
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * d**-0.5
        scores = torch.where(torch.ones(n, n).tril().bool(), scores, torch.finfo(scores.dtype).min)
        return torch.matmul(F.softmax(scores, -1), v).transpose(1, 2).contiguous()


class FeedForward(nn.Module):
    """SwiGLU or GEGLU; gate and up in one projection where it is fused."""

    def __init__(self, dim: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        sizes = [hidden, hidden] if kind == "separate" else [2 * hidden]
        self.up = nn.ModuleList(nn.Linear(dim, size, bias=False) for size in sizes)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = [layer(x) for layer in self.up] if self.kind == "separate" else self.up[0](x).chunk(2, -1)
        return self.down((F.gelu(gate) if self.kind == "geglu" else F.silu(gate)) * up)


class GroupedDecoder(nn.Module):
    """LLaMA's structure: RMS norm, rotary positions, grouped queries, gated feed-forward; logits of all positions."""

    def __init__(self, style: Style, dim: int = 28, heads: int = 6, size: int = 8, hidden: int = 44) -> None:
        super().__init__()
        self.size, self.style = size, style
        self.word = nn.Embedding(90, dim)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    RMSNorm(dim),
                    GroupedAttention(dim, heads, size, style),
                    RMSNorm(dim),
                    FeedForward(dim, hidden + layer, style.feed),
                ]
            )
            for layer in range(2)
        )
        self.norm, self.head = RMSNorm(dim), nn.Linear(dim, 90, bias=False)
        if style.tied:
            self.head.weight = self.word.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        n = input_ids.shape[1]
        frequency = 10000.0 ** (-torch.arange(0, self.size, 2).float() / self.size)
        angle = torch.outer(torch.arange(n).float(), frequency)
        if self.style.rotary == "half":
            angle = torch.cat([angle, angle], -1)
        cos, sin = angle.cos(), angle.sin()
        x = self.word(input_ids)
        for first, attention, second, feed in self.blocks:
            x = x + attention(first(x), cos, sin)
            x = x + feed(second(x))
        return self.head(self.norm(x))
