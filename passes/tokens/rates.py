"""DiffRate's search: how many tokens to drop and how many to merge at each place, by gradient, weights frozen.

At each place the kept counts have a softmax over candidates n, n - 4, ...; the expected count, rounded up, is what
runs, and gradients pass straight through to the probabilities: those that a rank is kept with, by what a program that
hides tokens (`masked`) loses, and the expected count itself, by what the polynomial says that it costs.

Source: Chen et al., DiffRate, ICCV 2023, arXiv:2305.17997. Differs: candidates start where the constant schedule meets
the budget, so that every place has something to learn from; few steps at a higher rate; costs are shares of the whole
program; without labels, the program's own outputs are what is wanted; sizes are not clamped while rates are searched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from graphopt.calibration import Calibration
from graphopt.passes.tokens.job import Job
from graphopt.passes.tokens.masked import KEPT, THROUGH, masked
from graphopt.passes.tokens.schedule import SCHEDULES, Schedule, in_proportion
from graphopt.passes.tokens.segments import Segments

_GRANULARITY = 4  # tokens between candidates
_RATE, _LAST_RATE = 0.1, 0.01  # of AdamW, from the first step to the last, by a cosine
_COST_WEIGHT = 100.0  # of (cost - allowed)^2, both as shares of the whole program's
_SAMPLES = 16  # a step
_EASILY = 0.9  # of the budget, which choosing tokens is a part of


@dataclass(frozen=True)
class Rates:
    """What was found: tokens left at each place when some are dropped, and when some of those are merged."""

    span: int
    through: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def schedule(self) -> Schedule:
        """More or fewer tokens, in these proportions."""
        return in_proportion("searched", "Rates found by gradient.", self.span, self.kept)

    @property
    def share(self) -> tuple[float, ...]:
        """Of the tokens that go at each place, how many are dropped."""
        steps = zip((self.span, *self.kept), self.through, self.kept, strict=False)
        return tuple((before - through) / max(before - now, 1) for before, through, now in steps)


def search(job: Job, model: Segments, allowed: float, data: Calibration, *, steps: int, seed: int) -> Rates:
    """Find rates for a job whose reducer is `prune-merge`.

    Args:
        job: its graph becomes the masked program.
        model: what the program costs.
        allowed: what it may cost.
        data: samples; labels where they are classes and fit the first output, else the program's own outputs are
            wanted, by the Kullback-Leibler divergence.
        steps: of gradient descent.
        seed: the order of samples.

    Raises:
        BadOption: see `masked`.
    """
    source = job.edit.program
    module = masked(job.again()).to_module().eval().requires_grad_(False)
    rates = _Learned(job, model, allowed)
    whole = model([job.span.size] * len(job.places))
    optimizer = torch.optim.AdamW(rates.parameters(), lr=_RATE, weight_decay=0.0)
    per_step = min(len(data), max(1, _SAMPLES // max(1, next(iter(data[0].values())).shape[0])))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    wanted: dict[int, list[Tensor]] = {}
    for step in range(steps):
        progress = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = _LAST_RATE + (_RATE - _LAST_RATE) * progress
        optimizer.zero_grad()
        if len(order) < per_step:
            order += torch.randperm(len(data), generator=generator).tolist()
        batches, order = order[:per_step], order[per_step:]
        for number in batches:
            if number not in wanted:
                wanted[number] = _floating(source.run(data[number]))
            tables, counts = rates()
            given = functional_call(module, dict(zip((THROUGH, KEPT), tables, strict=True)), (), data[number])
            labels = data.labels[number] if data.labels is not None else None
            task = _loss(_floating(given), wanted[number], labels)
            cost = (model.expected(counts) - allowed) / whole
            ((task + _COST_WEIGHT * cost.square()) / per_step).backward()
        optimizer.step()
    with torch.no_grad():
        tables, _ = rates()
    through, kept = (tuple(round(float(row.sum())) for row in table) for table in rates.counted(tables))
    return Rates(job.span.size, through, kept)


class _Learned(nn.Module):
    """The logits of candidates, (places, 2, candidates): tokens left when some are dropped, and when some are merged.

    The first block keeps all tokens, where the budget can be met so.
    """

    def __init__(self, job: Job, model: Segments, allowed: float) -> None:
        super().__init__()
        self.span = span = job.span.size
        first = [site.block == 0 for site in job.places]
        least = model([span if own else 1 for own in first])
        self.fixed = [own and least <= _EASILY * allowed for own in first]
        self.candidates = torch.arange(span, 0, -_GRANULARITY).double()
        free = self.fixed.count(False)
        held = [span] * self.fixed.count(True)

        def fits(counts: Sequence[int]) -> bool:
            return model([*held, *counts]) <= allowed

        constant = SCHEDULES["constant"]
        start = constant.within(span, free, job.reducer.least, fits)
        start = constant.counts(span, free, 1.0, job.reducer.least) if start is None else start
        before = [span, *start]
        pairs = [((left + now) / 2, now) for left, now in zip(before, start, strict=False)]
        logits = torch.stack([torch.stack([_tilted(self.candidates, each - 0.5) for each in pair]) for pair in pairs])
        self.logits = nn.Parameter(logits)

    def forward(self) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        """The tables, two of (places, span), and the expected counts at each place."""
        ones = torch.ones(self.span)
        now = torch.tensor(float(self.span), dtype=torch.float64)
        tables: tuple[list[Tensor], list[Tensor]] = ([], [])
        counts = []
        free = iter(self.logits.softmax(-1))
        for fixed in self.fixed:
            for table, shares in zip(tables, () if fixed else next(free), strict=not fixed):
                expected = (shares * self.candidates).sum()
                count = expected + (expected.ceil() - expected).detach()
                row = ones
                if count < now:
                    likely = (shares * (self.candidates > torch.arange(self.span)[:, None])).sum(-1)
                    hard = torch.arange(self.span) < count.detach()
                    row, now = (hard + (likely - likely.detach())).float(), count
                table.append(row)
            if fixed:
                for table in tables:
                    table.append(ones)
            counts.append(now)
        return (torch.stack(tables[0]), torch.stack(tables[1])), counts

    def counted(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The tables with what was gone at earlier places left out, too."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        now = torch.ones(self.span)
        for pair in zip(*tables, strict=True):
            for own, row in zip(found, pair, strict=True):
                now = now * row
                own.append(now)
        return torch.stack(found[0]), torch.stack(found[1])


def _tilted(candidates: Tensor, mean: float) -> Tensor:
    """Logits, linear in the candidates, with which their mean is as given, as nearly as it can be."""
    low, high = -50.0, 50.0
    unit = candidates / candidates.max()
    for _ in range(60):
        middle = (low + high) / 2
        if float(((middle * unit).softmax(-1) * candidates).sum()) < mean:
            low = middle
        else:
            high = middle
    return high * unit


def _loss(given: list[Tensor], wanted: list[Tensor], labels: Tensor | None) -> Tensor:
    first = given[0]
    if labels is not None and not labels.is_floating_point() and labels.shape == first.shape[:-1]:
        return F.cross_entropy(first.flatten(0, -2), labels.flatten())
    return torch.stack(
        [
            F.kl_div(a.flatten(0, -2).log_softmax(-1), b.flatten(0, -2).softmax(-1), reduction="batchmean")
            for a, b in zip(given, wanted, strict=True)
        ]
    ).sum()


def _floating(outputs: object) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(outputs) if isinstance(each, Tensor) and each.is_floating_point()]
