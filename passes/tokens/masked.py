"""A program that keeps all tokens and pays no attention to those that would be gone: DiffRate's form for learning.

    before  x -> attention -> mlp -> ...
    after   x -> attention -> sort, merge in place -> mlp -> ...      softmax(q k' + log size) * policy, to sum 1

How many tokens stay is in two tables that the program reads, (places, span): entry j is 1 where the token of rank j
stays when some are dropped, or when some of those are merged. With tables of zeros and ones it computes what the
program on fewer tokens does; it can be differentiated by them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import normalize, one_hot, pad

from graphopt.cost.formulas import base_name
from graphopt.cut import Kept, cut
from graphopt.errors import BadOption
from graphopt.inline import inline
from graphopt.passes.tokens.attention import Attention
from graphopt.passes.tokens.job import Job
from graphopt.passes.tokens.view import View
from graphopt.place import place
from graphopt.program import Program
from graphopt.region import Region, Span

THROUGH, KEPT = "rates.through", "rates.kept"  # the names of the tables
_PICKING = ("select", "slice", "narrow", "index_select", "index", "split", "split_with_sizes", "unbind", "getitem")
_SHOWN = 10.0  # how much more than the largest logit that is seen a hidden one counts as, so that none overflows


def masked(job: Job) -> Program:
    """The program of a job whose reducer is `prune-merge`, as above, with tables of ones.

    Raises:
        BadOption: something else than attention looks at all tokens, or an attention has fewer keys than queries.
    """
    edit = job.edit
    tables = [
        edit.add_tensor(name, torch.ones(len(job.places), job.span.size), parameter=True) for name in (THROUGH, KEPT)
    ]
    counted: Node | None = None
    policy: Node | None = None
    seen: dict[Node, tuple[Attention, Node, Node, Span]] = {}
    for number, site in enumerate(job.places):
        here = Span(site.dim, job.span.start, job.span.stop)
        region = job.region(site, here)
        _check(job, region)

        def hidden(
            view: View, tables: list[Tensor], policy: Tensor | None, number: int = number
        ) -> tuple[Kept, Tensor]:
            if policy is None:
                policy = torch.ones(view.x.shape[0], view.stop - view.start)
            scores = job.score(_without(view, policy))
            return _merged_in_place(view, scores, tables[0][number], tables[1][number], policy)

        kept, policy = job.look(site, here, region, counted, hidden, tables, policy)
        counted = kept.size
        cut(edit, region, kept)
        inside = set(region.nodes)
        for attention in job.attentions:
            if attention.node in inside:
                seen[attention.node] = (attention, policy, counted, Span(0, here.start, here.stop))
    for attention, own, sizes, where in seen.values():
        _attend(job, attention, own, sizes, where)
    edit.graph.eliminate_dead_code()
    return edit.program.replace(exported=edit.finish())


def _check(job: Job, region: Region) -> None:
    """That nothing but attention mixes tokens, and no result has all of them."""
    attending = {node for each in job.attentions for node in (each.node, each.result, *each.node.all_input_nodes)}
    mixing = [node for node, _ in region.ends]
    for node in region.nodes:
        reads = any(region.dims.get(each) and region.along(each) for each in node.all_input_nodes)
        if reads and not region.along(node) and node not in attending and base_name(node) not in _PICKING:
            mixing.append(node)
    if mixing or not region.nodes:
        what = f"{place(mixing[0])} looks at all tokens" if mixing else "nothing runs behind a place"
        raise BadOption(
            what=f"{job.options.name}: rates are searched by what a class token sees, and {what}",
            way_out="give another schedule, or counts",
        )


def _without(view: View, policy: Tensor) -> View:
    """What scores see: attention to tokens that are there."""
    if view.map is not None or view.query is None or view.key is None:
        return view
    n = view.key.shape[2]
    there = (pad(policy, (view.start, n - view.stop), value=1.0) > 0.5)[:, None, None]
    if view.mask is None:
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        return replace(view, mask=there & causal if view.causal else there, causal=False)
    if view.mask.dtype is torch.bool:
        return replace(view, mask=view.mask & there)
    return replace(view, mask=torch.where(there, view.mask, -torch.inf))


def _merged_in_place(view: View, scores: Tensor, through: Tensor, kept: Tensor, policy: Tensor) -> tuple[Kept, Tensor]:
    """The merge as a matrix that leaves every token at its place; and the policy behind it, (b, span).

    Args:
        view: the place.
        scores: (b, span).
        through: (span,) by rank, 1 where a token is not dropped.
        kept: (span,) by rank, 1 where a token is not merged.
        policy: (b, span), 1 where a token is there.
    """
    span = view.stop - view.start
    order = torch.where(policy > 0.5, scores, -torch.inf).argsort(dim=-1, descending=True)
    rank = order.argsort(dim=-1)
    left = policy * through.index_select(0, rank.flatten()).view(rank.shape)
    stay = left * kept.index_select(0, rank.flatten()).view(rank.shape)
    features = normalize(view.tokens, dim=-1)
    likeness = torch.matmul(features, features.transpose(-1, -2))
    best, to = torch.where(stay[:, None] > 0.5, likeness, -torch.inf).max(-1)
    goes = one_hot(to, span).to(view.x.dtype) * ((left > 0.5) & (stay < 0.5))[..., None]  # (b, span, span)
    arrived = goes.transpose(-1, -2)
    matrix = (arrived + torch.eye(span)) / (arrived.sum(-1, keepdim=True) + 1)
    sizes = view.sizes
    size = sizes + torch.matmul(arrived, (sizes * best)[..., None])[..., 0]
    index = torch.arange(span).expand(view.x.shape[0], -1)
    return Kept(index, matrix=matrix, size=size), stay


def _attend(job: Job, attention: Attention, policy: Node, size: Node, where: Span) -> None:
    """Let an attention count keys by their size, and see those that are there; a token always sees itself."""
    node, edit = attention.node, job.edit
    keys = int(attention.key.meta["val"].shape[-1 if attention.turned else -2])
    proportional = job.options.proportional

    def weights(logits: Tensor, policy: Tensor, size: Tensor) -> Tensor:
        samples = policy.shape[0]
        around = (where.start, keys - where.stop)
        own, counted = pad(policy, around, value=1.0), pad(size.log(), around)
        wide = (samples, *[1] * (logits.dim() - 2), keys)
        if logits.shape[0] != samples:  # heads and samples in one dimension
            own, counted = (each.repeat_interleave(logits.shape[0] // samples, 0) for each in (own, counted))
            wide = (logits.shape[0], *wide[1:])
        logits = logits + counted.view(wide) if proportional else logits
        shown = own.view(wide)
        if logits.shape[-2] == keys:
            shown = shown + (1 - shown) * torch.eye(keys)
        top = torch.where(shown > 0.5, logits, -torch.inf).amax(-1, keepdim=True)
        share = (logits - top).clamp(max=_SHOWN).exp() * shown
        return share / share.sum(-1, keepdim=True)

    def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, policy: Tensor, size: Tensor) -> Tensor:
        if k.shape[-3] != q.shape[-3]:
            k, v = (each.repeat_interleave(q.shape[-3] // each.shape[-3], -3) for each in (k, v))
        logits = torch.matmul(q, k.transpose(-1, -2)) * attention.scale
        if mask is not None:
            logits = torch.where(mask, logits, -torch.inf) if mask.dtype is torch.bool else logits + mask
        elif attention.causal:
            logits = torch.where(torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), logits, -torch.inf)
        return torch.matmul(weights(logits, policy, size), v)

    if attention.fused:
        q, k, v = attention.query, attention.key, attention.value
        new = inline(edit, written_out, q, k, v, attention.mask, policy, size, like=node)
    else:
        new = inline(edit, weights, node.args[0], policy, size, like=node)
    edit.replace(node, new)
