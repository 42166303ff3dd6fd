"""What holds for whole programs: order of patches, form of attention, outputs for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.passes.tokens.scores import SCORES
from tests.passes.tokens.test_masked import written_out
from tests.passes.tokens.vision import LAYERS, PATCHES, Dense, after, image_of, model_of

COUNTS = (11, 7, 5)


@pytest.mark.parametrize("score", [name for name in SCORES if name not in ("random", "uniform", "clipped", "norm")])
def test_attention_fused_or_written_out_chooses_the_same(score: str) -> None:
    """Every score that looks at attention, after merging too, whose sizes both forms count."""
    x = image_of(1, 2)
    options: dict[str, Any] = {"score": score, "reducer": "prune-merge:share=0.3", "counts": COUNTS}
    if SCORES[score].look == "following":
        options |= {"counts": COUNTS[:2], "sites": (0, 1), "where": "block"}
    one = after(model_of(2), x, "diffrate", **options)[1]
    two = after(written_out(model_of(2)), x, "diffrate", **options)[1]
    torch.testing.assert_close(one, two, atol=5e-5, rtol=1e-3)


class Causal(nn.Module):
    """Causal attention, fused, or written out with a scale and a mask; two layers."""

    def __init__(self, out: bool) -> None:
        super().__init__()
        self.out = out
        self.layers = nn.ModuleList([nn.Linear(16, 48) for _ in range(3)])
        self.register_buffer("mask", torch.full((1, 1, 12, 12), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        for layer in self.layers:
            q, k, v = layer(x).view(b, n, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            if self.out:
                y = (q @ k.transpose(-1, -2) * 8**-0.5 + self.mask).softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).reshape(b, n, c)
        return x[:, -1]


@pytest.mark.parametrize("score", ["pagerank", "last-attention", "span-attention", "mean-attention"])
def test_causal_attention_fused_or_written_out_chooses_the_same(score: str) -> None:
    """The scale and the mask of written-out logits are seen, by scores that do not read the map, too."""
    torch.manual_seed(0)
    fused, out, x = Causal(out=False), Causal(out=True), torch.randn(2, 12, 16)
    out.load_state_dict(fused.state_dict())
    options = {"score": score, "counts": (6, 4), "sites": (0, 1), "where": "block", "tokens": "2:11"}
    one, two = (after(model.eval(), x, "prune-tokens", **options) for model in (fused, out))
    assert sum("kept" in row for row in one[0].records[-1].details) == 2
    torch.testing.assert_close(one[1], two[1], atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("reducer", ["prune-merge", "transform", "cluster"])
def test_order_of_patches_does_not_matter_to_what_merges_by_score(reducer: str) -> None:
    """Patches in another order, positions with them: the same class output."""
    model, shuffled, x = model_of(3), model_of(3), image_of(4, 2)
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(5))
    patches = x.view(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(2, PATCHES, 3, 8, 8)[:, order]
    other = patches.reshape(2, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)
    with torch.no_grad():
        shuffled.position[:, 1:] = model.position[:, 1:][:, order]
    options = {"reducer": reducer, "counts": COUNTS}
    one, two = after(model, x, "prune-tokens", **options)[1], after(shuffled, other, "prune-tokens", **options)[1]
    torch.testing.assert_close(one, two, atol=5e-5, rtol=1e-3)


def dense_of(seed: int) -> Dense:
    """A model with an output for every token, whose attention is not flat."""
    model = Dense(dim=32, heads=4, layers=LAYERS, image=32, patch=8, classes=10)
    model.load_state_dict(model_of(seed).state_dict())
    return model.eval()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("reducer", ["bipartite", "cluster", "transform:tau=0.001,spread=1"])
def test_duplicates_come_back_at_all_their_places(reducer: str, batch: int) -> None:
    """Pairs of equal patches, merged in the first block: every output of the dense head is what it was."""
    model, x = dense_of(6), image_of(7, batch)
    with torch.no_grad():
        model.position[:, 2::2] = model.position[:, 1::2]
        x = x.view(batch, 3, 4, 8, 2, 2, 8)
        x[:, :, :, :, :, 1] = x[:, :, :, :, :, 0]
        x = x.reshape(batch, 3, 32, 32)
        wanted = model(x)
    options = {"reducer": reducer, "score": "uniform", "counts": (8,), "sites": (0,)}
    got = after(model, x, "prune-tokens", **options)[1]
    torch.testing.assert_close(got, wanted, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("reducer", ["top-k", "bipartite", "prune-merge", "transform", "contextual", "cluster"])
def test_outputs_get_all_tokens_or_leave_with_fewer(reducer: str) -> None:
    """ "restore" and "shrink" agree about the class token; dropped tokens come back as they were where they left."""
    model, x, batch = dense_of(8), image_of(9, 2), 2
    options = {"reducer": reducer, "counts": COUNTS}
    restored = after(model, x, "prune-tokens", **options)[1]
    shrunk = after(model, x, "prune-tokens", outputs="shrink", **options)[1]
    assert restored.shape == (batch, PATCHES + 1, 10)
    assert shrunk.shape == (batch, COUNTS[-1] + 1, 10)
    torch.testing.assert_close(restored[:, 0], shrunk[:, 0], atol=5e-5, rtol=1e-3)
    if reducer == "top-k":  # each token that stayed is where it was, the others somewhere, in order
        for own, few in zip(restored, shrunk, strict=True):
            places = [int((own - row).abs().amax(-1).argmin()) for row in few]
            assert places == sorted(set(places))
            torch.testing.assert_close(own[places], few, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize(("start", "stop"), [(3, 17), (1, 12), (5, 13)])
def test_protected_tokens_stay(start: int, stop: int) -> None:
    """`tokens` names those that may go; all in front and behind leave, whatever their scores, in their places."""
    model, x = dense_of(10), image_of(11, 2)
    count = 3
    options = {"tokens": f"{start}:{stop}", "counts": (count,), "sites": (1,), "outputs": "shrink"}

    def reference(x: Tensor) -> Tensor:
        x = model.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([model.cls.expand(x.shape[0], -1, -1), x], 1) + model.position
        x = model.blocks[0](x)
        block = model.blocks[1]
        b, n, c = x.shape
        q, k, v = block.attention.project[0](block.norm1(x)).view(b, n, 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + block.attention.out((weights @ v).transpose(1, 2).reshape(b, n, c))
        scores = weights.mean(1)[:, 0, start:stop]
        rows = []
        for own, score in zip(x, scores, strict=True):
            chosen = sorted(range(stop - start), key=lambda i: -float(score[i]))[:count]
            rows.append(own[[*range(start), *(start + i for i in sorted(chosen)), *range(stop, n)]])
        x = torch.stack(rows)
        x = x + block.mlp(block.norm2(x))
        return model.head(model.norm(model.blocks[2](x)))

    with torch.no_grad():
        wanted = reference(x)
    torch.testing.assert_close(after(model, x, "prune-tokens", **options)[1], wanted, atol=5e-5, rtol=1e-3)
