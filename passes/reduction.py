"""Passes that shrink axes under a budget: a criterion, an allocation, and `shrink`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from graphopt.axes import Axes, Axis, infer
from graphopt.budget import SLACK, Budget, Meter, meter
from graphopt.compensate import compensate_in
from graphopt.cost import alignment
from graphopt.edit import Edit
from graphopt.errors import BadOption, Decline, NothingToCut
from graphopt.passes import allocation as allocations
from graphopt.passes import criteria
from graphopt.passes.allocation.base import Allocation, Problem, ladder, top
from graphopt.passes.base import Pass
from graphopt.passes.checks import check_included, matches, not_excluded
from graphopt.passes.criteria.base import Criterion
from graphopt.passes.named import named_in
from graphopt.passes.query_groups import outer_of, rows_of
from graphopt.passes.rounding import Rounding, nearest_to_budget, rounding
from graphopt.passes.whole_blocks import in_blocks, whole_blocks
from graphopt.shrink import shrink_in

if TYPE_CHECKING:
    from graphopt.calibration import Calibration
    from graphopt.targets.target import Target

# Without a target: roles whose items are counted, not vectorised, are not rounded, the others to this.
_COUNTED = ("head", "query_group", "expert", "token")
_PREFERRED = 8


@dataclass(frozen=True, eq=False)
class Plan:
    """What a reduction will do: the indices that stay of each axis that is cut, by what scores, what it left alone, and
    what whoever asked should know.

    `merge` says for some of the axes how what is dropped folds into what stays, as `shrink` takes it.
    """

    keep: Mapping[Any, Tensor]
    scores: Mapping[Axis, Tensor]
    declined: Sequence[Decline] = ()
    notes: Sequence[str] = ()
    merge: Mapping[Any, Tensor] = field(default_factory=dict)

    @property
    def cut(self) -> dict[Axis, int]:
        """How many items stay of each axis that is cut."""
        return {key[1] if isinstance(key, tuple) else key: kept.shape[-1] for key, kept in self.keep.items()}


@dataclass(frozen=True)
class Reduction(Pass):
    """Score the free axes of some roles, decide how many items stay, shrink. Lossy.

    budget: what the whole program may cost; or
    keep: the share of every axis that stays. Exactly one of the two is given.
    criterion, allocation: names, with options as in `optin:lam=10`.
    include, exclude: patterns of axis labels (`c3`), or of tensors that have an axis as an output (`layer3.*`).
    min_keep: the share of every axis that stays in any case; one item always does.
    step: what stays is a multiple of it, on axes that are longer; 1 rounds nothing. "auto" asks the target: axes of
        fewer than four steps get half the step, and so on, and so do all where the budget is not met within 2 % so.
    calibration: data for criteria and allocations that measure; the example inputs where there is none.
    target: what "auto" and latency refer to.
    compensate: fit the layers behind the cut anew on the calibration data; where such is given, if it is not said.
    """

    lossless: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]]

    budget: Budget | None = None
    keep: float | None = None
    criterion: str = "l2"
    allocation: str = "global"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_keep: float = 0.05
    step: int | str = "auto"
    calibration: Any = None
    target: Any = None
    compensate: bool | None = None

    # What subclasses may change ---------------------------------------------------------------------------------------

    @property
    def cut_roles(self) -> tuple[str, ...]:
        """The roles of the axes that this pass cuts."""
        return self.roles

    def pick(self, axes: Axes) -> tuple[Axis, ...]:
        """The free axes that this pass cuts, before `include` and `exclude`."""
        return axes.free(*self.cut_roles)

    def step_of(self, axes: Axes, axis: Axis) -> int:
        """The multiple that is wanted of what stays of an axis, before it is fitted to the axis."""
        if self.step != "auto":
            return int(self.step)
        role, target = axes.role(axis), self.on_target
        if target is not None:
            return alignment(target, role)
        return 1 if role in _COUNTED else _PREFERRED

    def floor_of(self, axes: Axes, axis: Axis) -> int:
        """The least that stays of an axis, in items."""
        return max(1, int(np.ceil(self.min_keep * axis.extent - 1e-9)))

    # The pass ---------------------------------------------------------------------------------------------------------

    @property
    def on_target(self) -> Target | None:
        """The target itself where it was given by name."""
        if not isinstance(self.target, str):
            return self.target
        from graphopt import targets

        return targets.resolve(self.target)

    def apply(self, edit: Edit) -> None:
        """See Pass."""
        axes = infer(edit.program)
        plan = self.plan(axes)
        edit.declined += plan.declined
        edit.notes += plan.notes
        if plan.keep:
            shrink_in(edit, axes, plan.keep, merge=plan.merge)
        for axis in plan.cut:
            edit.count(f"{axes.role(axis) or 'axis'} axis")
        edit.details += explain(axes, plan, self.on_target)
        if plan.keep and (self.calibration is not None if self.compensate is None else self.compensate):
            data = self.read_calibration(axes)
            if self.compensate or not data.is_example:
                compensate_in(edit, axes, plan.keep, data, merge=plan.merge)

    def plan(self, axes: Axes) -> Plan:
        """What stays of which axis, without changing anything. Raises BadOption, BudgetUnreachable."""
        self.check()
        declined: list[Decline] = []
        notes = self.check_patterns(axes)
        wanted = self.wanted(axes, declined)
        if not wanted:
            roles = " or ".join(self.cut_roles)
            left = (
                f"include and exclude leave no axis of role {roles}"
                if self.pick(axes)
                else f"no free axis of role {roles}"
            )
            declined.append(Decline(axes.program.name, left))
            if self.budget is None:
                return Plan({}, {}, declined, notes)
        given = self.score(axes, wanted, declined) if wanted else {}
        for axis, block in whole_blocks(axes, given).items():
            given[axis] = in_blocks(given[axis], block.size)
            reason = f"only whole blocks of {block.size} go, because zeros of {block.weight} are {block.form}"
            declined.append(Decline(f"{axis.label} ({axes.where(axis)})", reason))
        scores = {axis: by_rank(own) for axis, own in given.items()}
        sizes = self.allocate(axes, scores, declined, notes)
        keep = {}
        for axis, size in sizes.items():
            if size < axis.extent:
                key, kept = self.chosen(axes, axis, given[axis], size)
                keep[key] = kept
        return Plan(keep, scores, declined, notes)

    def chosen(self, axes: Axes, axis: Axis, scores: Tensor, size: int) -> tuple[Any, Tensor]:
        """Which items of an axis stay, as `shrink` takes them: what to call the axis, and the indices."""
        if scores.dim() == 1:
            return axis, top(scores, size)
        return (outer_of(axes, axis), axis), torch.stack([top(row, size) for row in scores])

    def check(self) -> None:
        """Options that contradict each other. Raises BadOption."""
        if (self.budget is None) == (self.keep is None):
            what = f"{self.name} has a budget and keep" if self.budget else f"{self.name} has no budget"
            raise BadOption(what=what, way_out="give one of --flops, --macs, --params, --bytes, --latency and --keep")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise BadOption(
                what=f"{self.name}: keep={self.keep}", way_out="give the share that stays, above 0, up to 1"
            )
        if not (self.step == "auto" or (str(self.step).isdigit() and int(self.step) > 0)):
            raise BadOption(what=f"{self.name}: step={self.step}", way_out="give a number of items from 1, or auto")
        if self.budget is not None and self.budget.kind == "latency" and self.target is None:
            raise BadOption(what=f"{self.name} has a latency budget and no target", way_out="name it with --target")

    def check_patterns(self, axes: Axes) -> list[str]:
        """Notes on patterns of `exclude` that match no axis. Raises BadOption where one of `include` matches none."""
        if not self.include and not self.exclude:
            return []
        names = [name for axis in axes.atoms for name in names_of(axes, axis)]
        shown = [axes.where(axis) for axis in self.pick(axes)]
        check_included(self.name, self.include, names, "axis", shown)
        return not_excluded(self.exclude, names, "axis", shown)

    def wanted(self, axes: Axes, declined: list[Decline]) -> tuple[Axis, ...]:
        """The axes to cut; declines those of these roles that are pinned."""
        for axis in axes.atoms:
            if axis.pinned is not None and axes.role(axis) in self.cut_roles:
                declined.append(Decline(f"{axis.label} ({axes.where(axis)})", f"axis is pinned: {axis.pinned}"))
        chosen = []
        for axis in self.pick(axes):
            names = names_of(axes, axis)
            if self.include and not any(matches(name, self.include) for name in names):
                continue
            if any(matches(name, self.exclude) for name in names):
                declined.append(Decline(f"{axis.label} ({axes.where(axis)})", "excluded"))
                continue
            chosen.append(axis)
        return tuple(chosen)

    def score(self, axes: Axes, wanted: Sequence[Axis], declined: list[Decline]) -> dict[Axis, Tensor]:
        """The scores of the wanted axes, (extent,), or a row of such for each item of another axis, (outer, extent),
        where these choose for themselves; notes axes that the criterion does not apply to.
        """
        criterion = self.made_criterion()
        declined += criterion.fallbacks(axes, wanted)
        data = self.read_calibration(axes) if criterion.needs_calibration else None
        found = criterion.scores(axes, wanted, data)
        return rows_of(axes, criterion, {axis: found[axis] for axis in wanted}, data)

    def made_criterion(self) -> Criterion:
        """The criterion with its options. Raises BadOption."""
        return named("criterion", self.criterion, criteria)

    def made_allocation(self) -> Allocation:
        """The allocation with its options. Raises BadOption."""
        return named("allocation", self.allocation, allocations)

    def read_calibration(self, axes: Axes) -> Calibration:
        """The calibration data, fitted to the program."""
        from graphopt.calibration import calibration

        return calibration(self.calibration, axes.program)

    def allocate(
        self, axes: Axes, scores: Mapping[Axis, Tensor], declined: list[Decline], notes: list[str]
    ) -> dict[Axis, int]:
        """Sizes by axis; notes where steps leave more than SLACK of the budget. Raises BudgetUnreachable."""
        first = self.rounding(axes, scores, notes)
        floors = {axis: self.floor_of(axes, axis) for axis in scores}
        if self.budget is None:
            assert self.keep is not None
            steps = first.fitted(axes)
            ladders = {axis: ladder(axis.extent, steps[axis], floors[axis]) for axis in scores}
            return {axis: nearest(sizes, self.keep * axis.extent) for axis, sizes in ladders.items()}
        budget, gauge = self.budget, self.gauge(axes, tuple(scores))
        limit = budget.limit(gauge.full)
        if gauge.full <= limit:
            has, asked = (budget.show(value, gauge.full) for value in (gauge.full, limit))
            reason = f"the budget is met as it is: {has} of the {asked} {budget.kind} that may stay"
            declined.append(Decline(axes.program.name, reason))
        elif not scores:
            asked, reason = budget.show(limit, gauge.full), declined[-1].reason
            raise NothingToCut(file=axes.program.name, kind=budget.kind, asked=asked, name=self.name, reason=reason)

        def solve(trial: Rounding) -> tuple[dict[Axis, int], float]:
            problem = Problem(
                axes=axes,
                scores=scores,
                comparable=self.made_criterion().comparable,
                meter=gauge,
                limit=limit,
                step=trial.fitted(axes),
                floor=floors,
                calibration=partial(self.read_calibration, axes),
            )
            sizes = self.made_allocation().sizes(problem, budget)
            got = gauge(sizes)
            return sizes, 1 - got / limit if got < gauge.full else 0.0

        sizes, left, used = nearest_to_budget(first, solve)
        if used is not first:
            reason = "some extents are rounded to less than the target wants, so that the budget is met"
            declined.append(Decline(axes.program.name, reason))
        if left > SLACK:
            got, asked = (budget.show(value, gauge.full) for value in (gauge(sizes), limit))
            finer = "; step=1 rounds nothing" if used.asked else ""
            notes.append(f"{got} of {asked} {budget.kind} is used, because no extents come nearer{finer}")
        return dict(sizes)

    def rounding(self, axes: Axes, wanted: Iterable[Axis], notes: list[str]) -> Rounding:
        """What the extents that stay shall be multiples of."""
        own = self if self.step == "auto" else replace(self, step="auto")
        extents = {axis: axis.extent for axis in wanted}
        asked = None if self.step == "auto" else int(self.step)
        found = rounding(axes, extents, {axis: own.step_of(axes, axis) for axis in extents}, asked, notes)
        return replace(found, blocks={axis: block.size for axis, block in whole_blocks(axes, extents).items()})

    def gauge(self, axes: Axes, variables: Sequence[Axis]) -> Meter:
        """What measures the budget's quantity."""
        assert self.budget is not None
        return meter(self.budget.kind, axes, variables, self.on_target)


def by_rank(scores: Tensor) -> Tensor:
    """What the items of an axis are worth where each row chooses for itself: all best together, all second best, ...

    A single row of scores is as it is.
    """
    return scores if scores.dim() == 1 else scores.sort(1, descending=True).values.sum(0)


def nearest(sizes: Any, wanted: float) -> int:
    """Of some sizes, largest first, the one nearest to a number."""
    return int(sizes[int(np.argmin(np.abs(np.asarray(sizes) - wanted)))])


def names_of(axes: Axes, axis: Axis) -> list[str]:
    """What patterns of axes are compared with: the label, and the tensors that have the axis as an output."""
    produced = [f"{axes.tensor_name(name)}[{dim}]" for name, dim, summed in axes.stored_in(axis) if not summed]
    return list(dict.fromkeys([axis.label, axes.where(axis), *produced]))


def named(kind: str, text: str, registry: Any) -> Any:
    """A registered criterion or allocation from `name` or `name:option=value,option=value`. Raises BadOption."""
    known = registry.CRITERIA if kind == "criterion" else registry.ALLOCATIONS
    return named_in(kind, text, known, registry.make)


def explain(axes: Axes, plan: Plan, target: Target | None) -> list[dict[str, Any]]:
    """A row for each axis that was cut: how much, what share of its score went, and what that buys.

    What an axis buys is the mean of two differences: whole program to this axis cut alone, and everything cut to this
    axis whole again. So the savings of two axes that multiply add up to what both save.
    """
    cut = plan.cut
    variables = tuple(cut)
    kinds = ["flops", "params", *(["latency"] if target is not None else [])]
    saved = {kind: _savings(meter(kind, axes, variables, target), cut) for kind in kinds}
    rows = []
    for place, (axis, size) in enumerate(cut.items()):
        own = plan.scores[axis].double().abs()
        lost = float(own.sum() - own[top(plan.scores[axis], size)].sum())
        row: dict[str, Any] = {
            "axis": axis.label,
            "role": axes.role(axis),
            "where": axes.where(axis),
            "from": axis.extent,
            "to": size,
            "score_lost": round(lost / float(own.sum()), 6) if float(own.sum()) else 0.0,
            "flops_saved": round(saved["flops"][place]),
            "params_saved": round(saved["params"][place]),
        }
        if "latency" in saved:
            row["us_saved"] = round(float(saved["latency"][place]) * 1e6, 3)
        rows.append(row)
    return rows


def _savings(gauge: Meter, cut: Mapping[Axis, int]) -> Any:
    after = np.array([cut[axis] for axis in gauge.variables], np.int64)
    alone = gauge.full - gauge.each(gauge.extents, after)
    restored = gauge.each(after, gauge.extents) - (gauge.one(after) if len(after) else 0.0)
    return (alone + restored) / 2
