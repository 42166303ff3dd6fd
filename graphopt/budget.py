"""How small or how fast a program shall become, and how that is measured while its axes have other sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graphopt.axes import Axes, Axis
from graphopt.cost import Compiled, Polynomial, cost_model, latency_model

if TYPE_CHECKING:
    from graphopt.targets.target import Target

# What may be budgeted: shares of the original, or absolute amounts.
KINDS = ("flops", "macs", "params", "bytes", "latency")
_POLYNOMIAL = {"flops": "flops", "macs": "macs", "params": "params", "bytes": "stored_bytes"}
# Below the limit by no more than this share: the budget counts as used.
SLACK = 0.02
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Budget:
    """A limit on one quantity of a program.

    `amount` up to 1 is the share that stays ("flops 0.5": half the FLOPs); where `absolute` it is in
    FLOPs, multiply-adds, elements, bytes of parameters or seconds of latency.
    """

    kind: str
    amount: float
    absolute: bool = False

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"a budget of {self.kind}"
        assert self.amount > 0, f"a budget of {self.amount}"

    def limit(self, full: float) -> float:
        """The most that the quantity may be where the program as it is has `full` of it."""
        return self.amount if self.absolute else self.amount * full

    def show(self, value: float, full: float) -> str:
        """A value of the quantity as the user may write it, rounded up: `0.41`, `1.3G`, `8.2ms`."""
        if not self.absolute:
            return _up(value / full)
        if self.kind == "latency":
            return f"{_up(value * 1e3)}ms"
        for unit, name in _UNITS:
            if value >= unit:
                return f"{_up(value / unit)}{name}"
        return f"{math.ceil(value)}"


def _up(value: float) -> str:
    """Three digits that count, rounded up."""
    digits = 3 - 1 - math.floor(math.log10(value)) if value > 0 else 0
    # Powers of ten as strings have them: 10.0**-3 and dividing by it would round twice.
    return f"{float(f'{math.ceil(value * 10.0**digits - 1e-9)}e{-digits}'):g}"


class Meter:
    """A quantity of a program as a function of the sizes of some of its axes; the others stay whole.

    Sizes are arrays whose last dimension runs over `variables`, or mappings. `full` is what the program has now.
    """

    def __init__(self, variables: Sequence[Axis], many: Callable[[Ints], Floats]) -> None:
        self.variables = tuple(variables)
        self.extents: Ints = np.array([axis.extent for axis in self.variables], np.int64)
        self._many = many
        self.full = float(self.many(self.extents[None])[0])

    def many(self, sizes: Ints) -> Floats:
        """The quantity at many sizes: (k, variables) to (k,)."""
        return self._many(np.asarray(sizes, np.int64))

    def one(self, sizes: Ints) -> float:
        """The quantity at sizes (variables,)."""
        return float(self.many(np.asarray(sizes)[None])[0])

    def __call__(self, sizes: Mapping[Axis, int]) -> float:
        """The quantity where axes have these sizes; those that are missing are whole."""
        return self.one(np.array([sizes.get(axis, axis.extent) for axis in self.variables], np.int64))

    def each(self, sizes: Ints, others: Ints) -> Floats:
        """The quantity when one axis after another has its size of `others` and the rest those of `sizes`."""
        rows = np.repeat(np.asarray(sizes, np.int64)[None], len(sizes), 0)
        np.fill_diagonal(rows, others)
        return self.many(rows)


def meter(kind: str, axes: Axes, variables: Sequence[Axis], target: Target | None = None) -> Meter:
    """What measures one of KINDS. Latency, in seconds, needs a target."""
    if kind == "latency":
        assert target is not None, "a latency is that on a target"
        model = latency_model(axes, target)
        return Meter(variables, lambda sizes: model.many(sizes, variables))
    compiled = Compiled([fixed(cost_model(axes).total[_POLYNOMIAL[kind]], variables)], variables)
    return Meter(variables, lambda sizes: compiled(sizes)[..., 0].astype(np.float64))


def fixed(polynomial: Polynomial, variables: Sequence[Axis]) -> Polynomial:
    """The same polynomial of some of its variables only, the others at their full extent."""
    own, terms = set(variables), dict[tuple[Axis, ...], int]()
    for monomial, factor in polynomial.terms.items():
        left = tuple(atom for atom in monomial if atom in own)
        rest = math.prod(atom.extent for atom in monomial if atom not in own)
        terms[left] = terms.get(left, 0) + factor * rest
    return Polynomial(terms)
