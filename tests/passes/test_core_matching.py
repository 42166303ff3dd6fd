"""Core neurons and the tokens they fire for: equal to the paper's formulas, in prefill and decode."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.budget import Budget
from graphopt.errors import BadOption
from graphopt.passes import make
from graphopt.passes.tokens.neurons import core_neurons, core_size, elbow, matches
from graphopt.program import Program
from tests.passes.tokens.visual import logits_of, program_of
from tests.transformer_nets import LlamaBlock, VisionTransformer, rotate, tables
from tests.vision_language import BEFORE, VISUAL, LlavaLike, example, llava

# The formulas, token by token -----------------------------------------------------------------------------------------


def hidden_of(block: LlamaBlock, x: Tensor) -> Tensor:
    """What the down projection reads, (n, neurons), of the stream behind attention."""
    y = block.norm2(x)
    return (F.silu(block.gate(y)) * block.up(y))[0]


def fired(row: Tensor) -> set[int]:
    """Gamma(x)."""
    return {n for n, a in enumerate(row.tolist()) if a > 0}


def core_of(hidden: Tensor, rho: float, beta: float) -> list[int]:
    """The top beta share by frequency among the top rho share of what each token fires."""
    often = [0] * hidden.shape[1]
    for row in hidden:
        strongest = sorted(fired(row), key=lambda n: -float(row[n]))
        for neuron in strongest[: math.ceil(rho * len(strongest) - 1e-3)]:
            often[neuron] += 1
    ranked = sorted(range(len(often)), key=lambda n: (-often[n], n))
    return sorted(ranked[: math.ceil(beta * len(often) - 1e-3)])


def matches_of(hidden: Tensor, core: list[int]) -> list[int]:
    return [len(fired(row) & set(core)) for row in hidden]


def elbow_of(curve: list[int]) -> int:
    """By the geometry: the distance of a point to the line through the ends."""
    falling = sorted(curve, reverse=True)
    last = len(falling) - 1
    length = math.hypot(last, falling[-1] - falling[0])
    apart = [((y - falling[0]) * last - x * (falling[-1] - falling[0])) / length for x, y in enumerate(falling)]
    at = max(range(len(falling)), key=lambda x: (abs(apart[x]), -x))
    if abs(apart[at]) < 1e-9:
        return len(falling)
    return sum(y > falling[at] for y in falling) if apart[at] < 0 else sum(y >= falling[at] for y in falling)


def prefill(
    model: LlavaLike, inputs: dict[str, Tensor], counts: dict[int, int], rho: float, beta: float
) -> tuple[Tensor, list[Tensor], list[list[int]], list[int]]:
    """One sample: the logits of what is left, every layer's keys and values, cores, and matches where tokens go."""
    decoder = model.decoder
    x = model.embed(inputs["input_ids"], inputs["pixels"])
    places, visual = torch.arange(x.shape[1]), VISUAL
    cache: list[Tensor] = []
    cores: list[list[int]] = []
    found: list[int] = []
    for number, block in enumerate(decoder.blocks):
        seen: list[Tensor] = []
        handle = block.down.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0][0]))
        x = block(x, *tables(places, decoder.size), cache)
        handle.remove()
        cores.append(core_of(seen[0], rho, beta))
        if number in counts:
            found = matches_of(seen[0], cores[-1])[BEFORE : BEFORE + visual]
            ranked = sorted(range(visual), key=lambda n: (-found[n], n))
            stay = torch.tensor(sorted(ranked[: counts[number]])) + BEFORE
            index = torch.cat([torch.arange(BEFORE), stay, torch.arange(BEFORE + visual, x.shape[1])])
            x, places, visual = x[:, index], places[index], len(stay)
    return decoder.head(decoder.norm(x)), cache, cores, found


class Decode(nn.Module):
    """One token behind those whose keys and values are given, two tensors a layer."""

    def __init__(self, model: LlavaLike) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, input_ids: Tensor, place: Tensor, cache: list[Tensor]) -> Tensor:
        decoder = self.decoder
        x, (cos, sin) = decoder.word(input_ids), tables(place, decoder.size)
        for block, keys, values in zip(decoder.blocks, cache[::2], cache[1::2], strict=True):
            y = block.norm1(x)
            q, k, v = (f(y).view(1, 1, -1, block.size).transpose(1, 2) for f in (block.q, block.k, block.v))
            k, v = (torch.cat(pair, 2) for pair in ((keys, rotate(k, cos, sin)), (values, v)))
            k, v = (each.repeat_interleave(block.heads // block.groups, 1) for each in (k, v))
            y = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v)
            x = x + block.o(y.transpose(1, 2).reshape(1, 1, -1))
            x = x + block.down(F.silu(block.gate(block.norm2(x))) * block.up(block.norm2(x)))
        return decoder.head(decoder.norm(x))


def decode_of(model: LlavaLike, cache: list[Tensor]) -> tuple[Program, dict[str, Tensor]]:
    """The decode program for caches of these lengths, and its inputs behind the prompt."""
    given = (torch.tensor([[7]]), torch.tensor([24.0]), cache)
    program = graphopt.capture(Decode(model).eval(), given, name="decode")
    names = [spec.name for spec in program.inputs]
    return program, dict(zip(names, (*given[:2], *cache), strict=True))


# Neurons and elbows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rho", "beta"), [(0.2, 0.4), (1.0, 1.0), (0.01, 0.5), (0.5, 0.03), (1.0, 0.4)])
@pytest.mark.parametrize("seed", range(3))
def test_core_neurons_and_matches(rho: float, beta: float, seed: int) -> None:
    """As sets, sample by sample; one token of the second fires nothing."""
    hidden = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(seed))
    hidden[1, 4] = -1
    core = core_neurons(hidden, rho, beta)
    assert core.tolist() == [core_of(own, rho, beta) for own in hidden]
    assert matches(hidden, core).tolist() == [matches_of(*own) for own in zip(hidden, core.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("neurons", "beta", "size"), [(48, 0.4, 20), (10, 0.4, 4), (11008, 0.4, 4416), (260, 1.0, 260)]
)
def test_cores_are_whole_vectors_of_many_neurons(neurons: int, beta: float, size: int) -> None:
    """Of few, the share rounded up; never more than there are."""
    assert core_size(neurons, beta) == size


@pytest.mark.parametrize(("high", "count", "total"), [(1, 3, 10), (5, 5, 10), (7, 9, 10), (2, 1, 10), (3, 1, 2)])
def test_the_elbow_of_a_step_is_at_the_step(high: int, count: int, total: int) -> None:
    """What is on the upper level stays, wherever the step is."""
    assert elbow(torch.tensor([high] * count + [0] * (total - count))) == (count if total > 2 else total)


@pytest.mark.parametrize("curve", [torch.arange(20, 0, -1), torch.full((7,), 3), torch.linspace(0.9, 0.1, 33)])
def test_a_straight_line_has_no_elbow(curve: Tensor) -> None:
    """So all stay."""
    assert elbow(curve) == len(curve)


@pytest.mark.parametrize("seed", range(5))
def test_the_elbow_does_not_hang_on_scale(seed: int) -> None:
    """Either side of the plot may be stretched; it is where the geometry says."""
    random = torch.Generator().manual_seed(seed)
    curve = torch.randint(0, 30, (25,), generator=random).sort(descending=True).values
    assert elbow(curve) == elbow_of(curve.tolist())
    assert elbow(curve * 0.37) == elbow(curve * 1000) == elbow(curve + 5) == elbow(curve)


# Prefill --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rho", "beta"), [(0.2, 0.4), (0.6, 0.2)])
def test_prefill_equals_the_formulas(rho: float, beta: float) -> None:
    """Two places, one of them on what the first left: logits, and keys and values of every layer."""
    model, inputs = llava(cached=True), example()
    options = {"sites": (0, 2), "counts": (9, 4), "rho": rho, "beta": beta}
    small = make("core-matching", **options)(program_of(model, inputs))
    with torch.no_grad():
        logits, cache, _, _ = prefill(model, inputs, {0: 9, 2: 4}, rho, beta)
    for got, wanted in zip(small.run(inputs).values(), (logits, *cache), strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


def test_counts_are_the_elbows_of_calibration_data() -> None:
    """Their mean over samples, of a batch too, place by place; they are said."""
    model, inputs = llava(), example(4)
    samples = [{key: value[n : n + 1] for key, value in inputs.items()} for n in range(4)]
    options = {"sites": (0, 2), "calibration": samples}
    small = make("core-matching", **options)(program_of(model, samples[0]))
    with torch.no_grad():
        first = round(sum(elbow_of(prefill(model, own, {0: 1}, 0.2, 0.4)[3]) for own in samples) / 4)
        behind = [elbow_of(prefill(model, own, {0: first, 2: 1}, 0.2, 0.4)[3]) for own in samples]
    counts = [first, round(sum(behind) / 4)]
    rows = [row["kept"] for row in small.records[-1].details if "kept" in row]
    assert rows == [count for count, before in zip(counts, [VISUAL, *counts], strict=False) if count < before]
    assert small.records[-1].notes == (f"measured on calibration: counts=({counts[0]},{counts[1]})",)
    both = make("core-matching", **options)(program_of(model, {key: value[:2] for key, value in inputs.items()}))
    assert both.records[-1].notes == small.records[-1].notes


def test_samples_choose_for_themselves() -> None:
    """A batch of two gives what each gives alone."""
    model, inputs = llava(), example(2)
    both = logits_of(make("core-matching", counts=(6,))(program_of(model, inputs)), inputs)
    for sample in range(2):
        own = {key: value[sample : sample + 1] for key, value in inputs.items()}
        alone = logits_of(make("core-matching", counts=(6,))(program_of(model, own)), own)
        torch.testing.assert_close(both[sample : sample + 1], alone, atol=2e-5, rtol=1e-4)


def test_a_budget_is_met() -> None:
    """With more tokens than the elbows would leave."""
    program = program_of(llava(layers=8), example())
    small = make("core-matching", budget=Budget("flops", 0.9))(program)
    record = small.records[-1]
    assert 0.8 * record.flops_before < record.flops_after <= 0.9 * record.flops_before
    half = make("core-matching", keep=0.5)(program)
    assert [row["kept"] for row in half.records[-1].details if "kept" in row] == [VISUAL // 2]


# Decode ---------------------------------------------------------------------------------------------------------------


def test_decode_with_core_neurons_equals_masking_the_others() -> None:
    """A prompt's weights go from the prefill program to the decode program by name; other prompts have others."""
    model = llava(cached=True)
    program = program_of(model, example())
    small = make("core-matching", counts=(5,), neurons=True)(program)
    given, source, reduced = [], None, None
    for seed in (2, 3):
        inputs = example(seed=seed)
        results = small.run(inputs)
        cache = [value for name, value in results.items() if name.startswith("output_")][1:]
        if source is None or reduced is None:
            source, behind = decode_of(model, cache)
            reduced = make("core-matching", part="decode")(source)
        behind = dict(zip(behind, (*list(behind.values())[:2], *cache), strict=True))
        weights = {name: value for name, value in results.items() if name.startswith("core_")}
        assert [spec.name for spec in reduced.inputs] == [*behind, *weights]
        given.append(weights)
        with torch.no_grad():
            _, _, cores, _ = prefill(model, inputs, {0: 5}, 0.2, 0.4)
            handles = []
            for block, core in zip(model.decoder.blocks, cores, strict=True):
                mask = torch.zeros(48).index_fill(0, torch.tensor(core), 1.0)
                handles.append(block.down.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
            wanted = Decode(model)(*list(behind.values())[:2], cache)
            for handle in handles:
                handle.remove()
        torch.testing.assert_close(logits_of(reduced, {**behind, **weights}), wanted, atol=2e-5, rtol=1e-4)
    assert any(not torch.equal(given[0][name], given[1][name]) for name in given[0])
    record = reduced.records[-1]
    assert record.params_after < record.params_before
    assert record.flops_after < record.flops_before
    assert record.changed == {"feed-forward part": 4}


def test_bundles_pass_weights_on(tmp_path: Path) -> None:
    """What the compiled prefill gives, the compiled decode takes; the same as in PyTorch."""
    model, inputs = llava(cached=True, layers=2), example()
    small = make("core-matching", counts=(5,), neurons=True)(program_of(model, inputs))
    first = graphopt.compile(small, output=tmp_path / "prefill.bundle").run(inputs)
    wanted = small.run(inputs)
    for name, value in wanted.items():
        torch.testing.assert_close(torch.from_numpy(first[name]), value, atol=2e-5, rtol=1e-4)
    source, behind = decode_of(model, [value for name, value in wanted.items() if name.startswith("output_")][1:])
    take = make("core-matching", part="decode")
    cores = [name for name in wanted if name.startswith("core_")]
    second = graphopt.compile(source, passes=[take], output=tmp_path / "decode.bundle")
    got = second.run(behind | {name: first[name] for name in cores})
    dense = logits_of(take(source), behind | {name: wanted[name] for name in cores})
    torch.testing.assert_close(torch.from_numpy(got), dense, atol=2e-5, rtol=1e-4)


def test_all_neurons_and_all_tokens_are_the_dense_model() -> None:
    """Bit by bit, in prefill and in decode."""
    model, inputs = llava(cached=True), example()
    program = program_of(model, inputs)
    dense = program.run(inputs)
    small = make("core-matching", counts=(VISUAL,), rho=1.0, beta=1.0, neurons=True)(program)
    results = small.run(inputs)
    assert all(torch.equal(results[name], value) for name, value in dense.items())
    source, behind = decode_of(model, list(dense.values())[1:])
    reduced = make("core-matching", part="decode", beta=1.0)(source)
    weights = {name: value for name, value in results.items() if name.startswith("core_")}
    assert torch.equal(logits_of(reduced, {**behind, **weights}), logits_of(source, behind))


def test_decode_programs_go_through_files(tmp_path: Path) -> None:
    """The new inputs and their examples, too."""
    model, inputs = llava(cached=True), example()
    source, _ = decode_of(model, list(program_of(model, inputs).run(inputs).values())[1:])
    reduced = make("core-matching", part="decode")(source)
    reduced.save(tmp_path / "decode.pt2")
    again = graphopt.capture(tmp_path / "decode.pt2")
    assert again.inputs == reduced.inputs
    examples = reduced.example_inputs or {}
    assert torch.equal(logits_of(again, again.example_inputs or {}), logits_of(reduced, examples))


def test_a_program_without_feed_forward_parts_is_left_alone() -> None:
    """It says so, and takes what it took."""
    program = graphopt.capture(nn.Linear(8, 8).eval(), (torch.randn(1, 8),), name="linear")
    same = make("core-matching", part="decode")(program)
    assert same.inputs == program.inputs
    assert "no feed-forward part" in str(same.records[-1].declined[-1].reason)


@pytest.fixture(scope="module")
def pair() -> Program:
    """Two prompts at once."""
    return program_of(llava(), example(2))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"part": "encode"}, "part=encode"),
        ({"part": "decode", "keep": 0.5}, "part=decode has keep"),
        ({"part": "decode", "neurons": True}, "part=decode has neurons"),
        ({"schedule": "linear"}, "schedule=linear has no budget"),
        ({"schedule": "elbw"}, "did you mean elbow"),
        ({"score": "norm"}, "prune-tokens takes any score"),
        ({"rho": 0.0}, "rho=0"),
        ({"beta": 1.5}, "beta=1.5"),
        ({"neurons": True, "counts": (4,)}, "2 prompts at once"),
    ],
)
def test_what_is_refused(pair: Program, options: dict[str, object], says: str) -> None:
    """One error, and what to do instead."""
    with pytest.raises(BadOption, match=says):
        make("core-matching", **options)(pair)


def test_behind_attention_there_are_no_neurons() -> None:
    """Said with the reason; the score serves other passes, where a block ends."""
    torch.manual_seed(0)
    vit = VisionTransformer(dim=16, heads=2, layers=2, image=16, patch=4, classes=3).eval()
    program = graphopt.capture(vit, (torch.rand(2, 3, 16, 16),), name="vit")
    here = make("prune-tokens", score="core-match", keep=0.5)(program)
    assert "no feed-forward part" in str(here.records[-1].declined[-1].reason)
    behind = make("prune-tokens", score="core-match", keep=0.5, where="block")(program)
    assert [row["kept"] for row in behind.records[-1].details if "kept" in row] == [8]
