"""Does the compiled artefact compute what PyTorch computes? It is run itself, on its target or an emulator of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.arrays import Array, to_numpy, to_torch
from graphopt.errors import ChoiceMayDiffer, VerificationFailed
from graphopt.manifest import Verification
from graphopt.program import Program
from graphopt.token_trace import is_marked

# Samples of a calibration file that are run: enough to meet different branches of values, few enough for an emulator.
MAX_SAMPLES = 4
_FLOATS = ("bfloat16", "float16", "float32", "float64")
_SEED = 20
# Outputs whose largest element is smaller than this are compared as if it were this large.
_ZERO = 1e-6

Run = Callable[[Sequence[Array]], Sequence[Array]]


@dataclass(frozen=True)
class Tolerance:
    """An element may be off by `atol` times the largest magnitude of its output, plus `rtol` times its own."""

    rtol: float
    atol: float

    def __str__(self) -> str:
        return f"{self.atol:g} of the largest element + {self.rtol:g} of the element"


# Both sides add the same products in different orders and use different polynomials for exp and the like. One sum of K
# products is then off by about sqrt(K) rounding errors of its largest terms, and the layers' errors add up; that is
# relative to the magnitudes that went in, so it is measured against the output's largest element, not against each
# (which may be near zero by cancellation). For float32 (2^-24 = 6e-8) deep networks show 1e-6 to 1e-5, and any real
# mistake (a wrong index, a missing bias) shows 1e-2 and more: 1e-4 lies between. The others are the same number of
# roundings of theirs: float16 rounds at 2^-11, bfloat16 at 2^-8, and there intermediate results are rounded too.
# For float64 the polynomials limit, not the format.
TOLERANCES = {
    "float64": Tolerance(rtol=1e-7, atol=1e-7),
    "float32": Tolerance(rtol=1e-4, atol=1e-4),
    "float16": Tolerance(rtol=1e-2, atol=1e-2),
    "bfloat16": Tolerance(rtol=4e-2, atol=4e-2),
}


def tolerance_of(program: Program) -> Tolerance:
    """That of the coarsest floating-point type among the inputs, outputs and weights."""
    names = {spec.dtype for spec in (*program.inputs, *program.outputs)}
    names |= {str(tensor.dtype).removeprefix("torch.") for tensor in program.tensors.values()}
    return TOLERANCES[next((name for name in _FLOATS if name in names), "float32")]


@dataclass(frozen=True)
class Sample:
    """Inputs by name, and where they are from."""

    origin: str
    inputs: Mapping[str, Array]


def samples_of(program: Program, calibration: Sequence[Mapping[str, Any]] | None = None) -> list[Sample]:
    """What the artefact is run on: the calibration samples where there are some, else the example inputs, and where
    those are constant (all zeros hide most mistakes) or missing, seeded random ones as well."""
    if calibration:
        rows = [{name: to_numpy(value) for name, value in row.items()} for row in calibration[:MAX_SAMPLES]]
        return [Sample("calibration inputs", row) for row in rows]
    samples = []
    examples = program.example_inputs
    if examples is not None:
        samples.append(Sample("example inputs", {name: to_numpy(tensor) for name, tensor in examples.items()}))
    flat = [a for sample in samples for a in sample.inputs.values() if a.size > 1 and a.dtype.kind not in "biu"]
    if not samples or any(bool((a == a.flat[0]).all()) for a in flat):
        samples.append(Sample("random inputs", _random(program)))
    return samples


def filled(samples: Sequence[Sample], program: Program) -> list[Sample]:
    """The samples with the examples of inputs that a pass added to the program."""
    examples = {name: to_numpy(value) for name, value in (program.example_inputs or {}).items()}
    return [Sample(sample.origin, {**examples, **sample.inputs}) for sample in samples]


def counted(samples: Sequence[Sample]) -> str:
    """How many there are of each origin: "1 set of example inputs, 1 set of random inputs"."""
    origins = [sample.origin for sample in samples]
    counts = {origin: origins.count(origin) for origin in origins}
    return ", ".join(f"{count} {'set' if count == 1 else 'sets'} of {origin}" for origin, count in counts.items())


def _random(program: Program) -> dict[str, Array]:
    """Normally distributed where floating; the example's own integers (they may be indices), else zeros and ones."""
    from graphopt.capture import seeded

    examples = program.example_inputs or {}
    made = {}
    for spec in program.inputs:
        keep = spec.name in examples and not spec.torch_dtype.is_floating_point
        made[spec.name] = to_numpy(examples[spec.name] if keep else seeded(spec, seed=_SEED))
    return made


@dataclass
class _Worst:
    absolute: float = 0.0
    relative: float = 0.0


def verify(program: Program, name: str, runners: Mapping[str, Run], samples: Sequence[Sample]) -> Verification:
    """Run the artefact with every runner on every sample and compare with `program` in PyTorch.

    Args:
        program: the program as captured, so that the passes are checked along with code generation.
        name: what to call the artefact in an error.
        runners: by name, a function from arrays in the order of `program.inputs` to arrays in that of its outputs.
        samples: as `samples_of` gives them.

    Raises:
        VerificationFailed: an output differs by more than the tolerance, is non-finite where PyTorch's is not (or the
            other way round), or differs at all where it is integer or boolean.
    """
    tolerance = tolerance_of(program)
    worst = _Worst()
    for sample in samples:
        expected = _reference(program, sample.inputs)
        given = [sample.inputs[spec.name] for spec in program.inputs]
        for runner, run in runners.items():
            results = run([np.array(array) for array in given])
            assert len(results) == len(expected), f"{runner} gave {len(results)} outputs, not {len(expected)}"
            for spec, got in zip(program.outputs, results, strict=True):
                fault = compare(np.asarray(got), expected[spec.name], tolerance, worst)
                if fault is not None:
                    origin = {"name": name, "output": spec.name, "runner": runner, "inputs": sample.origin}
                    raise (ChoiceMayDiffer if is_marked(program) else VerificationFailed)(**origin, **fault)
    return Verification(
        "passed",
        inputs=counted(samples),
        runners=tuple(runners),
        max_abs_error=round_up(worst.absolute),
        max_rel_error=round_up(worst.relative),
        rtol=tolerance.rtol,
        atol=tolerance.atol,
    )


def _reference(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    import torch

    # Sums split over threads round differently from machine to machine; the manifest shall not.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outputs = program.run({spec.name: to_torch(inputs[spec.name], spec.torch_dtype) for spec in program.inputs})
    finally:
        torch.set_num_threads(threads)
    return {name: to_numpy(tensor) for name, tensor in outputs.items()}


def compare(got: Array, want: Array, tolerance: Tolerance, worst: _Worst | None = None) -> dict[str, Any] | None:
    """None where the arrays agree, else the fields of `VerificationFailed` for the element that is furthest off.

    NaN agrees with NaN and an infinity with the same infinity; `worst` collects the errors of the finite elements.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        have, wanted = (f"{a.dtype}{list(a.shape)}" for a in (got, want))
        return {"index": "", "got": have, "want": wanted, "count": want.size, "total": want.size, "tolerance": "none"}
    if want.dtype.kind in "biu":
        return _fault(got, want, got != want, None, "exact")
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    alike = (np.isnan(a) & np.isnan(b)) | (np.isinf(a) & (a == b))
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(a - b), 0.0)
    magnitudes = np.abs(b[np.isfinite(b)])
    # An output that is zero throughout in PyTorch may still hold rounding errors of what cancelled.
    largest = max(float(magnitudes.max(initial=0.0)), _ZERO)
    if worst is not None and error.size:
        biggest = float(error.max())
        worst.absolute = max(worst.absolute, biggest)
        worst.relative = max(worst.relative, biggest / largest)
    allowed = tolerance.atol * largest + tolerance.rtol * np.where(finite, np.abs(b), 0.0)
    off = np.where(finite, error > allowed, ~alike)
    return _fault(got, want, off, np.where(finite, error, math.inf), str(tolerance))


def _fault(got: Array, want: Array, off: Array, error: Array | None, tolerance: str) -> dict[str, Any] | None:
    if not off.any():
        return None
    flat = int(np.argmax(off if error is None else np.where(off, error, -1.0)))
    place = [int(i) for i in np.unravel_index(flat, want.shape)]
    return {
        "index": str(place) if place else "",
        "got": str(got.reshape(-1)[flat]),
        "want": str(want.reshape(-1)[flat]),
        "count": int(off.sum()),
        "total": int(want.size),
        "tolerance": tolerance,
    }


def round_up(value: float) -> float:
    """To two significant digits, away from zero: what is stated holds, and noise in the last bits is not recorded."""
    if not value or not math.isfinite(value):
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.1e}")
