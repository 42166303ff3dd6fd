"""Drop visual tokens as fast as what flows from them falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphopt.calibration import calibration
from graphopt.edit import Edit
from graphopt.passes.tokens.base import TokenReduction
from graphopt.passes.tokens.flow import contributions, fitted, flows
from graphopt.passes.tokens.job import Job
from graphopt.passes.tokens.schedule import SCHEDULES, in_proportion
from graphopt.passes.tokens.sites import Where

_LAYERS = (4, 8, 12, 16, 18, 20, 22, 24, 26, 28)  # of 32


@dataclass(frozen=True)
class Adatoken(TokenReduction):
    """Measure what flows from visual tokens in each layer; keep as many as a curve through that says.

        before  text, 576 visual, text -> 32 layers
        after   text, 576 visual, text -> 4 layers -> 480 visual -> 4 layers -> 390 -> 4 -> ...

    A layer's contribution is what its attention lets flow among visual tokens, between them and text, and what flowed
    among them so far. An exponential is fitted to it that keeps all tokens in the first layer and `keep` of them in the
    last. Ten times, as deep as published, those stay that the last token attends to most in the next layer. Text stays,
    and positions are kept.

    schedule: also "flow": that curve.
    keep: the share of the visual tokens that the curve has in the last layer; a tenth.
    calibration: data to measure on; the example inputs where there is none.

    Counts that were measured are said, so that they can be given again. With a budget they are in proportion to those
    of the curve.

    Source: AdaToken-3D, arXiv:2505.12782; what `graphopt.passes.tokens.flow` says differs.
    """

    name: ClassVar[str] = "adatoken"
    default_keep: ClassVar[float | None] = 0.1
    schedules: ClassVar[tuple[str, ...]] = (*SCHEDULES, "flow")

    score: str = "last-attention"
    schedule: str = "flow"
    where: Where = "block"
    outputs: Literal["restore", "shrink"] = "shrink"
    calibration: Any = None

    def default_sites(self, blocks: int) -> Sequence[int]:
        return sorted({max(1, blocks * layer // 32) - 1 for layer in _LAYERS})

    def wanted(self, edit: Edit, job: Job) -> list[int]:
        if self.schedule != "flow" or self.counts is not None:
            return super().wanted(edit, job)
        data = calibration(self.calibration, edit.program)
        first, span = job.places[0], job.span
        samples = int(first.at.meta["val"].shape[0]) if first.dim else 1
        measured = flows(edit.program, job.chain, samples, span, data)
        last = self.keep or self.default_keep or 0.0
        curve = fitted(contributions(*measured), last)
        # Behind block 0 is layer 2. A hair more, lest an exact share be rounded down.
        found = [max(1, int(curve(site.block + 2) * span.size + 1e-6)) for site in job.places]
        if self.budget is not None:
            found = self.falling(edit, job, in_proportion("flow", "The curve's proportions.", span.size, found))
        edit.note(f"measured on {data.origin}: counts=({','.join(map(str, found))})")
        return found
