"""What holds for every pass that drops visual tokens in a decoder: all kept, others masked out, counts and costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.cost import summary
from graphopt.edit import Edit
from graphopt.passes import make
from graphopt.passes.tokens.base import TokenReduction
from graphopt.passes.tokens.sequence import TokenSequence
from graphopt.program import Program
from graphopt.token_trace import chain, traced
from tests.passes.tokens.visual import program_of
from tests.transformer_nets import tables
from tests.vision_language import BEFORE, BEHIND, VISUAL, LlavaLike, example, llava

TEXT, TOKENS = BEFORE + BEHIND, BEFORE + VISUAL + BEHIND
EVERY = (VISUAL,) * 3


@cache
def captured(batch: int, layers: int = 4) -> Program:
    """Captured once; passes leave it as it is."""
    return program_of(llava(True, layers=layers), example(batch))


ALL_KEPT: list[tuple[str, dict[str, Any]]] = [
    ("visiondrop", {"counts": EVERY}),
    ("visiondrop", {"counts": EVERY, "reducer": "contextual:context=0"}),
    ("adatoken", {"counts": EVERY, "sites": (0, 1, 2)}),
    ("aim", {"merged": 1.0, "first": 3}),
    ("lvlm-csp", {"clustered": 1.0, "pruned": 1.0}),
]


@pytest.mark.parametrize(("name", "options"), ALL_KEPT)
def test_keeping_all_changes_no_bit_and_adds_no_call(name: str, options: dict[str, Any]) -> None:
    """Nor is anything copied or looked up."""
    program, inputs = captured(2), example(2)
    same = make(name, **options)(program)
    for mine, own in zip(same.run(inputs).values(), program.run(inputs).values(), strict=True):
        assert torch.equal(mine, own)
    assert [str(node.target) for node in same.graph.nodes] == [str(node.target) for node in program.graph.nodes]


def masked(model: LlavaLike, inputs: dict[str, Tensor], shown: Sequence[Tensor]) -> list[Tensor]:
    """All tokens in every layer, of which keys are seen where `shown` (b, n) says so: logits, keys and values."""
    decoder, cache = model.decoder, []
    x = model.embed(inputs["input_ids"], inputs["pixels"])
    past = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for block, own in zip(decoder.blocks, shown, strict=True):
        x = block(x, *tables(torch.arange(TOKENS), decoder.size), cache, past & own[:, None, None])
    return [decoder.head(decoder.norm(x)), *cache]


DROPPING: list[tuple[str, dict[str, Any]]] = [
    ("pyramid-drop", {"positions": "keep"}),
    ("adatoken", {"sites": (0, 1, 2)}),
    ("aim", {"merged": 1.0, "first": 0, "layers": 4}),
    ("prune-tokens", {"score": "entropy", "where": "block", "counts": (11, 11, 3), "outputs": "shrink"}),
    ("visiondrop", {"positions": "keep", "reducer": "top-k"}),
]


@pytest.mark.parametrize(("name", "options"), DROPPING)
def test_what_is_dropped_is_masked_out(name: str, options: dict[str, Any]) -> None:
    """With positions kept, the tokens that stay are, in every layer and sample, what they are in the whole model when
    nobody sees the others from there on; text always stays."""
    model, inputs = llava(True), example(2)
    small = traced(make(name, **options)(captured(2)))
    results = small.run(inputs)
    sites = [row["block"] for record in small.records for row in record.details if "kept" in row]
    shown = torch.ones(4, 2, TOKENS, dtype=torch.bool)
    for site, part in zip(sites, chain(results), strict=True):
        shown[site + 1 :, :, BEFORE : BEFORE + VISUAL] = torch.from_numpy(part) >= 0
    assert shown[-1].sum() < shown[0].sum()
    with torch.no_grad():
        wanted = masked(model, inputs, list(shown))
    got = [value for name, value in results.items() if not name.startswith("tokens")]
    layers = [3, *(number for number in range(4) for _ in "kv")]
    for mine, theirs, layer in zip(got, wanted, layers, strict=True):
        rows = theirs.movedim(theirs.dim() - 2, 1)[shown[layer]].unflatten(0, (2, -1))
        torch.testing.assert_close(mine.movedim(mine.dim() - 2, 1), rows, atol=5e-5, rtol=1e-3)


def share(layer: int, first: int, layers: int) -> float:
    """AIM's rate: what is left of the visual tokens in front of a layer."""
    return max(0.0, 1 - max(0, layer - first) / layers)


# What the papers' formulas leave in each of 8 layers; AIM's last visual token stays.
PYRAMID = [16, 16, 8, 8, 4, 4, 2, 2]
BUDGET = [16, 16, 12, 12, 8, 8, 5, 5]
CSP = [4, 4, 16, 16, 16, 1, 1, 1]
RATES = [max(1, int((TOKENS - TEXT) * share(layer, 2, 4) + TEXT) - TEXT) for layer in range(8)]
COUNTED: list[tuple[str, dict[str, Any], list[int]]] = [
    ("pyramid-drop", {}, PYRAMID),
    ("visiondrop", {"counts": (12, 8, 5), "reducer": "contextual:context=2"}, BUDGET),
    ("adatoken", {"counts": (12, 8, 5), "sites": (1, 3, 5)}, BUDGET),
    ("aim", {"merged": 1.0, "first": 2, "layers": 4}, RATES),
    ("lvlm-csp", {}, CSP),
]


def macs_of(visual: Sequence[int], width: int = 32, keys: int = 16, hidden: int = 48) -> int:
    """Multiply-adds of all layers: the papers' formula, with grouped keys and values and a gated FFN."""
    tokens = [TEXT + count for count in visual]
    return sum(2 * n * width * (width + keys) + 2 * n * n * width + 3 * n * width * hidden for n in tokens)


def modelled(name: str, options: dict[str, Any], program: Program) -> int:
    """Multiply-adds of a pass's program by the polynomials of its steps."""
    whole = make(name, **options)
    steps: Sequence[Any] = whole.steps(program) if isinstance(whole, TokenSequence) else [whole]
    total = summary(program).total.macs
    for step in steps:
        assert isinstance(step, TokenReduction)
        edit = Edit(program)
        job = step.job(edit)
        model, counts = job.segments("macs"), step.wanted(edit, job)
        total -= model([job.span.size] * len(counts)) - model(counts)
        program = step(program)
    return total


@pytest.mark.parametrize(("name", "options", "visual"), COUNTED)
def test_tokens_of_each_layer_and_their_cost_are_the_papers(
    name: str, options: dict[str, Any], visual: list[int]
) -> None:
    """As many keys leave a layer as the formula leaves tokens; the polynomial is the paper's, to the last one."""
    program, inputs = captured(1, 8), example()
    outputs = list(make(name, **options)(program).run(inputs).values())
    assert [keys.shape[2] - TEXT for keys in outputs[1::2]] == visual
    head = 32 * 50 * (outputs[0].shape[1] - TOKENS)
    saved = macs_of([VISUAL] * 8) - macs_of(visual) - head
    assert summary(program).total.macs - modelled(name, options, program) == saved


def test_the_papers_average_tokens() -> None:
    """PyramidDrop: 46.9 % of the visual tokens in a layer on average. VisionDrop: 8 (48 + 35 + 26 + 19) / 32 = 32 of
    576, LVLM_CSP: (a N_c + (b - a) N + (L - b) N_p) / L; of the counts that the test above finds in programs."""
    assert (
        sum(PYRAMID) / 8 / VISUAL == pytest.approx((1 - 0.5**4) / (4 * 0.5), abs=1e-9) == pytest.approx(0.469, abs=1e-3)
    )
    assert sum(BUDGET) / 8 == 2 * (16 + 12 + 8 + 5) / 8
    assert sum(CSP) / 8 == (2 * (VISUAL // 4) + (5 - 2) * VISUAL + (8 - 5) * (VISUAL // 16)) / 8
