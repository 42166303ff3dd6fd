"""Filters by their weights and by how much they spread the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes, Axis, find
from graphopt.errors import BadCalibration, Decline
from graphopt.observe import watch
from graphopt.passes.criteria.base import Criterion, Tally, checked_choice, data_of, stand_in
from graphopt.passes.criteria.uses import Use, given, op, uses

if TYPE_CHECKING:
    from graphopt.calibration import Calibration

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass(frozen=True)
class BetaRank(Criterion):
    """Mean absolute weight of a filter, times the ratio of the spread of its output and of its input on data.

        score_k = mean |f_k| * sum over places (u, v)  sigma_out(k, u, v) / sigma_in(u, v), then min-max to [0, 1]

    sigma_out is the standard deviation over samples of the convolution's output at a place, in front of norm and
    activation; sigma_in that of everything in the window of the input that feeds the place, over samples, too. Padding
    is not part of a window; places without spread are left out. A linear layer is a convolution of one tap, whose first
    dimension has the samples. An axis adds up all layers that produce it; one that none of these produce gets the norm
    of its weights, and `fallbacks` names it.

    Source: Beta-Rank, arXiv:2304.07253. Its equation 5 has the ratio the other way round than its code; the default is
    the code, where the published runs come from. Differs: windows lie where the padding puts them; groups and strides;
    samples of all batches, not of one.

    Attributes:
        ratio: "out_over_in" (the code) or "in_over_out" (the paper).
        scaled: min-max to [0, 1] in each layer, which the sum over layers needs.
    """

    name: ClassVar[str] = "beta-rank"
    needs_calibration: ClassVar[bool] = True
    ratio: str = "out_over_in"
    scaled: bool = True

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion.

        Raises:
            BadCalibration: there are fewer than two samples, which have no spread.
        """
        checked_choice(self.name, "ratio", self.ratio, ("out_over_in", "in_over_out"))
        tally = Tally(wanted)
        layers = _layers(axes, tally)
        spreads = {use.node.name: _Spread(use) for use in layers}
        data = data_of(axes, calibration)
        feeds: dict[str, list[_Spread]] = {}
        for use in layers:
            feeds.setdefault(use.source.name, []).append(spreads[use.node.name])

        def see(name: str, value: Any) -> None:
            for spread in feeds.get(name, ()):
                spread.see_input(value)
            if name in spreads:
                spreads[name].see_output(value)

        watch(axes.program, data, {*feeds, *spreads}, see)
        if any(spread.samples < 2 for spread in spreads.values()):
            raise BadCalibration(
                source=data.origin,
                what=f"{self.name} needs two samples or more, to see how outputs differ",
                expected=", ".join(map(str, axes.program.inputs)),
            )
        found: dict[Axis, Tensor] = {}
        for use in layers:
            weight = axes.program.tensors[use.weight.name].detach().double()
            score = weight.abs().flatten(1).mean(1) * spreads[use.node.name].ratios(self.ratio)
            if self.scaled:
                least, most = score.min(), score.max()
                score = (score - least) / (most - least) if most > least else torch.zeros_like(score)
            for atom, sums in tally.sums(axes.dims[use.weight][:1], score).items():
                found[atom] = found[atom] + sums if atom in found else sums
        return {**found, **stand_in(axes, [atom for atom in tally.wanted if atom not in found], found)}

    def fallbacks(self, axes: Axes, wanted: Sequence[Axis]) -> list[Decline]:
        """See Criterion."""
        tally = Tally(wanted)
        known = {atom for use in _layers(axes, tally) for atom in tally.atoms_of(axes.dims[use.weight][:1])}
        reason = f"{self.name}: no convolution or linear layer gives this axis; scored by the norm of its weights"
        return [Decline(axes.where(atom), reason) for atom in map(find, wanted) if atom not in known]


def _layers(axes: Axes, tally: Tally) -> list[Use]:
    """The convolutions and linear layers that produce a wanted axis."""
    kinds = (*_CONVOLUTIONS, "linear")
    return [use for use in uses(axes) if op(use.node) in kinds and tally.atoms_of(axes.dims[use.weight][:1])]


class _Spread:
    """Sums over samples of one layer's input windows and outputs, in float64."""

    def __init__(self, use: Use) -> None:
        self.node = use.node
        self.samples = 0
        self.sums: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def see_input(self, x: Tensor) -> None:
        """Add a batch of inputs: sums of x, x^2 and 1 over samples and the window of each place, (groups, places)."""
        x = _samples_first(self.node, x.double())
        parts = [x, x.square(), torch.ones_like(x)]
        self.sums = _add(self.sums, [windows(self.node, part) for part in parts])

    def see_output(self, y: Tensor) -> None:
        """Add a batch of outputs: (filters, places)."""
        y = _samples_first(self.node, y.double()).flatten(2)
        self.samples += len(y)
        self.outputs = _add(self.outputs, [y.sum(0), y.square().sum(0)])

    def ratios(self, how: str) -> Tensor:
        """For each filter the sum over places of one spread over the other."""
        (x, squares, count), (y, outer_squares) = self.sums, self.outputs
        inner = _deviation(x, squares, count)
        outer = _deviation(y, outer_squares, torch.full_like(y, self.samples))
        inner = inner.repeat_interleave(len(outer) // len(inner), 0)
        above, below = (outer, inner) if how == "out_over_in" else (inner, outer)
        return torch.where((below > 0) & (outer > 0), above / below, 0.0).sum(1)


def _samples_first(node: Node, x: Tensor) -> Tensor:
    """(samples, channels, places...)."""
    rank = _CONVOLUTIONS.get(op(node))
    if rank is not None:
        return x if x.dim() == rank + 2 else x[None]
    return x.reshape(len(x), -1, x.shape[-1]).movedim(-1, 1) if x.dim() > 1 else x[None, :, None]


def windows(node: Node, x: Tensor) -> Tensor:
    """Sums of x over samples, channels of a group, and the window of each place: (groups, places).

    Args:
        node: the layer.
        x: (samples, channels, places...).
    """
    rank = _CONVOLUTIONS.get(op(node))
    if rank is None:
        return x.sum((0, 1)).reshape(1, -1)
    call = given(node)
    kernel = call["weight"].meta["val"].shape[2:]
    groups = int(call["groups"])
    maps = x.sum(0).unflatten(0, (groups, -1)).sum(1)[:, None]
    ones = torch.ones(1, 1, *kernel, dtype=x.dtype)
    convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
    padding = call["padding"]
    return convolution(maps, ones, None, call["stride"], padding, call["dilation"]).flatten(1)


def _add(known: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(known, more, strict=True)] if known else more


def _deviation(sums: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """Standard deviations from sums; what is rounding counts as none."""
    mean = sums / count.clamp_min(1)
    variance = squares / count.clamp_min(1) - mean.square()
    none = variance <= 1e-12 * mean.square()
    unbiased = variance * count / (count - 1).clamp_min(1)
    return torch.where(none, 0.0, unbiased).sqrt()
