"""Queries and keys of the next block, computed in front of the place where its tokens are reduced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from graphopt.edit import Edit


def computed_early(edit: Edit, at: Node, wanted: Mapping[str, Any], before: Node) -> dict[str, Any]:
    """Copies of what is computed from `at`, and of whatever else stands behind `before`, in front of `before`.

    Values are left out: no score looks at those of a block that has not run yet.
    """
    order = {node: place for place, node in enumerate(edit.graph.nodes)}
    limit = order[before]
    copies: dict[Node, Node] = {}
    roots = [node for name, node in wanted.items() if isinstance(node, Node) and name != "value"]
    todo, seen = list(roots), set(roots)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen and order[source] >= limit:
                seen.add(source)
                todo.append(source)
    needed = sorted((node for node in seen if order[node] >= limit), key=order.__getitem__)
    for node in needed:
        with edit.graph.inserting_before(before):
            copies[node] = edit.graph.node_copy(node, lambda source: copies.get(source, source))
    found = {name: copies.get(node, node) if isinstance(node, Node) else node for name, node in wanted.items()}
    found["value"] = found["key"]
    return found
