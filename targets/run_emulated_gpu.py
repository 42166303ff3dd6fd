"""Run a CUDA library without a GPU: the library itself, on a driver whose kernels are its CUDA C built for the CPU.

So the launches, their arguments, the memory plan and the kernels' arithmetic are the ones of the GPU; what stays
unchecked is the driver, ptxas, and anything about time. It runs in a process of its own, so that no real driver is in
the way and a kernel that goes out of bounds ends that process only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from graphopt.errors import RunFailed, ToolMissing
from graphopt.targets.cpu import runs_here
from graphopt.targets.runner import Interface, check_sizes, dense, from_bytes, spec_bytes
from graphopt.targets.target import Target
from graphopt.targets.zig import zig_installed

# A model that takes longer than this on the emulator is not one to check there.
TIMEOUT_S = 1800
CHILD = Path(__file__).parent / "cuda_child.py"


def why_not(target: Target) -> str:
    """What keeps this machine from emulating a GPU; empty where nothing does."""
    if not zig_installed():
        return "pip install ziglang"
    return "" if runs_here(target) else f"the host code for {target} is for x86-64"


class Runner:
    """The kernels compiled for the CPU; a process per run, so threads do not meet. Each loads the files that were there
    at first, whatever has taken their place since."""

    name = "emulated_gpu"

    def __init__(self, folder: Path, model: Interface, target: Target, *, threads: int = 0) -> None:
        """Compile NAME.cu from `folder` for this machine.

        Args:
            threads: not used; the emulator has one.

        Raises:
            ToolMissing: zig is not installed.
            RunFailed: the kernels use something that the emulator does not have.
        """
        from graphopt.codegen.cuda.emulate import EmulationFailed, build

        if reason := why_not(target):
            raise ToolMissing(tool="an emulator", purpose=f"run {target}", install=reason)
        self._model = model
        self._bundle = folder.resolve()
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-emulated-")
        # Fields of the child's environment that tests add to: what the emulated driver shall do.
        self.environment: Mapping[str, str] = {}
        self._files = ExitStack()
        try:
            self._library, self._weights = (
                self._files.enter_context((self._bundle / file).open("rb"))
                for file in (f"lib{model.name}.so", "weights.bin")
            )
            source = (self._bundle / f"{model.name}.cu").read_text(encoding="utf-8")
            build(source, Path(self._folder.name) / "libcuda.so.1")
        except (OSError, EmulationFailed) as error:
            self.close()
            raise RunFailed(name=model.name, runner=self.name, reason=str(error)) from error

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `graphopt.targets.runner.Runner`. Runs twice, with two orders of threads, and compares.

        Raises:
            BundleCorrupt: the library is another model's.
            RunFailed: the library's own error; or the result depends on the order of threads: a race.
        """
        arrays = dense(self._model.inputs, inputs)
        first = self._run(arrays, order=0)
        if first != self._run(arrays, order=2):
            reason = "the result depends on the order of threads: a barrier is missing"
            raise RunFailed(name=self._model.name, runner=self.name, reason=reason)
        return [from_bytes(spec, data) for spec, data in zip(self._model.outputs, first, strict=True)]

    def time(self, inputs: Sequence[np.ndarray], seconds: float) -> list[float]:
        """See `graphopt.targets.runner.Runner`. These are seconds of emulation and say nothing about a GPU."""
        arrays = dense(self._model.inputs, inputs)
        taken: list[float] = []
        while not taken or sum(taken) < seconds:
            start = time.perf_counter()
            self._run(arrays, order=0)
            taken.append(time.perf_counter() - start)
        return taken

    def close(self) -> None:
        """See `graphopt.targets.runner.Runner`."""
        self._files.close()
        self._folder.cleanup()

    def _run(self, arrays: Sequence[np.ndarray], order: int) -> list[bytes]:
        name = self._model.name
        with tempfile.TemporaryDirectory(prefix="graphopt-emulated-") as work:
            place = Path(work)
            for i, array in enumerate(arrays):
                (place / f"in{i}").write_bytes(array.tobytes())
            sizes = [str(spec_bytes(spec)) for spec in self._model.outputs]
            handles = self._library.fileno(), self._weights.fileno()
            library, weights = (f"/proc/self/fd/{handle}" for handle in handles)
            memory = [str(self._model.workspace_bytes), str(self._model.weights_bytes)]
            files = [library, name, weights, *memory, work]
            command = [sys.executable, "-S", str(CHILD), *files, str(len(arrays)), *sizes]
            environment = {
                **os.environ,
                "LD_LIBRARY_PATH": self._folder.name,
                "GRAPHOPT_EMULATED_ORDER": str(order),
                **self.environment,
            }
            try:
                done = subprocess.run(
                    command,
                    env=environment,
                    pass_fds=handles,
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                reason = f"took more than {TIMEOUT_S} seconds"
                raise RunFailed(name=name, runner=self.name, reason=reason) from error
            if done.returncode == 3:  # it says what its sizes are
                workspace_bytes, weights_bytes = map(int, done.stderr.split())
                check_sizes(self._bundle, self._model, workspace_bytes=workspace_bytes, weights_bytes=weights_bytes)
            if done.returncode != 0:
                said = done.stderr.strip().replace(weights, self._weights.name).replace(library, self._library.name)
                reason = said or f"the process ended with status {done.returncode}"
                raise RunFailed(name=name, runner=self.name, reason=reason)
            return [(place / f"out{i}").read_bytes() for i in range(len(sizes))]
