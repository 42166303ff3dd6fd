"""What axis inference finds: the axes of every dimension, where each occurs, what it is, and why it must not shrink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from graphopt.axes import axis as ax
from graphopt.axes.axis import Axis
from graphopt.errors import Decline
from graphopt.exported import op_name
from graphopt.place import place
from graphopt.program import Program

# From the most telling to the least: an axis that is a head to one operator and a neuron to another is a head.
ROLES = ("expert", "head", "query_group", "head_dim", "channel", "embedding", "neuron", "token")
LETTERS = {
    "expert": "x", "head": "h", "query_group": "g", "head_dim": "d", "channel": "c", "embedding": "e", "neuron": "n",
    "token": "t",
}  # fmt: skip


@dataclass(frozen=True)
class Occurrence:
    """Where an atom is part of a dimension: `node`'s result (the `result`th, where it has several), dimension `dim`."""

    node: Node
    result: int
    dim: int


@dataclass(frozen=True, eq=False)
class Axes:
    """The axes of a program.

    `dims[node]` are the axes of a node's dimensions; a list of such lists where it has several results. `unknown` lists
    the calls that no rule covers, whose axes are pinned. `literals` and `targets` are what `shrink` rewrites. `sums`
    has the calls that sum, of products or not, with the tensors and dimensions that they sum over. `statistics` has
    the atoms that operators take statistics over, and where; `multiples` those of which only multiples may stay.
    """

    program: Program
    dims: Mapping[Node, Any]
    unknown: tuple[Decline, ...]
    literals: Mapping[Node, Mapping[str, Any]]
    targets: Mapping[Node, Any]
    sums: Mapping[Node, tuple[tuple[Node, int], ...]]
    roles: Mapping[Axis, str]
    statistics: Mapping[Axis, tuple[str, ...]]
    multiples: Mapping[Axis, int]

    @cached_property
    def occurrences(self) -> dict[Axis, list[Occurrence]]:
        """Every atom, in order of first occurrence, and where it occurs."""
        found: dict[Axis, list[Occurrence]] = {}
        for node, dims in self.dims.items():
            for result, own in enumerate(results_of(dims)):
                for dim, axis in enumerate(own):
                    for atom in dict.fromkeys(ax.atoms(axis)):
                        found.setdefault(atom, []).append(Occurrence(node, result, dim))
        return found

    @cached_property
    def atoms(self) -> tuple[Axis, ...]:
        """All atoms of an extent above 1, in order of first occurrence."""
        return tuple(atom for atom in self.occurrences if atom.extent > 1)

    def free(self, *roles: str) -> tuple[Axis, ...]:
        """The atoms that may be shrunk and that occur in a stored tensor; of these roles, if any are given."""
        return tuple(
            atom
            for atom in self.atoms
            if atom.pinned is None
            and (not roles or self.role(atom) in roles)
            and any(self.is_stored(o.node) for o in self.occurrences[atom])
        )

    def role(self, axis: Axis) -> str:
        """What an atom is: one of ROLES, or "" where no operator says."""
        return self.roles.get(ax.find(axis), "")

    def multiple(self, axis: Axis) -> int:
        """What the extent of an atom must stay a multiple of, for the operators that see it to take it."""
        return self.multiples.get(ax.find(axis), 1)

    def is_stored(self, node: Node) -> bool:
        """Whether a node stands for a tensor that belongs to the program."""
        return node.name in self._stored

    @cached_property
    def contracted(self) -> frozenset[tuple[Node, int]]:
        """The tensors and dimensions that some call sums over; of a view of a stored tensor, those of the tensor."""
        found = {operand for operands in self.sums.values() for operand in operands}
        for node, dim in list(found):
            source = self.source(node)
            if source is not node:
                axis = ax.find(results_of(self.dims[node])[0][dim])
                found |= {(source, n) for n, own in enumerate(self.dims[source]) if ax.find(own) is axis}
        return frozenset(found)

    @staticmethod
    def source(node: Node) -> Node:
        """What `node` is a view of, or a copy in another dtype; itself where it is neither."""
        while node.op == "call_function" and operator_of(node) in _VIEWS and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return node

    @cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset(self.program.tensors)

    def stored_in(self, axis: Axis) -> list[tuple[str, int, bool]]:
        """The stored tensors with an atom: placeholder name, dimension, and whether that dimension is summed over."""
        return [
            (o.node.name, o.dim, (o.node, o.dim) in self.contracted)
            for o in self.occurrences.get(ax.find(axis), [])
            if self.is_stored(o.node)
        ]

    def where(self, axis: Axis) -> str:
        """The first stored tensor that has an atom, in the user's names, such as `layer1.0.conv1.weight[0]`."""
        own = self.stored_in(axis)
        produced = [item for item in own if not item[2]] or own
        if not produced:
            occurrences = self.occurrences.get(ax.find(axis), [])
            return place(occurrences[0].node) if occurrences else ax.show(axis)
        name, dim, _ = produced[0]
        return f"{self.tensor_name(name)}[{dim}]"

    def explain(self, axis: Axis) -> list[str]:
        """What is known about an atom, a line each: what it is, why it is pinned, statistics over it, where it is."""
        axis = ax.find(axis)
        kind = f"{self.role(axis) or 'axis'} of {axis.extent}"
        lines = [f"{axis.label or 'unnamed'}: {kind}, {'free' if axis.pinned is None else f'pinned: {axis.pinned}'}"]
        lines += [f"  statistics are taken over it in {where}" for where in self.statistics.get(axis, ())]
        for name, dim, summed in self.stored_in(axis):
            lines.append(f"  {self.tensor_name(name)}[{dim}]{', summed over' if summed else ''}")
        return lines

    def name_of(self, node: Node) -> str:
        """A node in the user's names: its tensor's, else its own."""
        return self.tensor_name(node.name)

    def tensor_name(self, placeholder: str) -> str:
        """What the user calls the tensor behind a placeholder, such as `layer1.0.conv1.weight`."""
        return self._names.get(placeholder) or placeholder

    @staticmethod
    def is_elementwise(node: Node) -> bool:
        """Whether a call works on each element alone, or only moves elements."""
        return operator_of(node) in _VIEWS or is_pointwise(node)

    @cached_property
    def _names(self) -> dict[str, str | None]:
        return {s.arg.name: s.target for s in self.program.exported.graph_signature.input_specs}

    def __getitem__(self, label: str) -> Axis:
        """The atom with a label such as "c3". Raises KeyError."""
        return self._labels[label]

    @cached_property
    def _labels(self) -> dict[str, Axis]:
        return {atom.label: atom for atom in self.atoms}

    def __str__(self) -> str:
        return "\n".join(self.listing())

    def listing(self) -> list[str]:
        """One line per node: its name, operator and the axes of its result."""
        return [f"{name:32} {kind:28} {shown}" for name, kind, shown in self.rows()]

    def rows(self) -> list[tuple[str, str, str]]:
        """Of each node its name, its operator or the tensor it stands for, and the axes of its result."""
        rows = []
        for node, dims in self.dims.items():
            shown = ["[" + ", ".join(map(ax.show, own)) + "]" for own in results_of(dims)]
            kind = op_name(node) if node.op == "call_function" else str(self._names.get(node.name) or "input")
            rows.append((node.name, kind, " ".join(shown)))
        return rows


def results_of(dims: Any) -> list[list[Axis]]:
    """The dimensions of each result of a node, from what `Axes.dims` has for it."""
    return dims if dims and isinstance(dims[0], list) else [dims]


def operator_of(node: Node) -> str:
    """The operator's name without overload: "conv2d"; of one that is not PyTorch's own, all of it: "mine.conv2d"."""
    name = op_name(node).rpartition("::")[2]
    own = name.removeprefix("aten.")
    return own.partition(".")[0] if own != name else name


_VIEWS = frozenset({"transpose", "permute", "t", "numpy_T", "mT", "view", "reshape", "_unsafe_view", "unsqueeze",
                    "squeeze", "flatten", "unflatten", "to", "_to_copy", "contiguous", "clone", "alias", "detach",
                    "expand", "type_as"})  # fmt: skip


def is_pointwise(node: Node) -> bool:
    """Whether each element of the result depends on the elements at the same place only."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or operator_of(node) in POINTWISE


# Pointwise, though PyTorch does not tag them so: dtypes, copies, other names, and what it writes as compositions.
_NAMES = """
    clone contiguous to _to_copy type_as copy detach alias lift lift_fresh lift_fresh_copy conj _conj resolve_conj
    resolve_neg real imag complex polar positive
    absolute negative add multiply divide true_divide floor_divide subtract rsub fix clip special_expit arccos
    arcsin arctan arctan2 arccosh arcsinh arctanh special_erf special_erfc special_exp2 special_expm1 special_log1p
    special_round special_sinc special_xlogy special_digamma special_gammaln special_logit float_power square
    greater greater_equal less less_equal not_equal isclose isreal __and__ __or__ __xor__ __lshift__ __rshift__
    hardtanh hardswish hardsigmoid leaky_relu rrelu softplus threshold relu6 selu celu elu silu mish gelu logit
    log_sigmoid log_sigmoid_forward softshrink hardshrink nan_to_num
    dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout bernoulli
    masked_fill where fill clamp clamp_min clamp_max maximum minimum addcmul addcdiv lerp
"""
POINTWISE = frozenset(_NAMES.split())
