"""Merge the experts of a mixture into fewer, guided by how it routes calibration data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from graphopt.axes import infer
from graphopt.edit import Edit
from graphopt.errors import BadOption, Decline, ToolMissing
from graphopt.passes.base import Pass
from graphopt.passes.checks import check_count, check_share
from graphopt.passes.experts import Hidden, Mixture, mixtures
from graphopt.program import Program

_aten = torch.ops.aten
_LETTERS = "abcdefgh"


@dataclass(frozen=True)
class Usage:
    """How a mixture routes the data: `counts` (experts,), how often each is chosen (or its summed weights, where all
    run), and `logits` (tokens, experts)."""

    counts: Tensor
    logits: Tensor


@dataclass(frozen=True)
class MergeExperts(Pass):
    """Keep the experts that are used most, and fold the others into those that are routed to alike.

        before  topk -> numbers -> up[numbers], down[numbers]              up (e=32 c f), down (e=32 f c)
        after   topk -> numbers -> groups[numbers] -> up[.], down[.]       up (g=8 c f), down (g=8 f c)

    The router keeps its outputs. Where all experts run and are weighted, the weights of a group are added up. In order:
    hidden neurons of each expert are permuted to match those of the one it is merged into (`align`, by itself
    lossless); experts are counted on the data; as many as `groups` on average per mixture stay, those with the highest
    share of their mixture's use, at least one in each; every other goes to the one whose router logits over the tokens
    are most alike, up to `capacity` in a group; weights are averaged by use.

    Memory falls; the work does where all experts run. Options:

    groups: how many experts stay in a mixture, on average; or
    keep: the share of all experts that stays.
    align: match hidden neurons first; needs scipy.
    capacity: the most experts in a group.
    exclude: patterns of mixtures' names that keep all.
    calibration: data that is routed; the example inputs where there is none.

    Source: Li et al., "Merge, Then Compress" (M-SMoE), ICLR 2024, arXiv:2310.01334. Differs: experts are aligned with
    the one that they are merged into, where the released code takes the first of the group; experts that are never used
    are merged as equals among themselves.
    """

    name: ClassVar[str] = "merge-experts"
    lossless: ClassVar[bool] = False

    groups: float | None = None
    keep: float | None = None
    align: bool = True
    capacity: int | None = None
    exclude: tuple[str, ...] = ()
    calibration: Any = None

    def apply(self, edit: Edit) -> None:
        if (self.groups is None) == (self.keep is None):
            raise BadOption(what=f"{self.name} takes one of groups and keep", way_out="give groups=8 or keep=0.25")
        check_count(self.name, "groups", self.groups)
        check_count(self.name, "capacity", self.capacity)
        check_share(self.name, "keep", self.keep)
        program = edit.program
        found, declined = mixtures(infer(program))
        for node, reason in declined:
            edit.decline(node, reason)
        chosen = [mixture for mixture in found if not any(fnmatchcase(mixture.name, each) for each in self.exclude)]
        if not chosen:
            edit.declined.append(Decline(program.name, "there is no mixture of experts with stacked weights"))
            return
        used = usage(program, chosen, self.calibration)
        average = self.groups if self.groups is not None else (self.keep or 0) * _mean(m.experts for m in chosen)
        for mixture, kept in zip(chosen, dominant([u.counts for u in used], average), strict=True):
            seen = used[chosen.index(mixture)]
            group = assign(seen, kept, self.capacity)
            if len(kept) == mixture.experts:
                edit.declined.append(Decline(mixture.name, "all experts stay"))
                continue
            if self.align and not mixture.hidden:
                edit.declined.append(Decline(mixture.name, "which hidden neurons belong together cannot be told"))
            tensors = {stack.name: _value(edit, stack) for stack in mixture.stacks}
            if self.align and mixture.hidden:
                tensors = aligned(tensors, mixture.hidden, [int(kept[g]) for g in group])
            merged = {name: average_of(tensor, group, seen.counts) for name, tensor in tensors.items()}
            reason = _fits(program, mixture, merged, group)
            if reason:
                edit.declined.append(Decline(mixture.name, reason))
                continue
            rewrite(edit, mixture, merged, group)
            edit.details.append({"mixture": mixture.name, "from": mixture.experts, "to": len(kept)})
            edit.count("mixture")


def _mean(numbers: Any) -> float:
    values = list(numbers)
    return sum(values) / len(values)


def _value(edit: Edit, stack: Node) -> Tensor:
    node = next(node for node in edit.graph.nodes if node.name == stack.name)
    value = edit.tensor(node)
    assert value is not None
    return value.detach()


# What is decided ------------------------------------------------------------------------------------------------------


def usage(program: Program, found: Sequence[Mixture], data: Any) -> list[Usage]:
    """How each mixture routes calibration data."""
    from graphopt.calibration import calibration
    from graphopt.observe import watch

    counts = {mixture.name: torch.zeros(mixture.experts, dtype=torch.float64) for mixture in found}
    logits: dict[str, list[Tensor]] = {mixture.name: [] for mixture in found}
    by_node: dict[str, list[tuple[Mixture, int | None]]] = {}
    for mixture in found:
        by_node.setdefault(mixture.logits.name, []).append((mixture, None))
        source, dim = (mixture.places, 0) if mixture.places is not None else mixture.weights[0]
        by_node.setdefault(source.name, []).append((mixture, dim))

    def see(name: str, value: Tensor) -> None:
        for mixture, dim in by_node[name]:
            if dim is None:
                logits[mixture.name].append(_by_group(value.double().flatten(0, -2), mixture.table))
            elif mixture.places is not None:
                counts[mixture.name] += value.flatten().bincount(minlength=mixture.experts)
            else:
                lines = value.double().movedim(dim, -1).reshape(-1, mixture.experts)
                counts[mixture.name] += (lines != 0).sum(0) if bool((lines == 0).any()) else lines.abs().sum(0)

    watch(program, calibration(data, program), list(by_node), see)
    return [Usage(counts[mixture.name], torch.cat(logits[mixture.name])) for mixture in found]


def _by_group(logits: Tensor, table: Tensor | None) -> Tensor:
    """The means of the columns (tokens, experts) that a table has one number for."""
    if table is None:
        return logits
    members = F.one_hot(table.long()).double()
    return logits @ (members / members.sum(0))


def dominant(counts: Sequence[Tensor], average: float) -> list[Tensor]:
    """The experts of each mixture that stay, rising: the most used of all, relative to their mixture's most used.

    Args:
        counts: how often each expert is chosen, one tensor (experts,) a mixture.
        average: how many stay in a mixture, on average; at least one does.
    """
    shares = [each / each.sum().clamp_min(1e-300) for each in counts]
    for share in shares:
        share[int(share.argmax())] = 1.0  # the most used one stays, whatever the others are
    line = torch.cat(shares)
    total = max(len(counts), min(len(line), math.floor(average * len(counts) + 1e-9)))
    stays = torch.zeros(len(line), dtype=torch.bool)
    stays[line.argsort(descending=True, stable=True)[:total]] = True
    return [part.nonzero().flatten() for part in stays.split([len(each) for each in counts])]


def assign(seen: Usage, kept: Tensor, capacity: int | None = None) -> Tensor:
    """The group of each expert, (experts,) int64: its own for those in `kept`, else that of the most alike of them.

    The most used choose first. Where all groups are full the capacity is void.
    """
    columns = F.normalize(seen.logits, dim=0)
    alike = (columns.T @ columns[:, kept] + 1) / 2
    group = torch.full((len(alike),), -1)
    group[kept] = torch.arange(len(kept))
    for expert in seen.counts.argsort(descending=True, stable=True).tolist():
        if group[expert] >= 0:
            continue
        sizes = group[group >= 0].bincount(minlength=len(kept))
        full = sizes >= (capacity or len(alike))
        scores = alike[expert] if bool(full.all()) else alike[expert].masked_fill(full, -1.0)
        group[expert] = int(scores.argmax())
    return group


def aligned(tensors: Mapping[str, Tensor], hidden: Sequence[Hidden], reference: Sequence[int]) -> dict[str, Tensor]:
    """The stacks with the hidden neurons of each expert in the order in which they are most like its reference's.

    Args:
        tensors: stacks (experts, ...) by node name.
        hidden: their dimensions that run over hidden neurons.
        reference: for each expert the one to be like.

    Raises:
        ToolMissing: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ToolMissing(
            tool="scipy",
            purpose="match the hidden neurons of experts",
            install="pip install scipy, or give align=false",
        ) from error
    positions = [each.owner.argsort(stable=True).view(int(each.owner.max()) + 1, -1) for each in hidden]
    features = []
    for each, places in zip(hidden, positions, strict=True):
        lines = tensors[each.stack.name].double().movedim(each.dim, 1)
        features.append(lines[:, places].flatten(2))  # experts, neurons, (copies, the rest)
    lines = torch.cat(features, 2)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for expert, like in enumerate(reference):
        if expert == like:
            continue
        _, order = linear_sum_assignment((lines[like] @ lines[expert].T).numpy(), maximize=True)
        for each, places in zip(hidden, positions, strict=True):
            index = torch.empty(len(each.owner), dtype=torch.int64)
            index[places.flatten()] = places[torch.from_numpy(order)].flatten()
            stack = changed[each.stack.name]
            stack[expert] = stack[expert].index_select(each.dim - 1, index)
    return changed


def average_of(tensor: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """The means of the experts of each group, weighted by use; (groups, ...)."""
    rows = []
    for number in range(int(group.max()) + 1):
        own = (group == number).nonzero().flatten()
        share = counts[own].double()
        share = share / share.sum() if float(share.sum()) > 0 else torch.full_like(share, 1 / len(own))
        rows.append(torch.tensordot(share, tensor[own].double(), dims=1) if len(own) > 1 else tensor[own[0]].double())
    return torch.stack(rows).to(tensor.dtype)


# How it is written ----------------------------------------------------------------------------------------------------


def _fits(program: Program, mixture: Mixture, merged: Mapping[str, Tensor], group: Tensor) -> str:
    """Why the rewrite does not go through, tried on a copy; "" where it does."""
    trial = Edit(program)
    try:
        rewrite(trial, mixture, merged, group)
    except Exception as error:  # whatever an operator says of its new shapes
        return f"the number of experts is written into the program: {str(error).splitlines()[0]}"
    return ""


def rewrite(edit: Edit, mixture: Mixture, merged: Mapping[str, Tensor], group: Tensor) -> None:
    """Put the merged stacks in place, and map experts to groups in front of who reads them."""
    nodes = {node.name: node for node in edit.graph.nodes}
    groups = int(group.max()) + 1
    for name, tensor in merged.items():
        edit.set_tensor(nodes[name], tensor)
    readers = [nodes[reader.name] for reader in mixture.readers]
    if mixture.places is not None:
        places = nodes[mixture.places.name]
        table = edit.add_tensor(f"{mixture.name}.groups", group, parameter=False)
        mapped = edit.call(_aten.index.Tensor, (table, [places]), like=_next(places))
        for reader in readers:
            reader.replace_input_with(places, mapped)
        for counter in (nodes[counter.name] for counter in mixture.counters):
            counter.args = (counter.args[0], groups, 0, groups - 1)
            counter.kwargs = {}
    for source, dim in mixture.weights:
        weights = nodes[source.name]
        matrix = F.one_hot(group, groups).to(weights.meta["val"].dtype)
        summed = edit.add_tensor(f"{mixture.name}.groups", matrix, parameter=False)
        own = _LETTERS[: weights.meta["val"].dim()]
        spelled = f"{own},{own[dim]}z->{own.replace(own[dim], 'z')}"
        if dim == len(own) - 1:
            added = edit.call(_aten.matmul.default, (weights, summed), like=_next(weights))
        else:
            added = edit.call(_aten.einsum.default, (spelled, [weights, summed]), like=_next(weights))
        for reader in readers:
            reader.replace_input_with(weights, added)
    for node in edit.graph.nodes:
        if node.op == "call_function":
            before = node.meta.get("val")
            edit.infer(node)
            if any(node is user for user in edit.graph.output_node().all_input_nodes) and isinstance(before, Tensor):
                assert node.meta["val"].shape == before.shape, f"{node.name} has another shape"


def _next(node: Node) -> Node:
    """The node behind, in front of which something that reads `node` may stand."""
    return node.next
