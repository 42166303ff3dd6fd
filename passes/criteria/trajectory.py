"""What follows on an axis in a program: run for several items at a time, each of them zero once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.axes import Axes, Axis, atoms, find, owner, results_of
from graphopt.exported import arguments, user_output_places
from graphopt.passes.criteria.uses import given, op, uses
from graphopt.program import Program

Values = Mapping[Node, Any]
# Items that run at a time, at most: more do not make products larger in a way that counts.
_MOST = 32
# Values that are alive at a time when a program runs, about, in units of the largest.
_ALIVE = 6


def everything(program: Program, batch: Mapping[str, Tensor]) -> dict[Node, Any]:
    """All values of one run."""
    given = iter(arguments(program.exported, batch))
    values: dict[Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "call_function":
            values[node] = _call(node, values)
    return values


def _call(node: Node, values: Values) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    if op(node) in _BATCH_NORMS:  # vmap has no rule for these and would run item by item
        call = map_arg(given(node), values.__getitem__)
        if not call.get("training"):
            own = _batch_norm(
                *(call[name] for name in ("input", "weight", "bias", "running_mean", "running_var", "eps"))
            )
            return own if op(node) == "batch_norm" else (own, own.new_empty(0), own.new_empty(0))
    return node.target(*args, **kwargs)  # type: ignore[operator]


_BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    shape = [1, -1, *[1] * (x.dim() - 2)]
    return x * scale.view(shape) + shift.view(shape)


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _outputs(program: Program) -> list[Node]:
    results: Any = program.graph.output_node().args[0]
    return [results[place] for place in user_output_places(program.exported) if isinstance(results[place], Node)]


def features_of(axes: Axes) -> list[Node]:
    """The values through which everything passes that depends on the inputs and a weight: the trajectory.

    Of several without a layer between them the last. Where there are fewer than two, the inputs of all layers.
    """
    order = list(axes.program.graph.nodes)
    place = {node: at for at, node in enumerate(order)}
    layers = {use.node for use in uses(axes)}
    last = {node: max((place[user] for user in node.users), default=-1) for node in order}
    ends = set(_outputs(axes.program))
    weighted: set[Node] = set()
    alive: set[Node] = set()
    cuts: list[tuple[Node, int]] = []  # and how many layers are up to there
    count = 0
    for at, node in enumerate(order):
        alive = {value for value in alive if last[value] > at}
        count += node in layers
        if node.op == "call_function" and (node in layers or not weighted.isdisjoint(node.all_input_nodes)):
            weighted.add(node)
            if last[node] > at:
                alive.add(node)
            if alive == {node} and _is_float(node) and node.meta["val"].dim() > 1 and node not in ends:
                cuts = [cut for cut in cuts if cut[1] != count]
                cuts.append((node, count))
    if len(cuts) > 1:
        return [node for node, _ in cuts]
    sources = {use.source: None for use in uses(axes) if use.source in weighted and _is_float(use.source)}
    return [node for node in sources if node.meta["val"].dim() > 1]


@dataclass(frozen=True, eq=False)
class Suffix:
    """What follows on an atom: the calls whose values change when an item of it goes, in order.

    `first` are those whose inputs do not change, so that their value is known; `masked` those whose results have the
    axis, with the dimensions; `features` and `outputs` those that are compared.
    """

    atom: Axis
    calls: tuple[Node, ...]
    first: frozenset[Node]
    masked: Mapping[Node, list[tuple[int, int, Tensor]]]
    features: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @classmethod
    def of(cls, axes: Axes, atom: Axis, features: Sequence[Node]) -> Suffix | None:
        """Of an atom; None where no computed value has it."""
        atom = find(atom)
        ends = [node for node in _outputs(axes.program) if _is_float(node)][:1]
        needed = set(features) | set(ends)
        for node in reversed(axes.program.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        masked, first = {}, set()
        changed: dict[Node, None] = {}
        for node in axes.program.graph.nodes:
            if node.op != "call_function" or node not in needed:
                continue
            own = list(_masks(axes, node, atom))
            if own:
                masked[node] = own
            if any(source in changed for source in node.all_input_nodes):
                changed[node] = None
            elif own:
                changed[node] = None
                first.add(node)
        if not masked:
            return None
        own_features = tuple(node for node in features if node in changed)
        outputs = tuple(node for node in ends if node in changed)
        return cls(atom, tuple(changed), frozenset(first), masked, own_features, outputs)

    def distances(self, values: Values, rows: Mapping[Node, tuple[int, Tensor]], memory: int) -> tuple[Tensor, Tensor]:
        """For each item how far features and outputs move without it: two of (extent,), float64.

        Args:
            values: those of a run with all items.
            rows: for each feature the dimension of its columns, and which of its rows count.
            memory: bytes that the values of the items that run at a time may take, about.
        """
        grams = {node: _gram(values[node], *rows[node]) for node in self.features}

        def moved(mask: Tensor) -> tuple[Tensor, Tensor]:
            bend, apart = mask.new_zeros(()), mask.new_zeros(())
            for node, value in self._run(values, mask):
                if node in grams:
                    bend = bend + (_gram(value, *rows[node]) - grams[node]).square().sum()
                if node in self.outputs:
                    apart = apart + divergence(values[node], value)
            return bend, apart

        largest = max(
            (v.numel() * v.element_size() for n in self.calls if isinstance(v := values[n], Tensor)), default=1
        )
        each = max(1, min(_MOST, self.atom.extent, memory // (_ALIVE * max(largest, 1))))
        masks = 1 - torch.eye(self.atom.extent, dtype=torch.float64)
        results = [_batched(moved, part) for part in masks.split(each)]
        bend, apart = (torch.cat(parts) for parts in zip(*results, strict=True))
        return bend, apart

    def _run(self, known: Values, mask: Tensor) -> Iterator[tuple[Node, Any]]:
        """Each call that is compared, with its value when the atom's items are multiplied with `mask`."""
        last: dict[Node, Node] = {}
        for node in self.calls:
            for source in node.all_input_nodes:
                last[source] = node
        values = _Layered(known)
        for node in self.calls:
            value = known[node] if node in self.first else _call(node, values)
            for result, place, items in self.masked.get(node, ()):
                value = _times(value, result, place, torch.where(items >= 0, mask[items.clamp_min(0)], 1.0))
            values.own[node] = value
            if node in self.features or node in self.outputs:
                yield node, value
            for source in node.all_input_nodes:
                if last[source] is node:
                    values.own.pop(source, None)


class _Layered(dict[Node, Any]):
    """Values of a suffix over those of the whole run."""

    def __init__(self, known: Values) -> None:
        super().__init__()
        self.known, self.own = known, {}  # type: ignore[var-annotated]

    def __getitem__(self, node: Node) -> Any:
        return self.own[node] if node in self.own else self.known[node]


def _masks(axes: Axes, node: Node, atom: Axis) -> Iterator[tuple[int, int, Tensor]]:
    """Where a call's results have an atom: number of the result, dimension, item of each index."""
    value = node.meta.get("val")
    several = value if isinstance(value, (list, tuple)) else [value]
    for result, dims in enumerate(results_of(axes.dims.get(node) or [])):
        tensor = several[result] if result < len(several) else None
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            for place, dim in enumerate(dims):
                if atom in atoms(dim):
                    yield result, place, owner(dim, atom)


def _times(value: Any, result: int, place: int, mask: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return type(value)(_times(v, 0, place, mask) if n == result else v for n, v in enumerate(value))
    return value * mask.to(value.dtype).view([-1 if n == place else 1 for n in range(value.dim())])


def _gram(value: Tensor, place: int, rows: Tensor) -> Tensor:
    """The Gram matrix of the wanted rows, each of length 1 (or 0); float64."""
    lines = value.movedim(place, -1).reshape(-1, value.shape[place]).index_select(0, rows).double()
    unit = F.normalize(lines, dim=-1, eps=1e-30)
    return unit @ unit.mT


def divergence(whole: Tensor, part: Tensor) -> Tensor:
    """Summed Kullback-Leibler divergence of two outputs' softmax; of single numbers the squared relative change."""
    place = 1 if whole.dim() > 3 else -1
    whole, part = whole.double(), part.double()
    if whole.dim() == 0 or whole.shape[place] == 1:
        return (part - whole).square().sum() / whole.square().sum().clamp_min(1e-30)
    ours, theirs = whole.log_softmax(place), part.log_softmax(place)
    terms = ours.exp() * (ours - theirs)
    return torch.where(ours.isfinite() & theirs.isfinite(), terms, 0.0).sum().clamp_min(0)


def _batched(function: Any, masks: Tensor) -> tuple[Tensor, Tensor]:
    """One result for each mask: all at a time where every operator can, else one after another."""
    if len(masks) > 1:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*batching rule.*")
                bend, apart = torch.vmap(function, randomness="same")(masks)
            return bend, apart
        except (RuntimeError, NotImplementedError):
            pass
    each = [function(mask) for mask in masks]
    return torch.stack([bend for bend, _ in each]), torch.stack([apart for _, apart in each])
