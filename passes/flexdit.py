"""Let a diffusion transformer run on fewer tokens in the middle: pooled, and brought back group by group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import linear

from graphopt.axes import infer
from graphopt.cut import Kept, cut
from graphopt.edit import Edit
from graphopt.errors import BadOption, CannotShrink, Decline
from graphopt.inline import inline
from graphopt.passes.base import Pass
from graphopt.passes.tokens.attention import Attention
from graphopt.passes.tokens.cross import attend, attention_of, first_reader, logits_of, on_tokens, split_projection
from graphopt.passes.tokens.sites import Block, blocks, streams
from graphopt.place import place
from graphopt.program import Program
from graphopt.region import Span, region_of
from graphopt.token_trace import add_outputs, mark


@dataclass(frozen=True)
class Flexdit(Pass):
    """Pooling blocks in front, sparse-dense token modules in the middle, the last blocks as they are. To be trained.

        before  x (b, 256, c) -> 28 blocks
        after   x (b, 256, c) -> 2 with mean(v) instead of attention
                -> 4 x [pool (b, 64, c): merge -> 3 blocks; x = up(few) + full(x): recover -> 1 block] -> 2 blocks

    A merge block's queries are the pooled tokens, its keys and values those of all tokens. A recovery block has all
    tokens again, the pooled ones copied to their cells through `up` (0 at first) and those in front of the module
    through `full` (the identity at first), and its attention looks at the few. Blocks keep their weights in order, and
    their conditions. A program has one density; `densities` makes several that share their parameters, for the steps of
    a sampler.

    grid: the side of the grid of pooled tokens; the whole side leaves the modules out.
    poolings: how many of the first blocks have the mean of their values instead of attention.
    modules: how many sparse-dense token modules follow; each has 2 + sparse + dense blocks.
    sparse: blocks on few tokens between merge and recovery.
    dense: blocks on all tokens behind a recovery.
    trace: give more outputs, tokens_0, tokens_1, ..., by which `graphopt explain tokens` shows the cells of modules.

    Source: Chang et al., FlexDiT, arXiv:2412.06028. Differs: pooling blocks have no q and k, no matrix of ones;
    which density at which step is the sampler's.
    """

    name: ClassVar[str] = "flexdit"
    lossless: ClassVar[bool] = False

    grid: int = 8
    poolings: int = 2
    modules: int = 4
    sparse: int = 3
    dense: int = 1
    trace: bool = False

    def apply(self, edit: Edit) -> None:
        """See Pass. Raises BadOption, CannotShrink."""
        for option in ("poolings", "modules", "sparse", "dense"):
            if getattr(self, option) < 0:
                raise BadOption(
                    what=f"{self.name}: {option}={getattr(self, option)}", way_out="give a number of blocks"
                )
        found, declined = blocks(edit, infer(edit.program))
        edit.declined += declined
        if not found:
            edit.declined.append(Decline(edit.program.name, "there is no attention in a residual block"))
            return
        found = max(streams(edit, found), key=len)
        each = 2 + self.sparse + self.dense
        if self.poolings + self.modules * each > len(found):
            raise BadOption(
                what=f"{self.name}: {self.poolings} pooling blocks and {self.modules} modules of {each} blocks",
                way_out=f"the model has {len(found)}: {self.fitting(len(found))}",
            )
        if len({int(block.entry.meta["val"].shape[block.dim]) for block in found}) > 1:
            raise BadOption(what=f"{self.name}: an earlier pass reduced tokens", way_out="let it run first")
        tokens = int(found[0].entry.meta["val"].shape[found[0].dim])
        side = math.isqrt(tokens)
        if side * side != tokens or self.grid < 1 or side % self.grid:
            raise BadOption(what=f"{self.name}: grid={self.grid} of {tokens} tokens", way_out=_sides(side, tokens))
        for block in found[: self.poolings]:
            split_projection(edit, block.attention)
            pool_attention(edit, attention_of(edit, block.attention.node))
            edit.count("pooling block")
        if self.grid < side:
            for number in range(self.modules):
                first = self.poolings + number * each
                merge = found[first]
                insert_module(edit, found[first : first + 2 + self.sparse], side, self.grid)
                edit.count("sparse-dense token module")
                edit.details.append(
                    {"block": first, "name": merge.name, "where": "input", "tokens": tokens, "kept": self.grid**2}
                )
        if self.trace:
            add_outputs(edit)
        edit.graph.eliminate_dead_code()

    def fitting(self, blocks: int) -> str:
        """Options with which so many blocks suffice, as near to those asked for as there is room."""
        for poolings in range(self.poolings, -1, -1):
            for sparse in range(max(self.sparse, 1), 0, -1):
                modules = min(self.modules, (blocks - poolings) // (2 + sparse + self.dense))
                if modules > 0:
                    return f"give {poolings=},{modules=},{sparse=}".replace(", ", ",")
        return f"a module has {3 + self.dense} at least"


def _sides(side: int, tokens: int) -> str:
    if side * side != tokens:
        return "tokens that are a square grid can be pooled to a coarser one"
    return "sides that divide it are " + ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)


def densities(program: Program, grids: Sequence[int], **options: Any) -> dict[int, Program]:
    """One program for each grid, from the same model; all parameters are the same objects, those of modules too."""
    found: dict[int, Program] = {}
    shared: dict[str, Any] = {}
    for grid in sorted(grids):
        found[grid] = Flexdit(grid=grid, **options)(program)
        state = found[grid].exported.state_dict
        for name in state:
            state[name] = shared.setdefault(name, state[name])
    return found


def pool_attention(edit: Edit, attention: Attention) -> None:
    """Replace attention by the mean of its values, which is what it gives where all logits are equal. Raises
    CannotShrink where queries do not look at all keys."""
    logits_of(attention)
    shape = tuple(attention.result.meta["val"].shape)
    if tuple(attention.value.meta["val"].shape[:-2]) != shape[:-2]:
        raise CannotShrink(axis=place(attention.node), reason="heads share their values")

    def mean(value: Tensor) -> Tensor:
        return value.mean(-2, keepdim=True).expand(shape)

    edit.replace(attention.result, inline(edit, mean, attention.value, like=attention.result))


def insert_module(edit: Edit, own: Sequence[Block], side: int, grid: int) -> None:
    """One sparse-dense token module of these blocks: merge, those on few tokens, recovery. Raises CannotShrink."""
    merge, recovery, last = own[0], own[-1], own[-2]
    for block in (merge, recovery):
        split_projection(edit, block.attention)
    entry, dim = merge.entry, merge.dim
    region = region_of(edit, entry, Span(dim, 0, side * side), ordered=True, until=last.end)
    if strange := [end for end, _ in region.ends if end is not last.end]:
        reason = region.blocked[0].reason if region.blocked else "all tokens are wanted of it"
        raise CannotShrink(axis=place(strange[0]), reason=reason)
    reader = next(iter(last.end.users))
    at = reader.all_input_nodes.index(last.end)
    first = region.nodes[0]
    merged = attention_of(edit, merge.attention.node)
    whole_keys = on_tokens(edit, [merged.key, merged.value], entry, dim, entry, logits_of(merged)[0])
    kept = inline(edit, lambda x: _cells(x, dim, side, grid), entry, like=first)
    reduced = cut(edit, region, kept)
    mark(edit, kept, side * side)
    pooled = inline(edit, lambda x: _pooled(x, dim, side, grid), entry, like=first)
    reduced.replace_all_uses_with(pooled)  # for what crosses into the module the matrix, for the stream its sum
    attend(edit, merged, *whole_keys)
    whole = reader.all_input_nodes[at]
    joined = _joined(edit, whole, entry, recovery.name, like=first_reader(whole))
    for user in [user for user in whole.users if user not in _between(whole, joined)]:
        user.replace_input_with(whole, joined)
    recovered = attention_of(edit, recovery.attention.node)
    few_keys = [recovered.key, recovered.value]
    attend(edit, recovered, *on_tokens(edit, few_keys, joined, dim, last.end, logits_of(recovered)[0]))


def _joined(edit: Edit, up: Node, full: Node, name: str, like: Node) -> Node:
    """up(few) + full(x)."""
    width = int(full.meta["val"].shape[-1])
    dtype = full.meta["val"].dtype
    weights = [
        edit.add_tensor(f"{name}.{what}.weight", value.to(dtype), parameter=True)
        for what, value in (("up", torch.zeros(width, width)), ("full", torch.eye(width)))
    ]

    def joined(up: Tensor, full: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear(up, a) + linear(full, b)

    result: Node = inline(edit, joined, up, full, *weights, like=like)
    return result


def _between(first: Node, last: Node) -> set[Node]:
    """The calls that `last` is computed from by way of `first`: those of the join."""
    return {user for user in first.users if user in last.all_input_nodes or user is last}


def _pooled(x: Tensor, dim: int, side: int, grid: int) -> Tensor:
    """The mean of each cell."""
    return x.unflatten(dim, (grid, side // grid, grid, side // grid)).mean((dim + 1, dim + 3)).flatten(dim, dim + 1)


def _cells(x: Tensor, dim: int, side: int, grid: int) -> Kept:
    """Cells as what tokens are merged into, all of a cell with equal weight; they come back as copies."""
    samples, cell = x.shape[0] if dim else 1, side // grid
    place = torch.arange(side * side)
    number = place // side // cell * grid + place % side // cell
    corner = torch.arange(grid * grid)
    corner = corner // grid * cell * side + corner % grid * cell
    others = torch.tensor([n for n in range(side * side) if n // side % cell or n % side % cell], dtype=torch.int64)
    matrix = torch.nn.functional.one_hot(number, grid * grid).to(x.dtype).t() / cell**2
    return Kept(
        corner.expand(samples, -1),
        sources=others.expand(samples, -1),
        slots=number[others].expand(samples, -1),
        matrix=matrix.expand(samples, -1, -1),
    )
