"""One-line signatures of operators, in the spirit of einsum.

    linear       "... i, o i, o? -> ... o"
    conv2d       "... (g i) y! x!, (g o) i j! k!, (g o)? -> ... (g o) y'! x'!"      groups = g

A term per tensor argument, in the order of the operator's schema, and one per result. `(a b)` is a product, `...` any
number of leading dimensions, broadcast between terms; `?` marks an argument that may be missing, `!` an axis that is
pinned, `~` one whose statistics the operator takes (it may shrink, and the statistics are of what is kept). A name
stands for one axis wherever it occurs. A literal argument may be the extent of an axis, as `groups` is above; it is
known before, and rewritten when the axis shrinks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

_TOKEN = re.compile(r"\.\.\.|\((?P<product>[^)]*)\)|[A-Za-z]\w*'*|1")


@dataclass(frozen=True)
class Dim:
    """One dimension of a term: the names whose product it is (one name: itself), and its marks."""

    names: tuple[str, ...]
    pinned: bool = False
    statistics: bool = False


@dataclass(frozen=True)
class Term:
    """A tensor argument or a result: its dimensions, behind leading ones if `ellipsis`."""

    dims: tuple[Dim, ...]
    ellipsis: bool
    optional: bool


@dataclass(frozen=True)
class Signature:
    """What an operator does to axes. `reason` is why `!` pins; `literals` maps arguments to the axes they count."""

    text: str
    reason: str = "spatial"
    literals: Mapping[str, str] = field(default_factory=dict)
    # Roles of axes by their names in the text.
    roles: Mapping[str, str] = field(default_factory=dict)
    # Axes whose items must fill a multiple of so many bytes, by their names in the text.
    bytes_of: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> tuple[Term, ...]:
        """The terms left of the arrow."""
        return _terms(self.text.partition("->")[0])

    @cached_property
    def outputs(self) -> tuple[Term, ...]:
        """The terms right of the arrow."""
        return _terms(self.text.partition("->")[2])


def _terms(text: str) -> tuple[Term, ...]:
    return tuple(_term(part.strip()) for part in text.split(",")) if text.strip() else ()


def _term(text: str) -> Term:
    optional = text.endswith("?")
    text = text.removesuffix("?")
    dims: list[Dim] = []
    ellipsis, at = False, 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        found = _TOKEN.match(text, at)
        assert found is not None, f"{text!r} is no signature term at {at}"
        at = found.end()
        marks = set()
        while at < len(text) and text[at] in "!~":
            marks.add(text[at])
            at += 1
        if found[0] == "...":
            assert not dims, f"{text!r}: the ellipsis stands first"
            ellipsis = True
            continue
        names = tuple(found["product"].split()) if found["product"] is not None else (found[0],)
        dims.append(Dim(names, "!" in marks, "~" in marks))
    return Term(tuple(dims), ellipsis, optional)
