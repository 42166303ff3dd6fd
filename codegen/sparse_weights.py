"""What was weighed for each layer whose weight has zeros: is there a sparse kernel for it, was it picked, and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from graphopt.annotate import by_fingerprint
from graphopt.codegen.dataflow import Array
from graphopt.codegen.kernel_times import Times
from graphopt.exported import STORED, stored
from graphopt.program import Program
from graphopt.sparsity import Annotation, fingerprint
from graphopt.targets.speed import speed_of
from graphopt.targets.target import Target
from graphopt.weights import WORTH_MENTIONING


@dataclass(frozen=True)
class SparseWeight:
    """One layer, for reports. Times are of one thread; None where there is no such kernel, or none was estimated or
    measured."""

    weight: str  # by its name in the user's model
    operator: str  # "linear", "conv2d"
    format: str | None  # the annotation's word; None where there is no annotation
    density: float  # share of the elements that are not zero
    eligible: bool  # a sparse kernel can take it
    picked: bool  # and does
    reason: str
    dense_cycles: int | None = None
    sparse_cycles: int | None = None
    dense_us: float | None = None
    sparse_us: float | None = None
    dense_measured_us: float | None = None
    sparse_measured_us: float | None = None


@dataclass(frozen=True)
class Seen:
    """What is known of a constant that some layer multiplies by."""

    name: str | None
    annotation: Annotation | None
    density: float
    dims: int  # as the model has it: a convolution over a line is computed as one over an image

    @property
    def dense(self) -> bool:
        """Whether the user wants it taken as dense."""
        return self.annotation is not None and self.annotation.format is None

    @property
    def form(self) -> str:
        """What the annotation says of its zeros; empty where there is none."""
        return self.annotation.word if self.annotation is not None else ""

    def entry(
        self,
        constant: Array,
        operator: str,
        target: Target,
        *,
        reason: str,
        eligible: bool = False,
        picked: bool = False,
        dense: float | None = None,
        sparse: float | None = None,
        measured: Times | None = None,
    ) -> SparseWeight:
        """For reports; `dense` and `sparse` are estimates in cycles. Of a layer without a sparse kernel only the dense
        one's measurement is told.
        """
        unnamed = f"a {'x'.join(map(str, constant.shape))} constant"
        return SparseWeight(
            weight=self.name or unnamed,
            operator=operator,
            format=self.form or None,
            density=self.density,
            eligible=eligible,
            picked=picked,
            reason=reason,
            dense_cycles=None if dense is None else round(dense),
            sparse_cycles=None if sparse is None else round(sparse),
            dense_us=None if dense is None else microseconds(dense, target),
            sparse_us=None if sparse is None else microseconds(sparse, target),
            dense_measured_us=None if measured is None else microseconds(measured.dense, target),
            sparse_measured_us=None if measured is None or sparse is None else microseconds(measured.sparse, target),
        )


class Weights:
    """Which of the user's weights a constant is, by its values: kernels meet weights transposed, reshaped, copied."""

    def __init__(self, program: Program) -> None:
        exported = program.exported
        self._found: dict[str, tuple[str, Annotation | None]] = dict(by_fingerprint(program))
        self._dims: dict[str | None, int] = {}
        # One that is to be dense may have no zeros; then every constant must be looked at.
        self._full = any(annotation.density == 1 for annotation in program.annotations.values())
        names = [str(spec.target) for spec in exported.graph_signature.input_specs if spec.kind in STORED]
        self._order = {name: place for place, name in enumerate(names)}
        for name in names:
            tensor = stored(exported, name)
            self._dims[name] = tensor.dim()
            if name in program.annotations or not tensor.is_floating_point() or tensor.dim() < 2:
                continue
            if 1 - int(torch.count_nonzero(tensor)) / max(1, tensor.numel()) >= WORTH_MENTIONING:
                self._found.setdefault(fingerprint(tensor), (name, None))

    def look(self, constant: Array) -> Seen | None:
        """None where it has hardly any zeros and no annotation."""
        density = int(np.count_nonzero(constant)) / max(1, constant.size)
        zeros = 1 - density >= WORTH_MENTIONING
        if not zeros and not self._full:
            return None
        name, annotation = self._found.get(fingerprint(constant), (None, None))
        if not zeros and annotation is None:
            return None
        return Seen(name, annotation, density, self._dims.get(name, constant.ndim))

    def in_order(self, entries: list[SparseWeight]) -> tuple[SparseWeight, ...]:
        """As the model has the weights; constants that are none of its weights last."""
        return tuple(sorted(entries, key=lambda entry: self._order.get(entry.weight, len(self._order))))


def microseconds(cycles: float, target: Target) -> float:
    """To three digits behind the point."""
    return round(cycles / speed_of(target).clock_hz * 1e6, 3)


def shown(us: float) -> str:
    """For people: three digits, more only in front of the point."""
    return f"{us:,.0f} us" if us >= 100 else f"{us:.3g} us"
