"""The weights of core neurons: a prefill program picks them for its prompt, a decode program takes them as inputs.

    prefill   up (n=11008 c), down (c n=11008), a (1, tokens, n)  ->  core(a) (4416)  ->  core_up (4416 c), core_down
    decode    x -> core_up (4416 c) -> silu, mul -> core_down (c 4416)

So they are gathered once a prompt, and the decode program reads no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes, Axis, atoms, infer, results_of
from graphopt.cut import front
from graphopt.edit import Edit
from graphopt.errors import Decline
from graphopt.inline import inline
from graphopt.passes.residual import branches
from graphopt.passes.tokens.cross import first_reader
from graphopt.passes.tokens.neurons import core_neurons, core_size
from graphopt.passes.tokens.sites import hidden_of
from graphopt.place import place
from graphopt.shrink import shrink_in
from graphopt.spec import identifier


def give(edit: Edit, axes: Axes, hidden: Iterable[str], dim: int, rho: float, beta: float) -> dict[str, Node]:
    """Insert what picks the weights of core neurons.

    Args:
        edit: the graph.
        axes: of `edit.program`.
        hidden: names of what the last layers of feed-forward parts read; of one sample, tokens along `dim`.
        dim: see `hidden`.
        rho, beta: see `core_neurons`.

    Returns:
        The picked weights by name; in the graph, not given by the program yet.
    """
    nodes = {node.name: node for node in edit.graph.nodes}
    old = {node.name: node for node in axes.program.graph.nodes}
    found: dict[str, Node] = {}
    for axis, value in _neurons(edit, axes, [old[name] for name in hidden]):
        stored = [(nodes[name], at) for name, at, _ in axes.stored_in(axis)]

        def picked(value: Tensor, weights: list[Tensor], dims: list[int]) -> list[Tensor]:
            core = core_neurons(front(value, dim), rho, beta)[0]
            return [weight.index_select(at, core) for weight, at in zip(weights, dims, strict=True)]

        source = nodes[value.name]
        weights, dims = [node for node, _ in stored], [at for _, at in stored]
        results = inline(edit, picked, source, weights, dims, like=first_reader(source))
        found |= {_name(edit, node): result for node, result in zip(weights, results, strict=True)}
        _note(edit, axes, axis, core_size(axis.extent, beta))
    return found


def take(edit: Edit, beta: float) -> None:
    """Let every feed-forward part of a program run on core neurons, whose weights are inputs."""
    axes = infer(edit.program)
    parts = [hidden for branch in branches(edit.program)[0] if (hidden := hidden_of(branch)) is not None]
    own = [axis for axis, _ in _neurons(edit, axes, parts)]
    if not own:
        edit.declined.append(Decline(edit.program.name, "it has no feed-forward part whose neurons may be chosen"))
        return
    shrink_in(edit, axes, {axis: torch.arange(core_size(axis.extent, beta)) for axis in own})
    nodes = {node.name: node for node in edit.graph.nodes}
    for axis in own:
        for name in dict.fromkeys(name for name, _, _ in axes.stored_in(axis)):
            edit.make_input(nodes[name], _name(edit, nodes[name]))
        _note(edit, axes, axis, core_size(axis.extent, beta))
        edit.count("feed-forward part")
    edit.note("takes the weights of core neurons as inputs; what is lost shows with those that a prefill program gives")


def _neurons(edit: Edit, axes: Axes, hidden: Iterable[Node]) -> Iterator[tuple[Axis, Node]]:
    """The axes of neurons, each once, that what the last layers read ends with; those that may be cut."""
    seen: set[Axis] = set()
    for node in hidden:
        own = atoms(results_of(axes.dims[node])[0][-1])
        if len(own) != 1 or axes.role(own[0]) != "neuron":
            continue  # of attention: heads, and what they have
        if own[0].pinned is not None:
            edit.declined.append(Decline(place(node), f"its neurons cannot be chosen: {own[0].pinned}"))
        elif own[0] not in seen:
            seen.add(own[0])
            yield own[0], node


def _name(edit: Edit, node: Node) -> str:
    """What the picked part of a stored tensor is called, in both programs."""
    return identifier("core_" + edit.target(node).replace(".", "_"))


def _note(edit: Edit, axes: Axes, axis: Axis, core: int) -> None:
    edit.details.append({"part": axes.where(axis), "neurons": axis.extent, "core": core})
