"""Keep the visual tokens that a sentence's core neurons fire for, and decode with these neurons alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from graphopt.axes import infer
from graphopt.calibration import calibration
from graphopt.cut import front
from graphopt.edit import Edit
from graphopt.errors import BadOption
from graphopt.observe import watch
from graphopt.passes.checks import check_share
from graphopt.passes.tokens.base import TokenReduction
from graphopt.passes.tokens.core_weights import give, take
from graphopt.passes.tokens.job import Job
from graphopt.passes.tokens.neurons import core_neurons, elbow, matches
from graphopt.passes.tokens.schedule import SCHEDULES, in_proportion
from graphopt.passes.tokens.scores import CoreMatch, Score
from graphopt.passes.tokens.sites import Where, blocks, streams


@dataclass(frozen=True)
class CoreMatching(TokenReduction):
    """Find the neurons that fire most for a prompt; keep the visual tokens that most of them fire for.

        before  prefill  text, 576 visual, text -> 32 layers
                decode   up, gate (n=11008 c=4096) -> silu, mul -> down (c=4096 n=11008), in every layer
        after   prefill  text, 576 visual, text -> 10 layers -> 210 visual -> 22 layers; weights of the core neurons
                decode   up, gate (n=4416 c=4096) -> silu, mul -> down (c=4096 n=4416), which are inputs

    Which tokens and neurons, the prefill program finds for each prompt; how many is fixed. Of tokens, as many stay as
    stand in front of the elbow of the falling curve of their matches, on calibration data, mean over samples. Text
    stays, and positions are kept.

    The weights of a layer's core neurons are gathered once a prompt: with `neurons=true` a prefill program of one
    prompt gives them as outputs core_NAME, and the decode program that `part=decode` makes takes them as inputs of the
    same names, instead of the model's own. Its keys and values are as long as those that the prefill program gives.
    What a prompt is padded with has its say, as its other tokens have.

    rho: of the neurons that fire for a token, the share that fires most.
    beta: of all neurons, the share that is core; the same for both programs.
    schedule: also "elbow": counts that were measured, or in proportion to these with a budget or keep.
    part: "prefill": tokens are reduced, "decode": layers run on core neurons.
    neurons: give the weights of core neurons; of prefill.
    calibration: data to measure on; the example inputs where there is none.

    Counts that were measured are said, so that they can be given again.

    Source: Wang et al., CoreMatching, ICML 2025, arXiv:2505.19235. Differs: how many tokens stay is not found for each
    prompt; where the curve of matches runs above its chord at the elbow, the elbow stays, too; cores of many neurons
    are whole vectors. The layer is that of the published code.
    """

    name: ClassVar[str] = "core-matching"
    default_keep: ClassVar[float | None] = 1.0  # nothing need be given, as the elbow says it
    schedules: ClassVar[tuple[str, ...]] = (*SCHEDULES, "elbow")

    score: str = "core-match"
    schedule: str = "elbow"
    where: Where = "block"
    outputs: Literal["restore", "shrink"] = "shrink"
    rho: float = 0.2
    beta: float = 0.4
    part: Literal["prefill", "decode"] = "prefill"
    neurons: bool = False
    calibration: Any = None

    def default_sites(self, blocks: int) -> Sequence[int]:
        return [max(1, blocks * 10 // 32) - 1]

    @property
    def made_score(self) -> Score:
        return CoreMatch(rho=self.rho, beta=self.beta)

    def apply(self, edit: Edit) -> None:
        """See Pass. Raises as TokenReduction does."""
        self.check()
        if self.part == "decode":
            take(edit, self.beta)
            return
        super().apply(edit)
        if self.neurons:
            self.give_weights(edit)

    def check(self) -> None:
        """Options that contradict each other. Raises BadOption."""
        super().check()
        given = [name for name in ("budget", "keep", "counts") if getattr(self, name) is not None]
        if self.part not in ("prefill", "decode"):
            raise BadOption(what=f"{self.name}: part={self.part}", way_out="give prefill or decode")
        if self.part == "decode" and (given or self.neurons):
            what = given[0] if given else "neurons"
            raise BadOption(what=f"{self.name}: part=decode has {what}", way_out="that is of the prefill; leave it out")
        if not given and self.schedule != "elbow":
            raise BadOption(
                what=f"{self.name}: schedule={self.schedule} has no budget, keep or counts",
                way_out="give one of them, or leave the schedule out",
            )
        if self.score != "core-match":
            raise BadOption(
                what=f"{self.name}: score={self.score}",
                way_out="give rho and beta to the pass; prune-tokens takes any score",
            )
        for option in ("rho", "beta"):
            check_share(self.name, option, getattr(self, option))

    def wanted(self, edit: Edit, job: Job) -> list[int]:
        if self.schedule != "elbow" or self.counts is not None:
            return super().wanted(edit, job)
        data = calibration(self.calibration, edit.program)
        found = self.measured(job, data)
        if self.budget is not None or self.keep is not None:
            schedule = in_proportion("elbow", "The measured proportions.", job.span.size, found)
            return self.falling(edit, job, schedule)
        edit.note(f"measured on {data.origin}: counts=({','.join(map(str, found))})")
        return found

    def measured(self, job: Job, data: Sequence[dict[str, Tensor]]) -> list[int]:
        """The elbow at each place, where at those in front of it as many tokens stay as theirs says."""
        found: list[int] = []
        span = job.span
        for number, site in enumerate(job.places):
            assert site.hidden is not None
            trial = job.again()
            trial.places = trial.places[:number]
            trial.run(found)
            program = job.edit.program.replace(exported=trial.edit.finish())
            here = replace(span, dim=site.dim).of(found[-1] if found else span.size)
            elbows: list[int] = []

            def see(_: str, value: Tensor, here: Any = here, elbows: list[int] = elbows) -> None:
                hidden = front(value, here.dim)
                own = matches(hidden, core_neurons(hidden, self.rho, self.beta))[:, here.start : here.stop]
                elbows += [elbow(row) for row in own.sort(-1, descending=True).values]

            watch(program, data, [site.hidden.name], see)
            found.append(max(1, round(sum(elbows) / len(elbows))))
        return found

    def give_weights(self, edit: Edit) -> None:
        """Give those of the core neurons of all layers of the stream. Raises BadOption."""
        axes, before = infer(edit.program), Edit(edit.program)
        stream = streams(before, blocks(before, axes)[0])[self.job(before).stream]
        samples = int(stream[0].entry.meta["val"].shape[0]) if stream[0].dim else 1
        if samples > 1:
            raise BadOption(
                what=f"{self.name}: neurons=true of {samples} prompts at once",
                way_out="capture the prefill with one: each prompt has neurons of its own",
            )
        hidden = [block.hidden.name for block in stream if block.hidden is not None]
        edit.add_outputs(give(edit, axes, hidden, stream[0].dim, self.rho, self.beta))
