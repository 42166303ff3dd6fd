"""Run code for ARM on another processor, under qemu's user-mode emulator.

The model's static library is linked into a small program that reads files and writes files. Times are the emulator's:
they tell nothing about a device.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from graphopt.errors import RunFailed, ToolMissing
from graphopt.targets.cpu import host_machine
from graphopt.targets.runner import Interface, check_sizes, dense, from_bytes, one_at_a_time, spec_bytes
from graphopt.targets.target import Target
from graphopt.targets.zig import zig, zig_installed

QEMU = "qemu-aarch64"
INSTALL = "apt-get install qemu-user"
# Emulation is some fifty times slower than the processor that it runs on.
TIMEOUT_S = 1800.0
# Debian's libc for ARM (package libc6-arm64-cross). Where it is, programs are linked against it. Else they are linked
# statically with musl, which the toolchain first has to build: a minute or two, once.
SYSROOT = Path("/usr/aarch64-linux-gnu")


@functools.cache
def processors(qemu: str) -> frozenset[str]:
    """The processors that this qemu emulates."""
    done = subprocess.run([qemu, "-cpu", "help"], capture_output=True, text=True, timeout=60)
    return frozenset(word for line in done.stdout.splitlines() for word in line.split())


def why_not(target: Target) -> str:
    """What is missing to emulate `target`; empty where nothing is, or the machine needs no emulator."""
    if host_machine() == "aarch64":
        return "this machine is the target's kind: it needs no emulator"
    if not zig_installed():
        return "pip install ziglang"
    return "" if shutil.which(QEMU) else INSTALL


class Runner:
    """A program for the emulator. Each run is a process of its own, and loads the weights anew: from the file that was
    there at first, whatever has taken its place since."""

    name = "qemu"

    def __init__(
        self, folder: Path, model: Interface, target: Target, *, threads: int = 1, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Link libNAME.a from `folder` into a program.

        Args:
            threads: how many a run may use; 0 is one per processor.

        Raises:
            ToolMissing: qemu or the toolchain is not installed.
            LinkFailed: the program cannot be linked.
        """
        if reason := why_not(target):
            raise ToolMissing(tool=QEMU, purpose=f"run {target} on this machine", install=reason)
        from graphopt.targets.toolchain import LIBRARIES, runtime_folder, symbols_of

        qemu = shutil.which(QEMU)
        assert qemu is not None, "why_not found it"
        processor = target.llvm.get("mcpu", "")
        # One that this qemu does not know is emulated by one that has all instructions.
        self._qemu = [qemu, "-cpu", processor if processor in processors(qemu) else "max"]
        self._turn = threading.RLock()
        self._model, self._threads, self._timeout_s = model, threads, timeout_s
        self._folder = folder
        self._weights: IO[bytes] | None = None
        dynamic = (SYSROOT / "lib" / "ld-linux-aarch64.so.1").is_file()
        if dynamic:
            self._qemu += ["-L", str(SYSROOT)]
        machine = [target.zig] if dynamic else ["aarch64-linux-musl", "-static"]
        self._work = tempfile.TemporaryDirectory(prefix="graphopt-qemu-")
        place = Path(self._work.name)
        try:
            self._weights = (folder / "weights.bin").open("rb")
            for source in (runtime_folder() / "main.c", runtime_folder() / "runtime.h", folder / f"lib{model.name}.a"):
                shutil.copyfile(source, place / source.name)
            options = [symbols_of(model.name), "-std=gnu11", "-O2", "-fno-sanitize=all", "-s"]
            for what, size in (("WORKSPACE", model.workspace_bytes), ("WEIGHTS", model.weights_bytes)):
                options.append(f"-DGRAPHOPT_{what}_BYTES={size}")
            for what, specs in (("INPUT", model.inputs), ("OUTPUT", model.outputs)):
                options.append(f"-DGRAPHOPT_{what}_BYTES=" + "".join(f"{spec_bytes(spec)}," for spec in specs))
            command = ["cc", "-target", *machine, *options, "main.c", f"lib{model.name}.a", *LIBRARIES, "-o", "main"]
            zig(command, place, name=model.name, target=target.spec, purpose="link a program")
        except OSError as error:
            self.close()
            raise RunFailed(name=model.name, runner=self.name, reason=str(error)) from error
        except BaseException:
            self.close()
            raise

    @one_at_a_time
    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `graphopt.targets.runner.Runner`. Raises BundleCorrupt where the library is another model's."""
        return self._run(inputs, 0.0)[0]

    @one_at_a_time
    def time(self, inputs: Sequence[np.ndarray], seconds: float) -> list[float]:
        """See `graphopt.targets.runner.Runner`. The times are the emulator's, not a device's."""
        return self._run(inputs, seconds)[1]

    @one_at_a_time
    def close(self) -> None:
        """See `graphopt.targets.runner.Runner`."""
        if self._weights is not None:
            self._weights.close()
        self._work.cleanup()

    def _run(self, inputs: Sequence[np.ndarray], seconds: float) -> tuple[list[np.ndarray], list[float]]:
        place = Path(self._work.name)
        sources = [place / f"in{i}" for i in range(len(inputs))]
        results = [place / f"out{i}" for i in range(len(self._model.outputs))]
        for file, array in zip(sources, dense(self._model.inputs, inputs), strict=True):
            file.write_bytes(array.tobytes())
        times = place / "times"
        assert self._weights is not None, "the runner is open"
        handle = self._weights.fileno()
        weights = f"/proc/self/fd/{handle}"
        arguments = [weights, self._threads, seconds, times, *sources, *results]
        try:
            done = subprocess.run(
                [*self._qemu, str(place / "main"), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                pass_fds=[handle],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout_s + seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise self._failed(f"no result within {self._timeout_s:g} seconds") from error
        if done.returncode == 3:  # it says what its sizes are
            workspace_bytes, weights_bytes = map(int, done.stderr.split())
            check_sizes(self._folder, self._model, workspace_bytes=workspace_bytes, weights_bytes=weights_bytes)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
            raise self._failed(lines[0].replace(weights, self._weights.name))
        outputs = [from_bytes(spec, file.read_bytes()) for spec, file in zip(self._model.outputs, results, strict=True)]
        return outputs, np.frombuffer(times.read_bytes(), "<f8").tolist()

    def _failed(self, reason: str) -> RunFailed:
        return RunFailed(name=self._model.name, runner=self.name, reason=reason)
