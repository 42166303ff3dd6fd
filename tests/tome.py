"""Token Merging in plain PyTorch, from the paper's formulas, as its own code does it: what graphopt's pass is held to.

Source: Bolya et al., Token Merging, ICLR 2023, arXiv:2210.09461.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.transformer_nets import VisionTransformer


class MergedVisionTransformer(nn.Module):
    """A vision transformer that merges `removed[i]` tokens in block i, between attention and MLP."""

    def __init__(self, model: VisionTransformer, removed: Sequence[int]) -> None:
        super().__init__()
        self.model, self.removed = model, tuple(removed)

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([model.cls.expand(x.shape[0], -1, -1), x], 1) + model.position
        size: Tensor | None = None
        for block, removed in zip(model.blocks, self.removed, strict=True):
            attended, metric = self._attention(block.attention, block.norm1(x), size)
            x = x + attended
            if removed:
                x, size = merge(x, metric, removed, size)
            x = x + block.mlp(block.norm2(x))
        return model.head(model.norm(x)[:, 0])

    @staticmethod
    def _attention(attention: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        b, n, c = x.shape
        heads = attention.heads
        q, k, v = attention.project[0](x).view(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if size is None else size.log()[:, None, None, :, 0]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attention.out(out.transpose(1, 2).reshape(b, n, c)), k.mean(1)


def merge(x: Tensor, metric: Tensor, removed: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merge the `removed` most similar pairs: x (b, n, c), metric (b, n, d), size (b, n, 1); the class token stays."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0, :] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    stay, gone = order[:, removed:].sort(1)[0], order[:, :removed]
    to = partner[..., None].gather(1, gone)

    def fold(y: Tensor) -> Tensor:
        even, odd = y[:, ::2], y[:, 1::2]
        kept = even.gather(1, stay.expand(-1, -1, y.shape[2]))
        merged = even.gather(1, gone.expand(-1, -1, y.shape[2]))
        return torch.cat([kept, odd.scatter_add(1, to.expand(-1, -1, y.shape[2]), merged)], 1)

    size = x.new_ones(x.shape[0], x.shape[1], 1) if size is None else size
    total = fold(size)
    return fold(x * size) / total, total
