"""Diffusion transformers on pooled tokens: the structure equals its formulas, and each part its exact property."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graphopt
from graphopt.cost import summary
from graphopt.errors import BadOption, CannotShrink
from graphopt.passes import PREPARE, make
from graphopt.passes.base import run_passes
from graphopt.passes.flexdit import densities
from graphopt.program import Program
from graphopt.token_trace import chain, traced
from tests.token_models import Dit, DitBlock, random
from tests.transformer_nets import Decoder

SIDE = 4  # tokens


def model_of(fused: bool = True, layers: int = 8) -> Dit:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return random(Dit(layers=layers, fused=fused))


def inputs_of(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 8, 8, generator=seeded), torch.arange(batch) * 1.7, torch.arange(batch)


@cache
def captured_once(fused: bool = True, batch: int = 1) -> Program:
    return captured(model_of(fused), batch)


def captured(model: Dit, batch: int = 1) -> Program:
    return run_passes(graphopt.capture(model, inputs_of(batch)), PREPARE)


def output(program: Program, batch: int) -> Tensor:
    return program.run(dict(zip([each.name for each in program.inputs], inputs_of(batch), strict=True)))["output"]


def attended(block: DitBlock, x: Tensor, y: Tensor, c: Tensor, uniform: bool = False) -> Tensor:
    """The block with queries of x, keys and values of y; with `uniform` all logits are 0."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.condition(F.silu(c))[:, None].chunk(6, -1)
    own = block.attention
    weight, bias = (torch.cat([getattr(each, name) for each in own.project]) for name in ("weight", "bias"))
    each = zip(weight.chunk(3), bias.chunk(3), (x, y, y), strict=True)
    heads = [F.linear(block.norm1(t) * (1 + scale1) + shift1, w, b).unflatten(-1, (own.heads, -1)) for w, b, t in each]
    q, k, v = (head.transpose(1, 2) for head in heads)
    logits = q @ k.transpose(-1, -2) * (0.0 if uniform else q.shape[-1] ** -0.5)
    x = x + gate1 * own.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return x + gate2 * block.mlp(block.norm2(x) * (1 + scale2) + shift2)


def reference(
    model: Dit, inputs: tuple[Tensor, ...], grid: int, plan: tuple[int, int, int, int], joins: list[Any]
) -> Tensor:
    """FlexDiT from its formulas: average pooling, merge, blocks on few, nearest up-sampling, L1 + L2, recovery."""
    poolings, modules, sparse, dense = plan
    c = model.conditioned(*inputs[1:])
    x = model.enter(inputs[0]).flatten(2).transpose(1, 2) + model.position
    blocks = iter(model.blocks)
    for _ in range(poolings):
        block = next(blocks)
        x = attended(block, x, x, c, uniform=True)
    for number in range(modules):
        image = x.transpose(1, 2).unflatten(-1, (SIDE, SIDE))
        few = F.adaptive_avg_pool2d(image, grid).flatten(2).transpose(1, 2)
        few = attended(next(blocks), few, x, c)
        for _ in range(sparse):
            few = next(blocks)(few, c)
        up = F.interpolate(few.transpose(1, 2).unflatten(-1, (grid, grid)), size=SIDE, mode="nearest")
        x = F.linear(up.flatten(2).transpose(1, 2), joins[number][0]) + F.linear(x, joins[number][1])
        x = attended(next(blocks), x, few, c)
        for _ in range(dense):
            x = next(blocks)(x, c)
    for block in blocks:
        x = block(x, c)
    return model.head(x, c)


def with_joins(program: Program, seed: int | None) -> list[tuple[Tensor, Tensor]]:
    """The weights of each recovery, made random where there is a seed, in order."""
    state = program.exported.state_dict
    names = [name for name in state if name.endswith(".up.weight")]
    found = []
    for name in sorted(names):
        pair = (state[name], state[name.replace(".up.", ".full.")])
        if seed is not None:
            for tensor in pair:
                tensor.data = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) / 5
        found.append(pair)
    return found


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("grid", "plan"), [(2, (1, 1, 2, 1)), (1, (0, 2, 1, 1)), (2, (2, 2, 0, 0))])
def test_flexdit_equals_its_formulas(batch: int, fused: bool, grid: int, plan: tuple[int, int, int, int]) -> None:
    """With trained (here: random) joins, one projection for q, k and v or three, one module or several."""
    model = model_of(fused)
    options = dict(zip(("poolings", "modules", "sparse", "dense"), plan, strict=True))
    small = make("flexdit", grid=grid, **options)(captured_once(fused, batch))
    joins = with_joins(small, 3)
    assert len(joins) == plan[1]
    with torch.no_grad():
        wanted = reference(model, inputs_of(batch), grid, plan, joins)
    torch.testing.assert_close(output(small, batch), wanted, atol=2e-4, rtol=1e-3)


def test_the_whole_grid_and_no_pooling_change_no_bit() -> None:
    """As many cells as tokens: the program is the one it was."""
    program = captured_once(True, 2)
    same = make("flexdit", grid=SIDE, poolings=0, modules=2, sparse=1, dense=0)(program)
    assert torch.equal(output(same, 2), output(program, 2))
    assert not same.records[-1].changed


def test_pooling_is_attention_whose_logits_are_all_equal() -> None:
    """q and k of zeros: softmax(0) v is the mean of v, and the pass gives the same without q and k."""
    model = model_of(layers=3)
    program = captured(model, 2)
    pooled = make("flexdit", grid=SIDE, poolings=2, modules=0)(program)
    dim = model.position.shape[-1]
    with torch.no_grad():
        for block in model.blocks[:2]:
            for own in (block.attention.project[0].weight, block.attention.project[0].bias):
                own[: 2 * dim] = 0
        torch.testing.assert_close(output(pooled, 2), model(*inputs_of(2)), atol=1e-5, rtol=1e-4)


def test_recovery_gives_all_tokens_of_before_at_first() -> None:
    """up = 0, full = 1, and gates of the recovery block that are 0, as adaLN-zero has them: the module is gone."""
    model = model_of(layers=4)
    with torch.no_grad():
        for own in model.blocks[2].condition.parameters():
            own.zero_()
    small = make("flexdit", grid=2, poolings=0, modules=1, sparse=1, dense=0)(captured(model, 2))
    x, t, y = inputs_of(2)
    with torch.no_grad():
        c = model.conditioned(t, y)
        tokens = model.enter(x).flatten(2).transpose(1, 2) + model.position
        wanted = model.head(model.blocks[3](tokens, c), c)
    torch.testing.assert_close(output(small, 2), wanted, atol=1e-5, rtol=1e-4)


def macs_of(tokens: int, few: int, d: int, plan: tuple[int, int, int, int], layers: int) -> tuple[int, int]:
    """Multiply-adds of all blocks before and after, by the paper's counts."""
    poolings, modules, sparse, dense = plan
    whole, small = (12 * n * d * d + 2 * n * n * d for n in (tokens, few))
    pooling = 10 * tokens * d * d
    merge = 2 * few * d * d + 2 * tokens * d * d + 2 * few * tokens * d + 8 * few * d * d
    recovery = 4 * tokens * d * d + 2 * few * d * d + 2 * tokens * few * d + 8 * tokens * d * d
    left = layers - poolings - modules * (2 + sparse + dense)
    after = poolings * pooling + modules * (merge + sparse * small + recovery + dense * whole) + left * whole
    return layers * whole, after


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("plan", [(2, 1, 3, 1), (1, 2, 1, 0), (3, 0, 0, 0)])
def test_cost_is_the_papers(fused: bool, plan: tuple[int, int, int, int]) -> None:
    """Multiply-adds saved are those of the paper's counts, to the last one: nothing is computed for tokens in vain."""
    program = captured_once(fused)
    options = dict(zip(("poolings", "modules", "sparse", "dense"), plan, strict=True))
    small = make("flexdit", grid=2, **options)(program)
    before, after = macs_of(SIDE * SIDE, 4, 32, plan, 8)
    assert summary(program).total.macs - summary(small).total.macs == before - after


def test_the_papers_numbers() -> None:
    """DiT-XL at 512 pixels: 55.5 % less with 8 x 8 tokens, 45.2 % less with 16 x 16."""
    for few, share in ((64, 0.555), (256, 0.452)):
        before, after = macs_of(1024, few, 1152, (2, 4, 3, 1), 28)
        assert 1 - after / before == pytest.approx(share, abs=5e-4)


def test_densities_share_their_parameters() -> None:
    """Programs for different steps of a sampler hold the same objects, those that the pass made too."""
    programs = densities(captured_once(), (1, 2), poolings=1, modules=1, sparse=1, dense=1)
    one, two = (programs[grid].exported.state_dict for grid in (1, 2))
    assert set(one) == set(two)
    assert all(one[name] is two[name] for name in one)
    assert any(name.endswith(".up.weight") for name in one)
    trained = with_joins(programs[1], 5)
    assert torch.equal(with_joins(programs[2], None)[0][0], trained[0][0])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_trace_is_the_cells_of_each_module(batch: int) -> None:
    """All tokens are there again in front of each; marks and `trace` say the same, and outputs stay what they were."""
    program = captured(model_of(), batch)
    plain = make("flexdit", grid=2, poolings=1, modules=2, sparse=1, dense=0)(program)
    more = make("flexdit", grid=2, poolings=1, modules=2, sparse=1, dense=0, trace=True)(program)
    cells = [row // 2 * 2 + column // 2 for row in range(SIDE) for column in range(SIDE)]
    inputs = program.example_inputs or {}
    for given in (traced(plain), more):
        results = given.run(inputs)
        parts = chain({name: value.numpy() for name, value in results.items()})
        assert [part.tolist() for part in parts] == [[cells] * batch] * 2
        assert torch.equal(results["output"], plain.run(inputs)["output"])
    assert plain.records[-1].places == [("in front of blocks.1", 16, 4), ("in front of blocks.4", 16, 4)]


def test_what_cannot_be_is_refused_with_a_reason() -> None:
    """Grids that do not divide, more blocks than there are, causal attention."""
    program = captured_once()
    with pytest.raises(BadOption, match="sides that divide it are 1, 2, 4"):
        make("flexdit", grid=3, modules=1)(program)
    with pytest.raises(BadOption, match="the model has 8") as caught:
        make("flexdit", grid=2)(program)
    own = caught.value.way_out.partition("give ")[2]  # what it says to give fits
    make(
        "flexdit", grid=2, **{name: int(count) for name, _, count in (each.partition("=") for each in own.split(","))}
    )(program)
    decoder = Decoder(dim=16, heads=2, layers=2, sequence=16, words=20).eval()
    text = run_passes(graphopt.capture(decoder, (torch.arange(16)[None],)), PREPARE)
    with pytest.raises(CannotShrink, match="not all queries look at all keys alike"):
        make("flexdit", grid=4, poolings=1, modules=0)(text)
