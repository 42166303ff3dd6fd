"""Axes that a weight's blocks run along are cut in whole blocks, so that its sparse format survives the cut.

    before  w (o=64, i)  in 4x1 blocks      after  w (o=40, i)  in 4x1 blocks: six rows of blocks went
    before  w (o, i=64)  2:4                after  w (o, i=40)  2:4: six groups of four inputs went

A weight is seen as its format sees it: (outputs, inputs), of convolutions inputs are taps x channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis, atoms, owner
from graphopt.sparsity import UNSTRUCTURED, Format
from graphopt.weights import weights


@dataclass(frozen=True)
class Block:
    """Of an axis `size` consecutive items stay or go together, because of how the zeros of `weight` stand."""

    size: int
    weight: str
    form: Format


def whole_blocks(axes: Axes, wanted: Iterable[Axis]) -> dict[Axis, Block]:
    """The blocks of those axes that are to be cut in such; an axis whose blocks cannot go as a whole has none."""
    lines = list(_lines(axes))
    found: dict[Axis, Block] = {}
    for axis in wanted:
        own = [(line, line.unit_of(axis)) for line in lines if axis in line.atoms]
        if any(unit is None for _, unit in own):
            continue
        size = math.lcm(*(unit for _, unit in own if unit is not None))
        if 1 < size < axis.extent:
            line = next(line for line, unit in own if unit != 1)
            found[axis] = Block(size, line.weight, line.form)
    return found


def in_blocks(scores: Tensor, size: int) -> Tensor:
    """Scores (.., items) in which all items of a block have the mean of their scores, so that they stay or go together.

    What is left over at the end has the lowest of all: a number of whole blocks stays without it.
    """
    count = scores.shape[-1] // size
    whole = scores[..., : count * size].unflatten(-1, (count, size)).double().mean(-1).repeat_interleave(size, -1)
    rest = whole.amin(-1, keepdim=True).expand(*whole.shape[:-1], scores.shape[-1] - count * size)
    return torch.cat([whole, rest], -1).to(scores.dtype)


@dataclass(frozen=True, eq=False)
class _Line:
    """A side of a sparse weight's matrix: which part of `dim` each place belongs to, in blocks of `width` places."""

    weight: str
    form: Format
    dim: Axis
    copies: int  # how often the dimension's items follow each other: of inputs, once for each tap
    width: int

    @property
    def atoms(self) -> list[Axis]:
        return atoms(self.dim)

    def unit_of(self, axis: Axis) -> int | None:
        """How many consecutive items of an axis make whole blocks, at least; None where no number does."""
        items = owner(self.dim, axis).repeat(self.copies)
        # Blocks at the end may be smaller: they may lose what they like.
        blocks = items[: len(items) // self.width * self.width].reshape(-1, self.width)
        if not len(blocks) or len(items) == self.width:
            return 1
        units = (unit for unit in range(1, self.width + 1) if self.width % unit == 0)
        # Places of other axes are -1, and stay so.
        return next((u for u in units if bool((blocks // u == blocks[:, :1] // u).all())), None)


def _lines(axes: Axes) -> Iterator[_Line]:
    """The sides along which blocks of more than one place run."""
    annotations = axes.program.annotations.items()
    forms = {name: own.format for name, own in annotations if own.format not in (None, UNSTRUCTURED)}
    if not forms:
        return
    nodes = {axes.tensor_name(node.name): node for node in axes.dims if axes.is_stored(node)}
    for name, weight in weights(axes.program.exported).items():
        if name not in forms or name not in nodes:
            continue
        form, dims = forms[name], axes.dims[nodes[name]]
        assert form is not None, "those are left out"
        for view, kept in weight.matrices():
            last = int(view.outputs_last)
            taps = math.prod(weight.value.shape[2:])
            # Where all rows (columns) are alike, there are no blocks, but inputs (outputs) that are dead: they may go.
            sides = ((dims[last], 1, form.rows, kept.T), (dims[1 - last], taps, form.cols * form.m, kept))
            for dim, copies, width, lines in sides:
                if width > 1 and (lines != lines[:1]).any():
                    yield _Line(name, form, dim, copies, width)
