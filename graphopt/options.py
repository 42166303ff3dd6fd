"""What a compilation may be told, and which of it cannot work. Without PyTorch, so that a refusal comes at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.bundle import check_replaceable
from graphopt.errors import BadOption, CannotWrite, OutputInTheWay
from graphopt.export import KINDS, SUFFIXES, Kind, name_for
from graphopt.staging import resolved

if TYPE_CHECKING:
    from graphopt.targets.target import Target


# What becomes the output is made beside it, under a name that is longer by some twenty; file systems take 255.
_LONGEST_NAME_BYTES = 230


@dataclass(frozen=True)
class Options:
    """What a compilation may be told. Paths are as the user gave them."""

    target: str = "cpu"
    output: str | os.PathLike[str] | None = None
    example_inputs: Any = None
    input_shapes: Mapping[str, Any] | None = None
    model_factory: str | None = None
    unsafe_load: bool = False
    name: str | None = None
    calibration: Any = None  # as graphopt.calibration.calibration takes it
    verify: bool = True
    canonicalise: bool = True
    dump_dir: str | os.PathLike[str] | None = None
    tune: float | None = None  # seconds that timing kernels may take; None: nothing is timed
    records: str | os.PathLike[str] | None = None  # where times are read from and written to
    reduction: Any = None  # a Recipe or passes that are ready, as graphopt.optimize.plan gives them

    @property
    def kind(self) -> Kind:
        """What is written, by the suffix of the output."""
        return "bundle" if self.output is None else SUFFIXES.get(Path(self.output).suffix, "bundle")

    @property
    def name_wanted(self) -> str | None:
        """The name that was asked for; that of a library's file, since C symbols and file names should agree."""
        if self.name is None and self.output is not None and self.kind != "bundle":
            return name_for(self.output)
        return self.name


def check_output(options: Options) -> Target:
    """The target, having refused what cannot work before minutes are spent on it.

    Raises:
        UnknownTarget: there is no such target.
        BadOption: the output's suffix does not fit the target.
        OutputInTheWay, CannotWrite: the output cannot be written where it shall be.
    """
    from graphopt import targets

    check_place(options.output, options.kind)  # first: finding out what `cpu` is here takes TVM, and that PyTorch
    target = targets.resolve(options.target)
    if options.kind not in KINDS[target.kind]:
        fitting = [suffix for suffix, kind in SUFFIXES.items() if kind in KINDS[target.kind]]
        raise BadOption(
            what=f"{options.output}: {target.kind} has no {Path(os.fspath(options.output or '')).suffix} form",
            way_out=f"for {options.target} write a bundle folder, or {' or '.join(fitting)}",
        )
    return target


def check_place(output: str | os.PathLike[str] | None, kind: str) -> None:
    """Raises OutputInTheWay or CannotWrite where a `kind` (a bundle, or a file) cannot be written to `output`."""
    if output is None:
        return
    place = resolved(output)
    if (missing := missing_folder(output)) is not None:
        raise CannotWrite(file=output, reason=f"there is no folder {missing}; folders above the output are not made")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise CannotWrite(file=output, reason="Permission denied")
    if len(os.fsencode(place.name)) > _LONGEST_NAME_BYTES:
        raise CannotWrite(file=output, reason=f"its name has more than {_LONGEST_NAME_BYTES} bytes")
    if kind == "bundle":
        check_replaceable(output)
    elif place.is_dir():
        raise OutputInTheWay(file=output, what="is a folder")


def missing_folder(output: str | os.PathLike[str]) -> Path | None:
    """The first of the folders above `output` that is not there, as the user wrote it; None where all are."""
    if resolved(output).parent.is_dir():
        return None
    above = Path(output).parent
    return next((folder for folder in (*reversed(above.parents), above) if not folder.is_dir()), above)
