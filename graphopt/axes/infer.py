"""Axis inference: every dimension of every tensor of a program as an expression of axes.

    linear      [b, n=65, (qkv=3 h=4 d=16)]
    reshape     [b, n=65, qkv=3, h=4, d=16]
    cat         [b, (cls=1 + p=64), c=64]

Near-linear in the size of the program: operators are visited once, in order, and dimensions that agree are united.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from graphopt.axes import axis as ax
from graphopt.axes import rules_math, rules_recurrent, rules_select, rules_shape  # noqa: F401 (they register rules)
from graphopt.axes.axes import LETTERS, ROLES, Axes, is_pointwise, operator_of, results_of
from graphopt.axes.axis import Axis
from graphopt.axes.call import RULES, Call, GaveUp
from graphopt.axes.table import SIGNATURES
from graphopt.errors import Decline
from graphopt.exported import STORED, op_name
from graphopt.place import place
from graphopt.program import Program

_NO_TENSOR = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size")


def infer(program: Program) -> Axes:
    """Find the axes of a program.

    Folding constants and removing no-ops first lets it see more (`prepare`). Operators without a rule pin their axes
    and are listed in `unknown`: never a wrong answer.
    """
    return Inference(program).run()


class Inference:
    """The state of one inference; rules act on it through `Call`."""

    tolerated: frozenset[str] = frozenset()  # reasons for which nothing is pinned

    def __init__(self, program: Program) -> None:
        self.program = program
        self.dims: dict[Node, Any] = {}
        self.literals: dict[Node, dict[str, Any]] = {}
        self.targets: dict[Node, Any] = {}
        self.notes: list[tuple[Axis, str, Node]] = []
        self.multiples: list[tuple[Axis, int, Node]] = []
        self.sums: dict[Node, list[tuple[Node, int]]] = {}
        self.unknown: list[Decline] = []
        self.constants = _constants(program)
        self._where: dict[Node, str] = {}

    def where(self, node: Node) -> str:
        """A node's place in the user's names."""
        if node not in self._where:
            self._where[node] = place(node)
        return self._where[node]

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
        multiples = self.resolve_multiples()
        self.label(roles)
        return Axes(
            program=self.program,
            dims=self.dims,
            unknown=tuple(self.unknown),
            literals=self.literals,
            targets=self.targets,
            sums={node: tuple(operands) for node, operands in self.sums.items()},
            roles=roles,
            statistics=statistics,
            multiples=multiples,
        )

    def visit(self, node: Node) -> None:
        if node.target is operator.getitem:
            source, item = node.args
            self.dims[node] = results_of(self.dims[source])[item]  # type: ignore[index]
            return
        name = operator_of(node)
        if name in _NO_TENSOR:
            return
        call = Call(node, self)
        try:
            if name in RULES:
                dims = RULES[name](call)
            elif name in SIGNATURES:
                dims = call.apply(SIGNATURES[name])
            elif is_pointwise(node):
                dims = pointwise(call)
            else:
                raise GaveUp("no rule for this operator")
            self.check(node, dims)
        except GaveUp as reason:
            dims = self.give_up(node, call, str(reason))
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            # An argument of a kind that the rule does not expect. What it stated so far is true of any call.
            dims = self.give_up(node, call, f"its rule failed, {type(error).__name__}: {error}")
        self.dims[node] = dims

    def give_up(self, node: Node, call: Call, reason: str) -> Any:
        """Pin everything around a call that no rule covers, and say so."""
        self.unknown.append(Decline(place(node), f"{op_name(node)}: {reason}; its axes are pinned"))
        self.literals.pop(node, None)
        self.targets.pop(node, None)
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
            if node.op != "call_function" or operator_of(node) not in _SOFTMAX or node not in self.dims:
                continue
            scores = results_of(self.dims[node])[0]
            before = _through(node, lambda n: [i for i in n.all_input_nodes if i.op == "call_function"])
            after = _through(node, lambda n: list(n.users))
            if before is None or after is None or len(scores) < 3:
                continue
            query, value = before.all_input_nodes[-2], after.all_input_nodes[-1]
            key = results_of(self.dims[before.all_input_nodes[-1]])[0]
            shared = {atom for axis in key for atom in ax.atoms(axis)}
            if len(scores) > 4 and not shared & set(ax.atoms(scores[-3])):  # queries that share a head of keys
                self.notes += [(scores[-4], "head", node), (scores[-3], "query_group", node)]
            else:
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
            if spec.kind in _MUTATIONS and spec.target in targets:
                for a, b in zip(dims, self.dims[targets[spec.target]], strict=True):
                    ax.unify(a, b)
            else:
                for axis in dims:
                    ax.pin(axis, "program output")

    def label(self, roles: Mapping[Axis, str]) -> None:
        """Name the atoms in order of first occurrence by their roles: c0, c1, h0, ..."""
        counts: Counter[str] = Counter()
        done: set[Axis] = set()
        for dims in self.dims.values():
            todo = [axis for own in reversed(results_of(dims)) for axis in reversed(own)]
            while todo:
                axis = ax.find(todo.pop())
                if axis in done:
                    continue
                done.add(axis)
                todo += axis.parts[::-1]
                if axis.kind is None and axis.extent != 1:
                    letter = LETTERS.get(roles.get(axis, ""), "a")
                    axis.label = f"{letter}{counts[letter]}"
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

    def resolve_multiples(self) -> dict[Axis, int]:
        """What the extents of atoms must stay multiples of; a product is one where its last factor is."""
        found: dict[Axis, int] = {}
        for axis, count, node in self.multiples:
            todo = [axis]
            while todo:
                root = ax.find(todo.pop())
                if root.extent % count:
                    ax.pin(root, f"{op_name(node)} takes multiples of {count} ({self.where(node)})")
                elif root.kind is None:
                    found[root] = math.lcm(found.get(root, 1), count)
                else:
                    todo += ax.parts(root, root.kind)[0 if root.kind == "sum" else -1 :]
        return found


def _constants(program: Program) -> dict[Node, Tensor]:
    """The stored tensors that no run of the program changes, by placeholder."""
    outputs = program.exported.graph_signature.output_specs
    mutated = {spec.target for spec in outputs if spec.kind in _MUTATIONS}
    names = {spec.arg.name: spec.target for spec in program.exported.graph_signature.input_specs}
    tensors = program.tensors
    return {
        node: tensors[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in tensors and names[node.name] not in mutated
    }


def _through(node: Node, step: Callable[[Node], list[Node]]) -> Node | None:
    """The next matrix product of two computed tensors, up or down the graph, with only pointwise work between."""
    for _ in range(_FAR):
        following = step(node)
        if len(following) != 1 or following[0].op != "call_function":
            return None
        node = following[0]
        if operator_of(node) in _PRODUCTS:
            return node if len(node.all_input_nodes) >= 2 else None
        if not (is_pointwise(node) or operator_of(node) in _VIEWS):
            return None
    return None


_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
_FAR = 12
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "permute", "transpose"})


def pointwise(call: Call) -> Any:
    """All tensors are broadcast against each other."""
    dims = call.broadcast([call.dims(tensor) for tensor in call.tensors], call.shape)
    if not isinstance(call.node.meta["val"], (list, tuple)):
        return dims
    same = [shape == call.shape for shape in call.shapes]
    return [
        list(dims) if ok else call.fresh(shape, pin="a buffer") for ok, shape in zip(same, call.shapes, strict=True)
    ]
