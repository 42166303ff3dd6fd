"""What either kernel of a layer takes: as estimated, and as records of measurements have it.

A layer is known by its operator, the shapes of its input and weight, and the rest of its arguments; its sparse kernel
by the format and the share of the weight that is kept, too. Layers that have these in common share a record.

Layers by themselves have their weights in cache, and nothing between them. So the program as a whole has records, too:
with the kernels that were picked for its layers, and with dense ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tvm import relax

from graphopt.arrays import to_numpy
from graphopt.codegen.dataflow import Array, op_of, shape_of
from graphopt.program import Program
from graphopt.targets.speed import speed_of
from graphopt.targets.target import Target

Side = Literal["dense", "sparse"]
SIDES: tuple[Side, ...] = ("dense", "sparse")


@dataclass(frozen=True)
class Times:
    """For one layer, in cycles."""

    dense: float
    sparse: float
    obstacle: str = ""  # why there is no sparse kernel

    def of(self, side: Side) -> float:
        """Of one kernel."""
        return self.dense if side == "dense" else self.sparse


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer by itself, as either kernel takes it.

    linear   input (tokens, inputs), weight (inputs, outputs)
    conv2d   input (b, c, h, w), weight OIHW; `call` has the rest of the arguments. Sparse kernels, and what stands
             between them, take images with channels in front; so here that is what "sparse" means of one without zeros
    """

    shape: tuple[int, ...]
    weight: Array
    density: float  # share of the weight's elements that are not zero
    form: str = ""  # of its zeros, by the annotation's word
    call: relax.Call | None = None

    def name(self, side: Side) -> str:
        """What its record is called."""
        own, weight = ("x".join(map(str, shape)) for shape in (self.shape, self.weight.shape))
        more = ""
        if self.call is not None:
            attrs = self.call.attrs
            for argument in ("strides", "padding", "dilation"):
                more += f", {argument}={'x'.join(str(int(value)) for value in getattr(attrs, argument))}"
            more += f", groups={int(attrs.groups)}"
        operator = "linear" if self.call is None else "conv2d"
        kept = f" {self.form or 'unstructured'} {self.density:.2g} kept" if side == "sparse" else ""
        return f"{operator}(float32:{own}, [float32:{weight}]{more}) {side}{kept}"


def image_layer(call: relax.Call, weight: Array, density: float, form: str) -> Layer:
    """A conv2d in NCHW."""
    assert op_of(call) == "relax.nn.conv2d", op_of(call)
    return Layer(shape_of(call.args[0]), weight, density, form, call)


@dataclass(frozen=True)
class Wanted:
    """A kernel that a choice would be made by: of which layer, and what it is estimated to take, in cycles."""

    layer: Layer
    side: Side
    cycles: float


class KernelTimes:
    """Records of measurements for one target, and what of them was asked for."""

    def __init__(self, target: Target, records: Mapping[str, float] | None = None, *, only_dense: str = "") -> None:
        """`records` are seconds by the names of layers' kernels and of programs; `only_dense` is why no sparse kernel
        is to be picked where there is a choice.
        """
        self._target = target
        self._clock_hz = speed_of(target).clock_hz
        self.records: Mapping[str, float] = records if records is not None else {}
        self.wanted: dict[str, Wanted] = {}
        self.only_dense = only_dense

    def against(self, program: Program, picked: Sequence[str]) -> KernelTimes | None:
        """The same for dense kernels throughout, where the program as a whole was measured to be faster with them; None
        where it was not. `picked` are the weights that would get sparse kernels.
        """
        if not self.records or not picked:
            return None
        sparse, dense = (self.records.get(name) for name in program_names(program, picked))
        if sparse is None or dense is None or sparse <= dense:
            return None
        times = " to ".join(f"{seconds * 1e6:,.4g} us" for seconds in (sparse, dense))
        reason = f"the program as a whole is slower with sparse kernels: {times}, as measured"
        return KernelTimes(self._target, self.records, only_dense=reason)

    def of(self, layer: Layer, estimate: Times, sides: tuple[Side, ...] = SIDES) -> Times | None:
        """What the records have of a layer, in cycles of the target's clock; None where a side is missing.

        Of sides that are not asked for it is the estimate.
        """
        names = {side: layer.name(side) for side in sides}
        for side, name in names.items():
            self.wanted.setdefault(name, Wanted(layer, side, estimate.of(side)))
        if any(name not in self.records for name in names.values()):
            return None
        found: dict[str, Any] = {side: self.records[name] * self._clock_hz for side, name in names.items()}
        return Times(**{"dense": estimate.dense, "sparse": estimate.sparse, **found})


def program_names(program: Program, picked: Sequence[str]) -> tuple[str, str]:
    """What the records of a program as a whole are called: with sparse kernels for these weights, and without any."""
    own = hashlib.sha256(str(program).encode())
    for tensor in program.tensors.values():
        own.update(to_numpy(tensor).tobytes())
    chosen = hashlib.sha256("\n".join(picked).encode()).hexdigest()[:8]
    name = f"program {program.name} {own.hexdigest()[:16]}"
    layers = "layer" if len(picked) == 1 else "layers"
    return f"{name} sparse in {len(picked)} {layers} {chosen}", f"{name} dense"
