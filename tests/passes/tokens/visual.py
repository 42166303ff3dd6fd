"""What tests of vision-language models share: stages written out in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import graphopt
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.program import Program
from tests.transformer_nets import rotate, tables
from tests.vision_language import BEFORE, VISUAL, LlavaLike

# (queries (h, n, d), keys (h, n, d)) of the next layer, with the visual tokens' slice, to the visual indices that stay.
Choose = Callable[[Tensor, Tensor, slice], Tensor]


def program_of(model: nn.Module, inputs: dict[str, Tensor]) -> Program:
    return run_passes(graphopt.capture(model, inputs), PREPARE)


def logits_of(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    return next(iter(program.run(inputs).values()))


def staged(
    model: LlavaLike, inputs: dict[str, Tensor], stages: dict[int, Choose], renumber: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One sample: the logits of the tokens that are left, every layer's keys and values, what was left."""
    decoder = model.decoder
    x = model.embed(inputs["input_ids"], inputs["pixels"])
    places, visual = torch.arange(x.shape[1]), VISUAL
    cache: list[Tensor] = []
    for number, block in enumerate(decoder.blocks):
        x = block(x, *tables(places, decoder.size), cache)
        if number in stages:
            following = decoder.blocks[number + 1]
            y = following.norm1(x)
            cos, sin = tables(places, decoder.size)
            q = rotate(following.q(y).view(1, x.shape[1], -1, decoder.size).transpose(1, 2), cos, sin)[0]
            k = rotate(following.k(y).view(1, x.shape[1], -1, decoder.size).transpose(1, 2), cos, sin)[0]
            k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
            stay = stages[number](q, k, slice(BEFORE, BEFORE + visual)) + BEFORE
            index = torch.cat([torch.arange(BEFORE), stay, torch.arange(BEFORE + visual, x.shape[1])])
            x, visual = x[:, index], len(stay)
            places = torch.arange(len(index)) if renumber else places[index]
    return decoder.head(decoder.norm(x)), cache, [places]


def by_last(count: int, behind: int = 0) -> Choose:
    """PyramidDrop: the most attended by the last token under the causal mask, mean over heads, in order.

    behind: how many tokens stand behind the last one of the prompt.
    """

    def choose(q: Tensor, k: Tensor, visual: slice) -> Tensor:
        last = q.shape[1] - behind
        row = (q[:, last - 1 : last] @ k[:, :last].transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(0)[0]
        return row[visual].topk(count).indices.sort().values

    return choose
