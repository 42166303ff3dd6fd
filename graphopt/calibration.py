"""Calibration data: samples of what a program meets in use, read once and fitted to its inputs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from graphopt.arrays import Array, to_numpy, to_torch
from graphopt.errors import BadCalibration, BadSample
from graphopt.program import Program
from graphopt.samples import Gather, Refuse, Row, batch_of, parted, samples_in
from graphopt.user_code import call, names_function

log = logging.getLogger(__name__)

Source = str | os.PathLike[str] | Iterable[Any] | None

# How many samples are kept: what the criteria's papers use is 64 to 256.
LIMIT = 256


@dataclass(frozen=True, eq=False)
class Calibration(Sequence[dict[str, Tensor]]):
    """Batches, each a tensor of exactly its shape for every input by name, as `Program.run` takes them.

    `labels` has one tensor a batch, with as many entries in front as the first input has; None where there are none.
    `is_example`: nothing was given, and these are the example inputs, which may be noise.
    """

    batches: tuple[dict[str, Tensor], ...]
    labels: tuple[Tensor, ...] | None = None
    origin: str = "calibration"
    is_example: bool = False

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, place: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[dict[str, Tensor]]: ...
    def __getitem__(self, place: int | slice) -> dict[str, Tensor] | Sequence[dict[str, Tensor]]:
        return self.batches[place]

    def __repr__(self) -> str:
        with_labels = " with labels" if self.labels is not None else ""
        return f"<Calibration {self.origin}: {len(self)} batches{with_labels}>"


def calibration(source: Source, program: Program, *, limit: int = LIMIT, finite: bool = True) -> Calibration:
    """Read calibration data for a program.

    Args:
        source: one of
            * None: the program's example inputs, marked `is_example`;
            * the path of a .npz with an array for each input by name, and perhaps `labels` (or `target`), or of a .npy
              where there is one input;
            * "package.module:function": called without arguments, it returns or yields any of the others;
            * an iterable, such as a list, a generator or a DataLoader, of tensors or arrays: one for one input, tuples
              in the order of the inputs, dicts by name. Labels are the last of a tuple with one more, the second of a
              pair (tuple or dict, labels), or `labels` (or `target`) in a dict. Gone through once, and not to its end
              where it has more than `limit` samples;
            * a dict by name, a tensor or an array: all samples at once;
            * a Calibration.
            Samples come in any number at a time: an input of shape [b, c] as [b, c], [n, b, c], [m, c] or [c]. What is
            left over behind the last full batch is dropped.
        program: says names, shapes and dtypes. Dtypes are converted where every value survives that.
        limit: samples that are kept, at most, but one batch in any case.
        finite: refuse NaN and infinity: one of them makes a statistic useless, and every score that is made of it.

    Raises:
        BadSample, SampleNotFound: a file cannot be used.
        BadCalibration: anything else cannot be used, or its own code raised something.
        ModuleMissing: there is no module of the function's.
    """
    origin, marked = "calibration", False
    if isinstance(source, str) and names_function(source) and not Path(source).exists():
        origin = source
        source = call(source, source, lambda what: _refusal(program, origin, what))
        if source is None:
            raise _refusal(program, origin, "returned None")
    if isinstance(source, Calibration):
        origin, marked = source.origin, source.is_example
        source = source.batches if source.labels is None else list(zip(source.batches, source.labels, strict=True))
    if source is None:
        examples = program.example_inputs
        if examples is None:
            raise _refusal(program, program.name, "has no example inputs, and no calibration data was given")
        return Calibration((examples,), origin="example inputs", is_example=True)
    from_file = isinstance(source, str | os.PathLike)
    if isinstance(source, str | os.PathLike):
        origin = os.fspath(source)
        rows: Iterator[Row] = samples_in(source, program.inputs)
    else:
        rows = _rows(source, program, origin)
    batch = batch_of(program.inputs[0]) if program.inputs else 1
    kept = list(islice(rows, max(1, limit // batch)))
    if finite and (what := _not_finite(kept)) is not None:
        raise BadSample(file=origin, what=what) if from_file else _refusal(program, origin, what)
    if next(rows, None) is not None:
        log.info("%s: has more than %d samples; the others are not used", origin, limit)
    batches = tuple(
        {spec.name: to_torch(row.inputs[spec.name], spec.torch_dtype) for spec in program.inputs} for row in kept
    )
    labels = tuple(_label_tensor(row.labels) for row in kept if row.labels is not None)
    return Calibration(batches, labels or None, origin, marked)


def _not_finite(rows: Sequence[Row]) -> str | None:
    """Which array has numbers that are none, how many and where; None where all are finite."""
    for place, row in enumerate(rows):
        arrays = dict(row.inputs) if row.labels is None else {**row.inputs, "labels": row.labels}
        for name, array in arrays.items():
            if array.dtype.kind not in "biu" and (count := int((~np.isfinite(array)).sum())):
                return f"{name} has {count} of {array.size} numbers NaN or infinite in batch {place + 1} of {len(rows)}"
    return None


def _rows(source: Any, program: Program, origin: str) -> Iterator[Row]:
    def refuse(what: str) -> BadCalibration:
        return _refusal(program, origin, what)

    gather = Gather(program.inputs, refuse)
    for item in _items(source, refuse):
        values, given = _parts(item, program, refuse)
        inputs = {name: _array(name, value, refuse) for name, value in values.items()}
        yield from gather.add(inputs, None if given is None else _array("labels", given, refuse))
    gather.finish()


def _items(source: Any, refuse: Refuse) -> Iterator[Any]:
    """The items of what the user gave; what its own code raises is an error of theirs."""
    if isinstance(source, Mapping | Tensor | np.ndarray):
        yield source
        return
    end = object()
    try:
        iterator = iter(source)
    except TypeError as error:
        raise refuse(f"a {type(source).__name__} gives no samples") from error
    while True:
        try:
            item = next(iterator, end)
        except Exception as error:  # the user's own code runs here
            raise refuse(f"raised {type(error).__name__}: {error}") from error
        if item is end:
            return
        yield item


def _parts(item: Any, program: Program, refuse: Refuse) -> tuple[dict[str, Any], Any]:
    """Inputs by name, and the labels or None."""
    names = [spec.name for spec in program.inputs]
    if isinstance(item, Mapping):
        inputs, labels, others = parted(item, program.inputs)
        if others:
            raise refuse(f"the model has no input {', '.join(map(str, others))}")
        return inputs, labels
    if not isinstance(item, list | tuple):
        item = (item,)
    if len(item) == 2 and isinstance(item[0], Mapping | list | tuple):
        inputs, labels = _parts(item[0], program, refuse)
        if labels is not None:
            raise refuse("has labels twice")
        return inputs, item[1]
    if len(item) not in (len(names), len(names) + 1):
        raise refuse(f"gave {len(item)} tensors at once, and the model has {len(names)} inputs")
    return dict(zip(names, item, strict=False)), item[len(names)] if len(item) > len(names) else None


def _array(name: str, value: Any, refuse: Refuse) -> Array:
    if not isinstance(value, Tensor | np.ndarray | np.generic | int | float):
        raise refuse(f"{name} is a {type(value).__name__}, not a tensor or an array")
    return to_numpy(value)


def _label_tensor(array: Array) -> Tensor:
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(array.astype(bool if array.dtype.kind == "b" else np.float32))


def _refusal(program: Program, origin: str, what: str) -> BadCalibration:
    return BadCalibration(source=origin, what=what, expected=", ".join(map(str, program.inputs)) or "none")
