"""What a pass leaves behind: a record that travels with the program and into the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.errors import Decline

# Of so many places it is said without --explain why a pass left them alone.
_SHOWN = 3


@dataclass(frozen=True)
class Record:
    """One run of one pass.

    `changed` counts what was done, by kind ({"conv + batch_norm": 20}); the sizes are totals of the whole program:
    FLOPs (two per multiply-add), parameters in elements, bytes of parameters and constants. `max_abs_error` is the
    largest absolute difference of any output on the example inputs, before to after; None where that was not checked.
    `details` are rows of a table for `--explain`, plain JSON values by heading: for a reduction one for each axis that
    was cut. `notes` are sentences that whoever asked for the pass should read without asking. `seconds` differs from
    run to run, so it is not part of what is compared or written.
    """

    name: str
    changed: Mapping[str, int] = field(default_factory=dict)
    declined: tuple[Decline, ...] = ()
    flops_before: int = 0
    flops_after: int = 0
    params_before: int = 0
    params_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    max_abs_error: float | None = None
    details: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def total(self) -> int:
        """How many changes the pass made, of all kinds."""
        return sum(self.changed.values())

    @property
    def remarks(self) -> list[str]:
        """The notes, and where a pass that was asked for changed nothing, why."""
        if self.changed:
            return list(self.notes)
        reasons = list(dict.fromkeys(f"{decline.where}: {decline.reason}" for decline in self.declined))
        more = f"; and {len(reasons) - _SHOWN} more, see --explain" if len(reasons) > _SHOWN else ""
        why = "; ".join(reasons[::-1][:_SHOWN]) or "there is nothing in the program that it applies to"
        return [*self.notes, f"it changed nothing: {why}{more}"]

    @property
    def places(self) -> list[tuple[str, int, int]]:
        """Where tokens were reduced ("behind blocks.3", "in front of blocks.0"), of how many, to how many."""
        rows = [row for row in self.details if "tokens" in row and "kept" in row]
        sides = ["in front of" if row.get("where") == "input" else "behind" for row in rows]
        return [(f"{side} {row['name']}", row["tokens"], row["kept"]) for side, row in zip(sides, rows, strict=True)]

    def to_json(self, *, seconds: bool = False) -> dict[str, Any]:
        """Plain JSON values. `seconds` is left out unless asked for: artefacts must be the same from run to run."""
        data = asdict(self)
        data["details"] = [dict(row) for row in self.details]
        data["changed"] = dict(sorted(self.changed.items()))
        if not seconds:
            del data["seconds"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of `to_json`. Raises TypeError or KeyError where `data` is not a record."""
        declined = tuple(Decline(item["where"], item["reason"]) for item in data["declined"])
        details = tuple(dict(row) for row in data.get("details", ()))
        notes = tuple(map(str, data.get("notes", ())))
        return cls(**{**data, "declined": declined, "details": details, "notes": notes})
