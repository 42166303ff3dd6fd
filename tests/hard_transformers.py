"""Transformers for images and encoders whose heads, widths and tokens are hard to follow, for `hard_nets.py`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(dim: int, hidden: int) -> nn.Module:
    """Linear, gelu, linear."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


# One attention, written in many ways ---------------------------------------------------------------------------------


class SpelledAttention(nn.Module):
    """Multi-head self-attention of (b, n, c), heads of `size`; `spelling` says how it is written."""

    def __init__(self, dim: int, heads: int, size: int, spelling: str) -> None:
        super().__init__()
        self.heads, self.size, self.spelling = heads, size, spelling
        separate = spelling in ("bmm", "einsum")
        self.project = nn.ModuleList(
            [nn.Linear(dim, heads * size) for _ in range(3)] if separate else [nn.Linear(dim, 3 * heads * size)]
        )
        self.out = nn.Linear(heads * size, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        return self.out(getattr(self, self.spelling)(x).reshape(b, n, self.heads * self.size))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All (b, h, n, d); the result (b, n, h, d)."""
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(self.size)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def bmm(self, x: Tensor) -> Tensor:
        """Batch and heads in one dimension, as fairseq and transformers once had it."""
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, self.heads, self.size).transpose(1, 2).contiguous().view(b * self.heads, n, self.size)
            for layer in self.project
        )
        weights = torch.bmm(q * self.size**-0.5, k.transpose(1, 2)).softmax(-1)
        return torch.bmm(weights, v).view(b, self.heads, n, self.size).transpose(1, 2)

    def einsum(self, x: Tensor) -> Tensor:
        """Heads stay behind the tokens."""
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.heads, self.size) for layer in self.project)
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(self.size**-0.5).softmax(-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)

    def unbind(self, x: Tensor) -> Tensor:
        """One projection to (3, h, d), as timm has it."""
        b, n, _ = x.shape
        qkv = self.project[0](x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        return self.attend(*qkv.unbind(0))

    def index(self, x: Tensor) -> Tensor:
        """One projection to (3, h, d), the three taken by index."""
        b, n, _ = x.shape
        qkv = self.project[0](x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        return self.attend(qkv[0], qkv[1], qkv[2])

    def interleaved(self, x: Tensor) -> Tensor:
        """One projection to (h, 3, d), as GPT-NeoX has it: each head's three lie together."""
        b, n, _ = x.shape
        qkv = self.project[0](x).view(b, n, self.heads, 3 * self.size).transpose(1, 2)
        return F.scaled_dot_product_attention(*qkv.chunk(3, -1)).transpose(1, 2)

    def chunk(self, x: Tensor) -> Tensor:
        """One projection, cut in three before the heads are told apart."""
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, self.size).transpose(1, 2) for t in self.project[0](x).chunk(3, -1))
        return self.attend(q, k, v)


class SpelledEncoder(nn.Module):
    """Token features, two blocks, a mean: (b, n, 9) to (b, 7)."""

    def __init__(self, spelling: str, dim: int = 28, heads: int = 3, size: int = 8) -> None:
        super().__init__()
        self.enter = nn.Linear(9, dim)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(dim),
                    SpelledAttention(dim, heads, size, spelling),
                    nn.LayerNorm(dim),
                    mlp(dim, 50 + layer),
                ]
            )
            for layer in range(2)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for first, attention, second, feed in self.blocks:
            x = x + attention(first(x))
            x = x + feed(second(x))
        return self.head(self.norm(x).mean(1))


class ModuleAttention(nn.Module):
    """nn.MultiheadAttention, once with its averaged weights as a second result, and nn.TransformerEncoderLayer."""

    def __init__(self, dim: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(9, dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.other = nn.MultiheadAttention(dim, heads, kdim=9, vdim=9, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(dim, heads, 50, activation="gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(dim, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.enter(x)
        z = self.norm(y)
        y = y + self.attention(z, z, z, need_weights=False)[0]
        z, weights = self.other(y, x, x)
        return self.head(self.layer(y + z)), weights


# Images --------------------------------------------------------------------------------------------------------------


class DistilledVit(nn.Module):
    """DeiT (arXiv:2012.12877) with its distillation token: two tokens and two heads, which are averaged."""

    def __init__(self, dim: int = 28, heads: int = 3, size: int = 8, patch: int = 8, side: int = 5) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, patch, patch)
        self.cls, self.dist = (nn.Parameter(torch.randn(1, 1, dim) * 0.5) for _ in range(2))
        self.position = nn.Parameter(torch.randn(1, side * side + 2, dim) * 0.5)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [nn.LayerNorm(dim), SpelledAttention(dim, heads, size, "unbind"), nn.LayerNorm(dim), mlp(dim, 44)]
            )
            for _ in range(2)
        )
        self.norm, self.head, self.head_dist = nn.LayerNorm(dim), nn.Linear(dim, 7), nn.Linear(dim, 7)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(b, -1, -1), self.dist.expand(b, -1, -1), x), 1) + self.position
        for first, attention, second, feed in self.blocks:
            x = x + attention(first(x))
            x = x + feed(second(x))
        x = self.norm(x)
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2


class PooledBlock(nn.Module):
    """MViTv2's block: depthwise convolutions pool the heads of q, k and v, the width grows inside the attention."""

    def __init__(self, i: int, o: int, heads: int, stride: int, stride_kv: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.size, self.stride = heads, o // heads, stride
        self.norm1, self.norm2 = nn.LayerNorm(i), nn.LayerNorm(o)
        self.qkv, self.out = nn.Linear(i, 3 * o), nn.Linear(o, o)
        self.widen = nn.Linear(i, o) if i != o else None
        size = self.size
        self.pools = nn.ModuleList(
            nn.Conv2d(size, size, 3, s, 1, groups=size, bias=False) for s in (stride, stride_kv, stride_kv)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(3))
        self.mlp = mlp(o, hidden)

    def forward(self, x: Tensor, side: int) -> tuple[Tensor, int]:
        b, n, _ = x.shape
        y = self.norm1(x)
        parts = []
        for part, pool, norm in zip(
            self.qkv(y).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4), self.pools, self.norms,
            strict=True,
        ):  # fmt: skip
            image = part.reshape(b * self.heads, side, side, self.size).permute(0, 3, 1, 2)
            parts.append(norm(pool(image).flatten(2).transpose(1, 2).reshape(b, self.heads, -1, self.size)))
        q, k, v = parts
        z = q + F.scaled_dot_product_attention(q, k, v)
        skip = x if self.widen is None else self.widen(y)
        if self.stride > 1:
            skip = skip.transpose(1, 2).reshape(b, -1, side, side)
            skip = F.max_pool2d(skip, 3, self.stride, 1).flatten(2).transpose(1, 2)
            side = (side + self.stride - 1) // self.stride
        x = skip + self.out(z.transpose(1, 2).reshape(b, side * side, -1))
        return x + self.mlp(self.norm2(x)), side


class MultiscaleVit(nn.Module):
    """MViTv2 (arXiv:2112.01526): fewer tokens and twice the channels and heads from stage to stage."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 18, 7, 4, 3)
        self.blocks = nn.ModuleList([PooledBlock(18, 18, 2, 1, 2, 50), PooledBlock(18, 36, 4, 2, 1, 60)])
        self.norm, self.head = nn.LayerNorm(36), nn.Linear(36, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x, side = block(x, side)
        return self.head(self.norm(x).mean(1))


class UnitBlock(nn.Module):
    """Hiera's block: attention inside units of tokens, whose queries may be pooled by a maximum."""

    def __init__(self, i: int, o: int, heads: int, units: int, stride: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.size, self.units, self.stride = heads, o // heads, units, stride
        self.norm1, self.norm2 = nn.LayerNorm(i), nn.LayerNorm(o)
        self.qkv, self.out, self.mlp = nn.Linear(i, 3 * o), nn.Linear(o, o), mlp(o, hidden)
        self.widen = nn.Linear(i, o) if i != o else None

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.norm1(x)
        skip = x if self.widen is None else self.widen(y)
        # Tokens lie as (place in the unit, unit), so the first places of all units can be pooled together.
        qkv = self.qkv(y).reshape(b, n // self.units, self.units, 3, self.heads, self.size).permute(3, 0, 4, 2, 1, 5)
        q, k, v = qkv.unbind(0)
        if self.stride > 1:
            q = q.view(b, self.heads, self.units, self.stride, -1, self.size).amax(3)
            skip = skip.view(b, self.stride, n // self.stride, -1).max(1).values
        z = F.scaled_dot_product_attention(q, k, v)
        x = skip + self.out(z.permute(0, 3, 2, 1, 4).reshape(b, -1, self.heads * self.size))
        return x + self.mlp(self.norm2(x))


class Hiera(nn.Module):
    """Hiera (arXiv:2306.00989): plain blocks on units of 4 tokens, then one on all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 18, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 36, 18) * 0.5)
        self.blocks = nn.ModuleList(
            [UnitBlock(18, 18, 2, 9, 1, 50), UnitBlock(18, 30, 3, 9, 4, 60), UnitBlock(30, 30, 3, 1, 1, 70)]
        )
        self.norm, self.head = nn.LayerNorm(30), nn.Linear(30, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        b, _, c = x.shape
        x = x.view(b, 3, 2, 3, 2, c).permute(0, 2, 4, 1, 3, 5).reshape(b, 36, c)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class DitBlock(nn.Module):
    def __init__(self, dim: int, heads: int, size: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.attention, self.mlp = SpelledAttention(dim, heads, size, "index"), mlp(dim, hidden)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(condition).chunk(6, 1)
        y = self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1)
        x = x + gate1.unsqueeze(1) * self.attention(y)
        y = self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
        return x + gate2.unsqueeze(1) * self.mlp(y)


class Dit(nn.Module):
    """DiT (arXiv:2212.09748): time and class choose shifts, scales and gates; patches in, patches out."""

    def __init__(self, dim: int = 28, patch: int = 2, side: int = 5, channels: int = 4) -> None:
        super().__init__()
        self.patch_size, self.side, self.channels, self.frequencies = patch, side, channels, 11
        self.patch = nn.Conv2d(channels, dim, patch, patch)
        self.position = nn.Parameter(torch.randn(1, side * side, dim) * 0.5, requires_grad=False)
        self.time = nn.Sequential(nn.Linear(2 * self.frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(6, dim)
        self.blocks = nn.ModuleList(DitBlock(dim, 3, 8, 44) for _ in range(2))
        self.norm, self.last = nn.LayerNorm(dim, elementwise_affine=False), nn.Linear(dim, patch * patch * 2 * channels)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10000.0) * torch.arange(self.frequencies).float() / self.frequencies)
        angles = t[:, None].float() * rates[None]
        condition = self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.label(label)
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulate(condition).chunk(2, 1)
        x = self.last(self.norm(x) * (1 + scale[:, None]) + shift[:, None])
        p, s, c = self.patch_size, self.side, 2 * self.channels
        return torch.einsum("nhwpqc->nchpwq", x.reshape(-1, s, s, p, p, c)).reshape(-1, c, s * p, s * p)


# Two sequences -------------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another; a bias per head where `spans` is given (T5's)."""

    def __init__(self, dim: int, heads: int, size: int, spans: int = 0) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.kv = nn.Linear(dim, heads * size, bias=False), nn.Linear(dim, 2 * heads * size, bias=False)
        self.out = nn.Linear(heads * size, dim, bias=False)
        self.bias = nn.Embedding(spans, heads) if spans else None

    def forward(self, x: Tensor, y: Tensor, causal: bool = False) -> Tensor:
        b, n, _ = x.shape
        m = y.shape[1]
        q = self.q(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k, v = self.kv(y).view(b, m, 2, self.heads, self.size).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3)
        if self.bias is not None:
            apart = torch.arange(m)[None, :] - torch.arange(n)[:, None]
            spans = self.bias.weight.shape[0]
            scores = scores + self.bias(apart.clamp(-(spans // 2), spans // 2) + spans // 2).permute(2, 0, 1)
        if causal:
            scores = scores.masked_fill(torch.ones(n, m).triu(1).bool(), float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class EncoderDecoder(nn.Module):
    """T5's structure (arXiv:1910.10683): two sequences, cross-attention, one table of words for both."""

    def __init__(self, dim: int = 28, heads: int = 3, size: int = 6, words: int = 50) -> None:
        super().__init__()
        self.word = nn.Embedding(words, dim)
        self.encode, self.self_, self.cross = (CrossAttention(dim, heads, size, spans) for spans in (9, 7, 0))
        self.feed = nn.ModuleList([mlp(dim, 40), mlp(dim, 46)])
        self.norms = nn.ModuleList(nn.LayerNorm(dim, bias=False) for _ in range(6))
        self.head = nn.Linear(dim, words, bias=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = self.word(source), self.word(target)
        z = self.norms[0](x)
        x = x + self.encode(z, z)
        x = x + self.feed[0](self.norms[1](x))
        z = self.norms[2](y)
        y = y + self.self_(z, z, causal=True)
        y = y + self.cross(self.norms[3](y), x)
        y = y + self.feed[1](self.norms[4](y))
        return self.head(self.norms[5](y))
