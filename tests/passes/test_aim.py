"""Merges in front of the decoder, PageRank inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.passes import make
from tests.passes.tokens.visual import logits_of, program_of
from tests.transformer_nets import rotate, tables
from tests.vision_language import BEFORE, VISUAL, example, llava


def test_aim_equals_its_formulas() -> None:
    """Two merges in front of the decoder, then PageRank in the graph of attention, layer by layer."""
    model, inputs = llava(layers=6), example()
    small = make("aim", first=1, layers=4)(program_of(model, inputs))
    decoder = model.decoder

    def merged(x: Tensor, count: int) -> Tensor:
        even, odd = x[::2], x[1::2]
        best, to = (F.normalize(even, dim=-1) @ F.normalize(odd, dim=-1).T).max(-1)
        order = best.argsort(descending=True)
        gone, stay = order[: len(x) - count], order[len(x) - count :]
        means = [torch.stack([odd[n], *even[gone[to[gone] == n]]]).mean(0) for n in range(len(odd))]
        return torch.cat([even[stay], torch.stack(means)])

    with torch.no_grad():
        x = model.embed(inputs["input_ids"], inputs["pixels"])[0]
        image = merged(merged(x[BEFORE : BEFORE + VISUAL], 8), 4)
        x = torch.cat([x[:BEFORE], image, x[BEFORE + VISUAL :]])[None]
        places, visual = torch.arange(x.shape[1]), 4
        for number, block in enumerate(decoder.blocks):
            y, n = block.norm1(x), x.shape[1]
            cos, sin = tables(places, decoder.size)
            q, k = (rotate(f(y).view(1, n, -1, 8).transpose(1, 2), cos, sin)[0] for f in (block.q, block.k))
            logits = q @ k.repeat_interleave(2, 0).transpose(-1, -2) * 8**-0.5
            chain = ((logits + torch.full((n, n), -torch.inf).triu(1)) / 0.1).softmax(-1)
            x = block(x, cos, sin)
            if 1 <= number < 5:
                p = torch.full((4, 1, n), 1 / n)
                for _ in range(5):
                    p = p @ chain
                torch.testing.assert_close(p.sum(-1), torch.ones(4, 1))
                rank = p[:, 0].square().mean(0).sqrt()[BEFORE : BEFORE + visual]
                left = max(1, int(4 * (1 - number / 4)))
                stay = rank.topk(left).indices.sort().values + BEFORE
                index = torch.cat([torch.arange(BEFORE), stay, torch.arange(BEFORE + visual, n)])
                x, places, visual = x[:, index], places[index], left
        wanted = decoder.head(decoder.norm(x))
    torch.testing.assert_close(logits_of(small, inputs), wanted, atol=2e-5, rtol=1e-4)
