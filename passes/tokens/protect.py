"""Which tokens may go, and which never: class tokens, text beside an image."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from graphopt.axes import Axes, atoms, find, results_of
from graphopt.cost.formulas import base_name
from graphopt.errors import BadOption
from graphopt.observe import watch
from graphopt.passes.tokens.attention import Attention
from graphopt.passes.tokens.sites import Site
from graphopt.program import Program
from graphopt.region import Span


def span_of(axes: Axes, site: Site, given: str | None, first: Site | None = None, others: str = "") -> Span:
    """The tokens that may go at a place.

    Where the user does not say: those that earlier passes left of what may go at the stream's `first` place. There, of
    a sequence that was put together (class token and patches, text and image), what was computed from values (an image,
    sound), not from words and not from stored tensors alone; else all but the first and last ones that the model takes
    from the others behind the place (BERT's [CLS]).

    Raises:
        BadOption: `given` is no START:STOP of these tokens; or which tokens are an image's cannot be told, and some are
            text for sure: attention is causal, or the image is put where words say, or there are nothing but words.
            `others` is what it says of other sequences of tokens.
    """
    size = int(site.at.meta["val"].shape[site.dim])
    if given is not None:
        found = re.fullmatch(r"(\d*):(-?\d*)", given.strip())
        start = int(found[1] or 0) if found else 0
        stop = int(found[2] or size) if found else 0
        stop = stop + size if stop < 0 else stop
        if not 0 <= start < stop <= size:
            raise BadOption(what=f"tokens={given} of {size}", way_out="give START:STOP, such as 1: or 5:581")
        return Span(site.dim, start, stop)
    if first is not None:
        there, gone = span_of(axes, first, None, others=others), int(first.at.meta["val"].shape[first.dim]) - size
        return Span(site.dim, there.start, there.stop - gone)
    node = next(each for each in axes.program.graph.nodes if each.name == site.at.name)
    parts = _put_together(axes, node, site.dim)
    measured = _measured(axes.program)
    places = []
    start = 0
    for part in parts:
        value = part.meta["val"]
        count = int(value.shape[site.dim])
        if part in measured:
            places.append((start, start + count))
        start += count
    if places and start == size:
        # Several images: from the first to the last would take the text between them; the longest one it is.
        low, high = max(places, key=lambda place: place[1] - place[0])
        return Span(site.dim, low, high)
    flat = _measured(axes.program, 2)
    scattered = _scattered(axes, node, site.dim, flat)
    attention = site.attention or site.following
    if scattered is not None or (attention is not None and _is_causal(axes.program, attention, size)):
        seen = _places(axes.program, scattered) if scattered is not None else None
        raise BadOption(
            what=f"which of the {size} tokens are an image's cannot be told",
            way_out=f"name them: tokens=START:STOP{others}"
            if seen is None
            else f"name them: tokens={seen}, if they are always where they are in the example inputs{others}",
        )
    if attention is None and node not in flat:  # words in a scan: each is read behind all in front of it
        raise BadOption(
            what=f"which of the {size} words may go cannot be told", way_out=f"name them: tokens=START:STOP{others}"
        )
    alone = _taken_alone(axes, node, site.dim)
    start = next(place for place in range(size + 1) if place not in alone)
    stop = next(place for place in range(size, -1, -1) if place - 1 not in alone)
    return Span(site.dim, start, stop) if start < stop else Span(site.dim, 0, size)


def _taken_alone(axes: Axes, stream: Node, dim: int) -> set[int]:
    """The tokens that some call behind takes by their number, one alone."""
    own = atoms(results_of(axes.dims[stream])[0][dim])
    nodes = list(axes.program.graph.nodes)
    found: set[int] = set()
    for node in nodes[nodes.index(stream) :]:
        if base_name(node) != "select" or not isinstance(node.args[2], int):
            continue
        dims = results_of(axes.dims[node.args[0]])[0]
        place = int(node.args[1]) % len(dims)
        if atoms(dims[place]) == own:
            found.add(node.args[2] % dims[place].extent)
    return found


def _put_together(axes: Axes, stream: Node, dim: int) -> list[Node]:
    """What was concatenated to make the tokens of a stream, by the last call in front of it that did; or nothing."""
    root = find(results_of(axes.dims[stream])[0][dim])
    found: list[Node] = []
    for node in axes.program.graph.nodes:
        if node.op == "call_function" and base_name(node) in ("cat", "concat", "concatenate"):
            rank = node.meta["val"].dim()
            place = int(node.args[1]) % rank if len(node.args) > 1 else 0
            if place == dim and find(results_of(axes.dims[node])[0][place]) is root:
                found = list(node.args[0])
        if node is stream:
            break
    return found


def _scattered(axes: Axes, stream: Node, dim: int, measured: set[Node]) -> Node | None:
    """The call that writes what was computed from values to some of a stream's tokens, which its mask tells."""
    root = find(results_of(axes.dims[stream])[0][dim])
    for node in axes.program.graph.nodes:
        if base_name(node) in ("masked_scatter", "masked_scatter_") and measured & set(node.all_input_nodes):
            dims = results_of(axes.dims[node])[0]
            if node.args[0] not in measured and len(dims) > dim and find(dims[dim]) is root:
                return node
        if node is stream:
            break
    return None


def _places(program: Program, scattered: Node) -> str | None:
    """START:STOP of the tokens that are written to with the example inputs; None where they are no one segment."""
    mask = scattered.args[1]
    assert isinstance(mask, Node)
    value = _value(program, mask)
    if value is None:
        return None
    rows = value.expand(scattered.meta["val"].shape).any(-1).reshape(-1, value.shape[-2])
    places = rows[0].nonzero()[:, 0].tolist()
    if not places or (rows != rows[0]).any() or places != list(range(places[0], places[-1] + 1)):
        return None
    return f"{places[0]}:{places[-1] + 1}"


def _is_causal(program: Program, attention: Attention, size: int) -> bool:
    """Whether no token sees those behind it: the call says so, or the mask does, with the example inputs."""
    if attention.causal or size < 2:
        return attention.causal
    mask = attention.mask
    if not isinstance(mask, Node) or mask.meta["val"].shape[-2:] != (size, size):
        return False
    value = _value(program, mask)
    if value is None:
        return False
    behind = value[..., torch.ones(size, size, dtype=torch.bool).triu(1)]
    return not bool(behind.any()) if value.dtype is torch.bool else bool((behind <= _NEVER).all())


def _value(program: Program, node: Node) -> Tensor | None:
    """A value with the example inputs; None where there are none, and it is not stored."""
    if node.name in program.tensors:
        return program.tensors[node.name]
    examples = program.example_inputs
    found: list[Tensor] = []
    if examples is not None:
        watch(program, [examples], [node.name], lambda _, value: found.append(value))
    return found[0] if found else None


_NEVER = -1e4  # what masks add to logits that shall not count, or less


def _measured(program: Program, rank: int = 3) -> set[Node]:
    """The calls that are computed from the user's floating-point inputs, of such a rank or more: no mere numbers."""
    specs = program.exported.graph_signature.input_specs
    users = {spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT}
    found: set[Node] = set()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in users:
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= rank:
                found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
