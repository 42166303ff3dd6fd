"""Let the later blocks of a vision transformer run on a few semantic tokens that attention makes of the image's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import pad

from graphopt.axes import infer
from graphopt.cut import Kept, cut
from graphopt.edit import Edit
from graphopt.errors import BadOption, CannotShrink, Decline
from graphopt.inline import inline
from graphopt.passes.base import Pass
from graphopt.passes.residual import branches
from graphopt.passes.tokens.cross import attend, attention_of, first_reader, logits_of, on_tokens, split_projection
from graphopt.passes.tokens.protect import span_of
from graphopt.passes.tokens.sites import Block, Site, blocks, streams
from graphopt.passes.tokens.view import View, heads, repeated
from graphopt.place import place
from graphopt.region import Region, Span, region_of
from graphopt.token_trace import add_output, part_of


@dataclass(frozen=True)
class SemanticTokens(Pass):
    """Replace the image tokens behind a few blocks by semantic tokens: pooled, refined by two blocks. To be trained.

        before  x (b, 197, c) -> 12 blocks
        after   x (b, 197, c) -> 4 blocks -> max-pool (b, 1 + 16, c) -> 2 blocks whose keys and values are of the few
                and of the image -> 6 blocks on (b, 1 + 16, c)

    The two generation blocks are blocks of the model, with its weights; what they add to the few is scaled (1e-5 at
    first), and the queries of the second have learned centres added (normal, 0.02). Class tokens go with the few. A
    head that wants every token needs `recover`: at that block the image tokens of in front are there again, its queries
    are theirs, its keys and values those of the few.

    count: semantic tokens, a square number.
    base: blocks on image tokens in front.
    recover: the block, from 0, that brings the image tokens back.
    seed: of the centres.
    trace: give one more output, tokens_N, by which `graphopt explain tokens` shows for each image token which semantic
        token attends to it most in the second generation block.

    Source: Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View" (STViT), CVPR 2023.
    Differs: pooling is of the whole grid and not by windows; class tokens are queries, too, and layer scales are on
    both halves of both blocks.
    """

    name: ClassVar[str] = "semantic-tokens"
    lossless: ClassVar[bool] = False

    count: int = 16
    base: int = 4
    recover: int | None = None
    seed: int = 0
    trace: bool = False

    def apply(self, edit: Edit) -> None:
        """See Pass. Raises BadOption, CannotShrink."""
        axes = infer(edit.program)
        found, declined = blocks(edit, axes)
        edit.declined += declined
        if not found:
            edit.declined.append(Decline(edit.program.name, "no block has attention of all tokens to all tokens"))
            edit.note("no semantic tokens: " + "; ".join(dict.fromkeys(str(each.reason) for each in edit.declined)))
            return
        found = max(streams(edit, found), key=len)
        self.check(len(found))
        first, second = found[self.base : self.base + 2]
        span = span_of(axes, Site(self.base, first.name, first.entry, first.dim, first.attention, None), None)
        side = math.isqrt(span.size)
        if side * side != span.size or math.isqrt(self.count) ** 2 != self.count or self.count > span.size:
            raise BadOption(
                what=f"{self.name}: count={self.count} of {span.size} tokens", way_out="both are square grids: give 16"
            )
        recovery = found[self.recover - 1 : self.recover + 1] if self.recover is not None else []
        for block in (first, second, *recovery[1:]):
            split_projection(edit, block.attention)
        region = self.region(edit, first.entry, span, recovery[0].end if recovery else None)
        reader = next(iter(recovery[0].end.users)) if recovery else None
        at = reader.all_input_nodes.index(recovery[0].end) if reader else 0
        image = generate(edit, first, region, self.count)
        parts = refine(edit, second, image, span, self.count, self.centres(edit, second, span), self.trace)
        scale(edit, (first, second))
        if reader:
            bring_back(edit, recovery, reader.all_input_nodes[at], image, span, self.count)
        edit.count("generation of semantic tokens")
        edit.details.append(
            {"block": self.base, "name": first.name, "where": "input", "tokens": span.size, "kept": self.count}
        )
        if parts is not None:
            add_output(edit, parts)
        edit.graph.eliminate_dead_code()

    def check(self, number: int) -> None:
        """Blocks that are not there. Raises BadOption."""
        if self.count < 1 or self.base < 0 or self.base + 2 > number:
            raise BadOption(
                what=f"{self.name}: count={self.count}, base={self.base}", way_out=f"two of {number} blocks generate"
            )
        if self.recover is not None and not self.base + 2 < self.recover < number:
            raise BadOption(
                what=f"{self.name}: recover={self.recover}", way_out=f"blocks are {self.base + 3} to {number - 1}"
            )

    def region(self, edit: Edit, at: Node, span: Span, until: Node | None) -> Region:
        """What runs on semantic tokens. Raises CannotShrink."""
        region = region_of(edit, at, span, ordered=True, until=until)
        for source, _ in region.crossings:
            raise CannotShrink(
                axis=place(source), reason="it belongs to tokens by their place; semantic ones have none"
            )
        if early := [(end, user) for end, user in region.ends if end is not until]:
            why = region.blocked[0].reason if region.blocked and until is None else "it is read behind that block"
            raise CannotShrink(
                axis=place(early[0][1]), reason=f"it wants all tokens ({why}), which recover=BLOCK brings back"
            )
        return region

    def centres(self, edit: Edit, block: Block, span: Span) -> Node:
        """The learned centres, (1, count, c)."""
        value = block.entry.meta["val"]
        seeded = torch.Generator().manual_seed(self.seed)
        centres = torch.randn(1, self.count, int(value.shape[-1]), generator=seeded) * 0.02
        return edit.add_tensor(f"{block.name}.centres", centres.to(value.dtype), parameter=True)


def generate(edit: Edit, block: Block, region: Region, count: int) -> Node:
    """Pool the image tokens and let a block refine the pooled by all; gives the image tokens."""
    attention, span, entry = attention_of(edit, block.attention.node), region.where, block.entry
    first = region.nodes[0]

    def pooled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = x[:, span.start : span.stop]
        side, few = math.isqrt(span.size), math.isqrt(count)
        cells = _pooled(_pooled(image.unflatten(1, (side, side)), 1, few), 2, few).flatten(1, 2)
        tokens = _among(x, cells, span.start, span.stop)
        return image, tokens, torch.cat([tokens, image], 1)

    if block.dim != 1:
        raise CannotShrink(axis=place(entry), reason="its tokens do not run along the second dimension")
    image, few, both = inline(edit, pooled, entry, like=first)
    around = on_tokens(edit, [attention.key, attention.value], entry, 1, both, logits_of(attention)[0])
    samples = int(entry.meta["val"].shape[0])
    index = edit.call(torch.ops.aten.zeros.default, ([samples, count],), {"dtype": torch.int64}, like=first)
    cut(edit, region, Kept(index)).replace_all_uses_with(few)
    attend(edit, attention, *around)
    found: Node = image
    return found


def refine(edit: Edit, block: Block, image: Node, span: Span, count: int, centres: Node, trace: bool) -> Node | None:
    """The second block: centres are added to its queries, its keys and values are of the few and the image.

    With `trace`, gives which of the few looks most at each image token, (b, span) int64.
    """
    attention = attention_of(edit, block.attention.node)
    start = logits_of(attention)[0]
    behind = int(block.entry.meta["val"].shape[1]) - span.start - count

    def joined(few: Tensor, image: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        centred = few + (pad(centres, (0, 0, span.start, behind)) if span.start or behind else centres)
        return centred, torch.cat([few, image], 1)

    centred, both = inline(edit, joined, block.entry, image, centres, like=first_reader(block.entry))
    (query,) = on_tokens(edit, [attention.query], block.entry, 1, centred, start)
    around = on_tokens(edit, [attention.key, attention.value], block.entry, 1, both, start)
    parts = _looked_at(edit, block, query, around[0], span, count, like=start) if trace else None
    start.replace_input_with(attention.query, query)
    attend(edit, attention, *around)
    return parts


def _looked_at(edit: Edit, block: Block, query: Node, key: Node, span: Span, count: int, like: Node) -> Node:
    """For each image token, whose keys stand last, the semantic token that attends to it most, mean over heads."""
    samples = int(block.entry.meta["val"].shape[0])

    attention = attention_of(edit, block.attention.node)

    def looked(query: Tensor, key: Tensor) -> Tensor:
        key = key.transpose(-1, -2) if attention.turned else key
        own = heads(query, samples)
        view = View(own, own, repeated(heads(key, samples), own.shape[1]), scale=attention.scale)
        rows = view.rows(slice(span.start, span.start + count)).mean(1)
        return part_of(Kept(None, matrix=rows[:, :, rows.shape[2] - span.size :]), span.size)

    found: Node = inline(edit, looked, query, key, like=like)
    return found


def scale(edit: Edit, own: Sequence[Block]) -> None:
    """Scale what the blocks add to their tokens, channel by channel, by 1e-5 at first."""
    nodes = {node.name: node for node in edit.graph.nodes}
    order = {node: number for number, node in enumerate(edit.graph.nodes)}
    found = [(nodes[each.total.name], nodes[each.branch.name]) for each in branches(edit.program)[0]
             if each.total.name in nodes and each.branch.name in nodes]  # fmt: skip
    for block in own:
        halves = [(total, branch) for total, branch in found if order[block.entry] < order[total] <= order[block.end]]
        for number, (total, branch) in enumerate(halves, 1):
            value = branch.meta["val"]
            factor = torch.full((int(value.shape[-1]),), 1e-5, dtype=value.dtype)
            weight = edit.add_tensor(f"{block.name}.scale{number}", factor, parameter=True)
            total.replace_input_with(branch, edit.call(torch.ops.aten.mul.Tensor, (branch, weight), like=total))


def bring_back(edit: Edit, own: Sequence[Block], whole: Node, image: Node, span: Span, count: int) -> None:
    """Image tokens again: those of in front, which look at the semantic ones in the block behind."""
    few, block = own[0].end, own[1]

    def joined(few: Tensor, image: Tensor) -> Tensor:
        return _among(few, image, span.start, span.start + count)

    again = inline(edit, joined, few, image, like=first_reader(whole))
    whole.replace_all_uses_with(again)
    attention = attention_of(edit, block.attention.node)
    around = on_tokens(edit, [attention.key, attention.value], again, 1, few, logits_of(attention)[0])
    attend(edit, attention, *around)


def _pooled(x: Tensor, dim: int, few: int) -> Tensor:
    """The largest of each of `few` windows that cover a dimension: adaptive pooling, in operators that compile."""
    size = x.shape[dim]
    windows = [(n * size // few, -(-(n + 1) * size // few)) for n in range(few)]
    return torch.stack([x.narrow(dim, start, stop - start).amax(dim) for start, stop in windows], dim)


def _among(x: Tensor, new: Tensor, start: int, stop: int) -> Tensor:
    """`x` with other tokens in the place of those from `start` to `stop`."""
    pieces = [x[:, :start], new, x[:, stop:]]
    return torch.cat([piece for piece in pieces if piece.shape[1]], 1)
