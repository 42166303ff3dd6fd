"""Samples of any number, in files or one after the other, cut and gathered into what a model takes. Without PyTorch."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from graphopt.arrays import Array, is_safe, numpy_dtype, read_arrays
from graphopt.errors import BadSample, GraphoptError
from graphopt.spec import TensorSpec

log = logging.getLogger(__name__)

# What the right answers are called among arrays by name, unless an input of the model has that name.
LABELS = ("labels", "target", "targets")

T = TypeVar("T")
Refuse = Callable[[str], GraphoptError]


@dataclass(frozen=True)
class Row:
    """One array of exactly its shape for each input, and the right answers to these samples where they are known."""

    inputs: Mapping[str, Array]
    labels: Array | None = None


def samples_in(file: str | os.PathLike[str], specs: Sequence[TensorSpec]) -> Iterator[Row]:
    """The samples in a .npz, or in a .npy where there is one input; `Gather` says in what shapes.

    Raises:
        BadSample: a name or shape does not fit, or the file is damaged.
        SampleNotFound: it is missing or may not be read.
    """

    def refuse(what: str) -> BadSample:
        return BadSample(file=file, what=what)

    content = read_arrays(file)
    if not isinstance(content, dict):
        if len(specs) != 1:
            raise refuse(f"holds one array, and the model has {len(specs)} inputs")
        content = {specs[0].name: content}
    inputs, labels, others = parted(content, specs)
    if others:
        log.warning("%s: %s is no input of the model, and not used; right answers are called labels", file, others[0])
    gather = Gather(specs, refuse)
    yield from gather.add(inputs, labels)
    gather.finish()


def parted(content: Mapping[str, T], specs: Sequence[TensorSpec]) -> tuple[dict[str, T], T | None, list[str]]:
    """Inputs by name, the right answers, and the names of what is neither."""
    known = {spec.name for spec in specs}
    names = [name for name in content if name not in known]
    labels = next((name for name in names if name in LABELS), None)
    inputs = {name: content[name] for name in content if name in known}
    return inputs, None if labels is None else content[labels], [name for name in names if name != labels]


class Gather:
    """Takes samples as they come, any number at a time, and gives rows of exactly the inputs' shapes.

    An input of shape [b, c] may come as [b, c]; as [n, b, c], n times its shape; as [m, c], a shorter or longer batch;
    or as [c], one sample of it. Samples that a row lacks are taken from what comes next. Labels have one entry for each
    sample in front.
    """

    def __init__(self, specs: Sequence[TensorSpec], refuse: Refuse) -> None:
        """`refuse` makes the error for what does not fit."""
        self._specs = specs
        self._refuse = refuse
        self._rest: dict[str, Array] = {}
        self._rest_labels: Array | None = None
        self._rows = 0

    def add(self, inputs: Mapping[str, Array], labels: Array | None = None) -> Iterator[Row]:
        """The rows that are full now. Raises what `refuse` makes."""
        if not self._specs:
            return
        if missing := [spec.name for spec in self._specs if spec.name not in inputs]:
            raise self._refuse(f"has no array {', '.join(missing)}; it has {', '.join(inputs) or 'none'}")
        samples = {spec.name: self._samples(spec, inputs[spec.name]) for spec in self._specs}
        first = self._specs[0]
        count = len(samples[first.name])
        counts = {spec.name: len(samples[spec.name]) / batch_of(spec) for spec in self._specs}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} {number:g}" for name, number in counts.items())
            raise self._refuse(f"has different numbers of samples, in batches: {shown}")
        if (labels is None) != (self._rest_labels is None) and (self._rows or self._rest):
            raise self._refuse("has labels for some samples only")
        if labels is not None:
            labels = self._labels(labels, inputs[first.name], first, count)
            self._rest_labels = _behind(self._rest_labels, labels, self._refuse)
        for name, array in samples.items():
            self._rest[name] = _behind(self._rest.get(name), array, self._refuse)
        while all(len(self._rest[spec.name]) >= batch_of(spec) for spec in self._specs):
            yield self._row()

    def finish(self) -> None:
        """Raises what `refuse` makes where not one row became full; samples that are left over are dropped."""
        if self._specs and not self._rows:
            first = self._specs[0]
            have = len(self._rest.get(first.name, ()))
            raise self._refuse(f"has {have} samples, a batch takes {batch_of(first)}" if have else "has no samples")

    def _row(self) -> Row:
        inputs = {}
        for spec in self._specs:
            batch = batch_of(spec)
            # A copy: who gave the samples may go on to write into them.
            inputs[spec.name] = np.array(self._rest[spec.name][:batch]).reshape(spec.shape)
            self._rest[spec.name] = self._rest[spec.name][batch:]
        labels = self._rest_labels
        self._rows += 1
        if labels is None:
            return Row(inputs)
        batch = batch_of(self._specs[0])
        self._rest_labels = labels[batch:]
        return Row(inputs, np.array(labels[:batch]))

    def _samples(self, spec: TensorSpec, array: Array) -> Array:
        """`array` with samples in front."""
        if not is_safe(array.dtype, numpy_dtype(spec.dtype)):
            raise self._refuse(f"{spec.name} is {array.dtype}, the model takes {spec.dtype}")
        array = array.astype(numpy_dtype(spec.dtype), copy=False)
        if not spec.shape and array.ndim <= 1:
            return array.reshape(-1)
        front = array.ndim - len(spec.shape[1:])
        if spec.shape and front >= 0 and array.shape[front:] == spec.shape[1:]:
            if front == 0:
                return array[None]
            if front == 1:
                return array
            if front == 2 and array.shape[1] == spec.shape[0]:
                return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
        raise self._refuse(
            f"{spec.name} has shape {list(array.shape)}; wanted {list(spec.shape)}, "
            "or that with another number of samples in front"
        )

    def _labels(self, labels: Array, array: Array, spec: TensorSpec, count: int) -> Array:
        """`labels` with samples in front, `count` of them, as they belong to `array` for the input `spec`."""
        extra = array.ndim - len(spec.shape)
        if labels.ndim == 0 or extra < 0:
            labels = labels[None]
        elif extra > 0 and spec.shape and labels.shape[:2] == array.shape[:2]:
            labels = labels.reshape(count, *labels.shape[2:])
        if len(labels) != count:
            raise self._refuse(f"the labels have shape {list(labels.shape)}; wanted {count} in front, one for a sample")
        return labels


def batch_of(spec: TensorSpec) -> int:
    """How many samples one run takes: the first size of an input, 1 where it is a scalar."""
    return spec.shape[0] if spec.shape else 1


def _behind(rest: Array | None, array: Array, refuse: Refuse) -> Array:
    if rest is None or not len(rest):
        return array
    if rest.shape[1:] != array.shape[1:]:
        raise refuse(f"labels of shape {list(array.shape[1:])} come after some of shape {list(rest.shape[1:])}")
    return np.concatenate([rest, array])
