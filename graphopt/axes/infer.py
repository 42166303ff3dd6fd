"""Axis inference: every dimension of every tensor of a program as an expression of axes.

    linear      [b, n=65, (qkv=3 h=4 d=16)]
    reshape     [b, n=65, qkv=3, h=4, d=16]
    cat         [b, (cls=1 + p=64), c=64]

Near-linear in the size of the program: operators are visited once, in order, and dimensions that agree are united.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from graphopt.axes import axis as ax
from graphopt.axes import rules_math, rules_select, rules_shape  # noqa: F401 (they register their rules)
from graphopt.axes.axis import Axis
from graphopt.axes.call import RULES, Call, GaveUp
from graphopt.axes.table import SIGNATURES
from graphopt.errors import Decline
from graphopt.exported import STORED, op_name
from graphopt.place import place
from graphopt.program import Program

# From the most telling to the least: an axis that is a head to one operator and a neuron to another is a head.
ROLES = ("expert", "head", "query_group", "head_dim", "channel", "embedding", "neuron", "token")
_LETTERS = {
    "expert": "x", "head": "h", "query_group": "g", "head_dim": "d", "channel": "c", "embedding": "e", "neuron": "n",
    "token": "t",
}  # fmt: skip
_NO_TENSOR = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size")


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
    the calls that no rule covers, whose axes are pinned. `literals` and `targets` are what `shrink` rewrites.
    """

    program: Program
    dims: Mapping[Node, Any]
    unknown: tuple[Decline, ...]
    literals: Mapping[Node, Mapping[str, Any]]
    targets: Mapping[Node, Any]
    contracted: frozenset[tuple[Node, int]]
    roles: Mapping[Axis, str]
    statistics: Mapping[Axis, tuple[str, ...]]
    _places: dict[Axis, tuple[str, int]] = field(default_factory=dict)

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

    def is_stored(self, node: Node) -> bool:
        """Whether a node stands for a tensor that belongs to the program."""
        return node.name in self._stored

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
        names = {s.arg.name: s.target for s in self.program.exported.graph_signature.input_specs}
        own = self.stored_in(axis)
        produced = [item for item in own if not item[2]] or own
        if not produced:
            occurrences = self.occurrences.get(ax.find(axis), [])
            return place(occurrences[0].node) if occurrences else ax.show(axis)
        name, dim, _ = produced[0]
        return f"{names.get(name) or name}[{dim}]"

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
        lines = []
        targets = {s.arg.name: s.target for s in self.program.exported.graph_signature.input_specs}
        for node, dims in self.dims.items():
            shown = ["[" + ", ".join(map(ax.show, own)) + "]" for own in results_of(dims)]
            kind = op_name(node) if node.op == "call_function" else str(targets.get(node.name) or "input")
            lines.append(f"{node.name:32} {kind:28} {' '.join(shown)}")
        return lines


def results_of(dims: Any) -> list[list[Axis]]:
    """The dimensions of each result of a node, from what `Axes.dims` has for it."""
    return dims if dims and isinstance(dims[0], list) else [dims]


def infer(program: Program) -> Axes:
    """Find the axes of a program.

    Folding constants and removing no-ops first lets it see more (`prepare`). Operators without a rule pin their axes
    and are listed in `unknown`: never a wrong answer.
    """
    return Inference(program).run()


class Inference:
    """The state of one inference; rules act on it through `Call`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.dims: dict[Node, Any] = {}
        self.literals: dict[Node, dict[str, Any]] = {}
        self.targets: dict[Node, Any] = {}
        self.notes: list[tuple[Axis, str, Node]] = []
        self.contracted: set[tuple[Node, int]] = set()
        self.unknown: list[Decline] = []

    def where(self, node: Node) -> str:
        """A node's place in the user's names."""
        return place(node)

    def run(self) -> Axes:
        """Visit every node, then pin what the program takes and gives."""
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                value = node.meta.get("val")
                self.dims[node] = [Axis(size) for size in value.shape] if isinstance(value, Tensor) else []
            elif node.op == "call_function":
                self.visit(node)
        self.tie_shared_tensors()
        self.pin_ends()
        self.note_attention()
        roles, statistics = self.resolve_notes()
        self.label(roles)
        return Axes(
            program=self.program,
            dims=self.dims,
            unknown=tuple(self.unknown),
            literals=self.literals,
            targets=self.targets,
            contracted=frozenset(self.contracted),
            roles=roles,
            statistics=statistics,
        )

    def visit(self, node: Node) -> None:
        if node.target is operator.getitem:
            source, item = node.args
            self.dims[node] = results_of(self.dims[source])[item]  # type: ignore[index]
            return
        name = _name(node)
        if name in _NO_TENSOR:
            return
        call = Call(node, self)
        try:
            if name in RULES:
                dims = RULES[name](call)
            elif name in SIGNATURES:
                dims = call.apply(SIGNATURES[name])
            elif is_pointwise(node):
                dims = call.broadcast([call.dims(tensor) for tensor in call.tensors], call.shape)
            else:
                raise GaveUp("no rule for this operator")
        except GaveUp as reason:
            dims = self.give_up(node, call, str(reason))
        self.dims[node] = dims
        self.check(node, dims)

    def give_up(self, node: Node, call: Call, reason: str) -> Any:
        """Pin everything around a call that no rule covers, and say so."""
        self.unknown.append(Decline(place(node), f"{op_name(node)}: {reason}; its axes are pinned"))
        self.literals.pop(node, None)
        for source in node.all_input_nodes:
            for own in results_of(self.dims.get(source) or []):
                for axis in own:
                    call.pin(axis, f"{op_name(node)} has no rule")
        why = f"{op_name(node)} has no rule"
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return call.fresh(pin=why)
        if isinstance(value, (list, tuple)):
            return [call.fresh(shape, pin=why) for shape in call.shapes]
        return []

    def check(self, node: Node, dims: Any) -> None:
        value = node.meta.get("val")
        values = value if isinstance(value, (list, tuple)) else [value]
        for tensor, own in zip(values, results_of(dims), strict=False):
            if isinstance(tensor, Tensor):
                got = [axis.extent for axis in own]
                assert got == list(tensor.shape), f"rule of {node.target}: axes {got} for shape {tuple(tensor.shape)}"

    def tie_shared_tensors(self) -> None:
        """Two names of one stored tensor have the same axes (tied embeddings)."""
        seen: dict[Any, Node] = {}
        nodes = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        for name, tensor in self.program.tensors.items():
            key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if tensor.numel() and (first := seen.setdefault(key, nodes[name])) is not nodes[name]:
                for a, b in zip(self.dims[first], self.dims[nodes[name]], strict=True):
                    ax.unify(a, b)

    def note_attention(self) -> None:
        """Where attention is written out, matmul - softmax - matmul, say what its axes are."""
        for node in self.program.graph.nodes:
            if node.op != "call_function" or _name(node) not in _SOFTMAX or node not in self.dims:
                continue
            scores = results_of(self.dims[node])[0]
            before = _through(node, lambda n: n.all_input_nodes[:1])
            after = _through(node, lambda n: list(n.users))
            if before is None or after is None or len(scores) < 3:
                continue
            query, value = before.all_input_nodes[-2], after.all_input_nodes[-1]
            self.notes.append((scores[-3], "head", node))
            self.notes += [(axis, "token", node) for axis in scores[-2:]]
            for tensor in (query, value):
                own = results_of(self.dims[tensor])[0]
                if own and not any(own[-1] is axis for axis in scores):
                    self.notes.append((own[-1], "head_dim", node))

    def pin_ends(self) -> None:
        signature = self.program.exported.graph_signature
        placeholders = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        targets = {spec.target: placeholders[spec.arg.name] for spec in signature.input_specs if spec.target}
        for spec in signature.input_specs:
            if spec.kind is InputKind.USER_INPUT and spec.arg.name in placeholders:
                for axis in self.dims[placeholders[spec.arg.name]]:
                    ax.pin(axis, "program input")
            elif spec.kind not in STORED and spec.arg.name in placeholders:
                for axis in self.dims[placeholders[spec.arg.name]]:
                    ax.pin(axis, "not a tensor of the program")
        results = self.program.graph.output_node().args[0]
        assert isinstance(results, (list, tuple))
        for spec, result in zip(signature.output_specs, results, strict=True):
            if not isinstance(result, Node):
                continue
            dims = results_of(self.dims.get(result) or [])[0]
            if spec.kind is OutputKind.BUFFER_MUTATION and spec.target in targets:
                for a, b in zip(dims, self.dims[targets[spec.target]], strict=True):
                    ax.unify(a, b)
            else:
                for axis in dims:
                    ax.pin(axis, "program output")

    def label(self, roles: Mapping[Axis, str]) -> None:
        """Name the atoms in order of first occurrence by their roles: c0, c1, h0, ..."""
        counts: Counter[str] = Counter()
        for dims in self.dims.values():
            for own in results_of(dims):
                for axis in own:
                    for atom in ax.atoms(axis):
                        if not atom.label and atom.extent != 1:
                            letter = _LETTERS.get(roles.get(atom, ""), "a")
                            atom.label = f"{letter}{counts[letter]}"
                            counts[letter] += 1

    def resolve_notes(self) -> tuple[dict[Axis, str], dict[Axis, tuple[str, ...]]]:
        noted: dict[Axis, Counter[str]] = {}
        statistics: dict[Axis, dict[str, None]] = {}
        for axis, note, node in self.notes:
            for atom in ax.atoms(axis):
                if note == "statistics":
                    statistics.setdefault(atom, {})[place(node)] = None
                else:
                    noted.setdefault(atom, Counter())[note] += 1
        roles = {}
        for atom, counts in noted.items():
            if counts["channel"] == 1 and counts["embedding"]:
                del counts["channel"]  # the patches of a vision transformer come from its only convolution
            if counts.pop("copies", 0) and counts["head"]:
                counts["query_group"] = counts.pop("head")  # copies of a head of keys, one for each query
            counts += Counter()
            if not counts:
                continue
            roles[atom] = min(counts, key=ROLES.index)
        return roles, {atom: tuple(where) for atom, where in statistics.items()}


def _name(node: Node) -> str:
    return op_name(node).rpartition("::")[2].removeprefix("aten.").partition(".")[0]


def _through(node: Node, step: Callable[[Node], list[Node]]) -> Node | None:
    """The next matrix product of two computed tensors, up or down the graph, with only pointwise work between."""
    for _ in range(_FAR):
        following = step(node)
        if len(following) != 1 or following[0].op != "call_function":
            return None
        node = following[0]
        if _name(node) in _PRODUCTS:
            return node if len(node.all_input_nodes) >= 2 else None
        if not (is_pointwise(node) or _name(node) in _VIEWS):
            return None
    return None


_FAR = 12
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "permute", "transpose"})


def is_pointwise(node: Node) -> bool:
    """Whether each element of the result depends on the elements at the same place only."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or _name(node) in _POINTWISE


# Pointwise, though PyTorch does not tag them so.
_POINTWISE = frozenset({
    "clone", "contiguous", "to", "_to_copy", "type_as", "dropout", "alpha_dropout", "feature_dropout", "detach",
    "alias", "lift_fresh", "lift_fresh_copy", "hardtanh", "prelu", "masked_fill", "where", "float_power", "copy",
    "hardswish", "leaky_relu", "rrelu", "softplus", "threshold", "fill", "clamp_min", "clamp_max", "isclose",
    "maximum", "minimum", "square", "relu6", "selu", "celu", "silu", "mish", "gelu", "logit", "isin", "nan_to_num",
    "bernoulli", "rsub", "addcmul", "addcdiv", "lerp", "_conj", "real", "view_of",
})  # fmt: skip
