"""Attention whose heads of keys and values are repeated for the queries that share them, without the repetition."""

from __future__ import annotations

from torch.fx import Node

from graphopt.edit import Edit
from graphopt.exported import op_name
from graphopt.program import Program

_RESHAPES = frozenset({"reshape", "view", "_unsafe_view"})
_COPIES = frozenset({"clone", "contiguous"})


def is_attention(node: Node) -> bool:
    """Whether a call is attention as one operator."""
    return node.op == "call_function" and "scaled_dot_product_attention" in op_name(node)


def unrepeated(program: Program) -> Program:
    """The same program, in which attention itself lets several query heads read one head of keys and values.

        before  k (b h n d) -> unsqueeze (b h 1 n d) -> expand (b h g n d) -> reshape (b (h g) n d) -> attention
        after   k (b h n d) -> attention(enable_gqa)

    The same where repeat_interleave does it. The program given, where there is no such attention.
    """
    if not any(is_attention(node) and _sources(node) for node in program.graph.nodes):
        return program
    edit = Edit(program)
    for node in [node for node in edit.graph.nodes if is_attention(node)]:
        sources = _sources(node)
        if sources is None:
            continue
        repeated = node.args[1:3]
        node.args = (node.args[0], *sources, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        edit.infer(node)
        for old in repeated:
            _erase(edit, old)
    return program.replace(exported=edit.finish())


def _sources(call: Node) -> tuple[Node, Node] | None:
    """What keys and values are before they are repeated, as often both; None where they are not."""
    if call.kwargs.get("enable_gqa") or len(call.args) < 3:
        return None
    key, value = call.args[1:3]
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    first, second = _repeated(key), _repeated(value)
    if first is None or second is None or first.meta["val"].shape[-3] != second.meta["val"].shape[-3]:
        return None
    return first, second


def _repeated(node: Node) -> Node | None:
    """What a tensor (b, (h g), n, d) repeats g times, head by head: (b, h, n, d)."""
    name, shape = _name(node), tuple(node.meta["val"].shape)
    if name == "repeat_interleave":
        source, *rest = node.args
        if not isinstance(source, Node) or len(rest) != 2 or not isinstance(rest[0], int):
            return None
        return source if rest[1] in (len(shape) - 3, -3) else None
    if name not in _RESHAPES:
        return None
    expand = _only_input(node)
    while expand is not None and _name(expand) in _COPIES:
        expand = _only_input(expand)
    single = None if expand is None or _name(expand) != "expand" else _only_input(expand)
    source = None if single is None or _name(single) != "unsqueeze" else _only_input(single)
    if expand is None or single is None or source is None:
        return None
    own, wide = tuple(source.meta["val"].shape), tuple(expand.meta["val"].shape)
    if len(own) < 3 or len(wide) != len(own) + 1:
        return None
    times = wide[-3]
    by_head = wide == (*own[:-2], times, *own[-2:]) and tuple(single.meta["val"].shape) == (*own[:-2], 1, *own[-2:])
    return source if by_head and shape == (*own[:-3], own[-3] * times, *own[-2:]) else None


def _name(node: Node) -> str:
    return op_name(node).removeprefix("aten.").partition(".")[0] if node.op == "call_function" else ""


def _only_input(node: Node) -> Node | None:
    return node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None


def _erase(edit: Edit, node: object) -> None:
    """Erase a call that nobody reads, and what only it read."""
    while isinstance(node, Node) and node.op == "call_function" and not node.users:
        following = _only_input(node)
        edit.graph.erase_node(node)
        node = following
