"""Measured latency: single layers, compiled and timed where their target runs, over a grid of their extents.

    table = LatencyTable.load("cpu.json") if there is one, else LatencyTable("cpu")
    table.measure(latency_model(axes, target), seconds=120)
    table.save("cpu.json")
    faster = table.apply(latency_model(axes, target))          called with sizes as the estimate is

A layer's coordinates are the extents of its tensors that may shrink; equal layers are measured once. The table is plain
JSON, sorted, one record for each operator with its shapes, so tables of one target can be merged.
Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency" (NViT), CVPR 2023,
arXiv:2110.04869: a look-up table over EMB, heads, QK, V and MLP. Differs: by layer instead of by block.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.axes import Axes, Axis
from graphopt.cost.latency import Grid, LatencyModel
from graphopt.cost.model import CostModel
from graphopt.cost.polynomial import Polynomial
from graphopt.cost.work import Work
from graphopt.exported import op_name
from graphopt.program import Program
from graphopt.spec import dtype_name

# Shares of the full extents at which layers are measured.
SHARES = (0.25, 0.5, 1.0)
# Layers that take less than this share of the estimate are not worth a measurement.
_LEAST_SHARE = 0.01
_FORMAT = 1
# How long one layer runs, in seconds.
RUN_SECONDS = 0.1

# Seconds that one run of a program takes on the target.
Clock = Callable[[Program], float]


def run_seconds(program: Program, target: str, *, threads: int = 1, seconds: float = RUN_SECONDS) -> float:
    """Compile a program, run it for `seconds` on its example inputs, and give what the fastest run takes.

    Whatever else the machine does can only add to a run.

    Raises:
        ToolMissing: the target does not run here.
    """
    from graphopt.bundle import load
    from graphopt.pipeline import compile as compile_program

    assert program.example_inputs is not None, "there is nothing to run it on"
    with compile_program(program, target=target, verify=False) as bundle, load(bundle.path, threads=threads) as opened:
        inputs = {name: value.numpy() for name, value in program.example_inputs.items()}
        return min(opened.time(inputs, seconds))


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


@dataclass
class LatencyTable:
    """Seconds by layer, on one target with a number of threads. `records` are net of what an empty program takes.

    `machine` says where they were measured; empty where whoever measured did not say.
    """

    target: str
    threads: int = 1
    records: dict[str, float] = field(default_factory=dict)
    machine: str = ""

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            ValueError: it is no such file.
        """
        try:
            found = json.loads(Path(path).read_text())
            if found["format"] != _FORMAT:
                raise ValueError(f"format {found['format']}")
            records = {str(name): float(seconds) for name, seconds in found["records"].items()}
            if wrong := [name for name, seconds in records.items() if not 0 < seconds < math.inf]:
                raise ValueError(f"{wrong[0]} takes {records[wrong[0]]} s")
            return cls(str(found["target"]), int(found["threads"]), records, str(found.get("machine", "")))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no table of latencies: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all; equal records give equal bytes."""
        records = {name: _rounded(seconds) for name, seconds in self.records.items()}
        found = {"format": _FORMAT, "target": self.target, "threads": self.threads, "records": records}
        if self.machine:
            found["machine"] = self.machine
        part = Path(f"{path}.part")
        part.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        os.replace(part, path)

    def measure(
        self,
        model: LatencyModel,
        *,
        seconds: float = 60.0,
        shares: Sequence[float] = SHARES,
        clock: Clock | None = None,
    ) -> int:
        """Measure the layers of a program that are not in the table, those that matter most first.

        Args:
            seconds: no measurement starts later than this.
            shares: of the full extents, the points of every grid.
            clock: what times a program; `run_seconds` by default, less what an empty program takes.

        Returns:
            How many records are new. Layers whose grid is incomplete stay estimated.

        Raises:
            ToolMissing: the target does not run here.
        """
        end, new = time.monotonic() + seconds, 0
        timed = clock or self._seconds_of
        for layer in layers(model):
            for point in layer.grid(shares):
                name = layer.name(point)
                if name in self.records:
                    continue
                if time.monotonic() >= end:
                    return new
                self.records[name] = timed(layer.program(point))
                new += 1
        return new

    def note(self, name: str, taken: float) -> None:
        """Record a run of a kernel by itself that took so many seconds; as `save` writes it, so that choices made by
        it are the same when it was read again.
        """
        self.records[name] = _rounded(self._net(taken))

    @cached_property
    def _empty_seconds(self) -> float:
        class Empty(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + 1

        from graphopt.capture import capture

        return run_seconds(capture(Empty(), (torch.zeros(8),)), self.target, threads=self.threads)

    def _seconds_of(self, program: Program) -> float:
        return self._net(run_seconds(program, self.target, threads=self.threads))

    def _net(self, taken: float) -> float:
        return max(taken - self._empty_seconds, taken * 0.02)

    def apply(self, model: LatencyModel, shares: Sequence[float] = SHARES) -> LatencyModel:
        """The model with measured layers in the place of estimates; the others are scaled as the measured ones are off,
        all together at their full extents.

        Layers count as measured where every point of their grid is in the table.
        """
        grids, measured, estimated = dict[Node, Grid](), 0.0, 0.0
        for layer in layers(model, least=0.0):
            names = [layer.name(point) for point in layer.grid(shares)]
            if all(name in self.records for name in names):
                points = layer.points(shares)
                values = np.array([self.records[name] for name in names]).reshape([len(own) for own in points])
                measured += float(values.flat[-1]) * len(layer.works)
                estimated += layer.seconds * len(layer.works)
                grids |= {work.node: Grid(own, points, values) for work, own in layer.works.items()}
        factor = measured / estimated if grids else model.factor
        return replace(model, factor=factor, measured=grids, _known={})


@dataclass(frozen=True, eq=False)
class Layer:
    """Equal calls of a program: `works` with the coordinates of each, in the same order for all.

    Where the extents of tensors do not depend on each other they are the coordinates; else the atoms are (`free`).
    """

    axes: Axes
    cost: CostModel
    works: dict[Work, tuple[Polynomial, ...]]
    free: bool
    seconds: float  # estimated, of one of them at its full extents

    @property
    def _first(self) -> tuple[Work, tuple[Polynomial, ...]]:
        return next(iter(self.works.items()))

    def points(self, shares: Sequence[float]) -> tuple[tuple[int, ...], ...]:
        """The values of each coordinate, ascending."""
        fulls = [coordinate() for coordinate in self._first[1]]
        return tuple(tuple(sorted({max(1, math.ceil(full * share)) for share in shares})) for full in fulls)

    def grid(self, shares: Sequence[float]) -> Iterator[tuple[int, ...]]:
        """Every point, the last coordinate fastest."""
        return itertools.product(*self.points(shares))

    def _extent(self, polynomial: Polynomial, point: Sequence[int]) -> int:
        own = self._first[1]
        if self.free:
            return polynomial({p.variables[0]: value for p, value in zip(own, point, strict=True)})
        return dict(zip(own, point, strict=True))[polynomial] if polynomial.variables else polynomial()

    def _shape(self, node: Node, point: Sequence[int]) -> tuple[int, ...]:
        extents = self.cost.shapes[node][0].shape
        return tuple(e if isinstance(e, int) else self._extent(e, point) for e in extents)

    def _literals(self, point: Sequence[int]) -> dict[str, Any]:
        def value(literal: Any) -> Any:
            if isinstance(literal, Axis):
                return self._extent(Polynomial.of(literal), point)
            return [value(item) for item in literal] if isinstance(literal, list) else literal

        return {name: value(literal) for name, literal in self.axes.literals.get(self._first[0].node, {}).items()}

    def name(self, point: Sequence[int]) -> str:
        """The key of its record: the operator, dtypes and shapes of tensors ([stored]), and its other arguments."""
        node = self._first[0].node

        def show(source: Node) -> str:
            shape = "x".join(map(str, self._shape(source, point)))
            text = f"{dtype_name(source.meta['val'].dtype)}:{shape}"
            return f"[{text}]" if self.axes.is_stored(source) else text

        args, kwargs = self._arguments(point, lambda source: _Shown(show(source)))
        given = [repr(arg) for arg in args] + [f"{name}={arg!r}" for name, arg in sorted(kwargs.items())]
        return f"{op_name(node).removeprefix('aten.')}({', '.join(given)})"

    def _arguments(self, point: Sequence[int], tensor: Callable[[Node], Any]) -> tuple[list[Any], dict[str, Any]]:
        node = self._first[0].node
        args, kwargs = list(map_arg(node.args, tensor)), dict(map_arg(node.kwargs, tensor))
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        for place, argument in enumerate(schema):
            if argument.name in (literals := self._literals(point)):
                if place < len(args):
                    args[place] = literals[argument.name]
                else:
                    kwargs[argument.name] = literals[argument.name]
        return args, kwargs

    def program(self, point: Sequence[int]) -> Program:
        """One call of it with these extents, as a program of its own; weights and inputs are seeded noise."""
        from graphopt.capture import capture

        node, generator = self._first[0].node, torch.Generator().manual_seed(0)
        values, names = list[Tensor](), dict[Node, str]()
        module = _One(node)
        for place, source in enumerate(node.all_input_nodes):
            dtype, shape = source.meta["val"].dtype, self._shape(source, point)
            value = torch.randn(shape, generator=generator).to(dtype) if dtype.is_floating_point else None
            value = torch.zeros(shape, dtype=dtype) if value is None else value
            if self.axes.is_stored(source):
                module.register_buffer(f"t{place}", value)
            else:
                values.append(value)
                names[source] = f"#{len(values) - 1}"
        stored = {source: f"t{place}" for place, source in enumerate(node.all_input_nodes)}
        module.arguments = self._arguments(point, lambda source: _Place(names.get(source, stored[source])))
        return capture(module, tuple(values), name="layer")


@dataclass(frozen=True)
class _Shown:
    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class _Place:
    """Where an operand is: `#n` among the inputs, or the name of a buffer."""

    name: str


class _One(nn.Module):
    """One call. What stands for tensors among `arguments` is a _Place."""

    arguments: tuple[list[Any], dict[str, Any]]

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.target = node.target

    def forward(self, *inputs: Tensor) -> Any:
        def fill(value: Any) -> Any:
            if isinstance(value, _Place):
                return inputs[int(value.name[1:])] if value.name[0] == "#" else getattr(self, value.name)
            return [fill(item) for item in value] if isinstance(value, (list, tuple)) else value

        args, kwargs = self.arguments
        return self.target(*map(fill, args), **{name: fill(value) for name, value in kwargs.items()})  # type: ignore[operator]


def layers(model: LatencyModel, *, least: float = _LEAST_SHARE) -> list[Layer]:
    """The layers of a program that may be measured, those that take longest in all first.

    Calls that are computed in the kernel of another are none, nor are those that take less than `least` of the whole.
    """
    cost = model.cost
    plain = replace(model, measured={}, factor=1.0, _known={})
    rows = plain.rows()
    whole = sum(seconds for _, seconds in rows)
    found: dict[Any, Layer] = {}
    for work, seconds in rows:
        sources = work.node.all_input_nodes
        if work.kind == "fused" or not sources or not all(isinstance(s.meta.get("val"), Tensor) for s in sources):
            continue
        own, free = _coordinates(work.node, cost, cost.axes.literals.get(work.node, {}).values())
        layer = Layer(cost.axes, cost, {work: own}, free, seconds)
        # Equal layers have equal names at two points: as they are, and at a half.
        key = tuple(
            layer.name(point) for point in ([p[-1] for p in layer.points((1.0,))], [p[0] for p in layer.points((0.5,))])
        )
        found.setdefault(key, layer).works[work] = own
    shares = {key: layer.seconds * len(layer.works) / whole for key, layer in found.items()}
    return [found[key] for key in sorted(found, key=lambda key: -shares[key]) if shares[key] >= least]


def _coordinates(node: Node, cost: CostModel, literals: Iterable[Any]) -> tuple[tuple[Polynomial, ...], bool]:
    extents: dict[Polynomial, None] = {}
    for source in (*node.all_input_nodes, node):
        for extent in itertools.chain.from_iterable(shaped.shape for shaped in cost.shapes[source]):
            if isinstance(extent, Polynomial) and extent.variables:
                extents[extent] = None
    for literal in literals:
        for axis in literal if isinstance(literal, list) else [literal]:
            if isinstance(axis, Axis) and Polynomial.of(axis).variables:
                extents[Polynomial.of(axis)] = None
    atoms = [atom for extent in extents for atom in extent.variables]
    if len(set(atoms)) == len(atoms):
        return tuple(extents), False
    return tuple(Polynomial({(atom,): 1}) for atom in dict.fromkeys(atoms)), True


def corrected_by_run(model: LatencyModel, target: str, *, threads: int = 1, seconds: float = 1.0) -> LatencyModel:
    """The model scaled to what one measured run of its whole program takes.

    Raises:
        ToolMissing: the target does not run here.
    """
    return model.corrected(run_seconds(model.cost.axes.program, target, threads=threads, seconds=seconds))


__all__ = ["SHARES", "LatencyTable", "Layer", "corrected_by_run", "layers", "run_seconds"]
