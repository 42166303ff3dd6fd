"""Leave out whole residual blocks: those without which the output changes least."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.budget import Budget
from graphopt.edit import Edit
from graphopt.errors import BadOption, Decline
from graphopt.passes.base import Pass
from graphopt.passes.checks import check_count, check_included, check_share, matches, not_excluded
from graphopt.passes.residual import Branch, branches, dying
from graphopt.passes.sizes import amount, limit, nothing, short_of, unreachable
from graphopt.program import Program


@dataclass(frozen=True)
class DropBlocks(Pass):
    """Replace x + f(x) by x, for the least important f, until a budget is met.

        before  x -> x + attention(norm(x)) -> x + mlp(norm(x)) -> ...
        after   x -> x + attention(norm(x)) -> ...

    A branch is whatever is added to what it was computed from, with gates, scales and dropout on it, nested or not,
    with other inputs (masks, conditions) or not; a scaled shortcut keeps its scale. What the branch alone needed goes
    with it. With `unit` "layer" the branches of one numbered layer of the model (`blocks.3`) go together.

    Blocks are scored on calibration data by `criterion`: "output" is how far the program's outputs are without it, as a
    share of their squared size; "cosine" is 1 - cos(before, after), over the features of a position, which takes one
    run for all, and where a block hardly turns what flows by, it is small. The least important goes first. With
    `remeasure` the rest are scored anew after each. What in the end fits into the budget again comes back, the most
    important first.

    budget: what the whole program may cost, of FLOPs, multiply-adds, parameters or bytes; or
    keep: the share of the blocks that stays; or
    drop: how many blocks go.
    include, exclude: patterns of blocks' names, such as "blocks.*.mlp".
    calibration: data to score on; the example inputs where there is none.

    Source: Men et al., ShortGPT, arXiv:2403.03853 ("cosine", their Block Influence, with whole layers); Veit et al.,
    arXiv:1605.06431, that residual branches can be left out at all. Differs: halves of a layer are units of their own
    by default, a drop is a rewrite of the graph in any network, and norms behind the sum (post-norm) stay.
    """

    name: ClassVar[str] = "drop-blocks"
    lossless: ClassVar[bool] = False

    budget: Budget | None = None
    keep: float | None = None
    drop: int | None = None
    unit: Literal["branch", "layer"] = "branch"
    criterion: Literal["output", "cosine"] = "output"
    remeasure: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    calibration: Any = None

    def apply(self, edit: Edit) -> None:
        if sum(value is not None for value in (self.budget, self.keep, self.drop)) != 1:
            raise BadOption(
                what=f"{self.name} takes one of budget, keep and drop", way_out="give --flops 0.5, keep=0.5 or drop=2"
            )
        check_count(self.name, "drop", self.drop)
        check_share(self.name, "keep", self.keep)
        from graphopt.calibration import calibration

        program = edit.program
        found, declined = branches(program)
        edit.declined += declined
        names = self._named(found)
        check_included(self.name, self.include, list(names), "residual block")
        edit.notes += not_excluded(self.exclude, list(names), "residual block")
        blocks = {name: own for name, own in names.items() if not self.include or matches(name, self.include)}
        blocks = {name: own for name, own in blocks.items() if not matches(name, self.exclude)}
        if not blocks:
            reason = "all residual blocks are excluded" if names else "there is no residual block"
            edit.declined.append(Decline(program.name, reason))
            if self.budget is not None and amount(program, self.budget.kind) > limit(program, self.budget):
                raise nothing(program, self.budget, self.name, reason)
        data = calibration(self.calibration, program) if blocks else ()
        chosen = self._choose(program, blocks, data)
        for name, score in chosen.items():
            edit.details.append({"block": name, "score": score})
            remove(edit, blocks[name])
            edit.count("block")
        if self.budget is not None and chosen:
            left = amount(_without(program, blocks, chosen), self.budget.kind)
            edit.notes += short_of(program, self.budget, left, "a block goes whole")

    def _named(self, found: Sequence[Branch]) -> dict[str, list[Branch]]:
        """The blocks by name, in order."""
        blocks: dict[str, list[Branch]] = {}
        for branch in found:
            name = branch.unit if self.unit == "layer" else branch.name
            if self.unit == "branch" and name in blocks:
                name = f"{name}#{sum(key.partition('#')[0] == name for key in blocks) + 1}"
            blocks.setdefault(name, []).append(branch)
        return blocks

    def _choose(
        self, program: Program, blocks: Mapping[str, list[Branch]], data: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """The blocks that go, in the order of their going, with their scores."""

        def without(names: Collection[str]) -> Program:
            return _without(program, blocks, names)

        def fits(names: Collection[str]) -> bool:
            if self.budget is None:
                wanted = self.drop if self.drop is not None else math.floor((1 - (self.keep or 0)) * len(blocks) + 1e-9)
                return len(names) >= min(wanted, len(blocks))
            return amount(without(names), self.budget.kind) <= allowed

        allowed = limit(program, self.budget) if self.budget is not None else 0.0
        if not fits(blocks):
            assert self.budget is not None
            kind = self.budget.kind
            raise unreachable(program.name, self.budget, amount(without(blocks), kind), amount(program, kind))
        gone: dict[str, float] = {}
        scores: dict[str, float] = {}
        while not fits(gone):
            left = [name for name in blocks if name not in gone]
            if not scores or self.remeasure:
                scores = self._scores(program, blocks, left, gone, data, without)
            name = min(left, key=lambda each: (scores[each], each))
            gone[name] = scores[name]
        for name in sorted(gone, key=lambda each: -gone[each]):
            if fits(rest := gone.keys() - {name}) and self.budget is not None:
                gone = {each: score for each, score in gone.items() if each in rest}
        return gone

    def _scores(
        self,
        program: Program,
        blocks: Mapping[str, list[Branch]],
        left: Sequence[str],
        gone: Collection[str],
        data: Sequence[Mapping[str, Tensor]],
        without: Any,
    ) -> dict[str, float]:
        """How much each block that is left matters, when others are gone already."""
        if self.criterion == "cosine":
            present = without(gone) if gone else program
            known = {node.name for node in present.graph.nodes}
            ends = {name: (blocks[name][0].source.name, blocks[name][-1].total.name) for name in left}
            there = {name: pair for name, pair in ends.items() if set(pair) <= known}
            turned = _turned(present, there, data, _channels_last(program, blocks))
            return {name: turned.get(name, 0.0) for name in left}  # within one that is gone: nothing is lost
        wanted = [program.run(batch) for batch in data]
        scores = {}
        for name in left:
            tried = without([*gone, name])
            pairs = [_distance(right, tried.run(batch)) for right, batch in zip(wanted, data, strict=True)]
            scores[name] = sum(pairs) / len(pairs)
        return scores


def _without(program: Program, blocks: Mapping[str, Sequence[Branch]], names: Collection[str]) -> Program:
    """The program without some of the blocks."""
    edit = Edit(program)
    nodes = {node.name: node for node in edit.graph.nodes}
    for name in names:
        remove(edit, blocks[name], nodes)
    return program.replace(exported=edit.finish())


def remove(edit: Edit, block: Sequence[Branch], nodes: Mapping[str, Node] | None = None) -> None:
    """Let every reader of the sums read the shortcuts, and erase what only the branches needed."""
    nodes = nodes or {node.name: node for node in edit.graph.nodes}
    for branch in reversed(block):
        alive = set(edit.graph.nodes)
        total, own = nodes.get(branch.total.name), nodes.get(branch.branch.name)
        if total not in alive or own is None:
            continue  # it was within another that went
        assert total is not None
        # Not `branch.shortcut`: what stood there may have gone, and its own shortcut come in its place.
        (shortcut,) = (operand for operand in total.all_input_nodes if operand is not own)
        going = dying(own, total)
        edit.replace(total, shortcut)
        for node in reversed(list(edit.graph.nodes)):
            unread = node.op == "placeholder" and not node.users
            if node in going or (unread and edit.is_stored(node) and not edit.is_mutated(node)):
                edit.graph.erase_node(node)


def _distance(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> float:
    """Squared difference as a share of the squared size, summed over outputs; of integers the share that differs."""
    total = 0.0
    for name, right in wanted.items():
        other = got[name]
        if not right.is_floating_point():
            total += float((right != other).double().mean()) if right.numel() else 0.0
            continue
        finite = right.isfinite() & other.isfinite()
        difference = torch.where(finite, (right - other).double(), 0.0).square().sum()
        size = torch.where(finite, right.double(), 0.0).square().sum()
        total += float(difference / size.clamp_min(torch.finfo(torch.float64).tiny))
    return total


def _turned(
    program: Program,
    ends: Mapping[str, tuple[str, str]],
    data: Sequence[Mapping[str, Tensor]],
    last: Mapping[str, bool],
) -> dict[str, float]:
    """1 - cosine of the values at two nodes, over features, on average over positions."""
    from graphopt.observe import watch

    found: dict[str, list[float]] = {name: [] for name in ends}
    for batch in data:
        values: dict[str, Tensor] = {}
        watch(program, [batch], {node for pair in ends.values() for node in pair}, values.__setitem__)
        for name, (before, after) in ends.items():
            place = -1 if last[name] else 1
            cosine = torch.cosine_similarity(values[before].double(), values[after].double(), dim=place)
            found[name].append(1.0 - float(cosine.mean()))
    return {name: sum(each) / len(each) for name, each in found.items()}


def _channels_last(program: Program, blocks: Mapping[str, list[Branch]]) -> dict[str, bool]:
    """Whether a block's features are its last dimension: they are the second where it is made of convolutions only."""
    return {
        name: not all("conv" in str(layer.target) for branch in group for layer in branch.layers)
        for name, group in blocks.items()
    }
