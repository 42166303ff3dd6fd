"""Counts of visual tokens from what flows from them: the curve, the statistics, and what is left in each layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.budget import Budget
from graphopt.calibration import calibration
from graphopt.edit import Edit
from graphopt.passes import make
from graphopt.passes.adatoken import Adatoken
from graphopt.passes.tokens.flow import Curve, contributions, fitted, flows
from graphopt.passes.tokens.job import Job
from tests.passes.tokens.visual import by_last, logits_of, program_of, staged
from tests.transformer_nets import rotate, tables
from tests.vision_language import BEFORE, VISUAL, LlavaLike, example, llava


@pytest.mark.parametrize(("rate", "last"), [(0.3, 0.1), (0.02, 0.5), (-0.1, 0.05), (1.7, 0.2), (0.0, 0.1)])
def test_the_curve_is_found_again(rate: float, last: float) -> None:
    """From its own values; both ends are as asked for, and it falls all the way."""
    curve = Curve(rate, last, 32)
    values = curve.at(torch.arange(1, 33))
    again = fitted(values, last)
    assert abs(again.rate - rate) < 1e-4
    scale = (1 - last) / (1 - torch.exp(torch.tensor(-rate * 31.0, dtype=torch.float64))) if rate else None
    if scale is not None:  # A exp(-B (x - 1)) + D, written out
        written = scale * torch.exp(-rate * torch.arange(32, dtype=torch.float64)) + 1 - scale
        torch.testing.assert_close(values, written)
    assert curve(1) == pytest.approx(1)
    assert curve(32) == pytest.approx(last)
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_any_contributions_have_a_falling_curve(seed: int) -> None:
    """Even such as rise."""
    values = torch.rand(12, generator=torch.Generator().manual_seed(seed)).sort().values
    assert (fitted(values, 0.1).at(torch.arange(1, 13)).diff() <= 1e-12).all()


def measured(model: LlavaLike, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of one sample, pair by pair."""
    decoder = model.decoder
    x = model.embed(inputs["input_ids"], inputs["pixels"])
    n, visual = x.shape[1], range(BEFORE, BEFORE + VISUAL)
    cos, sin = tables(torch.arange(n), decoder.size)
    intra, inter = [], []
    for block in decoder.blocks:
        y = block.norm1(x)
        q, k = (rotate(f(y).view(1, n, -1, 8).transpose(1, 2), cos, sin)[0] for f in (block.q, block.k))
        logits = q @ k.repeat_interleave(2, 0).transpose(-1, -2) * 8**-0.5
        rows = (logits + torch.full((n, n), -torch.inf).triu(1)).softmax(-1).mean(0)
        pairs = [(i, j, float(rows[i, j])) for i in range(n) for j in range(i)]
        intra.append(sum(a for i, j, a in pairs if i in visual and j in visual))
        front = sum(a for i, j, a in pairs if i in visual and j < BEFORE)
        behind = sum(a for i, j, a in pairs if i >= BEFORE + VISUAL and j in visual)
        inter.append(0.7 * front + 0.3 * behind)
        x = block(x, cos, sin)
    return torch.tensor(intra), torch.tensor(inter)


def test_adatoken_equals_its_formulas() -> None:
    """Flows pair by pair over two samples, contributions, the curve's counts, and the stages of the decoder."""
    model, inputs = llava(layers=8), example(2)
    samples = [{key: value[n : n + 1] for key, value in inputs.items()} for n in range(2)]
    one = program_of(model, samples[0])
    small = make("adatoken", calibration=samples)(one)
    with torch.no_grad():
        intra, inter = (
            torch.stack(own).mean(0) for own in zip(*(measured(model, each) for each in samples), strict=True)
        )
    running, shares = float(intra[0]), []
    for layer in range(8):
        running += 0.73 * float(intra[layer]) if layer else 0.0
        shares.append(0.4 * float(intra[layer]) + 0.3 * float(inter[layer]) + 0.3 * running)
    wanted = torch.tensor(shares)
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    torch.testing.assert_close(contributions(intra, inter), wanted)
    curve = fitted(wanted, 0.1)
    sites = [0, 1, 2, 3, 4, 5, 6]
    counts = [max(1, int(curve(site + 2) * VISUAL)) for site in sites]
    rows = [row for row in small.records[-1].details if "kept" in row]
    assert {row["block"]: row["kept"] for row in rows} == {
        site: count for site, count, before in zip(sites, counts, [VISUAL, *counts], strict=False) if count < before
    }
    with torch.no_grad():
        logits, _, _ = staged(model, samples[0], {row["block"]: by_last(row["kept"]) for row in rows}, False)
    torch.testing.assert_close(logits_of(small, samples[0]), logits, atol=2e-5, rtol=1e-4)


def test_batches_are_measured_as_samples_are() -> None:
    """A batch of two has the mean of what each of them has."""
    model, inputs = llava(), example(2)
    program = program_of(model, inputs)
    job = Job(Adatoken(), Edit(program))
    both = flows(program, job.chain, 2, job.span, calibration(None, program))
    with torch.no_grad():
        each = [measured(model, {key: value[n : n + 1] for key, value in inputs.items()}) for n in range(2)]
    for mine, theirs in zip(both, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs).mean(0), atol=1e-4, rtol=1e-4)


def test_a_budget_is_met_in_the_curve_s_proportions() -> None:
    """More tokens than the curve alone would leave; of those that go, as large a part at each place."""
    model, inputs = llava(layers=8), example()
    program = program_of(model, inputs)
    plain, loose = (
        make("adatoken", sites=(2, 4))(program),
        make("adatoken", sites=(2, 4), budget=Budget("flops", 0.9))(program),
    )
    record = loose.records[-1]
    assert plain.records[-1].flops_after < record.flops_after <= 0.9 * record.flops_before
    gone, most = (
        [VISUAL - row["kept"] for row in each.records[-1].details if "kept" in row] for each in (loose, plain)
    )
    assert abs(gone[0] - most[0] * gone[1] / most[1]) <= 1
