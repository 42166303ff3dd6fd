"""Passes that take layers apart into factors: which layers, and of what rank under a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes, atoms, infer
from graphopt.budget import Budget
from graphopt.edit import Edit
from graphopt.errors import BadOption, Decline
from graphopt.exported import op_name
from graphopt.passes.base import Pass
from graphopt.passes.checks import check_count, check_included, check_share, matches, not_excluded
from graphopt.passes.layers import LINEAR, Layer, layer_of, samples_of
from graphopt.passes.ranks import Choice, choose
from graphopt.passes.sizes import amount, limit, nothing, short_of
from graphopt.program import Program

# Second moments (ins, ins) and the mean (ins,) of what a layer reads.
Seen = tuple[Tensor, Tensor]


class Factors(ABC):
    """The factors of one layer, of every rank at once. `energy` (k,): what each further rank adds, falling."""

    energy: Tensor

    @abstractmethod
    def put(self, edit: Edit, layer: Layer, rank: int) -> None:
        """Put the factors of a rank in the layer's place."""


@dataclass(frozen=True)
class Factoring(Pass):
    """Replace layers by factors whose size grows with a rank. Lossy.

    budget: what the whole program may cost, of FLOPs, multiply-adds, parameters or bytes. It is met by choosing all
        ranks at once so that the least of the layers' energy is lost, each layer's as a share of its own; or
    keep: the share of each layer's parameters that stays; or
    rank: the same for all.
    step: ranks are multiples of it, which is what the target's kernels are made for.
    include: all layers whose names match one of these patterns, such as "blocks.*.attention.*", instead of the linear
        ones of feed-forward networks, which read or write a hidden neuron axis.
    exclude: patterns of layers that stay.
    dense_first: the first feed-forward network stays.
    calibration: data, as `graphopt.calibration` takes it; the weights alone decide where there is none.
    """

    lossless: ClassVar[bool] = False

    budget: Budget | None = None
    keep: float | None = None
    rank: int | None = None
    step: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dense_first: bool = False
    calibration: Any = None

    # What subclasses say ----------------------------------------------------------------------------------------------

    @abstractmethod
    def per_rank(self, layer: Layer) -> tuple[int, int]:
        """Parameters and multiply-adds of the factors for each rank."""

    @abstractmethod
    def factors(self, layer: Layer, weight: Tensor, bias: Tensor | None, seen: Seen | None) -> Factors:
        """The layer taken apart; `seen` where there is calibration data."""

    def layer(self, edit: Edit, node: Node) -> Layer | str | None:
        """As `layer_of`, and why a layer cannot be taken apart in this way."""
        return layer_of(edit, node)

    def check(self) -> None:
        """Options that contradict each other or mean nothing. Raises BadOption."""
        if sum(value is not None for value in (self.budget, self.keep, self.rank)) != 1:
            raise BadOption(
                what=f"{self.name} takes one of budget, keep and rank",
                way_out="give --flops 0.5, or keep=0.5, or rank=64",
            )
        check_count(self.name, "rank", self.rank)
        check_count(self.name, "step", self.step)
        check_share(self.name, "keep", self.keep)

    # The pass ---------------------------------------------------------------------------------------------------------

    def apply(self, edit: Edit) -> None:
        """See Pass."""
        self.check()
        program = edit.program
        layers = self._layers(edit, program)
        if not layers:
            reason = "no layer is left" if self.include else "there is no linear layer of a feed-forward network"
            if not edit.declined:
                edit.declined.append(Decline(program.name, reason))
            if self.budget is not None and amount(program, self.budget.kind) > limit(program, self.budget):
                raise nothing(program, self.budget, self.name, reason)
        seen = self._seen(program, layers)
        found = {}
        for layer in layers:
            weight, bias = edit.tensor(layer.node.args[1]), edit.tensor(layer.bias)
            assert weight is not None
            found[layer.name] = self.factors(layer, weight, bias, seen.get(layer.name))
        ranks = self._ranks(program, layers, {name: factors.energy for name, factors in found.items()})
        for layer in layers:
            rank = ranks[layer.name]
            if rank is None:
                edit.decline(layer.node, f"{layer.name} stays dense ({layer.outs} x {layer.ins})")
                continue
            found[layer.name].put(edit, layer, rank)
            edit.details.append({"layer": layer.name, "rank": rank})
            edit.count(op_name(layer.node).removeprefix("aten.").partition(".")[0])
        if self.budget is not None and any(rank is not None for rank in ranks.values()):
            kind = self.budget.kind
            saved = sum(self._size(layer, None, kind) - self._size(layer, ranks[layer.name], kind) for layer in layers)
            why = "no ranks come nearer" if self.step == 1 else "no multiples of the step come nearer"
            edit.notes += short_of(program, self.budget, amount(program, kind) - saved, why)

    def _layers(self, edit: Edit, program: Program) -> list[Layer]:
        wanted = None if self.include else feed_forward(infer(program))
        storages = Counter(tensor.untyped_storage().data_ptr() for tensor in program.tensors.values())
        found: list[Layer] = []
        names = []
        for node in edit.graph.nodes:
            if wanted is not None and node.name not in wanted:
                continue
            layer = self.layer(edit, node)
            if isinstance(layer, str):
                edit.decline(node, layer)
            if isinstance(layer, Layer):
                names.append(layer.name)
            if not isinstance(layer, Layer) or matches(layer.name, self.exclude):
                continue
            weight = edit.tensor(layer.node.args[1])
            if self.include and not matches(layer.name, self.include):
                continue
            if weight is not None and storages[weight.untyped_storage().data_ptr()] > 1:
                edit.decline(node, "its weight is tied to another tensor")
                continue
            found.append(layer)
        check_included(self.name, self.include, names, "layer")
        edit.notes += not_excluded(self.exclude, names, "layer")
        if self.dense_first and found:
            first = found[0].name.rpartition(".")[0]
            found = [layer for layer in found if layer.name.rpartition(".")[0] != first]
        return found

    def _seen(self, program: Program, layers: Sequence[Layer]) -> dict[str, Seen]:
        if self.calibration is None:
            return {}
        from graphopt.calibration import calibration
        from graphopt.observe import watch

        readers: dict[str, list[Layer]] = {}
        for layer in layers:
            if layer.split == "channel":
                readers.setdefault(layer.source.name, []).append(layer)
        sums: dict[str, tuple[Tensor, Tensor, int]] = {}

        def see(name: str, value: Tensor) -> None:
            for layer in readers[name]:
                rows = samples_of(layer, value)
                gram, total, count = sums.get(layer.name, (0.0, 0.0, 0))
                sums[layer.name] = (gram + rows.T @ rows, total + rows.sum(0), count + len(rows))

        watch(program, calibration(self.calibration, program), list(readers), see)
        return {name: (gram / count, total / count) for name, (gram, total, count) in sums.items()}

    def _ranks(
        self, program: Program, layers: Sequence[Layer], energies: Mapping[str, Tensor]
    ) -> dict[str, int | None]:
        """The rank of each layer by name; None where it stays dense."""
        most = {layer.name: self._most(layer) for layer in layers}
        if self.budget is None:
            ranks: dict[str, int | None] = {}
            for layer in layers:
                wanted = self.rank or int((self.keep or 0) * layer.params / self.per_rank(layer)[0])
                wanted = max(self.step, wanted // self.step * self.step)
                ranks[layer.name] = wanted if wanted <= most[layer.name] else None
            return ranks
        kind = self.budget.kind
        allowed = limit(program, self.budget)
        rest = amount(program, kind) - sum(self._size(layer, None, kind) for layer in layers)
        choices = []
        for layer in layers:
            options: list[int | None] = [*range(self.step, most[layer.name] + 1, self.step), None]
            lost = _lost(energies[layer.name], options)
            choices.append(Choice(options, lost, [self._size(layer, rank, kind) for rank in options]))
        chosen = choose(choices, allowed - rest, self.budget, program.name, rest)
        return dict(zip((layer.name for layer in layers), chosen, strict=True))

    def _most(self, layer: Layer) -> int:
        """The highest rank, a multiple of `step`, that is less work and fewer parameters than the dense layer."""
        params, macs = self.per_rank(layer)
        return min((layer.params - 1) // params, (layer.macs - 1) // macs) // self.step * self.step

    def _size(self, layer: Layer, rank: int | None, kind: str) -> float:
        params, macs = self.per_rank(layer)
        if kind in ("params", "bytes"):
            elements = layer.params if rank is None else rank * params
            return elements * (layer.node.meta["val"].element_size() if kind == "bytes" else 1)
        return (layer.macs if rank is None else rank * macs) * (2 if kind == "flops" else 1)


def feed_forward(axes: Axes) -> set[str]:
    """The names of linear calls that read or write a free axis of hidden neurons."""
    found = set()
    for node in axes.program.graph.nodes:
        if node.op == "call_function" and op_name(node) == LINEAR:
            own = [atom for axis in axes.dims[node.args[1]] for atom in atoms(axis)]
            if any(axes.role(atom) == "neuron" and atom.pinned is None for atom in own):
                found.add(node.name)
    return found


def _lost(energy: Tensor, ranks: Sequence[int | None]) -> list[float]:
    """The share of a layer's energy that is lost at each rank."""
    total = float(energy.sum()) or 1.0
    beyond = energy.flip(0).cumsum(0).flip(0).tolist()
    return [0.0 if rank is None or rank >= len(beyond) else beyond[rank] / total for rank in ranks]
