"""Blocks whose tokens meet in scans: where these are, what they give, and that a scan knows of tokens that are gone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import find, results_of
from graphopt.cost.formulas import base_name
from graphopt.edit import Edit
from graphopt.errors import Decline
from graphopt.inline import inline
from graphopt.loops import Loop, loop_of
from graphopt.passes.residual import Branch, branches
from graphopt.place import place
from graphopt.region import Region, ancestors, descendants

_SCANS = ("cumsum", "logcumsumexp", "cumprod")
_TO_DECAY = ("mul", "neg", "sub", "unsqueeze", "view", "reshape", "transpose", "permute")


@dataclass(frozen=True, eq=False)
class Scan:
    """A residual block with scans: `total` is the stream behind it, tokens along `dim`; `output` (b, n, d) what the
    scans of all directions give together, in the order of the stream, before a gate."""

    name: str
    total: Node
    dim: int
    output: Node


def scans(edit: Edit) -> tuple[list[Scan], list[Decline]]:
    """The blocks with scans, in order; and those in which it cannot be told what the scans give."""
    nodes = {node.name: node for node in edit.graph.nodes}
    order = list(edit.graph.nodes)
    found: list[Scan] = []
    declined: list[Decline] = []
    ways: list[tuple[Branch, list[Node]]] = []
    for branch in branches(edit.program)[0]:
        source, end = nodes[branch.source.name], nodes[branch.branch.name]
        behind, above = descendants(order, source), ancestors(end)
        way = [node for node in order if node in behind and node in above]
        if any(_tokens_of(node) for node in way):
            ways.append((branch, way))
    for branch, way in ways:
        total, end = nodes[branch.total.name], nodes[branch.branch.name]
        if any(total in other for _, other in ways):  # what skips a scan inside of a block
            continue
        own = [node for node in way if _tokens_of(node)]
        shape = tuple(total.meta["val"].shape)
        sizes = {_tokens_of(node) for node in own}
        dims = [n for n in range(1, len(shape) - 1) if {shape[n]} == sizes]
        output = _output(way, own, end, shape)
        if len(dims) != 1 or output is None:
            reason = _why_not(shape, sizes) if len(dims) != 1 else "its scans give several things"
            declined.append(Decline(place(total), reason))
            continue
        found.append(Scan(branch.unit or branch.name, total, dims[0], output))
    return found, declined


def _why_not(shape: tuple[int, ...], sizes: set[int]) -> str:
    """Why the tokens of a stream are not those that scans run over."""
    grids = [pair for pair in pairwise(shape[1:]) if {pair[0] * pair[1]} == sizes]
    if not grids:
        return "its scans do not run along the tokens"
    high, wide = grids[0]
    return (
        f"its tokens are a grid of {high} x {wide}, which has no holes; those of a sequence (b, n, c), "
        "with a scan for each direction instead of all in one tensor, can be dropped"
    )


def _tokens_of(node: Node) -> int:
    """How many tokens a scan runs over: a cumulative sum, or the stack that is the end of a loop; 0 for other calls."""
    if base_name(node) in _SCANS:
        return int(node.meta["val"].shape[int(node.args[1])])  # type: ignore[arg-type]
    return len(loop.results) if (loop := loop_of(node)) is not None else 0


def _output(way: list[Node], own: list[Node], end: Node, shape: tuple[int, ...]) -> Node | None:
    """The first value shaped as the stream that everything which scans give goes through, and what is added to it."""
    for node in way:
        value = node.meta["val"]
        if isinstance(value, Tensor) and tuple(value.shape[:-1]) == shape[:-1] and not _reach(own, end, node):
            while len(node.users) == 1 and base_name(following := next(iter(node.users))) == "add":
                if following not in way or following.meta["val"].shape != node.meta["val"].shape:
                    break
                node = following
            return None if node is end else node
    return None


def _reach(starts: Iterable[Node], end: Node, around: Node) -> bool:
    """Whether `end` is computed from any of `starts` without `around`."""
    todo, seen = list(starts), {around}
    while todo:
        node = todo.pop()
        if node is end and node is not around:
            return True
        if node not in seen:
            seen.add(node)
            todo += node.users
    return False


@dataclass(frozen=True, eq=False)
class Decay:
    """A call whose argument is logarithms of decays, along `dim`: a cumulative sum of these, or their exponential,
    which a loop multiplies its state with. `places` (b, n) says where the tokens stand among all, in the order of the
    scan; `flipped` that they are visited from the last one on."""

    node: Node
    dim: int
    places: Node
    flipped: bool


def decays(region: Region, places: dict[tuple[int, ...], Node]) -> list[Decay]:
    """The calls of a region that say how fast a scan's state decays."""
    sums = [node for node in region.nodes if base_name(node) == "cumsum" and _is_exponent(node)]
    found = []
    for node in [*sums, *filter(None, map(_exponential, region.loops))]:
        dims = results_of(region.dims[node])[0]
        for order, whole in region.wholes.items():
            for dim in (n for n, axis in enumerate(dims) if find(axis) is find(whole)):
                found.append(Decay(node, dim, places[order], bool(region.backwards.get(node))))
    return found


def _exponential(loop: Loop) -> Node | None:
    """The exponential that a loop multiplies its state with; None where it does not."""
    for take, (source, _) in loop.takes.items():
        for user in take.users:
            others = [each for each in user.all_input_nodes if each is not take]
            if base_name(user) == "mul" and any(loop.steps.get(each) == loop.steps[take] - 1 for each in others):
                while base_name(source) in _TO_DECAY and len(source.all_input_nodes) == 1:
                    source = source.all_input_nodes[0]
                return source if base_name(source) == "exp" else None
    return None


def _is_exponent(node: Node) -> bool:
    todo, seen = list(node.users), set()
    while todo:
        each = todo.pop()
        if base_name(each) == "exp":
            return True
        if base_name(each) in _TO_DECAY and each not in seen:
            seen.add(each)
            todo += each.users
    return False


def bridge(edit: Edit, decay: Decay) -> None:
    """Let the state decay at places whose tokens are gone, too, as fast as at the last one that is there.

    exp(a_t) becomes exp(a_t) exp(a_s)^(g - 1), where s is the token visited before t, and t - s = g.
    """
    node = decay.node

    def bridged(steps: Tensor, places: Tensor) -> Tensor:
        apart = places[:, 1:] - places[:, :-1]
        apart = apart.flip(1) if decay.flipped else apart
        missing = (apart - 1).clamp(min=0).to(steps.dtype)  # a class token in the middle may stand out of order
        before = steps.narrow(decay.dim, 0, steps.shape[decay.dim] - 1)
        shape = [1] * steps.dim()
        shape[0], shape[decay.dim] = missing.shape
        more = before * missing.reshape(shape)
        return steps + torch.cat([torch.zeros_like(steps.narrow(decay.dim, 0, 1)), more], decay.dim)

    steps = node.args[0]
    assert isinstance(steps, Node)
    node.replace_input_with(steps, inline(edit, bridged, steps, decay.places, like=node))
