"""Tokens of state-space models: every direction visits what stays in its own order, and knows what went between."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.budget import Budget
from graphopt.errors import BadOption, NothingToCut
from graphopt.passes import PREPARE, make
from graphopt.passes.base import run_passes
from graphopt.program import Program
from tests.token_models import PlainMamba, ScanBlock, Vim, VMamba, grid_orders, stepwise
from tests.transformer_nets import Decoder

SIDE = 4
N = SIDE * SIDE


def model_of(kind: type[nn.Module], layers: int = 3) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(layers=layers).eval()


def image_of(batch: int) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@cache
def captured(kind: type[nn.Module], layers: int, batch: int) -> Program:
    return run_passes(graphopt.capture(model_of(kind, layers), (image_of(batch),)), PREPARE)


def after(model: nn.Module | Program, x: Tensor, **options: Any) -> tuple[Program, Tensor]:
    program = model if isinstance(model, Program) else run_passes(graphopt.capture(model, (x,)), PREPARE)
    small = make("prune-scan-tokens", **options)(program)
    return small, small.run({"x": x})["output"]


def visits(order: Tensor, index: Tensor, middle: bool) -> Tensor:
    """The kept tokens, by number among the kept, as a direction visits them: in its order on the whole grid."""
    if middle:  # forwards or backwards; the class token stays in the middle
        return torch.arange(len(index)) if order[0] == 0 else torch.arange(len(index)).flip(0)
    return order.argsort()[index].argsort()


def run_block(block: ScanBlock, x: Tensor, index: Tensor, align: bool, middle: bool) -> tuple[Tensor, Tensor]:
    """A block on the tokens `index` of the grid, one sample; and what its scans give."""
    y, gate = block.enter(block.norm(x)).chunk(2, -1)
    total: Any = 0
    for number in range(len(block.orders)):
        order = getattr(block, f"order{number}")
        visit = visits(order, index, middle)
        places = order.argsort()[index][visit]
        gap = torch.cat([torch.ones(1), (places[1:] - places[:-1]).clamp(min=1)])[None]
        one = block.scan(y[:, visit], gap if align else None)
        total = total + one[:, visit.argsort()]
    return x + block.leave(total * F.silu(gate)), total


def reference(model: Any, x: Tensor, counts: list[int | None], align: bool) -> Tensor:
    """One sample from the formulas: behind block i, `counts[i]` tokens of the highest sum of max(0, y) stay."""
    vim = isinstance(model, Vim)
    x = model.patch(x).flatten(2).transpose(1, 2)
    if vim:
        x = torch.cat([x[:, : model.middle], model.cls, x[:, model.middle :]], 1) + model.position
    index, cls = torch.arange(x.shape[1]), model.middle if vim else -1
    for block, count in zip(model.blocks, counts, strict=True):
        x, y = run_block(block, x, index, align, vim)
        if count is None:
            continue
        patches = torch.tensor([n for n in range(x.shape[1]) if n != cls])
        stay = patches[y.clamp(min=0).sum(-1)[0, patches].topk(count).indices.sort().values]
        if vim:
            stay = torch.cat([stay[: count // 2], torch.tensor([cls]), stay[count // 2 :]])
            cls = count // 2
        x, index = x[:, stay], index[stay]
    x = model.norm(x)
    return model.head(x[:, cls] if vim else x.mean(1))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("kind", [PlainMamba, Vim])
def test_equals_its_formulas(kind: type[nn.Module], align: bool, batch: int) -> None:
    """Two places, one behind the other; four ways through a grid, or two with the class token in the middle."""
    model, x = model_of(kind), image_of(batch)
    small, got = after(captured(kind, 3, batch), x, sites=(0, 1), counts=(12, 6), align=align)
    with torch.no_grad():
        wanted = torch.cat([reference(model, x[n : n + 1], [12, 6, None], align) for n in range(batch)])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    assert small.records[-1].changed["place"] == 2


@pytest.mark.parametrize("kind", [PlainMamba, Vim])
def test_keeping_all_changes_no_bit(kind: type[nn.Module]) -> None:
    program, x = captured(kind, 3, 2), image_of(2)
    small, got = after(program, x, sites=(0, 1), counts=(N, N))
    assert torch.equal(got, program.run({"x": x})["output"])
    assert not small.records[-1].changed


def test_alignment_is_the_whole_scan_with_nothing_fed_where_tokens_are_gone() -> None:
    """Where all steps are the same: exp(D A)^(gap) decays as the places do at which B x is 0, in every direction."""
    model, x = model_of(PlainMamba, 2), image_of(1)
    for block in model.blocks:
        nn.init.zeros_(block.step.weight)
    _, got = after(model, x, sites=(0,), counts=(7,), align=True)
    with torch.no_grad():
        tokens = model.patch(x).flatten(2).transpose(1, 2)
        tokens, y = run_block(model.blocks[0], tokens, torch.arange(N), True, False)
        stay = y.clamp(min=0).sum(-1)[0].topk(7).indices.sort().values
        fed = torch.zeros(1, N).index_fill(1, stay, 1.0)
        block = model.blocks[1]
        y, gate = block.enter(block.norm(tokens)).chunk(2, -1)
        total = sum(block.scan(y[:, o], fed=fed[:, o])[:, o.argsort()] for o in grid_orders(SIDE))
        tokens = tokens + block.leave(total * F.silu(gate))
        wanted = model.head(model.norm(tokens[:, stay]).mean(1))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gone", ["(10,11,12,13,14,15)", "(0,1,2,12,13)"])
def test_where_neighbours_stay_neighbours_alignment_changes_nothing(gone: str) -> None:
    """g = 1 everywhere, where tokens go at the ends of a snake of rows and its reverse: the scan is the compact one."""
    model, x = model_of(PlainMamba, 2), image_of(2)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = ScanBlock(16, 12, 3, grid_orders(SIDE)[:2]).eval()
        model.blocks[number].load_state_dict(block.state_dict(), strict=False)
    count = N - len(gone.split(","))
    options = {"sites": (0,), "counts": (count,), "reducer": f"listed:gone={gone}"}
    one, two = (after(model, x, align=align, **options)[1] for align in (True, False))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_a_sub_grid_is_visited_in_the_order_of_the_whole() -> None:
    """What the reference above stands on: relative order per direction is that of the full grid, not of a new grid."""
    stay = torch.tensor([0, 2, 8, 10])
    expected = [[0, 2, 8, 10], [10, 8, 2, 0], [0, 8, 2, 10], [10, 2, 8, 0]]
    for order, wanted in zip(grid_orders(SIDE), expected, strict=True):
        assert stay[visits(order, stay, False)].tolist() == wanted
        assert [token for token in order.tolist() if token in stay.tolist()] == wanted


@pytest.mark.parametrize("counts", [(15, 9), (13, 13), (3, 2)])
def test_the_class_token_survives_in_the_middle_of_an_odd_number(counts: tuple[int, int]) -> None:
    """Counts are made even beside it; the head still reads the class token."""
    model, x = model_of(Vim), image_of(2)
    small, got = after(captured(Vim, 3, 2), x, sites=(0, 1), counts=counts)
    kept = [row["kept"] for row in small.records[-1].details if "kept" in row]
    assert kept == sorted({count - count % 2 for count in counts}, reverse=True)
    wanted = [counts[0] - counts[0] % 2, counts[1] - counts[1] % 2, None]
    with torch.no_grad():
        rows = torch.cat([reference(model, x[n : n + 1], wanted, True) for n in range(2)])
    torch.testing.assert_close(got, rows, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", [PlainMamba, Vim])
def test_flops_are_those_of_the_polynomial_and_within_the_budget(kind: type[nn.Module]) -> None:
    """Turns and scans of every direction are counted by the tokens that stay."""
    small, _ = after(captured(kind, 3, 2), image_of(2), sites=(0, 1), budget=Budget("flops", 0.8))
    record = small.records[-1]
    assert record.flops_after == record.details[-1]["model_flops"] + record.details[-1]["reduction_flops"]
    assert 0.7 < record.flops_after / record.flops_before <= 0.8


def test_four_fifths_stay_at_each_place_if_nothing_is_said() -> None:
    """The paper's counts: behind 5, 10 and 15 of 24 blocks; ceil(0.8 (n - 1)), made odd with the class token."""
    small, _ = after(model_of(PlainMamba, 6), image_of(1))
    rows = [row for row in small.records[-1].details if "kept" in row]
    assert [(row["block"], row["kept"]) for row in rows] == [(0, 13), (1, 11), (2, 9)]
    small, _ = after(model_of(Vim, 6), image_of(1))
    assert [row["kept"] + 1 for row in small.records[-1].details if "kept" in row] == [13, 11, 9]


@pytest.mark.parametrize("kind", [PlainMamba, Vim])
def test_tokens_come_back_at_a_block(kind: type[nn.Module]) -> None:
    """`until`: behind that block all are there, those that went as they were; the last block runs on all."""
    program, x = captured(kind, 3, 2), image_of(2)
    _, got = after(program, x, sites=(0,), counts=(8,), until=1, align=False)
    model: Any = model_of(kind)
    vim = kind is Vim
    with torch.no_grad():
        rows = []
        for own in x.split(1):
            tokens = model.patch(own).flatten(2).transpose(1, 2)
            cls, patches = -1, torch.arange(N)
            if vim:
                cls = model.middle
                tokens = torch.cat([tokens[:, :cls], model.cls, tokens[:, cls:]], 1) + model.position
                patches = torch.tensor([n for n in range(N + 1) if n != cls])
            tokens, y = run_block(model.blocks[0], tokens, torch.arange(tokens.shape[1]), False, vim)
            stay = patches[y.clamp(min=0).sum(-1)[0, patches].topk(8).indices.sort().values]
            stay = torch.cat([stay[:4], torch.tensor([cls]), stay[4:]]) if vim else stay
            few, _ = run_block(model.blocks[1], tokens[:, stay], stay, False, vim)
            tokens, _ = run_block(model.blocks[2], tokens.index_copy(1, stay, few), torch.arange(N + vim), False, vim)
            tokens = model.norm(tokens)
            rows.append(model.head(tokens[:, cls] if vim else tokens.mean(1)))
    torch.testing.assert_close(got, torch.cat(rows), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("kind", "align", "batch", "counts"), [(PlainMamba, True, 2, (9,)), (Vim, True, 1, (12, 6))])
def test_scans_step_by_step_are_those_by_sums(
    kind: type[nn.Module], align: bool, batch: int, counts: tuple[int, ...]
) -> None:
    """A loop over the tokens has as many steps as tokens stay, in every direction; decay bridges what is gone."""
    x, layers = image_of(batch), len(counts) + 1
    options: dict[str, Any] = {"sites": tuple(range(len(counts))), "counts": counts, "align": align}
    _, wanted = after(captured(kind, layers, batch), x, **options)
    small, got = after(stepwise(model_of(kind, layers)), x, **options)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    record = small.records[-1]
    assert record.changed["place"] == len(counts)
    assert record.changed.get("aligned scan", 0) == align * len(counts) * (4 if kind is PlainMamba else 2)
    assert record.flops_after == record.details[-1]["model_flops"] + record.details[-1]["reduction_flops"]


def test_mamba_of_transformers_on_fewer_tokens() -> None:
    """Without alignment, layers behind a place run on the tokens that stay as on a shorter text; causal convolutions,
    too. Words are not dropped on a guess."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=3, intermediate_size=24, use_cache=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MambaModel(config).eval()
    words = torch.arange(20, 29)[None]
    program = run_passes(graphopt.capture(model, {"input_ids": words}), PREPARE)
    with pytest.raises(BadOption, match="START:STOP"):
        make("prune-scan-tokens")(program)
    options = {"tokens": "1:8", "sites": (0,), "reducer": "listed:gone=(2,5)", "counts": (5,), "align": False}
    small = make("prune-scan-tokens", outputs="shrink", **options)(program)
    with torch.no_grad():
        first, *others = model.layers
        x = first(model.embeddings(words))[:, [0, 1, 2, 4, 5, 7, 8]]
        for layer in others:
            x = layer(x)
        wanted = model.norm_f(x)
    torch.testing.assert_close(small.run({"input_ids": words})["last_hidden_state"], wanted, atol=1e-5, rtol=1e-4)


class Uneven(ScanBlock):
    """A loop that counts its steps, or whose last state is read elsewhere, too."""

    last = False

    def scan(self, x: Tensor, gap: Tensor | None = None, fed: Tensor | None = None) -> Tensor:
        decay, h, results = torch.sigmoid(self.step(x)), torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + (x[:, t] if self.last else x[:, t] * (t + 1))
            results.append(h.sin())
        return torch.stack(results, 1) + (h[:, None] if self.last else 0)


@pytest.mark.parametrize("last", [False, True])
def test_loops_whose_steps_are_not_alike_are_left_alone_with_a_reason(last: bool) -> None:
    """What a step knows of its number would be wrong of a token that moved up."""
    model: Any = PlainMamba(layers=2)
    for block in model.blocks:
        block.__class__, block.last = Uneven, last
    same, _ = after(model.eval(), image_of(1))
    assert not same.records[-1].changed
    assert any("with equal steps" in str(each.reason) for each in same.records[-1].declined)


def test_directions_stacked_on_a_grid_are_left_alone_with_a_reason() -> None:
    """VMamba: the reason names the grid, and how a model would be written that can do with fewer tokens."""
    same, _ = after(VMamba().eval(), image_of(1))
    assert not same.records[-1].changed
    reasons = [str(each.reason) for each in same.records[-1].declined]
    assert all("a grid of 4 x 4" in each and "a scan for each direction" in each for each in reasons)


def test_what_cannot_be_followed_is_left_alone_with_a_reason() -> None:
    """A model without scans; options that contradict each other."""
    words = torch.arange(12)[None]
    program = run_passes(graphopt.capture(Decoder(16, 2, 2, 12, 20).eval(), (words,)), PREPARE)
    same = make("prune-scan-tokens")(program)
    assert not same.records[-1].changed
    assert any("no scan by cumulative sums" in str(each.reason) for each in same.records[-1].declined)
    with pytest.raises(NothingToCut, match="no scan by cumulative sums"):
        make("prune-scan-tokens", budget=Budget("flops", 0.5))(program)
    with pytest.raises(BadOption, match="behind blocks"):
        make("prune-scan-tokens", where="attention")(program)
    with pytest.raises(BadOption, match="no attention is there"):
        make("prune-scan-tokens", score="class-attention")(program)
    with pytest.raises(BadOption, match="dropped, by top-k"):
        make("prune-scan-tokens", reducer="bipartite")(program)
    with pytest.raises(BadOption, match="blocks are 0 to 2"):
        after(captured(PlainMamba, 3, 1), image_of(1), until=3)
    with pytest.raises(BadOption, match="blocks are 0 to 2"):
        after(captured(PlainMamba, 3, 1), image_of(1), sites=(3,))
