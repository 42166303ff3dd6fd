"""Measured times of kernels in place of estimates: what was asked for, whether it can be had here, and its records.

`compile --tune SECONDS` times the dense and the sparse kernel of layers whose weights have zeros; `--records FILE`
keeps what was found. Equal records give equal bundles, so whoever wants the same bytes again keeps the file. The file
is a `LatencyTable`: JSON, sorted, one line for each kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import BadOption, BadRecords, CannotWrite
from graphopt.options import Options
from graphopt.staging import reason_of
from graphopt.targets.timing import machine, timing_runner

if TYPE_CHECKING:
    from graphopt.codegen.kernel_times import KernelTimes
    from graphopt.cost import LatencyTable
    from graphopt.program import Program
    from graphopt.targets.target import Target

log = logging.getLogger(__name__)


def records_of(options: Options, target: Target) -> LatencyTable | None:
    """The records that choices go by, those of a file or none yet; None where neither is asked for.

    Raises:
        BadOption: nothing can be timed for the target here.
        BadRecords: the file has no records, or those of another target or machine.
    """
    from graphopt.cost import LatencyTable

    if options.tune is not None:
        _check_timing(options.tune, target)
    file = options.records
    if options.tune is None and file is None:
        return None
    if file is None or (options.tune is not None and not Path(file).exists()):
        return LatencyTable(target.spec, machine=machine(target))
    try:
        table = LatencyTable.load(Path(file))
    except OSError as error:
        raise BadRecords(file=file, reason=f"cannot be read: {reason_of(error)}", way_out=_MEASURE) from error
    except ValueError as error:
        raise BadRecords(file=file, reason=f"holds no records: {error}", way_out=_MEASURE) from error
    if table.target != target.spec:
        way_out = f"compile with --target {table.target}, or name another file for {target}"
        raise BadRecords(file=file, reason=f"has times of {table.target}, not of {target}", way_out=way_out)
    here = machine(target)
    # Where the target does not run here, records can only be those of another machine.
    if timing_runner(target) and table.machine != here:
        reason = f"has times of another machine ({table.machine or 'it does not say which'}); this is {here}"
        raise BadRecords(file=file, reason=reason, way_out=_MEASURE)
    return table


_MEASURE = "measure here: --tune SECONDS with --records and the name of a file that is not there yet"


def _check_timing(seconds: float, target: Target) -> None:
    if not 0 < seconds < float("inf"):
        raise BadOption(what=f"--tune {seconds:g}", way_out="give the seconds that measuring may take, such as 60")
    if target.kind == "cuda":
        what = f"--tune: there are no sparse kernels for {target} yet, so there is nothing to choose between"
        raise BadOption(what=what, way_out="leave it out")
    if not timing_runner(target):
        raise BadOption(
            what=f"--tune: code for {target} cannot be timed here, where at most an emulator runs it",
            way_out="measure on such a device with --tune SECONDS --records FILE, bring the file here, and give "
            "--records FILE alone; without either, choices go by estimates",
        )


def tuned(
    program: Program, options: Options, target: Target, table: LatencyTable, step: Callable[[str], None]
) -> KernelTimes:
    """The times that choices for a program go by, after measuring what is not known yet, and writing it down.

    Raises:
        CannotWrite: the records.
    """
    from graphopt.codegen.kernel_times import KernelTimes

    if options.tune is not None:
        from graphopt.codegen.tune import tune

        done = tune(program, target, table, seconds=options.tune, progress=lambda text: step(f"timing {text}"))
        if done.missing:
            log.warning(
                "--tune %g was over when %d of %d times were measured; what the others would say goes by estimates",
                options.tune, done.wanted - done.missing, done.wanted,
            )  # fmt: skip
        if options.records is not None:
            try:
                table.save(Path(options.records))
            except OSError as error:
                raise CannotWrite(file=options.records, reason=reason_of(error)) from error
    return KernelTimes(target, table.records)
