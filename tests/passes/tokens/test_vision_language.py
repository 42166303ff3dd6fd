"""Token reduction of vision-language models: visual tokens go, text stays, positions are kept or given anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graphopt
from graphopt.errors import BadOption
from graphopt.passes import PREPARE, make
from graphopt.passes.base import run_passes
from graphopt.program import Program
from tests.transformer_nets import rotate, tables
from tests.vision_language import BEFORE, BEHIND, VISUAL, LlavaLike, example, llava

# (queries (h, n, d), keys (h, n, d)) of the next layer, with the visual tokens' slice, to the visual indices that stay.
Choose = Callable[[Tensor, Tensor, slice], Tensor]


def program_of(model: LlavaLike, inputs: dict[str, Tensor]) -> Program:
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


def by_last(count: int) -> Choose:
    """PyramidDrop: the most attended by the last token under the causal mask, mean over heads, in order."""

    def choose(q: Tensor, k: Tensor, visual: slice) -> Tensor:
        row = (q[:, -1:] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(0)[0]
        return row[visual].topk(count).indices.sort().values

    return choose


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("cached", [False, True])
def test_pyramid_drop_equals_its_formulas(positions: str, cached: bool) -> None:
    """Stages behind layers 1, 2, 3 of 4; each layer's keys and values are those of the tokens that it has."""
    model, inputs = llava(cached), example()
    small = make("pyramid-drop", positions=positions)(program_of(model, inputs))
    kept = [row["kept"] for row in small.records[-1].details if "kept" in row]
    assert kept == [VISUAL // 2, VISUAL // 4, VISUAL // 8]
    stages = {number: by_last(count) for number, count in enumerate(kept)}
    with torch.no_grad():
        logits, cache, _ = staged(model, inputs, stages, positions == "renumber")
    got = list(small.run(inputs).values())
    assert got[0].shape[1] == BEFORE + BEHIND + VISUAL // 8
    for mine, theirs in zip(got, [logits, *cache] if cached else [logits], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_positions_that_are_kept_and_given_anew_differ() -> None:
    """Two different methods, which nobody may merge."""
    model, inputs = llava(), example()
    program = program_of(model, inputs)
    kept, anew = (logits_of(make("pyramid-drop", positions=way)(program), inputs) for way in ("keep", "renumber"))
    assert (kept - anew).abs().max() > 1e-3


def test_the_query_of_the_last_token_alone_is_computed() -> None:
    """What ranking costs at a stage: the next layer's keys for all, its query for one."""
    model, inputs = llava(), example()
    small = make("pyramid-drop", sites=(0,), counts=(4,))(program_of(model, inputs))
    dim, tokens, kv = 32, BEFORE + VISUAL + BEHIND, 16
    added = small.records[-1].details[-1]["reduction_flops"]
    keys, query = 2 * tokens * dim * kv, 2 * dim * dim
    assert keys + query < added < keys + query + 2 * tokens * dim * 8  # norms, positions, one row of the map


def test_keeping_all_changes_no_bit() -> None:
    """Shares of 1 at every stage."""
    model, inputs = llava(), example(2)
    program = program_of(model, inputs)
    same = make("pyramid-drop", counts=(VISUAL,) * 3)(program)
    assert torch.equal(logits_of(same, inputs), logits_of(program, inputs))


@pytest.mark.parametrize(("name", "way"), [("pyramid-drop", "keep"), ("visiondrop", "renumber")])
def test_samples_choose_for_themselves(name: str, way: str) -> None:
    """A batch of two gives what each gives alone; with positions kept, tables are looked up for each."""
    model, inputs = llava(), example(2)
    both = logits_of(make(name, positions=way)(program_of(model, inputs)), inputs)
    for sample in range(2):
        own = {key: value[sample : sample + 1] for key, value in inputs.items()}
        alone = logits_of(make(name, positions=way)(program_of(model, own)), own)
        torch.testing.assert_close(both[sample : sample + 1], alone, atol=2e-5, rtol=1e-4)


def test_visiondrop_equals_its_formulas() -> None:
    """Visual-to-visual attention of the next layer ranks, contextual tokens gather what is dropped."""
    model, inputs = llava(), example()
    small = make("visiondrop", sites=(1,), counts=(8,), reducer="contextual:context=3")(program_of(model, inputs))
    decoder = model.decoder
    with torch.no_grad():
        x = model.embed(inputs["input_ids"], inputs["pixels"])
        places = tables(torch.arange(x.shape[1]), decoder.size)
        for block in decoder.blocks[:2]:
            x = block(x, *places)
        following = decoder.blocks[2]
        y = following.norm1(x)
        q, k = (rotate(f(y).view(1, 24, -1, 8).transpose(1, 2), *places)[0] for f in (following.q, following.k))
        k = k.repeat_interleave(2, 0)
        logits = q @ k.transpose(-1, -2) * 8**-0.5 + torch.full((24, 24), -torch.inf).triu(1)
        visual = slice(BEFORE, BEFORE + VISUAL)
        score = logits.softmax(-1).mean(0)[visual, visual].mean(0)
        metric = k.mean(0)[visual]
        order = score.argsort(descending=True).tolist()
        dominant, others = sorted(order[:5]), sorted(order[5:])
        targets = others[:: max(1, len(others) // 3)][:3]
        groups = {target: [target] for target in targets}
        for other in (each for each in others if each not in targets):
            groups[max(targets, key=lambda t: float(F.cosine_similarity(metric[other], metric[t], dim=0)))].append(
                other
            )
        image = x[0, visual]
        gathered = [image[members].mean(0) for members in groups.values()]
        x = torch.cat([x[0, :BEFORE], image[dominant], torch.stack(gathered), x[0, BEFORE + VISUAL :]])[None]
        for block in decoder.blocks[2:]:
            x = block(x, *tables(torch.arange(x.shape[1]), decoder.size))
        wanted = decoder.head(decoder.norm(x))
    torch.testing.assert_close(logits_of(small, inputs), wanted, atol=2e-5, rtol=1e-4)


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


def test_the_tower_is_a_stream_of_its_own() -> None:
    """stream=0 reduces in the vision tower by its class token; the decoder gets all tokens back."""
    model, inputs = llava(), example()
    small = make("prune-tokens", stream=0, counts=(10, 6))(program_of(model, inputs))
    assert [row["name"] for row in small.records[-1].details if "kept" in row] == ["tower.0", "tower.1"]
    assert logits_of(small, inputs).shape == (1, 24, 50)


def test_visual_tokens_of_text_alone_must_be_named() -> None:
    """A causal model without an image input: which tokens may go cannot be told, and the error says how to say it."""
    from tests.transformer_nets import Llama

    model = Llama(dim=32, heads=4, groups=2, layers=4, hidden=48, words=50).eval()
    program = graphopt.capture(model, (torch.arange(12)[None],))
    with pytest.raises(BadOption, match="START:STOP"):
        make("pyramid-drop")(program)
    assert make("pyramid-drop", tokens="2:10")(program).records[-1].changed


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


@pytest.mark.parametrize("segments", [("4:7",), ("0:2", "10:15"), ("5:24",)])
def test_segments_are_dropped_behind_a_block(segments: tuple[str, ...]) -> None:
    """The same tokens for every input; what stays is where it was."""
    model, inputs = llava(), example(2)
    small = make("drop-segments", segments=segments, sites=(1,))(program_of(model, inputs))
    gone = {place for each in segments for place in range(*map(int, each.split(":")))}
    index = torch.tensor([place for place in range(24) if place not in gone])
    decoder = model.decoder
    with torch.no_grad():
        x = model.embed(inputs["input_ids"], inputs["pixels"])
        for number, block in enumerate(decoder.blocks):
            x = block(x, *tables(index if number > 1 else torch.arange(24), decoder.size))
            x = x[:, index] if number == 1 else x
        wanted = decoder.head(decoder.norm(x))
    torch.testing.assert_close(logits_of(small, inputs), wanted, atol=2e-5, rtol=1e-4)
