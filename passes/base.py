"""What a pass is, and the runner that checks, times and records it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.cost import summary
from graphopt.edit import Edit
from graphopt.program import Program
from graphopt.record import Record
from graphopt.sparsity import UNSTRUCTURED

__all__ = ["Edit", "InvalidProgram", "Pass", "Record", "max_abs_errors", "run_passes"]

# What a lossless pass may change by rounding: largest absolute error, as a share of the output's largest magnitude
# (or of 1, where that is less). Integers and booleans must be equal.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class InvalidProgram(AssertionError):
    """A pass left a program that is broken or computes something else. Ours to mend, not the user's."""


@dataclass(frozen=True)
class Pass(ABC):
    """A function of a Program to a new Program. Options are fields; a subclass gives `name` and `apply`."""

    name: ClassVar[str]
    lossless: ClassVar[bool] = True

    @abstractmethod
    def apply(self, edit: Edit) -> None:
        """Change `edit.graph`; count what is done with `edit.count`, explain the rest with `edit.decline`, and say
        with `edit.note` what nobody should have to ask for."""

    def __call__(self, program: Program) -> Program:
        """The program after this pass, with one more record; the one given is unchanged.

        Raises:
            InvalidProgram: what the pass left is no valid program.
        """
        start = time.perf_counter()
        edit = Edit(program)
        self.apply(edit)
        try:
            examples = program.example_inputs
            more = {**examples, **edit.examples} if examples is not None else None
            after = program.replace(exported=edit.finish(), example_inputs=more, formats=edit.formats)
        except Exception as error:  # whatever lint or validation finds is this pass's fault
            raise InvalidProgram(f"{self.name} left an invalid program: {error}") from error
        edit.notes += _lost_formats(program, after)
        before_cost, after_cost = summary(program), summary(after)
        record = Record(
            name=self.name,
            changed=dict(edit.changed),
            declined=tuple(edit.declined),
            notes=tuple(edit.notes),
            details=tuple(edit.details),
            flops_before=before_cost.total.flops,
            flops_after=after_cost.total.flops,
            params_before=before_cost.total.params,
            params_after=after_cost.total.params,
            bytes_before=before_cost.stored_bytes,
            bytes_after=after_cost.stored_bytes,
            seconds=time.perf_counter() - start,
        )
        return after.replace(records=(*program.records, record))


@dataclass(frozen=True)
class Combined(Pass):
    """Several passes under one name. `__call__` runs them on a program; each leaves its own record."""

    lossless: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, program: Program) -> Program:
        """The program after all of them. Raises as they do."""

    def apply(self, edit: Edit) -> None:
        """It makes no change of its own."""
        raise AssertionError(f"{self.name} is called, and its passes are applied")


def _lost_formats(before: Program, after: Program) -> list[str]:
    """A note where a pass broke up the blocks that zeros stood in."""
    lost = []
    for name, own in before.annotations.items():
        now = after.annotations.get(name)
        if own.format is not None and now is not None and now.format == UNSTRUCTURED != own.format:
            lost.append(name)
    if not lost:
        return []
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return [f"zeros of {lost[0]}{more} stand in no blocks any longer: cut first, and make sparse what stays"]


def run_passes(
    program: Program,
    passes: Sequence[Pass | str],
    *,
    check: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
    dump: Path | None = None,
) -> Program:
    """Run passes in order.

    Args:
        program: where to start.
        passes: passes, or names of registered passes that need no options.
        check: run the program on its example inputs before the first pass and after each, and compare what lossless
            passes leave within TOLERANCE. Programs without example inputs are only validated.
        progress: called with the pass's name, its place from 0, and how many there are, before each.
        dump: a folder, made if need be; gets the program's text before the first pass and after each.

    Returns:
        The last program; its records are those of `program` and one per pass.

    Raises:
        InvalidProgram: a pass broke the program; says which, and where the first difference is.
        KeyError: a name is not registered.
    """
    from graphopt.passes import make  # the registry imports passes, and these import this module

    todo = [make(item) if isinstance(item, str) else item for item in passes]
    examples = program.example_inputs if check else None
    reference = None if examples is None else program.run(examples)
    _dump(dump, 0, "captured", program)
    for place, item in enumerate(todo):
        if progress is not None:
            progress(item.name, place, len(todo))
        after = item(program)
        if reference is not None and examples is not None:
            examples = after.completed(examples)
            results = after.run(examples)
            if item.lossless:
                error = _compare(item.name, reference, results, program, after)
                records = (*after.records[:-1], replace(after.records[-1], max_abs_error=error))
                after = after.replace(records=records)
            else:
                reference = results
        _dump(dump, place + 1, item.name, after)
        program = after
    return program


def max_abs_errors(reference: dict[str, Tensor], results: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference per output; infinity where shapes, dtypes or the places of NaN or inf differ."""
    errors = {}
    for name, wanted in reference.items():
        got = results.get(name)
        if got is None or got.shape != wanted.shape or got.dtype != wanted.dtype:
            errors[name] = float("inf")
            continue
        same = (got == wanted) | (got.isnan() & wanted.isnan())
        apart = (got.double() - wanted.double()).abs() if not wanted.is_complex() else (got - wanted).abs().double()
        apart = apart.masked_fill(same, 0.0).nan_to_num(nan=float("inf"))
        errors[name] = float(apart.max()) if apart.numel() else 0.0
    return errors


def _compare(
    name: str, reference: dict[str, Tensor], results: dict[str, Tensor], before: Program, after: Program
) -> float:
    errors = max_abs_errors(reference, results)
    for output, error in errors.items():
        wanted = reference[output]
        finite = wanted[wanted.isfinite()] if wanted.is_floating_point() else wanted.reshape(-1)[:0]
        scale = max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
        allowed = TOLERANCE.get(wanted.dtype, 0.0) * scale
        if not error <= allowed:
            changes = _first_difference(str(before), str(after))
            raise InvalidProgram(f"{name} changed output {output} by {error:g}, allowed is {allowed:g}; {changes}")
    return max(errors.values(), default=0.0)


def _first_difference(before: str, after: str) -> str:
    """The first line in which two listings differ, with its neighbours."""
    old, new = before.splitlines(), after.splitlines()
    at = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    lines = [f"  before {line}" for line in old[max(0, at - 1) : at + 2]]
    lines += [f"  after  {line}" for line in new[max(0, at - 1) : at + 2]]
    return "the first difference is\n" + "\n".join(lines)


def _dump(folder: Path | None, place: int, name: str, program: Program) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{place:02d}-{name}.txt").write_text(f"{program}\n")
