"""Passes that set weights to zero: which layers, how much of each, in which format. What stays is for subclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from graphopt.axes import Axes, Axis, atoms, index, infer, touched
from graphopt.budget import Budget, Floats
from graphopt.calibration import Calibration, calibration
from graphopt.compensate import compensate_in
from graphopt.edit import Edit
from graphopt.errors import BadOption, BudgetUnreachable, Decline
from graphopt.exported import op_name
from graphopt.passes import criteria
from graphopt.passes.base import Pass
from graphopt.passes.criteria.base import Elementwise, normalised
from graphopt.passes.criteria.magnitude import L1
from graphopt.passes.rearrange import Work, best_order, role_of
from graphopt.passes.reduction import named
from graphopt.passes.sizes import nothing, unreachable
from graphopt.passes.sparse_bill import BUDGETS, bill
from graphopt.passes.sparse_grid import Grid, best_of_each
from graphopt.passes.sparse_layers import SparseLayer, masked, sparse_layers
from graphopt.passes.sparse_shares import SHARES, Ranked, largest
from graphopt.shrink import shrink_in
from graphopt.sparsity import UNSTRUCTURED, Format, parse_format

# Element scores of weights by the name of their placeholder, of the weight's shape.
Scores = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """What stays of one layer: about `target` elements, in units of `grid`.

    `met`: so much of it is zero already that it stays as it is.
    """

    layer: SparseLayer
    grid: Grid
    target: float
    met: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing is set to zero."""
        form = self.grid.form
        return self.met or form.n == form.m if form.m > 1 else self.target >= self.grid.size


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set weights of linear layers, products with a stored matrix, and convolutions to zero. Lossy.

    keep: the share of the weights that stays, of all layers that are made sparse together. N:M formats say so
        themselves. What has as many zeros already, in units of the format, stays as it is; or
    budget: what the whole program may cost, of FLOPs, multiply-adds or parameters, where those with weights that are
        zero are not counted; or of latency, as estimated for `target`.
    format: "unstructured", blocks of outputs x inputs as "4x1", N of M inputs as "2:4", the same ones in each of V
        outputs as "8:2:4". Sizes that are odd leave smaller blocks at the end.
    criterion: what a weight is worth, a name with options as in `taylor:loss=labels`: one that has a value for every
        element. Blocks are worth what their elements are together.
    allocation: "global": one ranking of all blocks, "uniform": the same share of each layer, "erk": thin layers keep
        more. In a global ranking scores of criteria that are not comparable between layers are divided by their mean;
        those of `l1` and `l2` are as they are, unless their option normalise says otherwise ("lamp").
    minimum: the share of all weights together that every layer keeps in a global ranking; smaller layers stay whole.
    rearrange: first bring axes into the order in which blocks hold the most, which changes nothing that is computed.
    include: patterns of layers, such as "blocks.*.mlp.*". All layers where it is not given, but depthwise convolutions
        and a stem of up to 4 channels.
    exclude: patterns of layers that stay dense.
    calibration: data for criteria that measure; the example inputs where there is none.
    target: what a budget of latency refers to.
    compensate: fit the weights that stay, and batch norms, anew on the calibration data (see `graphopt.compensate`);
        where such is given, if it is not said.
    """

    lossless: ClassVar[bool] = False

    keep: float | None = None
    budget: Budget | None = None
    format: str = "unstructured"
    criterion: str = "l1"
    allocation: Literal["global", "uniform", "erk"] = "global"
    minimum: float = 0.0005
    rearrange: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    calibration: Any = None
    target: Any = None
    compensate: bool | None = None

    # What subclasses may change ---------------------------------------------------------------------------------------

    kernels: ClassVar[bool] = False  # whether units are blocks of outputs x one channel x all of a kernel
    by_row: ClassVar[bool] = False  # whether all rows of a layer keep as many units
    by_scores: ClassVar[bool] = True  # whether the criterion decides what stays within a layer

    def prune(self, edit: Edit, plans: Sequence[Plan], scores: Scores) -> None:
        """Set weights to zero, and note what was done with `put`. By default the units with the best scores stay."""
        for plan in plans:
            if plan.is_whole:
                self.put(edit, plan, torch.ones(plan.layer.outs, plan.layer.ins, dtype=torch.bool))
                continue
            own = plan.layer.matrix(scores[plan.layer.weight.name])
            kept = plan.grid.pick(plan.grid.sums(own), plan.target, self.by_row)
            self.put(edit, plan, plan.grid.elements(kept))

    # The pass ---------------------------------------------------------------------------------------------------------

    def apply(self, edit: Edit) -> None:
        """See Pass."""
        form = self.checked()
        layers = self._layers(edit, form)
        if not layers:
            reason = "there is no layer to be made sparse"
            edit.declined.append(Decline(edit.program.name, reason))
            if self.budget is not None:
                whole = bill(edit, self.budget, [], form, self.target).whole
                if whole > self.budget.limit(whole):
                    raise nothing(edit.program, self.budget, self.name, reason, whole=whole)
            return
        grids = [Grid(layer.outs, layer.taps, layer.channels, form, self.kernels) for layer in layers]
        axes = infer(edit.program)
        scores: Scores = {}
        if self.by_scores or self.rearrange or (self.allocation == "global" and form.m == 1):
            scores = self._scores(axes, layers)
        plans = self._plans(edit, layers, grids, scores)
        orders: dict[Any, Tensor] = {}
        if all(plan.is_whole for plan in plans):
            edit.declined.append(Decline(edit.program.name, self._why_nothing(edit, plans)))
        needed = self.rearrange and not all(plan.is_whole for plan in plans)
        if needed and (orders := self._orders(edit, axes, plans, scores)):
            shrink_in(edit, axes, orders)
            scores = {name: _reordered(axes, name, own, orders) for name, own in scores.items()}
            plans = self._plans(edit, layers, grids, scores)
        with torch.inference_mode(False), torch.no_grad():
            self.prune(edit, plans, scores)
        if self.budget is not None and self.budget.kind == "latency":
            edit.note("its latency is an estimate by layer; `graphopt compile --explain` shows what kernels make of it")
        if edit.formats and (self.calibration is not None if self.compensate is None else self.compensate):
            data = self.read_calibration(edit)
            if self.compensate or not data.is_example:
                compensate_in(edit, axes, orders, data)

    def checked(self) -> Format:
        """The format. Raises BadOption where options contradict each other."""
        form = parse_format(self.format)
        if form.m > 1:
            share = form.n / form.m
            if self.budget is not None or (self.keep is not None and abs(self.keep - share) > 1e-3):
                raise BadOption(
                    what=f"{self.name}: {form} keeps {share:g} of the weights, no other share",
                    way_out=f"leave the budget and keep out, give keep={share:g}, or another N:M",
                )
            return form
        if (self.budget is None) == (self.keep is None):
            what = f"{self.name} has a budget and keep" if self.budget else f"{self.name} is not told how much stays"
            raise BadOption(what=what, way_out="give one of keep=0.1, --flops, --macs, --params, --latency")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise BadOption(
                what=f"{self.name}: keep={self.keep}", way_out="give the share that stays, above 0, up to 1"
            )
        if self.budget is not None and self.budget.kind not in BUDGETS:
            raise BadOption(
                what=f"{self.name}: no budget of {self.budget.kind}: in a file zeros take as many as other values do",
                way_out=f"give one of {', '.join(BUDGETS)}",
            )
        if self.budget is not None and self.budget.kind == "latency" and self.target is None:
            raise BadOption(what=f"{self.name} has a latency budget and no target", way_out="name it with --target")
        if not 0 <= self.minimum < 1:
            raise BadOption(what=f"{self.name}: minimum={self.minimum}", way_out="give a share of all weights below 1")
        return form

    def put(self, edit: Edit, plan: Plan, kept: Tensor, matrix: Tensor | None = None) -> None:
        """Leave only the kept elements (outs, ins) of a weight, with the values of `matrix` where it is given."""
        layer = plan.layer
        weight = edit.tensor(layer.weight)
        assert weight is not None
        if plan.met:
            kept = layer.matrix(weight != 0)
        whole, count = bool(kept.all()), int(kept.sum())
        size = float(weight.double().abs().sum())
        stays = float(weight.double().abs()[layer.tensor(kept)].sum())
        if not plan.met and (not whole or matrix is not None):
            new = weight if matrix is None else layer.tensor(matrix).to(weight.dtype)
            edit.set_tensor(layer.weight, masked(new, layer.tensor(kept)))
            edit.annotate(edit.target(layer.weight), plan.grid.form)
            edit.count(op_name(layer.node).removeprefix("aten.").partition(".")[0])
        used = kept.reshape(layer.outs, layer.taps, layer.channels).any(0).any(0)
        edit.details.append(
            {
                "layer": layer.name,
                "format": "as it was" if plan.met else "dense" if whole else str(plan.grid.form),
                "outs_x_ins": f"{layer.outs} x {layer.ins}",
                "keep": count / layer.size,
                "magnitude_kept": stays / size if size else 1.0,
                "macs_before": layer.times * layer.size,
                "macs": layer.times * count,
                "unused_inputs": layer.channels - int(used.sum()),
            }
        )

    def read_calibration(self, edit: Edit) -> Calibration:
        """The calibration data, fitted to the program."""
        return calibration(self.calibration, edit.program)

    # How much ---------------------------------------------------------------------------------------------------------

    def _layers(self, edit: Edit, form: Format) -> list[SparseLayer]:
        found = []
        for layer in sparse_layers(edit, self.name, self.include, self.exclude):
            groups, outs, _ = layer.layer.shape
            if groups > 1 and outs % form.rows:
                reason = f"blocks of {form.rows} outputs would reach over two groups, which have {outs} each"
                edit.declined.append(Decline(layer.name, reason))
                continue
            weight = edit.tensor(layer.weight)
            if weight is None or not bool(weight.isfinite().all()):
                edit.declined.append(Decline(layer.name, "its weight has NaN or infinite values"))
                continue
            found.append(layer)
        return found

    def _scores(self, axes: Axes, layers: Sequence[SparseLayer]) -> Scores:
        criterion = named("criterion", self.criterion, criteria)
        if not isinstance(criterion, Elementwise):
            known = [name for name in sorted(criteria.CRITERIA) if issubclass(criteria.load(name), Elementwise)]
            raise BadOption(
                what=f"{self.name}: {criterion.name} has values for items of axes, not for weights",
                way_out=f"give one of {', '.join(known)}",
            )
        data = calibration(self.calibration, axes.program) if criterion.needs_calibration else None
        wanted = {layer.weight.name for layer in layers}
        found = {}
        for member, values in criterion.elements(axes, data):
            for name in wanted.intersection(member.names):
                found[name] = values.to(torch.promote_types(member.tensor.dtype, torch.float32))
        if missing := [layer.name for layer in layers if layer.weight.name not in found]:
            raise BadOption(
                what=f"{self.name}: {criterion.name} has no values for the weights of {', '.join(missing)}",
                way_out="leave them out with exclude, or take another criterion",
            )
        return found

    def _plans(self, edit: Edit, layers: Sequence[SparseLayer], grids: Sequence[Grid], scores: Scores) -> list[Plan]:
        if grids[0].form.m > 1:
            targets = np.array([float(grid.stored(0.0)) for grid in grids])
        else:
            targets = self._targets(edit, layers, grids, scores)
        return [
            Plan(layer, grid, float(target), met=_zeros(edit, layer) > 0 and _taken(edit, layer, grid) <= target)
            for layer, grid, target in zip(layers, grids, targets, strict=True)
        ]

    def _why_nothing(self, edit: Edit, plans: Sequence[Plan]) -> str:
        """Why all layers stay as they are."""
        if not any(plan.met for plan in plans):
            return "what is asked to stay is all that there is"
        size = sum(plan.layer.size for plan in plans)
        kept = 1 - sum(_zeros(edit, plan.layer) for plan in plans) / size
        taken = sum(_taken(edit, plan.layer, plan.grid) for plan in plans) / size
        units = "" if plans[0].grid.form == UNSTRUCTURED else f", {taken:.3g} of them in {plans[0].grid.form} units"
        return f"only {kept:.3g} of the weights are not zero as it is{units}; all of them stay"

    def _targets(self, edit: Edit, layers: Sequence[SparseLayer], grids: Sequence[Grid], scores: Scores) -> Floats:
        densities: list[Tensor | None] = [None] * len(layers)
        if self.allocation == "global":
            densities = [
                self._comparable(grid.density(grid.sums(layer.matrix(scores[layer.weight.name]))))
                for layer, grid in zip(layers, grids, strict=True)
            ]
        seen = [
            Ranked(grid, (layer.outs, layer.channels, *layer.layer.kernel), density)
            for layer, grid, density in zip(layers, grids, densities, strict=True)
        ]
        shares = SHARES[self.allocation](seen, self.minimum)
        sizes = np.array([float(layer.size) for layer in layers])
        taken = np.array([float(_taken(edit, layer, grid)) for layer, grid in zip(layers, grids, strict=True)])
        if self.keep is not None:
            self._check_reachable(edit, layers, self.keep)
            return sizes if taken.sum() <= self.keep * sizes.sum() else shares(self.keep)
        assert self.budget is not None
        costs = bill(edit, self.budget, layers, grids[0].form, self.target)

        def cost(keep: float) -> float:
            kept = [grid.stored(own, self.by_row) for grid, own in zip(grids, shares(keep), strict=True)]
            return costs.of(np.array(kept, np.float64))

        allowed = self.budget.limit(costs.whole)
        if costs.of(taken) <= allowed:
            return sizes
        if (keep := largest(cost, allowed)) <= 0:
            raise unreachable(edit.program.name, self.budget, cost(0.0), costs.whole)
        return shares(keep)

    def _check_reachable(self, edit: Edit, layers: Sequence[SparseLayer], keep: float) -> None:
        total = sum(layer.size for layer in layers)
        floor = int(total * self.minimum)
        least = sum(min(floor, layer.size) for layer in layers) / total
        if self.allocation == "global" and keep < least:
            raise BudgetUnreachable(file=edit.program.name, kind="keep", asked=f"{keep:g}", least=f"{least:.3g}")

    def _comparable(self, density: Tensor) -> Tensor:
        """Mean scores of units on a scale on which those of all layers are ranked together."""
        criterion = named("criterion", self.criterion, criteria)
        how = criterion.normalise if isinstance(criterion, L1) else "none" if criterion.comparable else "mean"
        return density if how == "none" else normalised(density.flatten().double(), how).reshape(density.shape)

    # In which order ---------------------------------------------------------------------------------------------------

    def _orders(self, edit: Edit, axes: Axes, plans: Sequence[Plan], scores: Scores) -> dict[Any, Tensor]:
        """The orders of axes under which more is kept."""
        nodes = {node.name: node for node in axes.program.graph.nodes}
        works = [
            Work(plan.grid, plan.layer.matrix(scores[plan.layer.weight.name]).clone(), plan.target, self.by_row)
            for plan in plans
        ]
        # Zeros that are there already stand in units of an order that must stay.
        settled = [
            [atom for dim in axes.dims[nodes[plan.layer.weight.name]] for atom in atoms(dim)]
            for plan in plans
            if plan.met
        ]
        found: dict[Any, Tensor] = {}
        for axis in axes.free():
            if any(axis in own for own in settled):
                continue
            roles = [
                role_of(work, rows, dims[place], axis)
                for plan, work in zip(plans, works, strict=True)
                for dims in [axes.dims[nodes[plan.layer.weight.name]]]
                for rows, place in ((True, plan.layer.place_of_outs), (False, plan.layer.layer.contracted))
                if axis in atoms(dims[place])
            ]
            order = best_order(roles, axis.extent)
            if not torch.equal(order, torch.arange(axis.extent)):
                found[axis] = order
                edit.count("axis rearranged")
        return found


def _zeros(edit: Edit, layer: SparseLayer) -> int:
    """Elements of a layer's weight that are zero."""
    weight = edit.tensor(layer.weight)
    assert weight is not None
    return layer.size - int(torch.count_nonzero(weight))


def _taken(edit: Edit, layer: SparseLayer, grid: Grid) -> int:
    """Elements of the units that have any that is not zero. With N:M, all where a group has more than N of those."""
    weight = edit.tensor(layer.weight)
    assert weight is not None
    units = grid.sums(layer.matrix(weight != 0).float()) > 0
    form = grid.form
    if form.m > 1 and bool((units & ~best_of_each(units.float(), form.n, form.m)).any()):
        return layer.size
    return int(grid.sizes[units].sum())


def _reordered(axes: Axes, name: str, scores: Tensor, keep: Mapping[Axis, Tensor]) -> Tensor:
    """Scores of a weight after its axes were brought into other orders."""
    node = next(node for node in axes.dims if node.name == name)
    for place, dim in enumerate(axes.dims[node]):
        if touched(dim, keep):
            scores = scores.index_select(place, index(dim, keep))
    return scores
