"""Attention between two sets of tokens, made of a captured block's own: queries of some, keys and values of others.

before  x -> norm -> qkv -> attention(q, k, v)
after   x -> norm -> q -----> attention(q, k', v')
        y -> norm -> k', v' -/                       the same weights
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn.functional import linear

from graphopt.cost.formulas import base_name
from graphopt.cut import Kept, cut
from graphopt.edit import Edit
from graphopt.errors import CannotShrink
from graphopt.inline import inline
from graphopt.passes.tokens.attention import Attention, attentions
from graphopt.place import place
from graphopt.region import Span, ancestors, descendants, region_of

_VIEWS = ("view", "reshape", "_unsafe_view", "permute", "transpose", "unsqueeze", "squeeze", "contiguous", "clone")
_SEVERAL = ("unbind", "split", "split_with_sizes", "chunk", "tensor_split")
_PIECES = ("select", "slice", "narrow")  # and items of what gives several


def attention_of(edit: Edit, node: Node) -> Attention:
    """The attention whose fused call, or softmax, `node` is, as the graph is now."""
    return next(each for each in attentions(edit) if each.node is node)


def first_reader(node: Node) -> Node:
    """The first call that reads a value."""
    order = {each: number for number, each in enumerate(node.graph.nodes)}
    return min(node.users, key=order.__getitem__)


def attend(edit: Edit, attention: Attention, key: Node, value: Node) -> None:
    """Let an attention look at other keys and values, of as many tokens as there may be.

    Raises:
        CannotShrink: its logits get something by the places of tokens (a mask), or are reshaped to given sizes.
    """
    middle = logits_of(attention)
    middle[0].replace_input_with(attention.key, key)
    attention.result.replace_input_with(attention.value, value)
    try:
        for node in middle:
            edit.infer(node)
    except (RuntimeError, ValueError) as problem:
        raise CannotShrink(
            axis=place(attention.node), reason="its map is reshaped to sizes that are given"
        ) from problem


def logits_of(attention: Attention) -> list[Node]:
    """The calls from the product of queries and keys to the last. Raises CannotShrink where logits hang on more."""
    if attention.fused and attention.mask is None and not attention.causal:
        return [attention.node]
    found = [attention.result]
    while not attention.fused and attention.key not in found[-1].all_input_nodes:
        computed = [each for each in found[-1].all_input_nodes if each is not attention.value]
        if len(computed) != 1:
            break
        found += computed
    if attention.key in found[-1].all_input_nodes and not attention.fused:
        return found[::-1]
    raise CannotShrink(axis=place(attention.node), reason="not all queries look at all keys alike: it has a mask")


def on_tokens(edit: Edit, wanted: Sequence[Node], entry: Node, dim: int, tokens: Node, before: Node) -> list[Node]:
    """Copies, in front of `before`, of what is computed from `entry`, computed from `tokens` instead.

    Args:
        edit: the graph.
        wanted: calls behind `entry`, which has its tokens along `dim`.
        entry: what they are computed from.
        dim: see `entry`.
        tokens: shaped as `entry`, which has several tokens; these may be any number.
        before: stands behind all that these calls read.

    Raises:
        CannotShrink: something on the way belongs to the tokens of `entry`: their positions, as a rule.
    """
    order = list(edit.graph.nodes)
    behind = descendants(order, entry)
    needed: set[Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node in behind and node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    alias = edit.call(torch.ops.aten.alias.default, (entry,), like=before)
    copies: dict[Node, Node] = {entry: alias}
    for node in order:
        if node in needed:
            with edit.graph.inserting_before(before):
                copies[node] = edit.graph.node_copy(node, lambda source: copies.get(source, source))
            edit.inserted.append(copies[node])
    if tokens is entry:
        alias.replace_all_uses_with(entry)
        edit.graph.erase_node(alias)
        return [copies[node] for node in wanted]
    size, count = (int(each.meta["val"].shape[dim]) for each in (entry, tokens))
    region = region_of(edit, alias, Span(dim, 0, size), ordered=True)
    if region.blocked:
        raise CannotShrink(axis=region.blocked[0].where, reason=region.blocked[0].reason)
    for source, _ in region.crossings:
        raise CannotShrink(axis=place(source), reason="it belongs to the tokens of its block, and others have none")
    samples = int(entry.meta["val"].shape[0]) if dim else 1
    # A stand-in: who reads what it gives reads `tokens` below.
    index = edit.call(torch.ops.aten.zeros.default, ([samples, count],), {"dtype": torch.int64}, like=region.nodes[0])
    reduced = cut(edit, region, Kept(index))
    reduced.replace_all_uses_with(tokens)
    return [copies[node] for node in wanted]


def split_projection(edit: Edit, attention: Attention) -> None:
    """Where queries, keys and values come from one linear layer, let each come from its rows of the weight.

    So each can be computed for other tokens. The weight is one parameter still, of which slices are taken.
    """
    order = list(edit.graph.nodes)
    roots = [attention.query, attention.key, attention.value]
    above = [ancestors(root) for root in roots]
    for layer in order:
        if base_name(layer) != "linear" or sum(layer in own for own in above) < 2:
            continue
        pieces = _pieces(layer)
        if pieces is None or layer.args[0] in pieces:
            continue
        for piece in pieces:
            _from_rows(edit, layer, piece)
    edit.graph.eliminate_dead_code()


def _pieces(layer: Node) -> list[Node] | None:
    """The calls that take a part of what a layer gives, by views; None where something reads it otherwise."""
    found, todo = [], list(layer.users)
    while todo:
        node = todo.pop()
        name = base_name(node)
        if node.target is operator.getitem or name in _PIECES:
            found.append(node)
        elif name in _VIEWS or name in _SEVERAL:
            todo += node.users
        else:
            return None
    return found


def _from_rows(edit: Edit, layer: Node, piece: Node) -> None:
    """Let `piece` come from the rows of a layer's weight that it consists of, where that is a run of rows."""
    shape = tuple(layer.meta["val"].shape)
    probe = _followed(layer, piece, torch.arange(layer.meta["val"].numel()).view(shape))
    wide = shape[-1]
    start, width = int(probe.flatten()[0]) % wide, probe.numel() // (layer.meta["val"].numel() // wide)
    lead = list(range(len(shape) - 1))
    steps = [
        int(probe.select(n, 1).flatten()[0] - probe.flatten()[0]) if s > 1 else 0 for n, s in enumerate(probe.shape)
    ]
    inner = sorted((n for n, step in enumerate(steps) if 0 < step < wide), key=lambda n: -steps[n])
    strides = torch.empty(shape, device="meta").stride()
    order: list[int] = []
    for n, step in enumerate(steps):
        if n in inner:
            order.append(len(lead) + inner.index(n))
        else:
            order += [
                m for m in lead if shape[m] == probe.shape[n] and m not in order and strides[m] == (step or strides[m])
            ][:1]
    sizes = [*shape[:-1], *(probe.shape[n] for n in inner)]
    if sorted(order) != list(range(len(sizes))):
        return

    def taken(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = slice(start, start + width)
        y = linear(x, weight[rows], bias[rows] if bias is not None else None)
        return y.reshape(sizes).permute(order)

    whole = torch.arange(layer.meta["val"].numel()).view(shape)
    if width > wide - start or not torch.equal(whole[..., start : start + width].reshape(sizes).permute(order), probe):
        return
    bias = layer.args[2] if len(layer.args) > 2 else layer.kwargs.get("bias")
    new = inline(edit, taken, layer.args[0], layer.args[1], bias, like=piece)
    edit.replace(piece, new)


def _followed(layer: Node, piece: Node, values: Tensor) -> Tensor:
    """What `piece` is where `layer` gives `values`."""
    way = [piece]
    while way[-1] is not layer:
        way.append(way[-1].all_input_nodes[0])
    known: dict[Node, Any] = {layer: values}
    for node in way[-2::-1]:
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    found = known[piece]
    assert isinstance(found, Tensor)
    return found
