"""Which tokens may go, and which never: class tokens, text beside an image."""

from __future__ import annotations

import re

from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from graphopt.axes import Axes, find, results_of
from graphopt.cost.formulas import base_name
from graphopt.errors import BadOption
from graphopt.passes.tokens.sites import Site
from graphopt.program import Program
from graphopt.region import Span


def span_of(axes: Axes, site: Site, given: str | None) -> Span:
    """The tokens that may go at a place.

    Where the user does not say: of a sequence that was put together (class token and patches, text and image), what was
    computed from values (an image, sound), not from words and not from stored tensors alone; else all.

    Raises:
        BadOption: `given` is no START:STOP of these tokens; or attention is causal, and which tokens are an image's
            cannot be told.
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
        first, last = max(places, key=lambda place: place[1] - place[0])
        return Span(site.dim, first, last)
    if site.attention is not None and site.attention.fused and site.attention.causal:
        raise BadOption(
            what=f"which of the {size} tokens are an image's cannot be told", way_out="name them: tokens=START:STOP"
        )
    return Span(site.dim, 0, size)


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


def _measured(program: Program) -> set[Node]:
    """The calls that are computed from the user's floating-point inputs."""
    specs = program.exported.graph_signature.input_specs
    users = {spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT}
    found: set[Node] = set()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in users:
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2:
                found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
