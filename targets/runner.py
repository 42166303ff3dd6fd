"""What runs a linked artefact: one interface for this machine, an emulator, and two WebAssembly engines."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import numpy as np

from graphopt.arrays import numpy_dtype
from graphopt.errors import BundleCorrupt
from graphopt.spec import TensorSpec
from graphopt.targets.target import Kind, Target

# The weights and everything the kernels touch start at a multiple of this.
ALIGNMENT_BYTES = 64


class Outside(Protocol):
    """What a model looks like from the outside; a Program is one."""

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...


class Interface(Outside, Protocol):
    """What a runner has to know of a model; a Manifest and an Artefact both are one."""

    @property
    def workspace_bytes(self) -> int: ...
    @property
    def weights_bytes(self) -> int: ...


class Runner(Protocol):
    """A model ready to run. Any number of threads may use it at once; where its engine cannot, they take turns."""

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Arrays in the order, shapes and dtypes of the model's inputs to new ones of its outputs.

        Raises:
            RunFailed: the program stopped, or a kernel failed.
        """
        ...

    def time(self, inputs: Sequence[np.ndarray], seconds: float) -> list[float]:
        """Run again and again for at least `seconds`, once at least; the seconds that each run took, by the clock of
        the process that runs it."""
        ...

    def close(self) -> None:
        """Let go of memory, processes and temporary files, once the runs of other threads have ended. The runner may
        not be used any more."""
        ...


_P = ParamSpec("_P")
_R = TypeVar("_R")


def one_at_a_time(method: Callable[Concatenate[Any, _P], _R]) -> Callable[Concatenate[Any, _P], _R]:
    """A method of a runner that has one engine: threads take turns. The runner has an RLock as `_turn`."""

    @functools.wraps(method)
    def in_turn(self: Any, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self._turn:
            return method(self, *args, **kwargs)

    return in_turn


# Kind of target to its runners, the fastest first: the module is graphopt.targets.run_NAME.
RUNNERS: dict[Kind, tuple[str, ...]] = {
    "cpu": ("native",),
    "arm": ("native", "qemu"),
    "wasm": ("node", "wasmtime"),
    "cuda": ("cuda", "emulated_gpu"),
}


def _module(runner: str) -> Any:
    return importlib.import_module(f"graphopt.targets.run_{runner}")


def why_not(runner: str, target: Target) -> str:
    """What keeps `runner` from running `target` here, with the way to mend it; empty where nothing does."""
    try:
        module = _module(runner)
    except ModuleNotFoundError as error:
        if error.name != f"graphopt.targets.run_{runner}":
            raise
        return f"there is no {runner} runner"
    return cast(str, module.why_not(target))


def runners_of(target: Target) -> tuple[str, ...]:
    """The names of what can run `target` here. Empty where nothing can."""
    return tuple(name for name in RUNNERS[target.kind] if not why_not(name, target))


def check_sizes(folder: Path, model: Interface, *, workspace_bytes: int, weights_bytes: int) -> None:
    """Hold what the code in `folder` says of itself against what `model` says of it.

    Raises:
        BundleCorrupt: they differ. Then its shapes may be another model's as well, and running it would read and write
            out of bounds.
    """
    for what, found in (("workspace", workspace_bytes), ("weights", weights_bytes)):
        wanted = getattr(model, f"{what}_bytes")
        if found != wanted:
            text = f"the code of {model.name} was made for {what} of {found:,} bytes, the manifest says {wanted:,}"
            raise BundleCorrupt(file=folder, what=text)


def array_dtype(spec: TensorSpec) -> np.dtype:
    """numpy's type for the elements of `spec`."""
    return numpy_dtype(spec.dtype)


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes of a dense tensor."""
    return math.prod(spec.shape) * array_dtype(spec).itemsize


def aligned_array(spec_shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts at a multiple of `ALIGNMENT_BYTES`, so that it is used in place."""
    size = math.prod(spec_shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    at = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[at : at + size].view(dtype).reshape(spec_shape)


def dense(specs: Sequence[TensorSpec], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The inputs as dense row-major arrays, without a copy where they are. They fit, or it is the caller's fault."""
    assert len(specs) == len(inputs), f"{len(inputs)} inputs for {len(specs)}"
    for spec, array in zip(specs, inputs, strict=True):
        fits = array.shape == spec.shape and array.dtype == array_dtype(spec)
        assert fits, f"{array.dtype}{array.shape} for {spec}"
    return [np.ascontiguousarray(array).reshape(array.shape) for array in inputs]


def from_bytes(spec: TensorSpec, data: bytes) -> np.ndarray:
    """An output that came as bytes."""
    return np.frombuffer(bytearray(data), array_dtype(spec)).reshape(spec.shape)


def open_named(runner: str, folder: Path, model: Interface, target: Target, threads: int) -> Runner:
    """Open one runner by name. Raises what its class raises."""
    return cast(Runner, _module(runner).Runner(folder, model, target, threads=threads))
