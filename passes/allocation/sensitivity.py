"""Measure what cutting each axis does to the outputs, then remove what harms least for what it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from graphopt.budget import Floats, Ints
from graphopt.passes.allocation.base import Allocation, Problem, top
from graphopt.passes.allocation.greedy import walk
from graphopt.program import Program
from graphopt.shrink import shrink


@dataclass(frozen=True)
class Sensitivity(Allocation):
    """Cut each axis alone to a few sizes, run the calibration data, and descend by least harm per unit saved.

        harm(axis, keep)   relative squared change of the outputs with only this axis cut
        next group         the one with the least  harm of it / what it saves

    Between measured sizes harm is interpolated, and it never falls as an axis gets shorter. The criterion only says
    which items of an axis go first. Costs (axes x `shares`) runs of the program for each of `batches` batches.

    Source: after Li et al., ICLR 2017, arXiv:1608.08710, section 3.2, which reads layers' sensitivities off such
    curves. Differs: the change of the outputs instead of the accuracy, so no labels; greedy under a budget instead of
    by hand.
    """

    name: ClassVar[str] = "sensitivity"
    needs_calibration: ClassVar[bool] = True
    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    batches: int = 4

    def levels(self, problem: Problem) -> Ints:
        """See Allocation."""
        curves = self.harms(problem)

        def ranks(levels: Ints, saved: Floats) -> Floats:
            more = [
                own[level + 1] - own[level] if level + 1 < len(own) else np.inf
                for own, level in zip(curves, levels, strict=True)
            ]
            return np.array([harm / gain if gain > 0 else np.inf for harm, gain in zip(more, saved, strict=True)])

        return walk(problem, ranks)

    def harms(self, problem: Problem) -> list[Floats]:
        """For each variable the harm at every size of its ladder."""
        data = list(problem.calibration())[: self.batches]
        program = problem.axes.program
        wanted = [program.run(batch) for batch in data]
        found = []
        for axis, sizes in zip(problem.variables, problem.ladders, strict=True):
            measured = {axis.extent: 0.0}
            for share in (*self.shares, 0.0):
                size = int(sizes[int(np.argmin(np.abs(sizes - share * axis.extent)))])
                if size not in measured and (share or len(measured) == 1):
                    small = shrink(problem.axes, {axis: top(problem.scores[axis], size)})
                    measured[size] = change(small, data, wanted)
            found.append(_curve(measured, sizes))
        return found


def _curve(measured: Mapping[int, float], sizes: Ints) -> Floats:
    """Harm by size, interpolated; below the shortest measured as steep as just above it."""
    points = sorted(measured.items(), reverse=True)
    lengths = np.array([points[0][0] - size for size, _ in points], np.float64)
    values = np.maximum.accumulate(np.array([value for _, value in points]))
    removed = (points[0][0] - sizes).astype(np.float64)
    curve = np.interp(removed, lengths, values)
    if len(lengths) > 1:
        slope = (values[-1] - values[-2]) / (lengths[-1] - lengths[-2])
        beyond = removed > lengths[-1]
        curve[beyond] = values[-1] + slope * (removed[beyond] - lengths[-1])
    return curve


def change(program: Program, data: Sequence[Mapping[str, Tensor]], wanted: Sequence[Mapping[str, Tensor]]) -> float:
    """The relative squared difference of the floating-point outputs: mean over outputs, sums over batches."""
    apart: dict[str, float] = {}
    size: dict[str, float] = {}
    for batch, reference in zip(data, wanted, strict=True):
        for name, got in program.run(batch).items():
            if got.is_floating_point():
                old = reference[name].double()
                apart[name] = apart.get(name, 0.0) + float((got.double() - old).square().nan_to_num().sum())
                size[name] = size.get(name, 0.0) + float(old.square().nan_to_num().sum())
    shares = [apart[name] / size[name] if size[name] else apart[name] for name in apart]
    return float(np.mean(shares)) if shares else 0.0
