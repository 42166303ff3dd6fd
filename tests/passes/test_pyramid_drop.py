"""Visual tokens drop in stages, as PyramidDrop's formulas say."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.errors import BadOption
from graphopt.optimize import plan, reduce
from graphopt.passes import make
from graphopt.token_trace import chain, traced
from tests.passes.tokens.visual import by_last, logits_of, program_of, staged
from tests.vision_language import BEFORE, BEHIND, VISUAL, Decode, Placed, example, llava


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


@pytest.mark.parametrize("batch", [1, 2])
def test_order_of_visual_tokens_does_not_matter(batch: int) -> None:
    """Visual tokens in another order, their positions with them: the same ones stay, and the same last logits."""
    model, words = Placed(llava()), example(batch)["input_ids"]
    random = torch.Generator().manual_seed(4)
    image, order = torch.randn(batch, VISUAL, 32, generator=random), torch.randperm(VISUAL, generator=random)
    places = torch.arange(BEFORE + VISUAL + BEHIND)
    moved = torch.cat([places[:BEFORE], places[BEFORE : BEFORE + VISUAL][order], places[BEFORE + VISUAL :]])
    inputs = {"words": words, "image": image, "places": places}
    small = traced(make("pyramid-drop", positions="keep")(program_of(model, inputs)))
    one, two = small.run(inputs), small.run({"words": words, "image": image[:, order], "places": moved})
    torch.testing.assert_close(one["output"][:, -1], two["output"][:, -1], atol=2e-5, rtol=1e-4)
    for mine, theirs in zip(chain(one), chain(two), strict=True):
        assert ((mine[:, order] < 0) == (theirs < 0)).all()


def test_a_visual_token_that_the_last_one_asks_for_stays() -> None:
    """Its key in the next layer is the last token's query: it is never dropped, wherever it stands."""
    model = llava()
    with torch.no_grad():
        first, following = model.decoder.blocks[:2]
        for layer in (first.o, first.down):
            layer.weight.zero_()  # tokens come to the next layer as they are
        following.q.weight.copy_(following.k.weight.view(2, 8, -1).repeat_interleave(2, 0).flatten(0, 1))
    random = torch.Generator().manual_seed(5)
    words, image = example(VISUAL)["input_ids"], torch.randn(VISUAL, VISUAL, 32, generator=random)
    with torch.no_grad():
        image[torch.arange(VISUAL), torch.arange(VISUAL)] = model.decoder.word(words[:, -1])  # sample n has it at n
    inputs = {"words": words, "image": image, "places": torch.zeros(BEFORE + VISUAL + BEHIND).long()}  # no rotation
    small = traced(make("pyramid-drop", sites=(0,), counts=(3,))(program_of(Placed(model), inputs)))
    (kept,) = chain(small.run(inputs))
    assert ((kept >= 0).sum(1) == 3).all()
    assert (kept.diagonal() >= 0).all()


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_decoding_behind_a_prefill_is_one_prefill_of_the_whole_text(positions: str) -> None:
    """Each layer's keys and values are of its own tokens; the next word stands behind all, or behind those of it."""
    model, inputs = llava(True), example()
    small = make("pyramid-drop", positions=positions)(program_of(model, inputs))
    _, *cache = small.run(inputs).values()
    lengths = torch.tensor([keys.shape[2] for keys in cache[::2]])
    word = torch.tensor([[7]])
    step = {"word": word, "places": lengths if positions == "renumber" else torch.full_like(lengths, 24)}
    step |= {"cache": cache}
    got = graphopt.capture(Decode(model).eval(), step).to_module()(**step)
    kept = [row["kept"] for row in small.records[-1].details if "kept" in row]
    stages = {number: by_last(count, behind=1) for number, count in enumerate(kept)}
    whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], word], 1)}
    with torch.no_grad():
        wanted, _, _ = staged(model, whole, stages, positions == "renumber")
    torch.testing.assert_close(got[:, -1], wanted[:, -1], atol=2e-5, rtol=1e-4)


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


def test_visual_tokens_of_text_alone_must_be_named() -> None:
    """A causal model without an image input: which tokens may go cannot be told, and the error says how to say it."""
    from tests.transformer_nets import Llama

    model = Llama(dim=32, heads=4, groups=2, layers=4, hidden=48, words=50).eval()
    program = graphopt.capture(model, (torch.arange(12)[None],))
    with pytest.raises(BadOption, match="START:STOP"):
        make("pyramid-drop")(program)
    assert make("pyramid-drop", tokens="2:10")(program).records[-1].changed


def test_the_reduced_model_compiles_and_is_compared_at_its_last_token() -> None:
    """`optimize` says how far the last logits are; the machine code gives what PyTorch does, keys and values too."""
    model, inputs = llava(True), example()
    done = reduce(program_of(model, inputs), plan(["pyramid-drop:positions=keep"], None, {}))
    assert {each.output for each in done.agreement} >= {"output_0, last token", "output_1"}
    wanted = done.after.run(inputs)
    with graphopt.compile(done.after, target="cpu:x86-64-v3") as bundle:
        got = bundle.run({name: value.numpy() for name, value in inputs.items()})
    for name, value in wanted.items():
        torch.testing.assert_close(torch.from_numpy(got[name]), value, atol=1e-4, rtol=1e-4)
