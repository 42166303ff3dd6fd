"""What the extents that stay are multiples of, and a finer choice where that leaves too much of a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from graphopt.axes import Axes, Axis
from graphopt.budget import SLACK
from graphopt.errors import BudgetUnreachable

# An axis keeps at least so many rungs: its step is halved until it has.
_RUNGS = 4


@dataclass(frozen=True, eq=False)
class Rounding:
    """The step of each axis. Those in `asked` are what the user said, and stay; the others may become finer.

    `blocks` are numbers of items that stay or go together.
    """

    steps: Mapping[Axis, int]
    asked: frozenset[Axis] = frozenset()
    blocks: Mapping[Axis, int] = field(default_factory=dict)

    @property
    def finer(self) -> Rounding | None:
        """With half the steps, where they are nobody's wish; None where nothing is rounded any more."""
        halves = {axis: step if axis in self.asked else _half(step) for axis, step in self.steps.items()}
        return replace(self, steps=halves) if halves != self.steps else None

    def fitted(self, axes: Axes) -> dict[Axis, int]:
        """The steps, and what operators take multiples of and blocks are."""
        return {
            axis: math.lcm(step, axes.multiple(axis), self.blocks.get(axis, 1)) for axis, step in self.steps.items()
        }


def rounding(
    axes: Axes, extents: Mapping[Axis, int], wanted: Mapping[Axis, int], asked: int | None, notes: list[str]
) -> Rounding:
    """The steps of some axes.

    Args:
        extents: the axes and how long they are.
        wanted: what the target, or the pass, wants multiples of; fitted to the axis.
        asked: what the user wants multiples of; axes that are no longer than that get what the target wants, and a note
            says so.
        notes: gets that note.
    """
    fitted = {axis: fitted_step(wanted[axis], extent) for axis, extent in extents.items()}
    if asked is None:
        return Rounding(fitted)
    long = frozenset(axis for axis, extent in extents.items() if extent > asked)
    if short := [axis for axis in extents if axis not in long and asked > 1]:
        least = min(extents[axis] for axis in short)
        count = f"{len(short)} {'axis is' if len(short) == 1 else 'axes are'} no longer than the step of {asked}"
        some = ", ".join(axes.where(axis) for axis in short[:3]) + (", ..." if len(short) > 3 else "")
        notes.append(f"{count} ({some}; the shortest has {least}), and rounded to what the target wants instead")
    return Rounding({axis: asked if axis in long else step for axis, step in fitted.items()}, long)


def nearest_to_budget(
    first: Rounding, solve: Callable[[Rounding], tuple[Mapping[Axis, int], float]]
) -> tuple[Mapping[Axis, int], float, Rounding]:
    """Solve with finer steps for as long as more than SLACK of the budget is left, or it cannot be met.

    The coarsest that comes within SLACK is taken, or else the one that comes nearest; rounding makes kernels fast, so a
    finer one has to be nearer by more than half of that.

    Args:
        solve: sizes, and the share of the budget that they leave. Raises BudgetUnreachable.

    Returns:
        The sizes, the share that is left, the steps.

    Raises:
        BudgetUnreachable: no step meets the budget; says what the finest reaches.
    """
    best: tuple[Mapping[Axis, int], float, Rounding] | None = None
    unreachable: BudgetUnreachable | None = None
    trial: Rounding | None = first
    while trial is not None:
        try:
            sizes, left = solve(trial)
        except BudgetUnreachable as error:
            unreachable = error
        else:
            if best is None or left <= SLACK or left < best[1] - SLACK / 2:
                best = sizes, left, trial
            if best[1] <= SLACK:
                break
        trial = trial.finer
    if best is None:
        assert unreachable is not None, "either sizes are found or none can be"
        raise unreachable
    return best


def fitted_step(step: int, extent: int) -> int:
    """The step, halved until the axis has at least four of it (or it is odd)."""
    while step > 1 and extent < _RUNGS * step:
        step = _half(step)
    return step


def _half(step: int) -> int:
    return step // 2 if step % 2 == 0 else 1
