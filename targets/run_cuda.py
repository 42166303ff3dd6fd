"""Run a CUDA library on this machine's GPU, in this process, through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from graphopt.errors import RunFailed, ToolMissing
from graphopt.targets.cpu import runs_here
from graphopt.targets.runner import Interface, aligned_array, array_dtype, check_sizes, dense, one_at_a_time
from graphopt.targets.target import Target


def device_count() -> int:
    """How many GPUs the CUDA driver sees; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def why_not(target: Target) -> str:
    """What keeps this machine from running CUDA; empty where nothing does."""
    if not runs_here(target):
        return f"the host code for {target} is for x86-64"
    return "" if device_count() else "install NVIDIA's driver on a machine with a GPU"


class Runner:
    """A loaded library with its weights on the first GPU."""

    name = "cuda"

    def __init__(self, folder: Path, model: Interface, target: Target, *, threads: int = 0) -> None:
        """Load libNAME.so from `folder` and upload weights.bin beside it.

        Args:
            threads: not used; the GPU decides.

        Raises:
            ToolMissing: there is no GPU.
            RunFailed: the library, the kernels or the weights cannot be loaded.
            BundleCorrupt: the library is another model's.
        """
        if reason := why_not(target):
            raise ToolMissing(tool="a GPU", purpose=f"run {target}", install=reason)
        self._turn = threading.RLock()
        self._model, name = model, model.name
        try:
            self._library = ctypes.CDLL(str((folder / f"lib{name}.so").resolve()))
            weights = (folder / "weights.bin").read_bytes()
        except OSError as error:
            raise RunFailed(name=name, runner=self.name, reason=str(error)) from error
        workspace_bytes, weights_bytes = (self._library[f"{name}_{what}_bytes"] for what in ("workspace", "weights"))
        workspace_bytes.restype = weights_bytes.restype = ctypes.c_size_t
        check_sizes(folder, model, workspace_bytes=workspace_bytes(), weights_bytes=weights_bytes())
        if (wanted := weights_bytes()) != len(weights):
            raise RunFailed(name=name, runner=self.name, reason=f"weights.bin has {len(weights)} bytes, not {wanted}")
        self._error = self._library[f"{name}_error"]
        self._error.restype = ctypes.c_char_p
        self._call, self._unload = self._library[f"{name}_run"], self._library[f"{name}_unload"]
        self._call.restype, self._call.argtypes = ctypes.c_int32, [ctypes.c_void_p] * 3
        self._unload.restype, self._unload.argtypes = None, [ctypes.c_void_p]
        load = self._library[f"{name}_load"]
        load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int32]
        self._context = load(weights, 0)
        if not self._context:
            raise self._failed()

    @one_at_a_time
    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `graphopt.targets.runner.Runner`."""
        arrays = dense(self._model.inputs, inputs)
        outputs = [aligned_array(spec.shape, array_dtype(spec)) for spec in self._model.outputs]
        self._run(arrays, outputs)
        return outputs

    @one_at_a_time
    def time(self, inputs: Sequence[np.ndarray], seconds: float) -> list[float]:
        """See `graphopt.targets.runner.Runner`. Copies to and from the GPU are included."""
        arrays = dense(self._model.inputs, inputs)
        outputs = [aligned_array(spec.shape, array_dtype(spec)) for spec in self._model.outputs]
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while not taken or time.perf_counter() < end:
            start = time.perf_counter()
            self._run(arrays, outputs)
            taken.append(time.perf_counter() - start)
        return taken

    @one_at_a_time
    def close(self) -> None:
        """See `graphopt.targets.runner.Runner`."""
        if self._context:
            self._unload(self._context)
            self._context = None
            import _ctypes

            with contextlib.suppress(OSError):
                _ctypes.dlclose(self._library._handle)

    def _run(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        assert self._context, "the runner is closed"
        arrays = [(ctypes.c_void_p * len(group))(*(a.ctypes.data for a in group)) for group in (inputs, outputs)]
        if self._call(self._context, *arrays) != 0:
            raise self._failed()

    def _failed(self) -> RunFailed:
        return RunFailed(name=self._model.name, runner=self.name, reason=self._error().decode(errors="replace"))
