"""Visual tokens rank each other, and contextual tokens gather what is dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import BadOption
from graphopt.passes import make
from graphopt.program import Program
from tests.passes.tokens.visual import logits_of, program_of
from tests.transformer_nets import Llama, rotate, tables
from tests.vision_language import BEFORE, VISUAL, example, llava


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pyramid-drop", {"positions": "keep"}),
        ("visiondrop", {"positions": "renumber"}),
        ("visiondrop", {"stages": ("9+2", "7+1", "4+2", "3+0")}),
        ("prune-tokens", {"stream": 0, "sites": (1,), "where": "block", "counts": (4,), "outputs": "shrink"}),
    ],
)
def test_samples_choose_for_themselves(name: str, options: dict[str, Any]) -> None:
    """A batch of two gives what each gives alone; with positions kept, tables are looked up for each."""
    model, inputs = llava(), example(2)
    both = logits_of(make(name, **options)(program_of(model, inputs)), inputs)
    for sample in range(2):
        own = {key: value[sample : sample + 1] for key, value in inputs.items()}
        alone = logits_of(make(name, **options)(program_of(model, own)), own)
        torch.testing.assert_close(both[sample : sample + 1], alone, atol=2e-5, rtol=1e-4)


def test_what_goes_in_the_tower_is_gone_in_the_decoder() -> None:
    """Positions stay those of the decoder's own tokens, among which the tower's stand."""
    model, inputs = llava(), example()
    options = {"stream": 0, "sites": (1,), "where": "block", "counts": (4,), "outputs": "shrink", "score": "uniform"}
    small = make("prune-tokens", **options)(program_of(model, inputs))
    index = torch.tensor([*range(BEFORE), *(BEFORE + 4 * n for n in range(4)), *range(BEFORE + VISUAL, 24)])
    with torch.no_grad():
        x = model.embed(inputs["input_ids"], inputs["pixels"])[:, index]
        for block in model.decoder.blocks:
            x = block(x, *tables(index, model.decoder.size))
        wanted = model.decoder.head(model.decoder.norm(x))
    torch.testing.assert_close(logits_of(small, inputs), wanted, atol=2e-5, rtol=1e-4)


def gathered(image: Tensor, score: Tensor, metric: Tensor, dominant: int, context: int) -> Tensor:
    """Of (n, c) those of the highest scores, and evenly spaced others with what is most like them; or all."""
    if dominant + context >= len(image):
        return image
    order = score.argsort(descending=True).tolist()
    first, others = sorted(order[:dominant]), sorted(order[dominant:])
    targets = others[:: max(1, len(others) // max(context, 1))][:context]
    groups = {target: [target] for target in targets}
    for other in (each for each in others if targets and each not in targets):
        groups[max(targets, key=lambda t: float(F.cosine_similarity(metric[other], metric[t], dim=0)))].append(other)
    return torch.stack([*image[first], *(image[members].mean(0) for members in groups.values())])


def staged(decoder: Llama, x: Tensor, visual: int, stages: dict[int, tuple[int, int]]) -> Tensor:
    """The logits of one sample whose visual tokens fall behind some blocks, ranked by each other in the next."""
    for number, block in enumerate(decoder.blocks):
        places = tables(torch.arange(x.shape[1]), decoder.size)
        x = block(x, *places)
        if number in stages:
            following, n = decoder.blocks[number + 1], x.shape[1]
            y = following.norm1(x)
            q, k = (rotate(f(y).view(1, n, -1, 8).transpose(1, 2), *places)[0] for f in (following.q, following.k))
            k = k.repeat_interleave(2, 0)
            logits = q @ k.transpose(-1, -2) * 8**-0.5 + torch.full((n, n), -torch.inf).triu(1)
            span = slice(BEFORE, BEFORE + visual)
            score = logits.softmax(-1).mean(0)[span, span].mean(0)
            few = gathered(x[0, span], score, k.mean(0)[span], *stages[number])
            x = torch.cat([x[0, :BEFORE], few, x[0, BEFORE + visual :]])[None]
            visual = len(few)
    return decoder.head(decoder.norm(x))


def test_visiondrop_equals_its_formulas() -> None:
    """Visual-to-visual attention of the next layer ranks, contextual tokens gather what is dropped."""
    model, inputs = llava(), example()
    small = make("visiondrop", sites=(1,), counts=(8,), reducer="contextual:context=3")(program_of(model, inputs))
    with torch.no_grad():
        wanted = staged(model.decoder, model.embed(inputs["input_ids"], inputs["pixels"]), VISUAL, {1: (5, 3)})
    torch.testing.assert_close(logits_of(small, inputs), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("stages", [("9+2", "7+1", "4+2", "3+0"), ("12+4", "9+3", "9+2", "1+1"), ("6+3",)])
def test_stages_begin_in_the_tower(stages: tuple[str, ...]) -> None:
    """The class token of its last layer ranks patches; the decoder goes on with what is left, counted anew."""
    model, inputs = llava(), example()
    small = make("visiondrop", stages=stages)(program_of(model, inputs))
    budgets = [tuple(map(int, stage.split("+"))) for stage in stages]
    with torch.no_grad():
        x = model.patch(inputs["pixels"]).flatten(2).transpose(1, 2)
        x = torch.cat([model.cls, x], 1) + model.position
        x, last = model.tower[0](x), model.tower[1]
        q, k, _ = last.attention.project[0](last.norm1(x)).view(VISUAL + 1, 3, 2, 12).permute(1, 2, 0, 3)
        score = (q[:, :1] @ k.transpose(-1, -2) * 12**-0.5).softmax(-1).mean(0)[0, 1:]
        few = gathered(last(x)[0, 1:], score, k.mean(0)[1:], *budgets[0])
        words = model.decoder.word(inputs["input_ids"])
        x = torch.cat([words[:, :BEFORE], model.projector(few)[None], words[:, BEFORE:]], 1)
        wanted = staged(model.decoder, x, len(few), dict(enumerate(budgets[1:])))
    torch.testing.assert_close(logits_of(small, inputs), wanted, atol=2e-5, rtol=1e-4)
    kept = [left for record in small.records for _, _, left in record.places]
    assert kept == [a + b for a, b in budgets if a + b < VISUAL]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": ("42",)}, "DOMINANT"),
        ({"stages": ("9+2", "0+2")}, "DOMINANT"),
        ({"stages": ("9+2",), "keep": 0.5}, "keep beside stages"),
        ({"stages": ("9+2",), "positions": "keep"}, "positions=keep with stages"),
        ({"stages": ("9+2",), "reducer": "top-k"}, "leave the reducer out"),
        ({"stages": ("9+2", "7+1")}, "1 counts for 3 places"),
        ({"stages": ("9+2", "7+1", "9+1", "3+0")}, "counts that fall"),
        ({"stages": ("9+2",), "stream": 0}, "no tower in front"),
        ({"stages": ("9+2",), "tokens": "3:9"}, "the tower has 16 tokens, and the decoder 6"),
    ],
)
def test_stages_that_cannot_be(pair: Program, options: dict[str, Any], says: str) -> None:
    """One error, and what to do instead."""
    with pytest.raises(BadOption, match=says):
        make("visiondrop", **options)(pair)


@pytest.fixture(scope="module")
def pair() -> Program:
    """Two samples at once."""
    return program_of(llava(), example(2))
