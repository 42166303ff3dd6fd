"""Token reduction of Qwen2-VL as transformers has it: positions in three rows, a merger that wants every patch."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import BadOption
from graphopt.passes import make
from graphopt.program import Program
from tests.passes.tokens.visual import program_of

pytest.importorskip("transformers")

from transformers import DynamicCache
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb, apply_rotary_pos_emb_vision

from tests.hf_qwen import LENGTH, PATCHES, PLACES, START, Prefill, hf_qwen, qwen_example
from tests.hf_vision_language import entering

IMAGE = f"{START}:{START + PLACES}"


@cache
def built(attention: str = "sdpa", batch: int = 1) -> tuple[Prefill, dict[str, Tensor], Program]:
    model = hf_qwen(attention, batch)
    inputs = qwen_example(model, batch)
    return model, inputs, program_of(model, inputs)


def sample_of(inputs: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    return {
        "pixel_values": inputs["pixel_values"][sample * PATCHES : (sample + 1) * PATCHES],
        "input_ids": inputs["input_ids"][sample : sample + 1],
        "position_ids": inputs["position_ids"][:, sample : sample + 1],
    }


def outputs_of(program: Program, inputs: dict[str, Tensor]) -> list[Tensor]:
    return list(program.run(inputs).values())


def staged(model: Prefill, inputs: dict[str, Tensor], counts: dict[int, int], renumber: bool) -> list[Tensor]:
    """PyramidDrop on one sample, with the modules of transformers: logits, each layer's keys and values."""
    whole = model.model.model.language_model
    x, visual, cache = entering(model, inputs), PLACES, DynamicCache()
    rows = inputs["position_ids"]  # (3, 1, n): frames, rows and columns
    for number, layer in enumerate(whole.layers):
        n = x.shape[1]
        mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
        tables = whole.rotary_emb(x, rows)
        x = layer(x, attention_mask=mask, position_embeddings=tables, past_key_values=cache, use_cache=True)
        if number in counts:
            following = whole.layers[number + 1]
            y, attention = following.input_layernorm(x), following.self_attn
            q, k = (f(y).view(1, n, -1, 16).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
            q, k = apply_rotary_pos_emb(q, k, *tables)
            row = (q[:, :, -1:] @ k.transpose(-1, -2) * 0.25).softmax(-1).mean((0, 1, 2))
            stay = row[START : START + visual].topk(counts[number]).indices.sort().values + START
            index = torch.cat([torch.arange(START), stay, torch.arange(START + visual, n)])
            x, visual = x[:, index], counts[number]
            rows = rows[:, :, : len(index)] if renumber else rows[:, :, index]
    logits = model.model.lm_head(whole.norm(x))
    return [logits, *(each for layer in cache.layers for each in (layer.keys, layer.values))]


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize(("attention", "batch"), [("sdpa", 1), ("eager", 1), ("sdpa", 2)])
def test_pyramid_drop_cuts_all_rows_of_positions(attention: str, batch: int, positions: str) -> None:
    """Frames, rows and columns of the tokens that stay, or of the first places; every sample has its own."""
    _, inputs, program = built(attention, batch)
    small = make("pyramid-drop", tokens=IMAGE, positions=positions, counts=(4, 2, 1))(program)
    got = outputs_of(small, inputs)
    assert [each.shape[2] for each in got[1::2]] == [LENGTH - PLACES + count for count in (PLACES, 4, 2, 1)]
    for sample in range(batch):
        with torch.no_grad():
            wanted = staged(built(attention)[0], sample_of(inputs, sample), {0: 4, 1: 2, 2: 1}, positions == "renumber")
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine[sample : sample + 1], theirs, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["visiondrop", "aim", "lvlm-csp", "adatoken"])
def test_samples_choose_for_themselves(name: str) -> None:
    """A batch of two gives what each gives alone."""
    _, inputs, program = built("sdpa", 2)
    options = {"counts": (4, 3, 2), "sites": (0, 1, 2)} if name == "adatoken" else {}
    both, alone = (make(name, tokens=IMAGE, **options)(own) for own in (program, built()[2]))
    results = outputs_of(both, inputs)
    for sample in range(2):
        for all_, one in zip(results, outputs_of(alone, sample_of(inputs, sample)), strict=True):
            torch.testing.assert_close(all_[sample : sample + 1], one, atol=5e-5, rtol=1e-3)


def entered(model: Prefill, inputs: dict[str, Tensor], index: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Patches in front of the tower's blocks, and positions of some of them."""
    tower = model.model.model.visual
    x = tower.patch_embed(inputs["pixel_values"])
    return x, *(table[index] for table in tower.rotary_pos_emb(x, model.patches))


def attended(block: Any, x: Tensor, cos: Tensor, sin: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a block's attention adds, its map, and its keys: queries, keys of patches at given positions."""
    own = block.attn
    q, k, v = own.qkv(block.norm1(x)).unflatten(-1, (3, own.num_heads, -1)).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
    weights = (torch.einsum("nhd,mhd->hnm", q, k) * own.scaling + size.log()).softmax(-1)
    return own.proj(torch.einsum("hnm,mhd->nhd", weights, v).flatten(1)), weights, k


def finished(model: Prefill, inputs: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits of patches behind the tower's last block."""
    tower = model.model.model.visual
    hook = tower.merger.register_forward_pre_hook(lambda *_: (x,))
    logits = model(**inputs)[0]
    hook.remove()
    return logits


def test_patches_of_the_tower_come_back_in_front_of_the_merger() -> None:
    """What is dropped is there again, as it was, where four patches become one token; and that is said."""
    model, inputs, program = built()
    small = make("prune-tokens", stream=0, score="mean-attention", counts=(17, 9), sites=(0, 1))(program)
    reasons = [str(each) for each in small.records[-1].declined]
    assert any("merger" in each and "makes a grid of the tokens" in each for each in reasons)
    with torch.no_grad():
        index = torch.arange(PATCHES)
        few, cos, sin = entered(model, inputs, index)
        whole = few
        for block, count in zip(model.model.model.visual.blocks, (17, 9, None), strict=True):
            added, weights, _ = attended(block, few, cos, sin, torch.ones(len(few)))
            few = few + added
            if count:
                whole = whole.index_copy(0, index, few)
                stay = weights.mean((0, 1)).topk(count).indices.sort().values
                few, cos, sin, index = few[stay], cos[stay], sin[stay], index[stay]
            few = few + block.mlp(block.norm2(few))
        wanted = finished(model, inputs, whole.index_copy(0, index, few))
    torch.testing.assert_close(outputs_of(small, inputs)[0], wanted, atol=5e-5, rtol=1e-3)


def test_patches_of_the_tower_are_merged_and_all_come_back() -> None:
    """Token Merging without a class token, over rotary positions; the merger gets every patch as what it was merged
    into."""
    model, inputs, program = built()
    small = make("merge-tokens", stream=0, counts=(15,), sites=(0,))(program)
    with torch.no_grad():
        x, cos, sin = entered(model, inputs, torch.arange(PATCHES))
        first, *blocks = model.model.model.visual.blocks
        added, _, keys = attended(first, x, cos, sin, torch.ones(PATCHES))
        x, unit = x + added, F.normalize(keys.mean(1), dim=-1)
        best, partner = (unit[::2] @ unit[1::2].T).max(-1)
        gone = set((2 * best.argsort(descending=True)[: PATCHES - 15]).tolist())
        to = [2 * int(partner[n // 2]) + 1 if n in gone else n for n in range(PATCHES)]
        index = torch.tensor([n for n in range(PATCHES) if n not in gone])
        parts = torch.tensor([[float(to[n] == new) for n in range(PATCHES)] for new in index.tolist()])
        size = parts.sum(1)
        few, cos, sin = parts @ x / size[:, None], cos[index], sin[index]
        few = few + first.mlp(first.norm2(few))
        for block in blocks:
            few = few + attended(block, few, cos, sin, size)[0]
            few = few + block.mlp(block.norm2(few))
        wanted = finished(model, inputs, parts.T @ few)
    torch.testing.assert_close(outputs_of(small, inputs)[0], wanted, atol=5e-5, rtol=1e-3)


def test_what_must_be_said_is_asked_for() -> None:
    """Where the image is: the error has it from the example. Patches of several images attend to their own alone,
    which leaves the tower as it is, with a reason."""
    with pytest.raises(BadOption, match=f"tokens={IMAGE}"):
        make("pyramid-drop")(built()[2])
    small = make("pyramid-drop", tokens=IMAGE)(built("sdpa", 2)[2])
    reasons = [str(each) for each in small.records[-1].declined]
    assert any("visual.blocks.0.attn" in each and "windows" in each for each in reasons)
