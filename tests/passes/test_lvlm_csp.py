"""Clustering, scattering, pruning."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.passes import make
from tests.passes.tokens.visual import by_last, logits_of, program_of
from tests.transformer_nets import rotate, tables
from tests.vision_language import BEFORE, VISUAL, example, llava


def test_tokens_that_were_left_out_return_where_it_is_said() -> None:
    """LVLM_CSP: few visual tokens in front, all of them behind layer 1, those left out as they were."""
    model, inputs = llava(), example()
    program = program_of(model, inputs)
    options: dict[str, Any] = {"where": "input", "score": "uniform", "counts": (4,), "until": 1, "positions": "keep"}
    small = make("prune-tokens", **options)(program)
    decoder = model.decoder
    index = torch.tensor([*range(BEFORE), *(BEFORE + 4 * n for n in range(4)), *range(BEFORE + VISUAL, 24)])
    with torch.no_grad():
        whole = model.embed(inputs["input_ids"], inputs["pixels"])
        x = whole[:, index]
        for block in decoder.blocks[:2]:
            x = block(x, *tables(index, decoder.size))
        x = whole.index_copy(1, index, x)
        for block in decoder.blocks[2:]:
            x = block(x, *tables(torch.arange(24), decoder.size))
        wanted = decoder.head(decoder.norm(x))
    torch.testing.assert_close(logits_of(small, inputs), wanted, atol=2e-5, rtol=1e-4)


def test_csp_gathers_scatters_and_prunes() -> None:
    """Few in the first third, all in the second, top by the last token's attention in the last, positions kept."""
    model, inputs = llava(layers=6), example()
    small = make("lvlm-csp", pruned=0.25)(program_of(model, inputs))
    decoder = model.decoder
    index = torch.tensor([*range(BEFORE), *(BEFORE + 4 * n for n in range(4)), *range(BEFORE + VISUAL, 24)])
    every = tables(torch.arange(24), decoder.size)
    with torch.no_grad():
        whole = model.embed(inputs["input_ids"], inputs["pixels"])
        x = whole[:, index]
        for block in decoder.blocks[:2]:
            x = block(x, *tables(index, decoder.size))
        x = whole.index_copy(1, index, x)
        for block in decoder.blocks[2:4]:
            x = block(x, *every)
        y = decoder.blocks[4].norm1(x)
        q, k = (
            rotate(f(y).view(1, 24, -1, 8).transpose(1, 2), *every)[0]
            for f in (decoder.blocks[4].q, decoder.blocks[4].k)
        )
        stay = by_last(4)(q, k.repeat_interleave(2, 0), slice(BEFORE, BEFORE + VISUAL)) + BEFORE
        last = torch.cat([torch.arange(BEFORE), stay, torch.arange(BEFORE + VISUAL, 24)])
        x = x[:, last]
        for block in decoder.blocks[4:]:
            x = block(x, *tables(last, decoder.size))
        wanted = decoder.head(decoder.norm(x))
    torch.testing.assert_close(logits_of(small, inputs), wanted, atol=2e-5, rtol=1e-4)


def test_scattering_and_pruning_at_the_same_layer_are_two_stages() -> None:
    """a = b: all tokens come back, the last one chooses among them, and no layer runs on all."""
    model, inputs = llava(True, layers=6), example()
    small = make("lvlm-csp", pruned=0.25, scatter=2, prune=2)(program_of(model, inputs))
    decoder, cache = model.decoder, []
    index = torch.tensor([*range(BEFORE), *(BEFORE + 4 * n for n in range(4)), *range(BEFORE + VISUAL, 24)])
    every = tables(torch.arange(24), decoder.size)
    with torch.no_grad():
        whole = model.embed(inputs["input_ids"], inputs["pixels"])
        x = whole[:, index]
        for block in decoder.blocks[:2]:
            x = block(x, *tables(index, decoder.size), cache)
        x = whole.index_copy(1, index, x)
        following = decoder.blocks[2]
        y = following.norm1(x)
        q, k = (rotate(f(y).view(1, 24, -1, 8).transpose(1, 2), *every)[0] for f in (following.q, following.k))
        stay = by_last(4)(q, k.repeat_interleave(2, 0), slice(BEFORE, BEFORE + VISUAL)) + BEFORE
        last = torch.cat([torch.arange(BEFORE), stay, torch.arange(BEFORE + VISUAL, 24)])
        x = x[:, last]
        for block in decoder.blocks[2:]:
            x = block(x, *tables(last, decoder.size), cache)
        wanted = decoder.head(decoder.norm(x))
    for mine, theirs in zip(small.run(inputs).values(), [wanted, *cache], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
