"""A small vision-language model in plain torch: a vision tower, a projector, a causal decoder that reads both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.transformer_nets import Block, Llama, rotate, tables

BEFORE, VISUAL, BEHIND = 3, 16, 5  # tokens: text, image, text


class LlavaLike(nn.Module):
    """LLaVA's shape (arXiv:2304.08485): patches between words; all logits, and keys and values if asked."""

    def __init__(self, cached: bool = False, layers: int = 4, dim: int = 32) -> None:
        super().__init__()
        self.cached = cached
        self.patch = nn.Conv2d(3, 24, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 24))
        self.position = nn.Parameter(torch.randn(1, VISUAL + 1, 24))
        self.tower = nn.ModuleList([Block(24, 2, pre=True) for _ in range(2)])
        self.projector = nn.Sequential(nn.Linear(24, dim), nn.GELU(), nn.Linear(dim, dim))
        self.decoder = Llama(dim=dim, heads=4, groups=2, layers=layers, hidden=48, words=50)

    def embed(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        """Text and image as one sequence."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.tower:
            x = block(x)
        words = self.decoder.word(input_ids)
        return torch.cat([words[:, :BEFORE], self.projector(x[:, 1:]), words[:, BEFORE:]], 1)

    def forward(self, input_ids: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(input_ids, pixels)
        cos, sin = tables(torch.arange(x.shape[1]), self.decoder.size)
        cache: list[Tensor] = []
        for block in self.decoder.blocks:
            x = block(x, cos, sin, cache)
        logits = self.decoder.head(self.decoder.norm(x))
        return (logits, *cache) if self.cached else (logits,)


class Placed(nn.Module):
    """The decoder on text and visual tokens that are given as they are; whatever has a lower place is seen."""

    def __init__(self, model: LlavaLike) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, words: Tensor, image: Tensor, places: Tensor) -> Tensor:
        text = self.decoder.word(words)
        x = torch.cat([text[:, :BEFORE], image, text[:, BEFORE:]], 1)
        for block in self.decoder.blocks:
            x = block(x, *tables(places, self.decoder.size), mask=places[:, None] >= places)
        return self.decoder.head(self.decoder.norm(x))


class Decode(nn.Module):
    """One more word behind a prefill: `places` (layers,) says where it stands in each, `cache` may differ in length."""

    def __init__(self, model: LlavaLike) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, word: Tensor, places: Tensor, cache: list[Tensor]) -> Tensor:
        x = self.decoder.word(word)
        for number, block in enumerate(self.decoder.blocks):
            y, at = block.norm1(x), tables(places[number : number + 1], self.decoder.size)
            q, k, v = (f(y).unflatten(-1, (-1, block.size)).transpose(1, 2) for f in (block.q, block.k, block.v))
            k, v = torch.cat([cache[2 * number], rotate(k, *at)], 2), torch.cat([cache[2 * number + 1], v], 2)
            k, v = (t.repeat_interleave(block.heads // block.groups, 1) for t in (k, v))
            x = x + block.o(F.scaled_dot_product_attention(rotate(q, *at), k, v).transpose(1, 2).flatten(2))
            y = block.norm2(x)
            x = x + block.down(F.silu(block.gate(y)) * block.up(y))
        return self.decoder.head(self.decoder.norm(x))


def example(batch: int = 1, seed: int = 2) -> dict[str, Tensor]:
    """Random words and an image."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (batch, BEFORE + BEHIND), generator=random)
    return {"input_ids": ids, "pixels": torch.randn(batch, 3, 32, 32, generator=random)}


def llava(cached: bool = False, seed: int = 0, layers: int = 4) -> LlavaLike:
    """Random weights, larger than PyTorch's own, so that attention is not flat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaLike(cached, layers)
        for parameter in model.parameters():
            parameter.data.mul_(2.0)
    return model.eval()
