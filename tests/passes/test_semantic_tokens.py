"""Semantic tokens: the modules equal their formulas, and each part its exact property."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import graphopt
from graphopt.cost import summary
from graphopt.errors import BadOption, CannotShrink
from graphopt.passes import PREPARE, make
from graphopt.passes.base import run_passes
from graphopt.program import Program
from graphopt.token_trace import chain, traced
from tests.token_models import Segmenter, random
from tests.transformer_nets import Block, Swin, VisionTransformer

DIM, SIDE, LAYERS = 32, 4, 5


def vit(layers: int = LAYERS) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return random(VisionTransformer(dim=DIM, heads=4, layers=layers, image=32, patch=8, classes=10))


def segmenter() -> Segmenter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return random(Segmenter(DIM, layers=LAYERS))


def image_of(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def after(model: nn.Module, x: Tensor, trained: bool = True, **options: Any) -> Program:
    """The program of a pass, with scales and centres that are not those of the start, as training leaves them."""
    small = make("semantic-tokens", **options)(run_passes(graphopt.capture(model, (x,)), PREPARE))
    state = small.exported.state_dict
    seeded = torch.Generator().manual_seed(3)
    for name in sorted(state):
        if trained and (".scale" in name or ".centres" in name):
            state[name].data = torch.randn(state[name].shape, generator=seeded)
    return small


def attended(block: Block, q: Tensor, kv: Tensor) -> Tensor:
    """What attention adds: queries of one set of tokens, keys and values of another."""
    own = block.attention
    weight, bias = own.project[0].weight.chunk(3), own.project[0].bias.chunk(3)
    each = zip(weight, bias, (q, kv, kv), strict=True)
    heads = [F.linear(block.norm1(t), w, b).unflatten(-1, (own.heads, -1)).transpose(1, 2) for w, b, t in each]
    logits = heads[0] @ heads[1].transpose(-1, -2) * heads[0].shape[-1] ** -0.5
    return own.out((logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))


def reference(model: Any, x: Tensor, state: dict[str, Tensor], few: int, base: int, recover: int | None) -> Tensor:
    """STViT from its formulas, behind the patches; the tokens behind the last block."""
    x = model.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls.expand(x.shape[0], -1, -1), x], 1) + model.position
    blocks = list(model.blocks)
    for block in blocks[:base]:
        x = block(x)
    image = x[:, 1:]
    pooled = F.adaptive_max_pool2d(image.transpose(1, 2).unflatten(-1, (SIDE, SIDE)), few).flatten(2).transpose(1, 2)
    s = torch.cat([x[:, :1], pooled], 1)
    for number in (base, base + 1):
        block, name = blocks[number], f"blocks.{number}"
        q = s if number == base else s + F.pad(state[f"{name}.centres"], (0, 0, 1, 0))
        s = s + state[f"{name}.scale1"] * attended(block, q, torch.cat([s, image], 1))
        s = s + state[f"{name}.scale2"] * block.mlp(block.norm2(s))
    for number, block in enumerate(blocks[base + 2 :], base + 2):
        if number == recover:
            x = torch.cat([s[:, :1], image], 1)
            x = x + attended(block, x, s)
            s = x + block.mlp(block.norm2(x))
        else:
            s = block(s)
    return s


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("few", "base"), [(2, 1), (3, 2), (1, 0)])
def test_semantic_tokens_equal_their_formulas(batch: int, few: int, base: int) -> None:
    """Pooling also where the grid does not divide; base blocks of any number."""
    model, x = vit(), image_of(batch)
    small = after(model, x, count=few * few, base=base)
    with torch.no_grad():
        s = reference(model, x, small.exported.state_dict, few, base, None)
        wanted = model.head(model.norm(s)[:, 0])
    torch.testing.assert_close(small.run({"x": x})["output"], wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("few", [2, 3])
def test_the_trace_is_who_looks_at_an_image_token_most(batch: int, few: int) -> None:
    """Among the semantic tokens, in the second generation block, mean over heads; other outputs stay."""
    model, x = vit(), image_of(batch)
    small, plain = (after(model, x, count=few * few, base=1, trace=trace) for trace in (True, False))
    state = small.exported.state_dict
    with torch.no_grad():
        tokens = model.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([model.cls.expand(batch, -1, -1), tokens], 1) + model.position
        tokens = model.blocks[0](tokens)
        image = tokens[:, 1:]
        grid = image.transpose(1, 2).unflatten(-1, (SIDE, SIDE))
        s = torch.cat([tokens[:, :1], F.adaptive_max_pool2d(grid, few).flatten(2).transpose(1, 2)], 1)
        first, second = model.blocks[1], model.blocks[2]
        s = s + state["blocks.1.scale1"] * attended(first, s, torch.cat([s, image], 1))
        s = s + state["blocks.1.scale2"] * first.mlp(first.norm2(s))
        q = second.norm1(s + F.pad(state["blocks.2.centres"], (0, 0, 1, 0)))
        weight, bias = (each.chunk(3) for each in second.attention.project[0].parameters())
        q, k = F.linear(q, weight[0], bias[0]), F.linear(second.norm1(torch.cat([s, image], 1)), weight[1], bias[1])
        q, k = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in (q, k))
        rows = (q @ k.transpose(-1, -2) * (DIM // 4) ** -0.5).softmax(-1).mean(1)
    results = small.run({"x": x})
    assert torch.equal(results["tokens_0"], rows[:, 1:, -SIDE * SIDE :].argmax(1))
    assert torch.equal(results["output"], plain.run({"x": x})["output"])
    assert small.records[-1].places == [("in front of blocks.1", 16, few * few)]


def test_the_trace_goes_on_behind_other_passes() -> None:
    """Places of passes in front, marked or traced, keep their numbers; a later one chooses among semantic tokens."""
    model, x = vit(), image_of(1)
    program = run_passes(graphopt.capture(model, (x,)), PREPARE)
    small = make("semantic-tokens", count=9, base=1, trace=True)(program)
    fewer = make("prune-tokens", counts=(4,), sites=(2,), trace=True)(small)
    assert [spec.name for spec in fewer.outputs] == ["output", "tokens_0", "tokens_1"]
    first, second = chain({name: value.numpy() for name, value in fewer.run({"x": x}).items()}, [9, 4])
    assert first.shape == second.shape == (1, 16)
    assert set(second[0]) <= {-1, 0, 1, 2, 3}
    assert traced(fewer) is fewer


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("recover", [3, 4])
def test_recovery_brings_every_token_back_to_a_dense_head(batch: int, recover: int) -> None:
    """Image tokens as queries, semantic ones as keys and values; then blocks and head on the whole grid."""
    model, x = segmenter(), image_of(batch)
    small = after(model, x, count=4, base=0, recover=recover)
    with torch.no_grad():
        wanted = model.dense(reference(model, x, small.exported.state_dict, 2, 0, recover))
    torch.testing.assert_close(small.run({"x": x})["output"], wanted, atol=2e-4, rtol=1e-3)


def test_gradients_reach_everything_that_is_trained() -> None:
    """Every parameter and every pixel, through pooling, generation and recovery."""
    x = image_of(2).requires_grad_()
    small = after(segmenter(), image_of(2), count=4, base=1, recover=4)
    module = small.to_module()
    own = {name: tensor.requires_grad_() for name, tensor in module.named_parameters()}
    functional_call(module, own, (x,)).square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().amax((0, 1)) > 0).all()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in own.values())


def test_a_file_gives_the_same_again(tmp_path: Path) -> None:
    """Pooling, both generation blocks and recovery are what torch.export can write and read."""
    x = image_of(2)
    small = after(segmenter(), x, count=4, base=1, recover=4)
    small.save(tmp_path / "small.pt2")
    assert torch.equal(graphopt.capture(tmp_path / "small.pt2").run({"x": x})["output"], small.run({"x": x})["output"])


def test_as_many_as_tokens_and_no_scale_give_the_image_tokens() -> None:
    """Pooling to the same grid, scales 0: the generation blocks hand their tokens on."""
    model, x = vit(), image_of(2)
    small = after(model, x, trained=False, count=SIDE * SIDE, base=1)
    for name, tensor in small.exported.state_dict.items():
        if ".scale" in name:
            assert torch.equal(tensor, torch.full_like(tensor, 1e-5))
            tensor.data = torch.zeros_like(tensor)
    model.blocks = nn.Sequential(*(block for n, block in enumerate(model.blocks) if n not in (1, 2)))
    with torch.no_grad():
        torch.testing.assert_close(small.run({"x": x})["output"], model(x), atol=1e-5, rtol=1e-4)


def test_order_inside_a_pooling_cell_does_not_matter() -> None:
    """Tokens of a cell in another order: the same semantic tokens, as keys have no positions."""
    model, x = vit(), image_of(1)
    order = torch.arange(16).view(2, 2, 2, 2)[:, [1, 0]].flatten()  # the rows of each pair of rows change places
    other = vit()
    with torch.no_grad():
        other.position[:, 1:] = model.position[:, 1:][:, order]
    shuffled = x.view(1, 3, 4, 8, 32)[:, :, [1, 0, 3, 2]].reshape(1, 3, 32, 32)
    assert order.view(4, 4)[0].tolist() == [4, 5, 6, 7]
    one, two = (after(net, each, count=4, base=1).run({"x": each}) for net, each in ((model, x), (other, shuffled)))
    torch.testing.assert_close(one["output"], two["output"], atol=1e-4, rtol=1e-3)


def macs_of(d: int, tokens: int, few: int, base: int, layers: int) -> tuple[int, int]:
    """Multiply-adds of all blocks before and after, by the paper's counts; class tokens counted."""

    def block(n: int, m: int) -> int:
        return 2 * n * d * d + 2 * m * d * d + 2 * n * m * d + 8 * n * d * d

    whole, around = block(tokens, tokens), block(few, few + tokens - 1)
    return layers * whole, base * whole + 2 * around + (layers - base - 2) * block(few, few)


def test_cost_is_the_papers() -> None:
    """What is saved is what the counts say, to the last multiply-add; DeiT-S with 4 + 2 + 6 blocks: 58.7 % less."""
    x = image_of(1)
    program = run_passes(graphopt.capture(vit(), (x,)), PREPARE)
    small = make("semantic-tokens", count=4, base=1)(program)
    before, now = macs_of(DIM, SIDE * SIDE + 1, 4 + 1, 1, LAYERS)
    assert summary(program).total.macs - summary(small).total.macs == before - now
    before, now = macs_of(384, 197, 17, 4, 12)
    assert now == pytest.approx(1.877e9, rel=1e-3)
    assert before == pytest.approx(4.541e9, rel=1e-3)


def test_what_cannot_be_is_refused_with_a_reason() -> None:
    """A dense head without recovery names where tokens are wanted; windows are left alone; options that do not fit."""
    x = image_of(1)
    with pytest.raises(CannotShrink, match="recover=BLOCK"):
        after(segmenter(), x, count=4, base=0)
    with pytest.raises(BadOption, match="square grids"):
        after(vit(), x, count=5, base=1)
    with pytest.raises(BadOption, match="two of 5 blocks"):
        after(vit(), x, count=4, base=4)
    swin = Swin(dim=16, heads=2, grid=8, window=4, layers=2, patch=4, classes=5).eval()
    same = after(swin, x, count=4, base=0)
    assert not same.records[-1].changed
    assert any("windows" in str(each) for each in same.records[-1].declined)
