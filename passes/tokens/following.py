"""Queries and keys of the next block, computed in front of the place where its tokens are reduced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from graphopt.cut import Kept, cut
from graphopt.edit import Edit
from graphopt.region import Span, region_of


def computed_early(
    edit: Edit, at: Node, dim: int, wanted: Mapping[str, Any], before: Node, *, last: bool
) -> dict[str, Any]:
    """Copies of what is computed from `at`, and of whatever else stands behind `before`, in front of `before`.

    Values are left out: no score looks at those of a block that has not run yet.

    Args:
        edit: the graph.
        at: the stream, tokens along `dim`.
        dim: see `at`.
        wanted: nodes by name, "query" among them.
        before: where the copies go.
        last: compute the query of the last token only.
    """
    found = {name: node for name, node in wanted.items() if name not in ("query", "value")}
    found |= _copied(edit, found, before)
    query = {"query": wanted["query"]}
    if last:
        count = int(at.meta["val"].shape[dim])
        alias = edit.call(torch.ops.aten.alias.default, (at,), like=before)
        query = _copied(edit, query, before, {at: alias})
        region = region_of(edit, alias, Span(dim, 0, count), ordered=True)
        if not region.blocked and region.nodes:
            samples = int(at.meta["val"].shape[0]) if dim else 1
            index = edit.call(
                torch.ops.aten.full.default, ([samples, 1], count - 1), {"dtype": torch.int64}, like=region.nodes[0]
            )
            cut(edit, region, Kept(index))
    else:
        query = _copied(edit, query, before)
    found |= query
    found["value"] = found["key"]
    return found


def _copied(
    edit: Edit, wanted: Mapping[str, Any], before: Node, instead: Mapping[Node, Node] | None = None
) -> dict[str, Any]:
    """What is wanted, computed in front of `before`; from other nodes where `instead` says so."""
    order = {node: place for place, node in enumerate(edit.graph.nodes)}
    limit = order[before]
    copies: dict[Node, Node] = dict(instead or {})
    roots = [node for node in wanted.values() if isinstance(node, Node)]
    todo, seen = list(roots), set(roots)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen and order[source] >= limit:
                seen.add(source)
                todo.append(source)
    for node in sorted((node for node in seen if order[node] >= limit), key=order.__getitem__):
        with edit.graph.inserting_before(before):
            copies[node] = edit.graph.node_copy(node, lambda source: copies.get(source, source))
        edit.inserted.append(copies[node])
    return {name: copies.get(node, node) if isinstance(node, Node) else node for name, node in wanted.items()}
