"""Which token each token becomes a part of, place by place: marked by passes, and given by programs on request.

Marks are metadata of the nodes that choose tokens; they go into .pt2 files and through later passes. `traced` makes
outputs of them: `tokens_0`, `tokens_1`, ... of (b, n) int64, place by place: for each of the n tokens that could go
there, the number of the token that it is a part of behind the place, -1 where it was dropped.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.cut import Kept
from graphopt.edit import Edit
from graphopt.exported import output_names
from graphopt.inline import inline
from graphopt.program import Program
from graphopt.region import ancestors, descendants

MARK = "graphopt.tokens"
_OUTPUT = re.compile(r"tokens_(\d+)")
_READ = ("index", "sources", "slots", "matrix", "spread")


def mark(edit: Edit, kept: Kept, size: int) -> None:
    """Note on the nodes of `kept` that they choose among `size` tokens, behind all places that are marked so far."""
    place = _next(edit)
    for field in _READ:
        node = getattr(kept, field)
        if isinstance(node, Node):
            # A file keeps no metadata of the calls that take one result of several, so the call before has the mark.
            item = node.args[1] if node.target is operator.getitem else None
            marked = node.all_input_nodes[0] if item is not None else node
            custom = marked.meta.get("custom") or {}
            marked.meta["custom"] = {**custom, MARK: [*custom.get(MARK, []), [place, field, size, item]]}


def is_traced(names: Iterable[str]) -> bool:
    """Whether outputs of these names are those of `traced`."""
    return bool(_numbers(names))


def is_marked(program: Program) -> bool:
    """Whether a program chooses tokens."""
    return any(_marks(node) for node in program.graph.nodes)


def traced(program: Program) -> Program:
    """The program with more outputs, one for each marked place; all outputs by name. Itself where none is missing."""
    edit = Edit(program)
    add_outputs(edit)
    return program.replace(exported=edit.finish()) if edit.inserted else program


def add_outputs(edit: Edit) -> None:
    """Let the program give for each marked place which token each token is a part of, where it does not yet."""
    given, output = _given(edit), edit.graph.output_node()
    places = [(number, own) for number, own in sorted(_marked(edit).items()) if number not in given]
    if places:
        edit.add_outputs({f"tokens_{number}": inline(edit, part_of, *own, like=output) for number, own in places})


@dataclasses.dataclass(frozen=True)
class Choice:
    """A place where `count` of `size` tokens are chosen already; what that is computed from, and what from it."""

    size: int
    count: int
    above: frozenset[Node]
    behind: frozenset[Node]


def choices(edit: Edit) -> list[Choice]:
    """The marked places, in order."""
    found, order = [], list(edit.graph.nodes)
    for _, (kept, size) in sorted(_marked(edit).items()):
        node = kept.index if kept.matrix is None else kept.matrix
        count = int(node.meta["val"].shape[1])
        found.append(Choice(size, count, frozenset(ancestors(node)), frozenset(descendants(order, node))))
    return found


def add_output(edit: Edit, parts: Node) -> None:
    """Let the program give `parts` (b, n) int64 for one more place, whose tokens no `Kept` says."""
    number = _next(edit)
    add_outputs(edit)
    edit.add_outputs({f"tokens_{number}": parts})


def part_of(kept: Kept, size: int) -> Tensor:
    """For each of `size` tokens, the number of the new one that it is (mostly) a part of; -1: none. (b, size) int64."""
    if kept.matrix is not None:
        shares = kept.matrix if kept.spread is None else kept.spread.transpose(1, 2)
        most, slot = shares.max(1)
        return torch.where(most > 0, slot, -1)
    batch, count = kept.index.shape
    found = torch.full((batch, size), -1, dtype=torch.int64)
    found = found.scatter(1, kept.index, torch.arange(count).expand(batch, -1))
    return found if kept.sources is None else found.scatter(1, kept.sources, kept.slots)


def chain(outputs: Mapping[str, Any], left: Sequence[int] = ()) -> list[Any]:
    """For each place, in order, which token each of the *first* tokens is a part of behind it; -1: dropped by then.

    Args:
        outputs: arrays by name, those of `traced` among them.
        left: how many tokens are left behind each place, where that is known; else there are those that have parts.

    Returns:
        int64 arrays (b, n), n being the tokens in front of the first place. A place that has other tokens than the one
        in front of it left (another stream) starts anew.
    """
    import numpy as np

    found: list[Any] = []
    now = 0
    for place, number in enumerate(sorted(_numbers(outputs))):
        step = np.asarray(outputs[f"tokens_{number}"])
        size, now = now, left[place] if place < len(left) else int(step.max()) + 1
        if found and size == step.shape[1]:
            before = found[-1]
            after = np.take_along_axis(step, np.maximum(before, 0), 1)
            step = np.where(before < 0, -1, after)
        found.append(step)
    return found


def _numbers(names: Iterable[str]) -> set[int]:
    """The places that outputs of these names are of."""
    return {int(match[1]) for name in names if (match := _OUTPUT.fullmatch(name))}


def _given(edit: Edit) -> set[int]:
    """The places that the program gives outputs of."""
    top = edit.exported.module_call_graph[0].signature
    assert top is not None
    return _numbers(output_names(top.out_spec))


def _next(edit: Edit) -> int:
    """The number of a place behind all others."""
    return max([*_marked(edit), *_given(edit)], default=-1) + 1


def _marked(edit: Edit) -> dict[int, tuple[Kept, int]]:
    """What is marked, by place."""
    fields: dict[int, dict[str, Node]] = {}
    sizes: dict[int, int] = {}
    for node in edit.graph.nodes:
        # Loading a file gives the metadata of a call to those that take its results, too.
        for place, field, size, item in [] if node.target is operator.getitem else _marks(node):
            takers = [user for user in node.users if user.target is operator.getitem and user.args[1] == item]
            if item is None or takers:
                fields.setdefault(place, {})[field] = takers[0] if takers else node
                sizes[place] = size
    empty = Kept(index=None)
    return {
        place: (dataclasses.replace(empty, **own), sizes[place])
        for place, own in fields.items()
        if "index" in own or "matrix" in own
    }


def _marks(node: Node) -> list[Any]:
    """The marks of a node, as far as they are well-formed: they may come from a file."""
    custom = node.meta.get("custom")
    marks = custom.get(MARK) if isinstance(custom, dict) else None
    return [each for each in marks if _is_mark(each)] if isinstance(marks, list) else []


def _is_mark(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 4 or value[1] not in _READ:
        return False
    return isinstance(value[0], int) and isinstance(value[2], int) and isinstance(value[3], int | None)
