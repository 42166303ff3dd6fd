"""What a program costs by how many tokens run between the places where they are reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axis, find, results_of
from graphopt.cost.formulas import Shaped, counts, numbers
from graphopt.cost.polynomial import Polynomial
from graphopt.edit import Edit
from graphopt.region import Region, descendants


class Segments:
    """FLOPs (or multiply-adds) of a program, without what choosing and folding tokens costs.

    A polynomial in the tokens of each segment: behind a place and in front of the next; exact. `rest` is the cost of
    what always has all of them.
    """

    def __init__(self, region: Region, polynomials: Sequence[Polynomial], rest: int) -> None:
        self._counts, self._polynomials, self.rest = region.counts, polynomials, rest

    def __call__(self, wanted: Sequence[int]) -> int:
        """The cost where so many tokens of the span stay behind each place."""
        own = zip(self._polynomials, wanted, strict=True)
        return self.rest + sum(polynomial(self._counts(count)) for polynomial, count in own)

    def expected(self, wanted: Sequence[Tensor]) -> Tensor:
        """The same for numbers of tokens that are differentiated, in double precision."""
        total = torch.tensor(float(self.rest), dtype=torch.float64)
        for polynomial, count in zip(self._polynomials, wanted, strict=True):
            for monomial, factor in polynomial.terms.items():  # nothing but the span varies
                total = total + factor * count ** len(monomial)
        return total

    def __str__(self) -> str:
        return " + ".join(f"({polynomial})" for polynomial in self._polynomials) + f" + {self.rest}"


def segments_of(edit: Edit, region: Region, places: Sequence[Node], kind: str) -> Segments:
    """The segments of a graph behind the places, in order, the first being that of `region`."""
    order = list(edit.graph.nodes)
    steps = {node for loop in region.loops for node in loop.steps}
    inside = set(region.nodes) - steps
    behind = [descendants(order, at) for at in places]
    spans = set(map(find, region.spans))
    shapes = {node: _shaped(node, region.dims.get(node), spans) for node in order}
    sums: list[list[Any]] = [[] for _ in places]
    rest = 0
    for node in order:
        if node.op != "call_function" or node in steps:
            continue
        if node not in inside:
            rest += int(getattr(counts(node, numbers), kind))
            continue
        number = max(n for n, own in enumerate(behind) if node in own)
        sums[number].append(getattr(counts(node, shapes.__getitem__), kind))
    for loop in region.loops:
        number = max(n for n, own in enumerate(behind) if loop.joined in own)
        whole = Polynomial.of(results_of(region.dims[loop.joined])[0][loop.dim], lambda atom: atom in spans)
        first, other = (
            sum(int(getattr(counts(node, numbers), kind)) for node, own in loop.steps.items() if own == step)
            for step in (0, 1)
        )
        sums[number].append(whole * other + (first - other))
    for span in spans:
        span.label = span.label or "n"
    return Segments(region, [Polynomial.sum(own) for own in sums], rest)


def _shaped(node: Node, dims: Any, spans: set[Axis]) -> tuple[Shaped, ...]:
    plain = tuple(numbers(node))
    known = results_of(dims) if dims else []
    if [len(own) for own in known] != [len(result.shape) for result in plain]:
        return plain
    return tuple(
        Shaped(tuple(Polynomial.of(axis, lambda atom: atom in spans) for axis in own), result.item_bytes)
        for own, result in zip(known, plain, strict=True)
    )
