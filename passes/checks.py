"""Refusals of options that no pass can make sense of, and of patterns that match nothing, in the same words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from graphopt.errors import BadOption

# So many names are listed of those that a pattern could have matched.
_LISTED = 8


def check_count(name: str, option: str, value: float | None) -> None:
    """A number of things that stay or are made, where it is given: at least 1. Raises BadOption."""
    if value is not None and not 1 <= value < float("inf"):
        raise BadOption(what=f"{name}: {option}={value:g}", way_out=f"give {option} as a number from 1")


def check_share(name: str, option: str, value: float | None) -> None:
    """A share that stays, where it is given: above 0, up to 1. Raises BadOption."""
    if value is not None and not 0 < value <= 1:
        raise BadOption(what=f"{name}: {option}={value:g}", way_out="give the share that stays, above 0, up to 1")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of the patterns matches, as for file names, or is the name itself (which may have brackets)."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def idle(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The patterns that match none of the names."""
    known = list(names)
    return [pattern for pattern in patterns if not any(matches(name, (pattern,)) for name in known)]


def listed(names: Iterable[str]) -> str:
    """Some names in a row, and how many more there are."""
    known = list(dict.fromkeys(names))
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return ", ".join(known[:_LISTED]) + more if known else "none"


def check_included(
    name: str, patterns: Sequence[str], names: Iterable[str], what: str, shown: Iterable[str] | None = None
) -> None:
    """Refuse a pattern of `include` that matches nothing, where there are names at all.

    Raises:
        BadOption: says what could be matched, `shown` or else all names.
    """
    known = list(names)
    unmet = idle(patterns, known)
    if known and unmet:
        raise BadOption(
            what=f"{name}: include {' '.join(unmet)} matches no {what}",
            way_out=f"patterns are like those of file names, layer3.*; there are {listed(shown or known)}",
        )


def not_excluded(
    patterns: Sequence[str], names: Iterable[str], what: str, shown: Iterable[str] | None = None
) -> list[str]:
    """A note for each pattern of `exclude` that matches nothing, with what could be matched: `shown`, or all."""
    known = list(names)
    there = listed(shown or known)
    return [f"exclude {pattern} matches no {what}; there are {there}" for pattern in idle(patterns, known)]
