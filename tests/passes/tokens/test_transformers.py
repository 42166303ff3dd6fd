"""Token reduction of LLaVA as transformers has it: images written where words say, masks that are computed."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from graphopt.errors import BadOption
from graphopt.passes import make
from graphopt.passes.tokens.neurons import core_neurons, matches
from graphopt.program import Program
from tests.passes.tokens.visual import program_of

pytest.importorskip("transformers")

from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.architectures import enliven
from tests.hf_models import SMALL, seeded
from tests.hf_vision_language import LENGTH, PLACES, START, Prefill, entering, hf_example, hf_llava

IMAGE = f"{START}:{START + PLACES}"


@cache
def built(attention: str, padded: int, batch: int = 1) -> tuple[Prefill, dict[str, Tensor], Program]:
    model, inputs = hf_llava(attention), hf_example(batch, padded)
    return model, inputs, program_of(model, inputs)


def staged(model: Prefill, inputs: dict[str, Tensor], counts: dict[int, int], renumber: bool) -> list[Tensor]:
    """PyramidDrop on one sample, with the modules of transformers: logits, each layer's keys and values."""
    whole = model.model.model.language_model
    x, visual, cache = entering(model, inputs), PLACES, DynamicCache()
    shown = inputs.get("attention_mask", torch.ones(1, LENGTH))[0].bool()
    places = torch.arange(LENGTH)
    for number, layer in enumerate(whole.layers):
        n = x.shape[1]
        mask = torch.where(torch.ones(n, n).tril().bool() & shown, 0.0, torch.finfo(torch.float32).min)[None, None]
        tables = whole.rotary_emb(x, places[None])
        x = layer(x, attention_mask=mask, position_embeddings=tables, past_key_values=cache, use_cache=True)
        if number in counts:
            following = whole.layers[number + 1]
            y, attention = following.input_layernorm(x), following.self_attn
            q, k = (f(y).view(1, n, -1, 8).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
            q, k = apply_rotary_pos_emb(q, k, *tables)
            k = k.repeat_interleave(2, 1)
            row = (q[:, :, -1:] @ k.transpose(-1, -2) * 8**-0.5 + mask[:, :, -1:]).softmax(-1).mean((0, 1, 2))
            stay = row[START : START + visual].topk(counts[number]).indices.sort().values + START
            index = torch.cat([torch.arange(START), stay, torch.arange(START + visual, n)])
            x, visual = x[:, index], counts[number]
            places = torch.arange(len(index)) if renumber else places[index]
            # With `renumber` masks, too, are those of the first places.
            shown = shown[: len(index)] if renumber else shown[index]
    logits = model.model.lm_head(whole.norm(x))
    return [logits, *(each for layer in cache.layers for each in (layer.keys, layer.values))]


def outputs_of(program: Program, inputs: dict[str, Tensor]) -> list[Tensor]:
    return list(program.run(inputs).values())


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize(("attention", "padded"), [("sdpa", 0), ("sdpa", 2), ("eager", 2)])
def test_pyramid_drop_of_transformers_llava_equals_its_formulas(attention: str, padded: int, positions: str) -> None:
    """Attention fused and written out, with a mask as an input and without; each layer's cache has its own length."""
    model, inputs, program = built(attention, padded)
    small = make("pyramid-drop", tokens=IMAGE, positions=positions)(program)
    kept = [row["kept"] for row in small.records[-1].details if "kept" in row]
    assert kept == [4, 2, 1]
    with torch.no_grad():
        wanted = staged(model, inputs, dict(enumerate(kept)), positions == "renumber")
    got = outputs_of(small, inputs)
    assert [each.shape[2] for each in got[1::2]] == [LENGTH - PLACES + count for count in (PLACES, *kept)]
    for mine, theirs in zip(got, wanted, strict=True):
        dim = mine.dim() - 2
        real = slice(padded, None)  # what hidden tokens attend to, where all is hidden, is anyone's choice
        torch.testing.assert_close(mine.movedim(dim, 0)[real], theirs.movedim(dim, 0)[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_core_matching_drops_what_few_core_neurons_fire_for(attention: str) -> None:
    """In transformers' own layers, too; the rest is as where the same tokens are named."""
    model, inputs, program = built(attention, 0)
    seen: list[Tensor] = []
    down = model.model.model.language_model.layers[0].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    found = matches(seen[0], core_neurons(seen[0], 0.2, 0.4))[0, START : START + PLACES].tolist()
    gone = sorted(range(PLACES), key=lambda n: (-found[n], n))[4:]
    named = make("drop-segments", segments=tuple(f"{START + n}:{START + n + 1}" for n in gone), sites=(0,))(program)
    chosen = make("core-matching", tokens=IMAGE, counts=(4,))(program)
    for mine, theirs in zip(outputs_of(chosen, inputs), outputs_of(named, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["visiondrop", "lvlm-csp"])
def test_samples_choose_for_themselves(name: str) -> None:
    """A batch of two gives what each gives alone, with masks that are each sample's own."""
    _, inputs, program = built("sdpa", 2, batch=2)
    _, _, single = built("sdpa", 2)
    both, alone = (make(name, tokens=IMAGE)(each) for each in (program, single))
    results = outputs_of(both, inputs)
    for sample in range(2):
        own = {key: value[sample : sample + 1] for key, value in inputs.items()}
        for all_, one in zip(results, outputs_of(alone, own), strict=True):
            torch.testing.assert_close(all_[sample : sample + 1], one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["pyramid-drop", "visiondrop", "aim", "lvlm-csp"])
def test_images_written_where_words_say_must_be_named(name: str) -> None:
    """Other words would put the image elsewhere: nothing is dropped on a guess, but the error says where it is now."""
    _, _, program = built("sdpa", 0)
    with pytest.raises(BadOption) as refused:
        make(name)(program)
    assert f"tokens={IMAGE}" in str(refused.value)


def mixtral(experts: str) -> tuple[MixtralForCausalLM, dict[str, Tensor], Program]:
    config = MixtralConfig(**SMALL, vocab_size=100, num_key_value_heads=2, num_local_experts=4, use_cache=False)
    config._experts_implementation = experts

    def made() -> MixtralForCausalLM:
        model = MixtralForCausalLM(config)
        enliven(model)
        return model

    model, inputs = seeded(made), {"input_ids": torch.arange(20, 32)[None]}
    return model, inputs, program_of(model, inputs)


def test_experts_that_sort_tokens_get_all_of_them_and_say_so() -> None:
    """Mixtral as it comes groups tokens by expert: merging leaves it as it is; the reason names what can be done."""
    _, inputs, program = mixtral("grouped_mm")
    same = make("merge-tokens", tokens="2:10", counts=(6, 5))(program)
    assert torch.equal(outputs_of(same, inputs)[0], outputs_of(program, inputs)[0])
    assert not same.records[-1].changed
    assert all("sorts tokens by expert" in each.reason for each in same.records[-1].declined)
    assert "batched_mm" in same.records[-1].notes[0]
    dropped = make("prune-tokens", tokens="2:10", score="norm", where="input", counts=(5,))(program)
    assert dropped.records[-1].changed  # the attention in front of the experts
    assert any("mlp.experts" in each.where for each in dropped.records[-1].declined)


def test_experts_by_batched_products_run_on_fewer_tokens() -> None:
    """With that implementation the model is the same, and every layer runs on the tokens that stay."""
    model, inputs, program = mixtral("batched_mm")
    stay = torch.tensor([[0, 1, 4, 5, 6, 8, 9, 10, 11]])
    small = make("drop-segments", segments=("2:4", "7:8"), where="input")(program)
    with torch.no_grad():
        # With a mask, lest gaps between positions be taken for several texts.
        shorter = model(inputs["input_ids"][:, stay[0]], position_ids=stay, attention_mask=torch.ones_like(stay))
        sorting = mixtral("grouped_mm")[0](**inputs)
    torch.testing.assert_close(outputs_of(small, inputs)[0], shorter.logits, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(outputs_of(program, inputs)[0], sorting.logits, atol=2e-5, rtol=1e-4)
    merged = make("merge-tokens", tokens="2:10", counts=(6, 5), outputs="shrink")(program)
    assert outputs_of(merged, inputs)[0].shape[1] == 12 - 8 + 5
