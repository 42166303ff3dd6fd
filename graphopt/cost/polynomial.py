"""Polynomials in the extents of axes: sums of an integer times a product of atoms, and their fast evaluation.

    3 c0 c1 + 16 c1        is        {(c0, c1): 3, (c1,): 16}

Pinned atoms never change, so they are part of the coefficients. All arithmetic is exact: Python integers where one
value is asked for, int64 where many are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graphopt.axes import Axis, atoms, find

Sizes = Mapping[Axis, int]
Monomial = tuple[Axis, ...]  # sorted by identity, repeated for powers; () is the constant
Ints = NDArray[np.int64]


class Polynomial:
    """A sum of monomials with integer coefficients. Immutable; adds and multiplies with others and with integers."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Monomial, int] | int = 0) -> None:
        given = {(): terms} if isinstance(terms, int) else terms
        self.terms: dict[Monomial, int] = {monomial: factor for monomial, factor in given.items() if factor}

    @classmethod
    def of(cls, axis: Axis, varies: Callable[[Axis], bool] = lambda atom: atom.pinned is None) -> Polynomial:
        """The extent of `axis`: a product is a product, a concatenation a sum, and an atom that varies itself."""
        axis = find(axis)
        if axis.kind is None:
            return cls({(axis,): 1}) if axis.extent > 1 and varies(axis) else cls(axis.extent)
        extents = [cls.of(part, varies) for part in axis.parts]
        return cls.sum(extents) if axis.kind == "sum" else cls(1) * math.prod(extents, start=cls(1))

    @classmethod
    def sum(cls, summands: Iterable[Polynomial | int]) -> Polynomial:
        """All of them together; linear in the number of their terms."""
        terms: dict[Monomial, int] = {}
        for summand in summands:
            for monomial, factor in _terms(summand).items():
                terms[monomial] = terms.get(monomial, 0) + factor
        return cls(terms)

    def __add__(self, other: Polynomial | int) -> Polynomial:
        return Polynomial.sum((self, other))

    __radd__ = __add__

    def __sub__(self, other: Polynomial | int) -> Polynomial:
        return self + other * -1

    def __mul__(self, other: Polynomial | int) -> Polynomial:
        if isinstance(other, int):
            return Polynomial({monomial: factor * other for monomial, factor in self.terms.items()})
        terms: dict[Monomial, int] = {}
        for a, x in self.terms.items():
            for b, y in other.terms.items():
                both = a + b if not (a and b) else tuple(sorted(a + b, key=id))
                terms[both] = terms.get(both, 0) + x * y
        return Polynomial(terms)

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return self.terms == _terms(other) if isinstance(other, (int, Polynomial)) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    def __bool__(self) -> bool:
        return bool(self.terms)

    @property
    def variables(self) -> tuple[Axis, ...]:
        """The atoms it depends on, in order of first occurrence."""
        return tuple(dict.fromkeys(atom for monomial in self.terms for atom in monomial))

    def __call__(self, sizes: Sizes | None = None) -> int:
        """Its value where atoms have these extents, and others their full ones."""
        given = sizes or {}
        return sum(
            factor * math.prod(given.get(atom, atom.extent) for atom in monomial)
            for monomial, factor in self.terms.items()
        )

    def __str__(self) -> str:
        return " + ".join(_show(monomial, factor) for monomial, factor in self.terms.items()) or "0"

    __repr__ = __str__


def _terms(value: Polynomial | int) -> Mapping[Monomial, int]:
    return value.terms if isinstance(value, Polynomial) else {(): value} if value else {}


def _show(monomial: Monomial, factor: int) -> str:
    names = sorted(atom.label or "?" for atom in monomial)
    powers = [name if (n := names.count(name)) == 1 else f"{name}^{n}" for name in dict.fromkeys(names)]
    return " ".join([str(factor)] * (factor != 1 or not names) + powers)


def sizes_of(sizes: Sizes) -> dict[Axis, int]:
    """The same with every atom once, by the axis that stands for it.

    Raises:
        ValueError: a size is not from 1 to the axis's extent, or the axis consists of others.
    """
    found = {}
    for given, size in sizes.items():
        axis = find(given)
        if axis.kind is not None:
            raise ValueError(f"{axis!r} consists of {', '.join(map(repr, atoms(axis)))}; give their sizes")
        if not 1 <= size <= axis.extent:
            raise ValueError(f"a size of {size} for {axis!r}")
        found[axis] = int(size)
    return found


class Compiled:
    """Several polynomials, ready for evaluation at many sizes at once.

    Sizes are arrays whose last dimension runs over `variables`; `full` are the extents that the program has. Values
    are int64, with a last dimension that runs over the polynomials.
    """

    def __init__(self, polynomials: Sequence[Polynomial], variables: Sequence[Axis]) -> None:
        self.variables = tuple(variables)
        self.full: Ints = np.array([axis.extent for axis in self.variables], np.int64)
        self._place = {axis: place for place, axis in enumerate(self.variables)}
        monomials: dict[Monomial, int] = {}
        owners, columns, factors = [], [], []
        for owner, polynomial in enumerate(polynomials):
            for monomial, factor in polynomial.terms.items():
                owners.append(owner)
                columns.append(monomials.setdefault(monomial, len(monomials)))
                factors.append(factor)
        self.count = len(polynomials)
        self._owners, self._columns = np.array(owners, np.intp), np.array(columns, np.intp)
        self._factors: Ints = np.array(factors, np.int64)
        degree = max(map(len, monomials), default=0)
        # A variable past the last one is 1: it fills monomials of lower degree.
        self._atoms = np.full((len(monomials), degree), len(self.variables), np.intp)
        powers = []
        for row, monomial in enumerate(monomials):
            places = [self._place[atom] for atom in monomial]
            self._atoms[row, : len(places)] = places
            powers += [(row, place, places.count(place)) for place in dict.fromkeys(places)]
        self._powers = np.array(powers, np.int64).reshape(-1, 3)
        # Every term once more for each variable in it: what changes when that variable does.
        starts: dict[int, list[int]] = {}
        for number, (row, _, _) in enumerate(powers):
            starts.setdefault(row, []).append(number)
        pairs = [(term, number) for term, row in enumerate(columns) for number in starts.get(row, ())]
        self._changes = np.array(pairs, np.intp).reshape(-1, 2)

    def sizes(self, sizes: Sizes) -> Ints:
        """The array of sizes that a mapping stands for; variables that it leaves out have their full extent."""
        out = self.full.copy()
        for axis, size in sizes_of(sizes).items():
            if axis in self._place:
                out[self._place[axis]] = size
        return out

    def __call__(self, sizes: ArrayLike) -> Ints:
        """Values of all polynomials: (..., variables) to (..., polynomials)."""
        values = self._monomials(np.asarray(sizes, np.int64))[..., self._columns] * self._factors
        out = np.zeros((self.count, *values.shape[:-1]), np.int64)
        np.add.at(out, self._owners, np.moveaxis(values, -1, 0))
        return np.moveaxis(out, 0, -1)

    def _monomials(self, sizes: Ints) -> Ints:
        padded = np.concatenate([sizes, np.ones((*sizes.shape[:-1], 1), np.int64)], axis=-1)
        return np.asarray(padded[..., self._atoms].prod(axis=-1), np.int64)

    def decreases(self, sizes: ArrayLike, step: ArrayLike = 1) -> Ints:
        """How much less each polynomial is when one variable is `step` smaller, and the others are as they are.

        Args:
            sizes: (variables,), all above 0.
            step: one for all variables, or (variables,).

        Returns:
            (variables, polynomials) int64; exact.
        """
        now = np.asarray(sizes, np.int64)
        less = now - np.broadcast_to(np.asarray(step, np.int64), now.shape)
        rows, places, powers = self._powers.T
        before = now[places] ** powers
        gone = self._monomials(now)[rows] // before * (before - less[places] ** powers)
        out = np.zeros((len(self.variables), self.count), np.int64)
        terms, numbers = self._changes.T
        np.add.at(out, (places[numbers], self._owners[terms]), gone[numbers] * self._factors[terms])
        return out
