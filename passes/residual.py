"""Residual branches of a graph: where something computed from x is added to x."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch.fx import Node

from graphopt.errors import Decline
from graphopt.exported import op_name
from graphopt.place import module_path, place
from graphopt.program import Program

_SUMS = {"aten.add.Tensor", "aten.sub.Tensor", "aten.add_.Tensor"}
# What may stand between x and the sum: x times something stored, or x under another name.
_SCALES = {"mul", "div"}
_SAME = {"dropout", "clone", "contiguous", "view", "reshape", "_unsafe_view", "alias", "detach", "to", "_to_copy"}
_LAYERS = {"linear", "matmul", "mm", "bmm", "addmm", "einsum", "conv1d", "conv2d", "conv3d", "convolution",
           "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}  # fmt: skip
_FAR = 12


@dataclass(frozen=True)
class Branch:
    """`total` = `shortcut` + `branch`, where `branch` is computed from `source`, and `shortcut` is that or a multiple.

    `layers` are the matrix products and convolutions with stored weights on the way from `source` to `branch`. `name`
    is what their modules' paths have in common, such as `blocks.0.attention`.
    """

    total: Node
    shortcut: Node
    branch: Node
    source: Node
    layers: tuple[Node, ...]
    name: str

    @property
    def unit(self) -> str:
        """The path of the layer of the model that has the sum, to its last number: `encoder.layer.0`."""
        found = re.match(r"(.*\.)?\d+(?=\.|$)", module_path(self.total)) or re.match(r"(.*\.)?\d+(?=\.|$)", self.name)
        return found[0] if found else self.name


def branches(program: Program) -> tuple[list[Branch], list[Decline]]:
    """All residual branches in order, nested ones too; and the sums of two computed things that are none."""
    finder = _Finder(program)
    found, declined = [], []
    for node in finder.nodes:
        branch = finder.at(node)
        if isinstance(branch, Branch):
            found.append(branch)
        elif branch is not None:
            declined.append(Decline(place(node), branch))
    return found, declined


class _Finder:
    def __init__(self, program: Program) -> None:
        self.nodes = list(program.graph.nodes)
        self.stored = frozenset(program.tensors)
        self.number = {node: n for n, node in enumerate(self.nodes)}

    @cached_property
    def above(self) -> list[int]:
        """For each node a bit set of what it is computed from, itself included."""
        found: list[int] = []
        for n, node in enumerate(self.nodes):
            bits = 1 << n
            for source in node.all_input_nodes:
                bits |= found[self.number[source]]
            found.append(bits)
        return found

    def is_above(self, node: Node, other: Node) -> bool:
        return node is not other and bool(self.above[self.number[other]] >> self.number[node] & 1)

    def at(self, node: Node) -> Branch | str | None:
        if node.op != "call_function" or op_name(node) not in _SUMS or len(node.all_input_nodes) != 2:
            return None
        left, right = node.args[:2]
        assert isinstance(left, Node)
        assert isinstance(right, Node)
        pairs = [(left, right)] if "sub" in op_name(node) else [(left, right), (right, left)]
        for shortcut, branch in pairs:
            value, whole = shortcut.meta["val"], node.meta["val"]
            if value.shape != whole.shape or value.dtype != whole.dtype or branch.op != "call_function":
                continue
            source = next((s for s in self.stream(shortcut) if self.is_above(s, branch)), None)
            if source is None or self.is_above(branch, shortcut):
                continue
            layers = self.layers(source, branch, node)
            if layers:
                return Branch(node, shortcut, branch, source, layers, _common(layers))
        ends = [self.layers(None, operand, node) for operand in (left, right) if operand.op == "call_function"]
        shared = self.above[self.number[left]] & self.above[self.number[right]]
        if (
            len(ends) == 2
            and all(ends)
            and any(shared >> self.number[i] & 1 for i in self.nodes if i.op != "placeholder")
        ):
            return "both sides of the sum have layers of their own: no shortcut is left without one"
        return None

    def stream(self, node: Node) -> Iterable[Node]:
        """The node, and what it is a multiple or a sum of, the nearest first."""
        todo, seen = [node], {node}
        while todo and len(seen) < _FAR:
            node = todo.pop(0)
            yield node
            if node.op != "call_function":
                continue
            name = op_name(node).removeprefix("aten.").partition(".")[0]
            computed = [source for source in node.all_input_nodes if not self.is_stored(source)]
            if name in _SAME or op_name(node) in _SUMS or (name in _SCALES and len(computed) == 1):
                todo += [source for source in computed if source not in seen]
                seen.update(computed)

    def is_stored(self, node: Node) -> bool:
        """Whether a node stands for a tensor that belongs to the program."""
        return node.name in self.stored

    def layers(self, source: Node | None, branch: Node, total: Node) -> tuple[Node, ...]:
        """The layers that go when `branch` is no longer added, in order: those on the way from `source` to it."""
        going = dying(branch, total)
        return tuple(
            node
            for node in sorted(going, key=self.number.__getitem__)
            if op_name(node).removeprefix("aten.").partition(".")[0] in _LAYERS
            and (source is None or self.is_above(source, node))
            and any(self.is_stored(each) for each in self.inputs(node))
        )

    def inputs(self, node: Node) -> list[Node]:
        """Inputs of a call; of what only views a tensor, that tensor."""
        found = []
        for source in node.all_input_nodes:
            while source.op == "call_function" and len(source.all_input_nodes) == 1:
                source = source.all_input_nodes[0]
            found.append(source)
        return found


def dying(branch: Node, total: Node) -> set[Node]:
    """The calls that nothing reads any more when `total` does not read `branch`."""
    if set(branch.users) != {total}:
        return set()
    gone, todo = {branch}, [branch]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in gone and source.op == "call_function" and all(user in gone for user in source.users):
                gone.add(source)
                todo.append(source)
    return gone


def _common(layers: Sequence[Node]) -> str:
    """The beginning that the paths of the layers' modules have in common."""
    paths = [module_path(node).split(".") for node in layers]
    first, last = min(paths), max(paths)
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return ".".join(first[:same]) or place(layers[-1])
