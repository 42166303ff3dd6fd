"""Take linear layers (and convolutions) apart into two thin ones, by truncated singular value decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes, atoms, infer
from graphopt.budget import Budget
from graphopt.edit import Edit
from graphopt.errors import BadOption
from graphopt.exported import op_name
from graphopt.passes.base import Pass
from graphopt.passes.layers import LINEAR, Layer, bias_of, layer_of, matrix_of, replace_layer, samples_of
from graphopt.passes.ranks import Choice, choose
from graphopt.passes.sizes import amount, limit
from graphopt.program import Program


@dataclass(frozen=True)
class FactorLowRank(Pass):
    """Replace y = W x + b by y = U (V x) + b with a short axis between, where that is less work.

        before  linear (o=768 i=3072)                                   o i multiply-adds
        after   linear (r=192 i=3072) -> linear (o=768 r=192)           r (i + o), with r < o i / (o + i)

    Without calibration data U V is W's truncated singular value decomposition, which is nearest to W. With data it is
    nearest to W in what comes out for that data: U has the r leading principal components of the layer's outputs, V is
    U^T W, and the mean of what is lost goes into the bias, where there is one.

    One of three is given: a `budget`, which is met by choosing all ranks at once so that the least of the layers'
    energy is lost, each layer's as a share of its own; `keep`, the share of each layer's parameters; or `rank`. Ranks
    are multiples of `step`; layers that would not get smaller stay dense. The new axis can be shrunk like any other.

    Layers are the linear ones of feed-forward networks, those that read or write a hidden neuron axis; with `include`,
    all linear layers and convolutions whose names match one of the patterns, such as "blocks.*.attention.*". `exclude`
    takes some out, `dense_first` the first feed-forward network. A k x k convolution becomes k x k and 1 x 1 (`split`
    "channel") or k x 1 and 1 x k ("space", always without data).

    budget: what the whole program may cost, of FLOPs, multiply-adds, parameters or bytes; or
    keep: the share of each layer's parameters that stays; or
    rank: the same for all.
    step: ranks are multiples of it, which is what the target's kernels are made for.
    include, exclude, dense_first, split: which layers, and how, as above.
    calibration: data, as `graphopt.calibration` takes it; the weights alone decide where there is none.

    Source: Wei et al., "Building on Efficient Foundations", NeurIPS 2024, arXiv:2406.16450 (LowRank); with data: Chen
    et al., DRONE, NeurIPS 2021; Wang et al., SVD-LLM, arXiv:2403.07378; "space": Jaderberg et al., arXiv:1405.3866.
    Differs: ranks are chosen per layer, where the first source gives all the same; no inverse of a covariance is
    needed, so data that does not span the inputs is no special case.
    """

    name: ClassVar[str] = "factor-low-rank"
    lossless: ClassVar[bool] = False

    budget: Budget | None = None
    keep: float | None = None
    rank: int | None = None
    step: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dense_first: bool = False
    split: Literal["channel", "space"] = "channel"
    calibration: Any = None

    def apply(self, edit: Edit) -> None:
        if sum(value is not None for value in (self.budget, self.keep, self.rank)) != 1:
            raise BadOption(
                what=f"{self.name} takes one of budget, keep and rank",
                way_out="give --flops 0.5, or keep=0.5, or rank=64",
            )
        program = edit.program
        layers = self._layers(edit, program)
        covariances = self._covariances(program, layers)
        bases = {layer.name: _basis(edit, layer, covariances.get(layer.name)) for layer in layers}
        ranks = self._ranks(program, layers, {name: basis.energy for name, basis in bases.items()})
        for layer in layers:
            rank = ranks[layer.name]
            if rank is None:
                edit.decline(layer.node, f"{layer.name} stays dense ({layer.outs} x {layer.ins})")
                continue
            basis = bases[layer.name]
            replace_layer(edit, layer, *basis.factors(rank))
            edit.count(op_name(layer.node).removeprefix("aten.").partition(".")[0])

    def _layers(self, edit: Edit, program: Program) -> list[Layer]:
        wanted = self._ffn(infer(program)) if not self.include else None
        found: list[Layer] = []
        for node in edit.graph.nodes:
            if wanted is not None and node.name not in wanted:
                continue
            layer = layer_of(edit, node, self.split)
            if isinstance(layer, str):
                edit.decline(node, layer)
            if not isinstance(layer, Layer) or _matches(layer.name, self.exclude):
                continue
            if not self.include or _matches(layer.name, self.include):
                found.append(layer)
        if self.dense_first and found:
            first = found[0].name.rpartition(".")[0]
            found = [layer for layer in found if layer.name.rpartition(".")[0] != first]
        return found

    @staticmethod
    def _ffn(axes: Axes) -> set[str]:
        """The names of linear calls that read or write a free axis of hidden neurons."""
        found = set()
        for node in axes.program.graph.nodes:
            if node.op == "call_function" and op_name(node) == LINEAR:
                own = [atom for axis in axes.dims[node.args[1]] for atom in atoms(axis)]
                if any(axes.role(atom) == "neuron" and atom.pinned is None for atom in own):
                    found.add(node.name)
        return found

    def _covariances(self, program: Program, layers: Sequence[Layer]) -> dict[str, tuple[Tensor, Tensor]]:
        """For each layer the second moments (ins, ins) and the mean (ins,) of what it reads on the data."""
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
        most = {layer.name: _most(layer, self.step) for layer in layers}
        if self.budget is None:
            ranks: dict[str, int | None] = {}
            for layer in layers:
                wanted = self.rank or int((self.keep or 0) * layer.params / (layer.ins + layer.outs))
                wanted = max(self.step, wanted // self.step * self.step)
                ranks[layer.name] = wanted if wanted <= most[layer.name] else None
            return ranks
        kind = self.budget.kind
        allowed = limit(program, self.budget)
        rest = amount(program, kind) - sum(_size(layer, None, kind) for layer in layers)
        choices = []
        for layer in layers:
            options: list[int | None] = [*range(self.step, most[layer.name] + 1, self.step), None]
            lost = _lost(energies[layer.name], options)
            choices.append(Choice(options, lost, [_size(layer, rank, kind) for rank in options]))
        chosen = choose(choices, allowed - rest, self.budget, program.name, rest)
        return dict(zip((layer.name for layer in layers), chosen, strict=True))


@dataclass(frozen=True)
class _Basis:
    """What a layer's factors of every rank are made of; `energy` (k,) are squared singular values, falling."""

    left: Tensor
    right: Tensor
    energy: Tensor
    lost_mean: Tensor | None

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """V (rank, ins), U (outs, rank) and what is added to the bias, (outs,)."""
        u, v = self.left[:, :rank], self.right[:rank]
        if self.lost_mean is None:
            return v, u, None
        return v, u, self.lost_mean - u @ (u.T @ self.lost_mean)


def _basis(edit: Edit, layer: Layer, seen: tuple[Tensor, Tensor] | None) -> _Basis:
    weight = edit.tensor(layer.node.args[1])
    assert weight is not None
    matrix = matrix_of(layer, weight)
    if seen is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        root = s.sqrt()
        return _Basis(u * root, root[:, None] * vh, s.square(), None)
    moments, mean = seen
    bias = edit.tensor(bias_of(layer.node))
    centred = moments - torch.outer(mean, mean) if bias is not None else moments
    values, vectors = torch.linalg.eigh(matrix @ centred @ matrix.T)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    return _Basis(vectors, vectors.T @ matrix, values, matrix @ mean if bias is not None else None)


def _most(layer: Layer, step: int) -> int:
    """The highest rank, a multiple of `step`, that is less work and fewer parameters than the dense layer."""
    by_params = (layer.params - 1) // (layer.ins + layer.outs)
    by_macs = (layer.macs - 1) // layer.macs_of(1)
    return min(by_params, by_macs) // step * step


def _size(layer: Layer, rank: int | None, kind: str) -> float:
    if kind in ("params", "bytes"):
        elements = layer.params if rank is None else layer.params_of(rank)
        weight = layer.node.args[1]
        assert isinstance(weight, Node)
        return elements * (weight.meta["val"].element_size() if kind == "bytes" else 1)
    macs = layer.macs if rank is None else layer.macs_of(rank)
    return macs * (2 if kind == "flops" else 1)


def _lost(energy: Tensor, ranks: Sequence[int | None]) -> list[float]:
    """The share of a layer's energy that is lost at each rank."""
    total = float(energy.sum()) or 1.0
    beyond = energy.flip(0).cumsum(0).flip(0).tolist()
    return [0.0 if rank is None or rank >= len(beyond) else beyond[rank] / total for rank in ranks]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
