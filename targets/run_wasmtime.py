"""Run a WebAssembly module in this process, with wasmtime from pip: single-threaded, near native speed."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import RunFailed, ToolMissing
from graphopt.targets.runner import (
    ALIGNMENT_BYTES,
    Interface,
    check_sizes,
    dense,
    from_bytes,
    one_at_a_time,
    spec_bytes,
)
from graphopt.targets.target import Target

_PAGE_BYTES = 65536


def why_not(target: Target) -> str:
    """What is missing to run `target` with wasmtime; empty where nothing is."""
    return "" if importlib.util.find_spec("wasmtime") else "pip install wasmtime"


class Runner:
    """An instance with memory of its own."""

    name = "wasmtime"

    def __init__(self, folder: Path, model: Interface, target: Target, *, threads: int = 0) -> None:
        """Compile NAME.wasm from `folder` and copy weights.bin into its memory. `threads` has no meaning here.

        Raises:
            ToolMissing: wasmtime is not installed.
            RunFailed: the module cannot be compiled, or its memory not be had.
            BundleCorrupt: the module is another model's.
        """
        if reason := why_not(target):
            raise ToolMissing(tool="wasmtime", purpose=f"run {target}", install=reason)
        import wasmtime

        self._turn = threading.RLock()
        self._model = model
        name = model.name
        self._errors = (wasmtime.WasmtimeError, wasmtime.Trap)
        try:
            config = wasmtime.Config()
            config.wasm_relaxed_simd = True
            engine = wasmtime.Engine(config)
            self._store: Any = wasmtime.Store(engine)
            module = wasmtime.Module.from_file(engine, str(folder / f"{name}.wasm"))
            exports: Any = wasmtime.Instance(self._store, module, []).exports(self._store)
            weights = (folder / "weights.bin").read_bytes()
            self._memory = exports["memory"]
            self._call = exports[f"{name}_run"]
            self._top = exports["__heap_base"].value(self._store)
            sizes = {
                f"{w}_bytes": exports[f"{name}_{w}_bytes"](self._store) % (1 << 32) for w in ("workspace", "weights")
            }
            check_sizes(folder, model, **sizes)
            if (wanted := sizes["weights_bytes"]) != len(weights):
                raise RunFailed(
                    name=name, runner=self.name, reason=f"weights.bin has {len(weights)} bytes, not {wanted}"
                )
            self._weights = self._reserve(len(weights))
            self._workspace = self._reserve(sizes["workspace_bytes"])
            self._inputs = [self._reserve(spec_bytes(spec)) for spec in model.inputs]
            self._outputs = [self._reserve(spec_bytes(spec)) for spec in model.outputs]
            tables = [np.array(at, "<u4").tobytes() for at in (self._inputs, self._outputs)]
            self._tables = [self._reserve(len(table)) for table in tables]
            missing = self._top - self._memory.data_len(self._store)
            if missing > 0:
                self._memory.grow(self._store, -(-missing // _PAGE_BYTES))
            for content, at in ((weights, self._weights), *zip(tables, self._tables, strict=True)):
                self._memory.write(self._store, content, at)
            if "_initialize" in exports:
                exports["_initialize"](self._store)
        except (*self._errors, OSError) as error:
            raise RunFailed(name=name, runner=self.name, reason=_first_line(error)) from error

    def _reserve(self, size: int) -> int:
        """The place of `size` bytes behind all others; the memory is grown later, at once."""
        at = -(-self._top // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._top = at + max(size, 1)
        return at

    @one_at_a_time
    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `graphopt.targets.runner.Runner`."""
        self._put(inputs)
        self._run()
        return [
            from_bytes(spec, bytes(self._memory.read(self._store, at, at + spec_bytes(spec))))
            for spec, at in zip(self._model.outputs, self._outputs, strict=True)
        ]

    @one_at_a_time
    def time(self, inputs: Sequence[np.ndarray], seconds: float) -> list[float]:
        """See `graphopt.targets.runner.Runner`."""
        self._put(inputs)
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while not taken or time.perf_counter() < end:
            start = time.perf_counter()
            self._run()
            taken.append(time.perf_counter() - start)
        return taken

    @one_at_a_time
    def close(self) -> None:
        """See `graphopt.targets.runner.Runner`."""
        self._store = self._memory = self._call = None

    def _put(self, inputs: Sequence[np.ndarray]) -> None:
        for array, at in zip(dense(self._model.inputs, inputs), self._inputs, strict=True):
            self._memory.write(self._store, array.tobytes(), at)

    def _run(self) -> None:
        try:
            status = self._call(self._store, self._weights, *self._tables, self._workspace)
        except self._errors as error:
            raise RunFailed(name=self._model.name, runner=self.name, reason=_first_line(error)) from error
        if status != 0:
            raise RunFailed(name=self._model.name, runner=self.name, reason=f"kernel {-status} failed")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
