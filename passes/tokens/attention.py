"""Attention in a graph, fused or written out: its queries, keys, values, and what is added to its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes.axes import is_pointwise
from graphopt.cost.formulas import base_name
from graphopt.edit import Edit
from graphopt.inline import inline

_FUSED = "scaled_dot_product_attention"
_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
_PRODUCTS = ("matmul", "bmm", "baddbmm")
_VIEWS = ("view", "reshape", "_unsafe_view", "expand", "clone", "contiguous", "unsqueeze", "squeeze")
_FAR = 12


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention, of b samples, h heads, n queries, m keys.

    `node` is the fused call, or the softmax (over the last dimension) of a written-out one. `query` (..., n, d), `key`
    (..., m, d), or (..., d, m) where `turned`, `value` (..., m, e). `result` is the last call of it. Written out, its
    logits are multiplied by `factor`, and `adding` adds a mask to them.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    result: Node
    turned: bool
    factor: float = 1.0
    adding: Node | None = None

    @property
    def fused(self) -> bool:
        """Whether it is one call, so that its map is never there."""
        return base_name(self.node) == _FUSED

    def argument(self, place: int, name: str) -> object:
        """An argument of the fused call."""
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name)

    @property
    def mask(self) -> object:
        """The mask, (..., n, m), added or boolean; None where there is none."""
        if self.fused:
            return self.argument(3, "attn_mask")
        return None if self.adding is None else _summand(self.adding)

    @property
    def causal(self) -> bool:
        """Whether a fused call lets queries see only keys up to their own place."""
        return self.fused and bool(self.argument(5, "is_causal"))

    @property
    def scale(self) -> float:
        """What logits are multiplied with."""
        if not self.fused:
            return self.factor
        given = self.argument(6, "scale")
        return float(given) if given is not None else float(self.query.meta["val"].shape[-1]) ** -0.5  # type: ignore[arg-type]


def attentions(edit: Edit) -> list[Attention]:
    """All of a graph, in order."""
    found = []
    for node in edit.graph.nodes:
        if node.op != "call_function":
            continue
        if base_name(node) == _FUSED:
            query, key, value = node.args[:3]
            found.append(Attention(node, query, key, value, node, turned=False))
        elif base_name(node) in _SOFTMAX and (written := _written_out(node)) is not None:
            found.append(written)
    return found


def _written_out(softmax: Node) -> Attention | None:
    """The attention that a softmax is the middle of."""
    rank, dim = softmax.meta["val"].dim(), softmax.args[1]
    if rank < 3 or not isinstance(dim, int) or dim % rank != rank - 1:
        return None
    before = softmax
    factor, adding = 1.0, None
    for _ in range(_FAR):
        name, others = base_name(before), list(before.args[1:2])
        if name in ("mul", "div") and isinstance(others[0], (int, float)):
            factor *= others[0] if name == "mul" else 1 / others[0]
        elif name == "add" and rank == 4:
            adding = before
        mask = _summand(before) if before is adding else None
        sources = [each for each in before.all_input_nodes if each.op == "call_function" and each is not mask]
        products = [each for each in sources if base_name(each) in _PRODUCTS]
        if products:
            before = products[0]
            break
        if len(sources) != 1 or not (is_pointwise(sources[0]) or base_name(sources[0]) in _VIEWS):
            return None
        before = sources[0]
    else:
        return None
    after = softmax
    for _ in range(_FAR):
        if len(after.users) != 1:
            return None
        after = next(iter(after.users))
        if base_name(after) in _PRODUCTS:
            break
        if not (is_pointwise(after) or base_name(after) in _VIEWS):
            return None
    else:
        return None
    query, key = before.all_input_nodes[-2:]
    value = after.all_input_nodes[-1]
    return Attention(softmax, query, key, value, after, turned=True, factor=factor, adding=adding)


def _summand(total: Node) -> Node | None:
    """What a call adds to logits."""
    return next((each for each in total.all_input_nodes if not _is_logits(each)), None)


def _is_logits(node: Node) -> bool:
    """Whether a value is a product, or is computed from one alone by views and numbers."""
    for _ in range(_FAR):
        if base_name(node) in _PRODUCTS:
            return True
        sources = [each for each in node.all_input_nodes if each.op == "call_function"]
        if len(sources) != 1 or not (is_pointwise(node) or base_name(node) in _VIEWS):
            return False
        node = sources[0]
    return False


def add_to_keys(edit: Edit, attention: Attention, bias: Node) -> None:
    """Add `bias` (b, m) to the logits of every key, for all heads and queries (ToMe's proportional attention)."""
    node = attention.node
    if attention.fused:
        mask, causal = attention.mask, attention.causal
        query, key = attention.query, attention.key

        def masked(bias: Tensor, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
            own = bias.reshape(bias.shape[0], *[1] * (query.dim() - 2), bias.shape[1]).to(query.dtype)
            if mask is not None and mask.dtype is torch.bool:
                return torch.where(mask, own, -torch.inf)
            if mask is not None:
                return own + mask
            if causal:
                seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
                return torch.where(seen, own, -torch.inf)
            return own

        new = inline(edit, masked, bias, mask, query, key, like=node)
        kwargs = dict(node.kwargs)
        dropout = node.args[4] if len(node.args) > 4 else kwargs.pop("dropout_p", 0.0)
        node.args = (*node.args[:3], new, dropout, False)
        node.kwargs = {name: value for name, value in kwargs.items() if name not in ("attn_mask", "is_causal")}
        edit.infer(node)
        return

    logits = node.args[0]
    assert isinstance(logits, Node)

    def added(logits: Tensor, bias: Tensor) -> Tensor:
        copies = logits.numel() // (logits.shape[-1] * logits.shape[-2] * bias.shape[0])
        if logits.dim() == 3:  # heads and samples in one dimension
            own = bias[:, None].expand(-1, copies, -1).reshape(-1, 1, bias.shape[1])
        else:
            own = bias.reshape(bias.shape[0], *[1] * (logits.dim() - 2), bias.shape[1])
        return logits + own.to(logits.dtype)

    new = inline(edit, added, logits, bias, like=node)
    node.replace_input_with(logits, new)
    edit.infer(node)
