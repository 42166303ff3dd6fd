"""Mixtures of experts on a graph: one pattern of a router, experts in stacked weights, and what picks them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes, Axis, atoms, find, owner, results_of
from graphopt.axes.axes import is_pointwise
from graphopt.exported import op_name
from graphopt.place import module_path, place

_RENAMES = {"view", "reshape", "_unsafe_view", "flatten", "unsqueeze", "squeeze", "expand", "permute", "transpose",
            "clone", "contiguous", "to", "_to_copy", "slice", "select", "alias", "detach"}  # fmt: skip
_COUNTS = {"histc", "sort", "argsort"}
_ROUTING = {"gather", "scatter", "take_along_dim"}
_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "einsum"}


@dataclass(frozen=True)
class Hidden:
    """A dimension of a stack that runs over hidden neurons: `owner` (extent,) says which one each index belongs to."""

    stack: Node
    dim: int
    owner: Tensor


@dataclass(frozen=True)
class Mixture:
    """One mixture of `experts` experts.

    `stacks` are the stored weights (experts, ...). `logits` is what the router gives, (..., experts), or with a
    `table`, where experts were merged before, one column for each number that the table replaces. Either `places` is
    the tensor of the chosen experts' numbers, `readers` those of its users that look up stacks with them, and
    `counters` the histograms of them; or, where all experts run, `weights` are what their results are multiplied with,
    each with the dimension that runs over experts, and `readers` who multiplies. `hidden` is empty where the experts'
    hidden neurons cannot be told.
    """

    name: str
    experts: int
    stacks: tuple[Node, ...]
    logits: Node
    readers: tuple[Node, ...]
    hidden: tuple[Hidden, ...]
    places: Node | None = None
    counters: tuple[Node, ...] = ()
    weights: tuple[tuple[Node, int], ...] = ()
    table: Tensor | None = None


def mixtures(axes: Axes) -> tuple[list[Mixture], list[tuple[Node, str]]]:
    """All mixtures of a program in order; and what looks like one and cannot be told, with the reason."""
    found: list[Mixture] = []
    declined: list[tuple[Node, str]] = []
    for node in axes.program.graph.nodes:
        mixture = _chosen(axes, node) if _name(node) == "topk" else None
        if isinstance(mixture, str):
            declined.append((node, mixture))
        elif mixture is not None:
            found.append(mixture)
    taken = {stack for mixture in found for stack in mixture.stacks}
    for atom, stacks in _stacked(axes).items():
        if not taken & set(stacks):
            mixture = _dense(axes, atom, stacks)
            if isinstance(mixture, str):
                declined.append((stacks[0], mixture))
            elif mixture is not None:
                found.append(mixture)
    order = {node: n for n, node in enumerate(axes.program.graph.nodes)}
    return sorted(found, key=lambda mixture: order[mixture.logits]), declined


def _name(node: object) -> str:
    if not isinstance(node, Node) or node.op != "call_function":
        return ""
    return op_name(node).removeprefix("aten.").partition(".")[0]


def _is_grouped(node: Node) -> bool:
    return node.op == "call_function" and "grouped_mm" in op_name(node)


# Experts that are looked up by number ---------------------------------------------------------------------------------


def _chosen(axes: Axes, topk: Node) -> Mixture | str | None:
    source = topk.args[0]
    assert isinstance(source, Node)
    dim = topk.args[2] if len(topk.args) > 2 else topk.kwargs.get("dim", -1)
    assert isinstance(dim, int)
    experts = int(source.meta["val"].shape[dim])
    places = next((user for user in topk.users if user.target is operator.getitem and user.args[1] == 1), None)
    if places is None:
        return None
    routed, table = experts, None
    for user in places.users:
        if _name(user) == "index" and (groups := _table(axes, user, experts)) is not None:
            places, table, experts = user, groups, int(groups.max()) + 1
            break
    readers, stacks, counters = [], dict[Node, None](), dict[Node, None]()
    for user in places.users:
        ends = list(_ends(places, user))
        looked = [end for end in ends if _looked_up(axes, end, experts) or _name(end) in _COUNTS]
        if not looked:
            if any(_name(end) not in _ROUTING for end in ends) and stacks:
                return f"the numbers of the chosen experts go into {ends[0].name}, which is not known"
            continue
        if len(looked) < len(ends):
            return f"the numbers of the chosen experts go into {looked[0].name} and elsewhere on one way"
        readers.append(user)
        for end in looked:
            if _name(end) == "histc":
                counters[end] = None
                stacks |= dict.fromkeys(_grouped_stacks(axes, end, experts))
            elif stack := _looked_up(axes, end, experts):
                stacks[stack] = None
    if len(stacks) < 2:
        return None
    if shared := [s for s in stacks if any(not (_looked_up(axes, u, experts) or _is_grouped(u)) for u in s.users)]:
        return f"{shared[0].name} is used elsewhere, too"
    own = tuple(stacks)
    hidden = _hidden(axes, own) or _grouped_hidden(own)
    name = module_path(next(iter(own[0].users))) or place(topk)
    logits = _logits(source, routed)
    return Mixture(name, experts, own, logits, tuple(readers), hidden, places, tuple(counters), table=table)


def _table(axes: Axes, node: Node, experts: int) -> Tensor | None:
    """The stored numbers that a call replaces the experts' numbers with, as `merge-experts` leaves them."""
    source = node.args[0]
    table = axes.program.tensors.get(source.name) if isinstance(source, Node) else None
    whole = table is not None and table.shape == (experts,) and not table.is_floating_point()
    return table if whole else None


def _ends(ids: Node, user: Node) -> Iterator[Node]:
    """Where numbers of experts arrive when they go into `user`, through what renames, sorts or re-orders them."""
    if _name(user) == "sort":
        yield user
        for item in user.users:
            if item.args[1] == 0:
                for following in item.users:
                    yield from _ends(item, following)
    elif _name(user) in _RENAMES or (_name(user) == "index" and user.args[0] is ids):
        for following in user.users:
            yield from _ends(user, following)
    else:
        yield user


def _looked_up(axes: Axes, node: Node, experts: int) -> Node | None:
    """The stack that a call takes items of by their numbers."""
    if _name(node) not in ("index", "index_select", "embedding"):
        return None
    stack = node.args[0]
    assert isinstance(stack, Node)
    if _name(node) == "index_select" and node.args[1] != 0:
        return None
    return stack if axes.is_stored(stack) and stack.meta["val"].shape[0] == experts else None


def _grouped_stacks(axes: Axes, counter: Node, experts: int) -> list[Node]:
    """The stored weights of grouped products whose groups `counter` counts."""
    found, todo = [], list(counter.users)
    while todo:
        node = todo.pop(0)
        if _is_grouped(node):
            stack = node.args[1]
            if isinstance(stack, Node) and axes.is_stored(stack) and stack.meta["val"].shape[0] == experts:
                found.append(stack)
        elif _name(node) in _RENAMES | {"cumsum"}:
            todo += list(node.users)
    return found


def _grouped_hidden(stacks: Sequence[Node]) -> tuple[Hidden, ...]:
    """Hidden neurons between two grouped products (experts, in, out): the whole output of the first, or its halves."""
    for second in stacks:
        product = next(iter(second.users))
        node = product.args[0] if _is_grouped(product) else None
        seen: set[Node] = set()
        todo = [node] if isinstance(node, Node) else []
        while todo:
            node = todo.pop()
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            if not _is_grouped(node):
                between = is_pointwise(node) or node.target is operator.getitem or _name(node) in ("split", "chunk")
                todo += node.all_input_nodes if between else []
                continue
            first, count = node.args[1], int(second.meta["val"].shape[1])
            if not isinstance(first, Node) or first not in stacks:
                break
            extent = int(first.meta["val"].shape[2])
            halves = [n for n in seen if _name(n) in ("split", "chunk") and n.args[0] is node]
            if extent == count or (extent == 2 * count and halves):
                numbers = torch.arange(extent) % count
                return Hidden(first, 2, numbers), Hidden(second, 1, torch.arange(count))
            break
    return ()


# Experts that all run -------------------------------------------------------------------------------------------------


def _stacked(axes: Axes) -> dict[Axis, list[Node]]:
    """Stored tensors by the axis of their first dimension, where at least two have three dimensions."""
    found: dict[Axis, list[Node]] = {}
    for node, dims in axes.dims.items():
        if (
            not axes.is_stored(node)
            or len(dims) < 2
            or any(_name(user) in ("linear", "embedding") for user in node.users)
        ):
            continue
        axis = find(dims[0])
        if axis.kind is None and axis.extent > 1:
            found.setdefault(axis, []).append(node)
    return {axis: nodes for axis, nodes in found.items() if sum(len(axes.dims[node]) > 2 for node in nodes) > 1}


def _dense(axes: Axes, atom: Axis, stacks: Sequence[Node]) -> Mixture | str | None:
    routers = [
        node
        for node in axes.program.graph.nodes
        if _name(node) in _PRODUCTS
        and [find(axis) for axis in results_of(axes.dims[node])[0][-1:]] == [atom]
        and not set(stacks) & set(_up(node))
    ]
    if not routers:
        return None
    after, weights, readers = _down(stacks), [], []
    routed = _down([routers[0]])
    for node in axes.program.graph.nodes:
        if node not in routed or node in after or not isinstance(node.meta.get("val"), Tensor):
            continue
        users = [user for user in node.users if user in after]
        own = [n for n, axis in enumerate(results_of(axes.dims[node])[0]) if find(axis) is atom]
        if users and len(own) != 1:
            return f"the experts are no dimension of {node.name}, which their results meet"
        if users:
            weights.append((node, own[0]))
            readers += users
    if not weights:
        return None
    name = module_path(routers[0]).rpartition(".")[0] or module_path(next(iter(stacks[0].users))) or place(routers[0])
    hidden = _hidden(axes, stacks)
    return Mixture(
        name, atom.extent, tuple(stacks), routers[0], tuple(dict.fromkeys(readers)), hidden, weights=tuple(weights)
    )


def _up(node: Node) -> set[Node]:
    seen, todo = {node}, [node]
    while todo:
        fresh = [source for source in todo.pop().all_input_nodes if source not in seen]
        seen.update(fresh)
        todo += fresh
    return seen


def _down(nodes: Sequence[Node]) -> set[Node]:
    seen, todo = set(nodes), list(nodes)
    while todo:
        fresh = [user for user in todo.pop().users if user not in seen]
        seen.update(fresh)
        todo += fresh
    return seen


# Both -----------------------------------------------------------------------------------------------------------------


def _hidden(axes: Axes, stacks: Sequence[Node]) -> tuple[Hidden, ...]:
    """The dimensions with the one free axis that at least two stacks and no other stored tensor have."""
    found: dict[Axis, list[Hidden]] = {}
    for stack in stacks:
        for dim, axis in enumerate(axes.dims[stack]):
            for atom in dict.fromkeys(atoms(axis)) if dim else ():
                others = [name for name, _, _ in axes.stored_in(atom) if name not in {each.name for each in stacks}]
                if atom.pinned is None and atom.extent > 1 and not others:
                    found.setdefault(atom, []).append(Hidden(stack, dim, owner(axis, atom)))
    able = [each for each in found.values() if len(each) > 1 and all(_even(hidden.owner) for hidden in each)]
    return tuple(max(able, key=lambda each: math.prod(h.owner.numel() for h in each))) if able else ()


def _even(numbers: Tensor) -> bool:
    """Whether every hidden neuron has the same number of indices, and every index a neuron."""
    return bool((numbers >= 0).all()) and len(numbers.bincount().unique()) == 1


def _logits(node: Node, experts: int) -> Node:
    """The router's product that scores are made of; the scores where there is none."""
    scores = node
    while node.op == "call_function":
        if _name(node) in _PRODUCTS:
            return node
        following = [
            s for s in node.all_input_nodes if s.op == "call_function" and s.meta["val"].shape[-1:] == (experts,)
        ]
        if not following:
            break
        node = following[0]
    return scores
