"""How active an item is on data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes, Axis, find
from graphopt.errors import Decline
from graphopt.observe import watch
from graphopt.passes.criteria.base import Criterion, Tally, checked_choice, data_of, stand_in
from graphopt.passes.criteria.uses import uses

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class Activation(Criterion):
    """The size of an item's values, over data and positions, summed over all places where something consumes them.

        "mean"     score_j = sum over places  mean |x_j|
        "rms"      score_j = sum over places  sqrt(mean x_j^2)
        "std"      score_j = sum over places  standard deviation of x_j
        "nonzero"  score_j = sum over places  share of x_j that is not zero  =  1 - APoZ

    What is consumed is the input of a sum of products: behind activation and norm, that is. An axis without such (the
    head size of queries and keys) takes what stored weights produce of it; one that occurs in neither gets the norm of
    its weights, and `fallbacks` names it.

    Source: APoZ is from Hu et al., "Network Trimming", arXiv:1607.03250; the mean from Molchanov et al., "Pruning
    Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017, arXiv:1611.06440. Differs: all places of
    the axis add up, where they look at one layer.

    Attributes:
        measure: "mean", "rms", "std" or "nonzero".
    """

    name: ClassVar[str] = "activation"
    needs_calibration: ClassVar[bool] = True
    measure: str = "mean"

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        checked_choice(self.name, "measure", self.measure, ("mean", "rms", "std", "nonzero"))
        tally = Tally(wanted)
        where = _places(axes, tally)
        sums: dict[str, dict[Axis, Tensor]] = {}
        seen: dict[str, int] = {}
        dims = {node.name: axes.dims[node] for node in where}

        def see(name: str, value: Any) -> None:
            x = value.double()
            parts = [x, x.square()] if self.measure == "std" else [_MEASURES[self.measure](x)]
            each = [tally.sums(dims[name], part) for part in parts]
            seen[name] = seen.get(name, 0) + x.numel()
            for atom in each[0]:
                total = torch.stack([part[atom] for part in each])
                known = sums.setdefault(name, {})
                known[atom] = known[atom] + total if atom in known else total

        watch(axes.program, data_of(axes, calibration), where, see)
        found: dict[Axis, Tensor] = {}
        for node, own in where.items():
            for atom in own:
                counts = sum(
                    torch.bincount(items[items >= 0], minlength=atom.extent) * (seen[node.name] / len(items))
                    for items in [tally.owner(axes.dims[node][place], atom) for place in own[atom]]
                )
                means = sums[node.name][atom] / counts
                score = self._of(means)
                found[atom] = found[atom] + score if atom in found else score
        return {**found, **stand_in(axes, [atom for atom in tally.wanted if atom not in found], found)}

    def _of(self, means: Tensor) -> Tensor:
        if self.measure == "std":
            return (means[1] - means[0].square()).clamp_min(0).sqrt()
        return means[0].sqrt() if self.measure == "rms" else means[0]

    def fallbacks(self, axes: Axes, wanted: Sequence[Axis]) -> list[Decline]:
        """See Criterion."""
        known = {atom for own in _places(axes, Tally(wanted)).values() for atom in own}
        reason = f"{self.name}: no product takes or gives values with this axis; scored by the norm of its weights"
        return [Decline(axes.where(atom), reason) for atom in map(find, wanted) if atom not in known]


_MEASURES = {"mean": torch.abs, "rms": torch.square, "nonzero": lambda x: (x != 0).double()}


def _places(axes: Axes, tally: Tally) -> dict[Node, dict[Axis, list[int]]]:
    """The computed values to look at, and the atoms with their dimensions there."""
    found: dict[Node, dict[Axis, list[int]]] = {}
    known: set[Axis] = set()
    every = list(uses(axes))
    for use in every:
        value = use.source.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        weight = [axes.dims[use.weight][place] for place in use.summed]
        here = tally.atoms_of(axes.dims[use.source])
        for atom in tally.atoms_of(weight):
            if atom in here:
                found.setdefault(use.source, {})[atom] = here[atom]
                known.add(atom)
    for node in {use.node: None for use in every}:
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        for atom, everywhere in tally.atoms_of(axes.dims[node]).items():
            if atom not in known:
                found.setdefault(node, {})[atom] = everywhere
    return found
