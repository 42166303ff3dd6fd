"""Run a shared library on this machine, in this process, through ctypes.

The weights are mapped, not copied; workspace and outputs are 64-byte aligned, so the kernels work in place.
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from graphopt.errors import RunFailed, ToolMissing
from graphopt.targets.cpu import runs_here
from graphopt.targets.runner import Interface, aligned_array, array_dtype, check_sizes, dense
from graphopt.targets.target import Target


def why_not(target: Target) -> str:
    """What keeps this machine from running `target`'s code; empty where nothing does."""
    if runs_here(target):
        return ""
    return f"this machine does not execute code for {target}; run it on one that does"


class Runner:
    """A loaded library. ctypes lets other threads go on during a run, so each run borrows a workspace of its own; there
    are as many as there ever were runs at once."""

    name = "native"

    def __init__(self, folder: Path, model: Interface, target: Target, *, threads: int = 0) -> None:
        """Load libNAME.so from `folder` and map weights.bin beside it.

        Args:
            threads: how many a run may use; 0 is one per processor. It holds for every user of this library file.

        Raises:
            ToolMissing: this machine cannot run it.
            RunFailed: the library or the weights cannot be loaded.
            BundleCorrupt: the library is another model's.
        """
        if reason := why_not(target):
            raise ToolMissing(tool="a fitting processor", purpose=f"run {target}", install=reason)
        self._model = model
        name = model.name
        self._library = self._load((folder / f"lib{name}.so").resolve())
        self._call = self._library[f"{name}_run"]
        self._call.argtypes = [ctypes.c_void_p] * 4
        self._call.restype = ctypes.c_int32
        self._unmap = self._library[f"{name}_unmap_weights"]
        self._unmap.argtypes, self._unmap.restype = [ctypes.c_void_p], None
        self._set_threads = self._library[f"{name}_set_threads"]
        self._set_threads.argtypes, self._set_threads.restype = [ctypes.c_int32], None
        self._set_threads(threads)
        workspace_bytes, weights_bytes = (self._library[f"{name}_{what}_bytes"] for what in ("workspace", "weights"))
        workspace_bytes.restype = weights_bytes.restype = ctypes.c_size_t
        check_sizes(folder, model, workspace_bytes=workspace_bytes(), weights_bytes=weights_bytes())
        self._returned = threading.Condition()
        self._idle = [self._new_workspace()]
        self._running = 0
        map_weights = self._library[f"{name}_map_weights"]
        map_weights.argtypes, map_weights.restype = [ctypes.c_char_p], ctypes.c_void_p
        self._weights = map_weights(str(folder / "weights.bin").encode())
        if self._weights is None:
            raise RunFailed(
                name=name, runner=self.name, reason=f"{folder / 'weights.bin'} is missing or has another size"
            )

    def _load(self, file: Path) -> ctypes.CDLL:
        """Load a library, which may have replaced another of the same name that is still loaded.

        The system's loader takes equal paths for equal files, so it gets a path of its own each time. Equal files it
        knows by themselves: they are loaded once.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="graphopt-load-") as folder:
                link = Path(folder) / file.name
                link.symlink_to(file)
                return ctypes.CDLL(str(link))
        except OSError as error:
            # The message has the link's name, which nobody knows.
            reason = str(error).replace(str(Path(folder) / file.name), str(file))
            raise RunFailed(name=self._model.name, runner=self.name, reason=reason) from error

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `graphopt.targets.runner.Runner`."""
        arrays = dense(self._model.inputs, inputs)
        outputs = [aligned_array(spec.shape, array_dtype(spec)) for spec in self._model.outputs]
        self._run(*self._pointers(arrays, outputs))
        return outputs

    def time(self, inputs: Sequence[np.ndarray], seconds: float) -> list[float]:
        """See `graphopt.targets.runner.Runner`."""
        arrays = []
        for array in dense(self._model.inputs, inputs):
            arrays.append(aligned_array(array.shape, array.dtype))
            arrays[-1][...] = array
        outputs = [aligned_array(spec.shape, array_dtype(spec)) for spec in self._model.outputs]
        pointers = self._pointers(arrays, outputs)
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while not taken or time.perf_counter() < end:
            start = time.perf_counter()
            self._run(*pointers)
            taken.append(time.perf_counter() - start)
        return taken

    def close(self) -> None:
        """See `graphopt.targets.runner.Runner`. The library's threads end with its last user."""
        with self._returned:
            weights, self._weights = self._weights, None
            if weights is None:
                return
            # Unmapped under a running kernel, the weights would take the process with them.
            self._returned.wait_for(lambda: not self._running)
            self._idle.clear()
        self._unmap(weights)
        import _ctypes

        with contextlib.suppress(OSError):
            _ctypes.dlclose(self._library._handle)

    def _pointers(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
    ) -> tuple[ctypes.Array, ctypes.Array]:
        return tuple((ctypes.c_void_p * len(a))(*(x.ctypes.data for x in a)) for a in (inputs, outputs))  # type: ignore[return-value]

    def _new_workspace(self) -> np.ndarray:
        return aligned_array((self._model.workspace_bytes,), np.dtype(np.uint8))

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[tuple[int, np.ndarray]]:
        """The weights and a workspace that nobody else uses now."""
        with self._returned:
            assert self._weights is not None, "the runner is closed"
            weights = self._weights
            workspace = self._idle.pop() if self._idle else self._new_workspace()
            self._running += 1
        try:
            yield weights, workspace
        finally:
            with self._returned:
                self._running -= 1
                self._idle.append(workspace)
                self._returned.notify_all()

    def _run(self, inputs: ctypes.Array, outputs: ctypes.Array) -> None:
        with self._borrowed() as (weights, workspace):
            status = self._call(weights, inputs, outputs, workspace.ctypes.data)
        if status != 0:
            raise RunFailed(name=self._model.name, runner=self.name, reason=f"kernel {-status} failed")
