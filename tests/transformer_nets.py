"""Transformers for the zoo in `models.py`, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, from one projection (`fused`) or from three."""

    def __init__(self, dim: int, heads: int, fused: bool = True, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.project = nn.ModuleList([nn.Linear(dim, 3 * dim)] if fused else [nn.Linear(dim, dim) for _ in range(3)])
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        if len(self.project) == 1:
            q, k, v = self.project[0](x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).view(b, n, self.heads, c // self.heads).transpose(1, 2) for layer in self.project)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(x.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """A transformer block: layer norm before (`pre`) or after each half."""

    def __init__(self, dim: int, heads: int, pre: bool, causal: bool = False, approximate: str = "none") -> None:
        super().__init__()
        self.pre = pre
        self.attention = Attention(dim, heads, fused=pre, causal=causal)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate), nn.Linear(4 * dim, dim), nn.Dropout(0.1)
        )
        self.norm1, self.norm2 = (nn.LayerNorm(dim, 1e-6 if pre else 1e-12) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.pre:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class VisionTransformer(nn.Module):
    """DeiT (arXiv:2012.12877) without the distillation token; the defaults are DeiT-S."""

    def __init__(self, dim=384, heads=6, layers=12, image=224, patch=16, classes=1000) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.Sequential(*[Block(dim, heads, pre=True) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(dim, 1e-6), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Encoder(nn.Module):
    """BERT-like (arXiv:1810.04805), with a padding mask and mean pooling; the defaults are MiniLM's sizes."""

    def __init__(self, dim=384, heads=12, layers=6, sequence=128, words=30522) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(words, dim), nn.Embedding(sequence, dim)
        self.norm = nn.LayerNorm(dim, 1e-12)
        self.blocks = nn.ModuleList([Block(dim, heads, pre=False) for _ in range(layers)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.word(input_ids) + self.position(place))
        mask = attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, mask)
        weight = attention_mask[..., None].to(x.dtype)
        return {"last_hidden_state": x, "embedding": (x * weight).sum(1) / weight.sum(1)}


class Decoder(nn.Module):
    """GPT-2-like: causal, layer norm first, tied embeddings; prefill, logits of all positions."""

    def __init__(self, dim=768, heads=12, layers=12, sequence=128, words=50257) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(words, dim), nn.Embedding(sequence, dim)
        self.blocks = nn.Sequential(
            *[Block(dim, heads, pre=True, causal=True, approximate="tanh") for _ in range(layers)]
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, words, bias=False)
        self.head.weight = self.word.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.word(input_ids) + self.position(torch.arange(input_ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) on (b, h, n, d), halves rotated as transformers does it."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def tables(places: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary positions, (n, size)."""
    frequency = 10000.0 ** (-torch.arange(0, size, 2).float() / size)
    angle = torch.outer(places.float(), frequency)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


class LlamaBlock(nn.Module):
    def __init__(self, dim: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, dim // heads
        self.q, self.o = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k, self.v = (nn.Linear(dim, groups * self.size, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: list[Tensor] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        b, n, c = x.shape
        y = self.norm1(x)
        q = rotate(self.q(y).view(b, n, self.heads, self.size).transpose(1, 2), cos, sin)
        k = rotate(self.k(y).view(b, n, self.groups, self.size).transpose(1, 2), cos, sin)
        v = self.v(y).view(b, n, self.groups, self.size).transpose(1, 2)
        if cache is not None:
            cache += [k, v]
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, c))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """LLaMA-like decoder: RMSNorm, rotary positions, grouped queries, SwiGLU; logits of all positions."""

    def __init__(self, dim=512, heads=8, groups=2, layers=8, hidden=1376, words=32000) -> None:
        super().__init__()
        self.word, self.size = nn.Embedding(words, dim), dim // heads
        self.blocks = nn.ModuleList([LlamaBlock(dim, heads, groups, hidden) for _ in range(layers)])
        self.norm, self.head = RMSNorm(dim), nn.Linear(dim, words, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        cos, sin = tables(torch.arange(input_ids.shape[1]), self.size)
        x = self.word(input_ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


class SwinBlock(nn.Module):
    """Attention in windows, shifted by half a window in every other block, with a relative position bias."""

    def __init__(self, dim: int, heads: int, grid: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.grid, self.window, self.shift = heads, grid, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.bias = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.02)
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None, :] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])
        region = torch.zeros(1, grid, grid, 1)
        for row, part in enumerate((slice(-window), slice(-window, -shift or None), slice(-shift, None))):
            for column, other in enumerate((slice(-window), slice(-window, -shift or None), slice(-shift, None))):
                region[:, part, other] = row * 3 + column
        ids = self.windows(region).squeeze(-1)
        mask = (ids[:, None, :] != ids[:, :, None]).float() * -100.0
        self.register_buffer("mask", mask[:, None] if shift else None)

    def windows(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, c)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        y = self.norm1(x).view(b, self.grid, self.grid, c)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self.windows(y)
        q, k, v = self.qkv(y).view(-1, self.window**2, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.bias[self.index.view(-1)].view(*self.index.shape, -1).permute(2, 0, 1)[None]
        if self.mask is not None:
            count = self.mask.shape[0]
            scores = scores.view(b, count, self.heads, *self.index.shape) + self.mask[None]
            scores = scores.view(-1, self.heads, *self.index.shape)
        y = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, self.window**2, c))
        side = self.grid // self.window
        y = (
            y.view(b, side, side, self.window, self.window, c)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(b, self.grid, self.grid, c)
        )
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y.reshape(b, n, c)
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """One stage of Swin (arXiv:2103.14030) behind a patch embedding; the defaults are the first stage of Swin-T."""

    def __init__(self, dim=96, heads=3, grid=56, window=7, layers=2, patch=4, classes=1000) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, patch, patch)
        self.blocks = nn.Sequential(
            *[SwinBlock(dim, heads, grid, window, window // 2 if place % 2 else 0) for place in range(layers)]
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patch(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))
