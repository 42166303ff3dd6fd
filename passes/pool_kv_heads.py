"""Turn multi-head attention into grouped-query attention: fewer heads of keys and values, each the mean of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes, Axis, find, infer, owner, results_of
from graphopt.axes.axis import atoms, parts
from graphopt.edit import Edit
from graphopt.errors import BadOption, CannotShrink, Decline
from graphopt.passes.base import Pass
from graphopt.passes.repeated_heads import is_attention, unrepeated
from graphopt.place import place
from graphopt.program import Program
from graphopt.shrink import shrink_in


@dataclass(frozen=True)
class PoolKvHeads(Pass):
    """Mean-pool heads of keys and values in groups; queries and the output projection stay.

        before  q (h=8 d), k (h=8 d), v (h=8 d)     attention(q, k, v)
        after   q (h=8 d), k (h=2 d), v (h=2 d)     attention(q, k, v, enable_gqa), 4 query heads read each

    kv_heads: how many stay; it divides the number of heads of keys. 1 is multi-query attention.
    conversion: "mean-pool" takes consecutive heads for a group, as the paper does; "group" those whose keys and values
        have the most similar weights, and re-orders the query heads to match, which by itself changes nothing.

    Attention must be one operator, with keys and values from layers of their own: one tensor for queries, keys and
    values is declined. Where query heads share heads of keys already, by repetition or in attention itself, these are
    pooled further. The cache of keys and values shrinks alike; the work of attention itself does not.

    Source: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
    EMNLP 2023, arXiv:2305.13245. Differs: up-training is a step of its own; grouping by similarity is ours.
    """

    name: ClassVar[str] = "pool-kv-heads"
    lossless: ClassVar[bool] = False

    kv_heads: int | None = None
    conversion: Literal["mean-pool", "group"] = "mean-pool"

    def __call__(self, program: Program) -> Program:
        """See Pass. Raises BadOption where nothing says how many heads stay."""
        if self.kv_heads is None or self.kv_heads < 1:
            raise BadOption(
                what=f"{self.name}: kv_heads is {self.kv_heads}", way_out="give how many heads stay, from 1"
            )
        after = super().__call__(unrepeated(program))
        return after if after.records[-1].changed else program.replace(records=after.records)

    def apply(self, edit: Edit) -> None:
        """See Pass."""
        assert self.kv_heads is not None, "a number of heads is checked for before"
        axes = infer(edit.program)
        found: dict[Axis, list[Node]] = {}
        for node in axes.program.graph.nodes:
            if is_attention(node):
                head = _head_of(axes, node)
                reason = head if isinstance(head, str) else _why_not(head, self.kv_heads)
                if reason is not None or isinstance(head, str):
                    edit.declined.append(Decline(place(node), str(reason)))
                else:
                    found.setdefault(head, []).append(node)
        if not found and not edit.declined:
            edit.declined.append(Decline(axes.program.name, "no attention is one operator"))
        for head, calls in list(found.items()):
            path = _path(axes, head, calls)
            if isinstance(path, str):
                edit.declined.append(Decline(f"{head.label} ({axes.where(head)})", path))
                continue
            groups = self.groups(axes, head, path, self.kv_heads)
            try:
                _convert(edit, axes, head, calls, path, groups)
            except CannotShrink as error:
                edit.declined.append(Decline(f"{head.label} ({axes.where(head)})", str(error.args[0])))
                continue
            edit.count("attention")
            row = {"axis": head.label, "role": "kv_head", "where": axes.where(head), "from": head.extent}
            edit.details.append({**row, "to": len(groups), "groups": " ".join("+".join(map(str, g)) for g in groups)})

    def groups(self, axes: Axes, head: Axis, path: frozenset[Node], kv_heads: int) -> list[list[int]]:
        """The heads of each group, in the order of the groups."""
        each = head.extent // kv_heads
        if self.conversion == "mean-pool":
            return [list(range(start, start + each)) for start in range(0, head.extent, each)]
        pieces = []
        for node in path:
            if axes.is_stored(node):
                tensor = axes.program.tensors[node.name].double()
                for n, axis in enumerate(axes.dims[node]):
                    items = owner(axis, head)
                    if (items >= 0).all():
                        by_head = tensor.movedim(n, 0)[items.argsort(stable=True)].reshape(head.extent, -1)
                        pieces.append(by_head / by_head.norm().clamp_min(1e-30))
        return balanced(torch.cat(pieces, 1), each)


def _why_not(head: Axis, kv_heads: int) -> str | None:
    if head.extent % kv_heads:
        return f"{head.extent} heads cannot share {kv_heads} heads of keys and values evenly"
    return "it has no more heads of keys and values" if head.extent == kv_heads else None


def balanced(items: Tensor, each: int) -> list[list[int]]:
    """Groups of `each` items with rows as alike as can be had greedily: the closest pair first, then its nearest.

    Args:
        items: (n, features); n is a multiple of `each`.
        each: items in a group.
    """
    apart = torch.cdist(items[None], items[None])[0]
    left, groups = list(range(len(items))), []
    while left:
        if each == 1 or len(left) == each:
            group = left[:each]
        else:
            pairs = [(float(apart[a, b]), a, b) for n, a in enumerate(left) for b in left[n + 1 :]]
            _, first, second = min(pairs)
            group = [first, second]
            while len(group) < each:
                rest = [(float(apart[item, group].mean()), item) for item in left if item not in group]
                group.append(min(rest)[1])
        groups.append(sorted(group))
        left = [item for item in left if item not in group]
    return sorted(groups)


def _head_of(axes: Axes, call: Node) -> Axis | str:
    """The axis of heads of an attention's keys and values, which queries have as well, or why there is none."""
    dims = [results_of(axes.dims[source])[0] for source in call.all_input_nodes[:3]]
    if any(len(own) < 3 for own in dims):
        return "attention without a dimension of heads"
    query, head, values = (find(own[-3]) for own in dims)
    if head.extent == 1:
        return "it has one head of keys and values"
    if head is not values or head.kind is not None:
        return "keys and values are not by the same heads"
    if head is not parts(query, "product")[0]:
        return "query heads are not in groups, one after another, for the heads of keys and values"
    return f"axis is pinned: {head.pinned}" if head.pinned else head


def _path(axes: Axes, head: Axis, calls: Sequence[Node]) -> frozenset[Node] | str:
    """What computes keys and values by head, and nothing else; or what else it computes."""
    found: set[Node] = set()
    todo = [source for call in calls for source in call.all_input_nodes[1:3]]
    while todo:
        node = todo.pop()
        has = any(head in atoms(axis) for own in results_of(axes.dims.get(node) or []) for axis in own)
        if node not in found and has:
            found.add(node)
            todo += node.all_input_nodes
    for node in found:
        for user in node.users:
            if user not in found and (user not in calls or user.args[0] is node):
                return f"{place(node)} computes more than keys and values, as where queries come from the same tensor"
    return frozenset(found)


def _convert(
    edit: Edit, axes: Axes, head: Axis, calls: Sequence[Node], path: frozenset[Node], groups: Sequence[Sequence[int]]
) -> None:
    order = [item for group in groups for item in group]
    nodes = {node.name: node for node in edit.graph.nodes}
    inside = path | {source for node in path for source in node.all_input_nodes}
    if order != list(range(head.extent)):
        shrink_in(edit, _only(axes, lambda node: node not in path), {head: order})
    mean = torch.zeros(len(groups), head.extent, dtype=torch.float64)
    for place_, group in enumerate(groups):
        mean[place_, list(group)] = 1 / len(group)
    kept = [group[0] for group in groups]
    shrink_in(edit, _only(axes, lambda node: node in inside), {head: kept}, merge={head: mean})
    for call in calls:
        node = nodes[call.name]
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        edit.infer(node)


def _only(axes: Axes, wanted: object) -> Axes:
    """The axes as if the program had some of its nodes only."""
    assert callable(wanted)
    dims: Mapping[Node, object] = {node: own for node, own in axes.dims.items() if wanted(node)}
    sums = {call: operands for call, operands in axes.sums.items() if all(node in dims for node, _ in operands)}
    return replace(axes, dims=dims, sums=sums)
