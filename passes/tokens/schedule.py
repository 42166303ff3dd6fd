"""How the number of tokens falls from place to place, so that a budget is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_STEPS = 50


@dataclass(frozen=True)
class Schedule:
    """Counts by a single strength from 0 (all stay) to 1 (as few as can be).

    `shape` gives, for the number of places, the share of all removed tokens that is gone behind each: rising to 1.
    `text` explains it.
    """

    name: str
    text: str
    shape: Callable[[int], list[float]]
    ratio: bool = False

    def counts(self, span: int, places: int, strength: float, least: Callable[[int], int]) -> list[int]:
        """How many of `span` tokens stay at each place."""
        found, now = [], span
        for place, share in enumerate(self.shape(places)):
            wanted = span * (1 - strength) ** (place + 1) if self.ratio else span - strength * (span - 1) * share
            now = max(least(now), min(now, math.floor(wanted + 1e-6)), 1)
            found.append(now)
        return found

    def within(
        self,
        span: int,
        places: int,
        least: Callable[[int], int],
        fits: Callable[[list[int]], bool],
        steps: int = _STEPS,
    ) -> list[int] | None:
        """The most tokens that fit, after so many halvings; None where not even the fewest do."""
        low, high = 0.0, 1.0
        if fits(self.counts(span, places, low, least)):
            return self.counts(span, places, low, least)
        if not fits(self.counts(span, places, high, least)):
            return None
        for _ in range(steps):
            middle = (low + high) / 2
            if fits(self.counts(span, places, middle, least)):
                high = middle
            else:
                low = middle
        return self.counts(span, places, high, least)

    def ending(self, span: int, places: int, last: int, least: Callable[[int], int]) -> list[int]:
        """Counts that end with `last` tokens, or with as few as can be."""
        if self.ratio:
            return self.counts(span, places, 1 - (last / span) ** (1 / places), least)
        found = self.within(span, places, least, lambda counts: counts[-1] <= last)
        return self.counts(span, places, 1.0, least) if found is None else found


def in_proportion(name: str, text: str, span: int, counts: Sequence[int]) -> Schedule:
    """More or fewer tokens than `counts` of `span`, in the proportions of what goes."""
    gone = [span - count for count in counts]
    # Up to many times as many, so that any budget can be met that these places allow.
    most = max(gone) or 1
    return Schedule(name, text, lambda _: [span * each / most for each in gone])


def _constant(places: int) -> list[float]:
    return [(place + 1) / places for place in range(places)]


def _linear(places: int) -> list[float]:
    """ToMe's falling schedule: from twice the mean to none."""
    steps = [2 - 2 * place / max(places - 1, 1) for place in range(places)] if places > 1 else [1.0]
    total = sum(steps)
    return [sum(steps[: place + 1]) / total for place in range(places)]


def _cosine(places: int) -> list[float]:
    return [math.sin(math.pi / 2 * (place + 1) / places) for place in range(places)]


SCHEDULES: dict[str, Schedule] = {
    each.name: each
    for each in (
        Schedule("constant", "As many tokens go at every place.", _constant),
        Schedule(
            "linear",
            """Twice the mean goes at the first place, none at the last, in even steps.

Source: the decreasing schedule of Bolya et al., Token Merging, ICLR 2023, arXiv:2210.09461.""",
            _linear,
        ),
        Schedule("cosine", "What goes falls from place to place as a cosine does.", _cosine),
        Schedule("ratio", "The same share of the tokens that are left goes at every place.", _constant, ratio=True),
        Schedule("last", "All that go do so at the first place.", lambda places: [1.0] * places),
    )
}
