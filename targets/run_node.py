"""Run a WebAssembly bundle in Node, through the very loader that the bundle ships: a process that answers requests."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import selectors
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import RunFailed, ToolMissing
from graphopt.targets.runner import Interface, check_sizes, dense, from_bytes, one_at_a_time
from graphopt.targets.target import Target

OLDEST = 18
INSTALL = "install Node 18 or later: `apt-get install nodejs`, or https://nodejs.org"
# A run of the largest models takes seconds; what takes this long hangs.
TIMEOUT_S = 600.0


@functools.cache
def version(node: str) -> int:
    """Node's major version; 0 where it does not tell."""
    try:
        done = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.match(r"v(\d+)", done.stdout)
    return int(found[1]) if found else 0


def why_not(target: Target) -> str:
    """What is missing to run `target` in Node; empty where nothing is."""
    node = shutil.which("node")
    return "" if node and version(node) >= OLDEST else INSTALL


class Runner:
    """A Node process with one instance of the model. Inputs and outputs go through files."""

    name = "node"

    def __init__(
        self, folder: Path, model: Interface, target: Target, *, threads: int = 0, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Start Node on NAME.mjs in `folder`. `threads` has no meaning here.

        Raises:
            ToolMissing: Node is not installed, or too old.
            RunFailed: the loader fails.
            BundleCorrupt: the module is another model's.
        """
        if reason := why_not(target):
            raise ToolMissing(tool=f"Node {OLDEST} or later", purpose=f"run {target}", install=reason)
        from graphopt.targets.toolchain import runtime_folder

        node = shutil.which("node")
        assert node is not None, "why_not found it"
        flags = ["--experimental-wasm-relaxed-simd"] if "relaxed-simd" in target.features and version(node) < 21 else []
        loader = (folder / f"{model.name}.mjs").resolve()
        self._turn = threading.RLock()
        self._model, self._timeout_s = model, timeout_s
        self._work = tempfile.TemporaryDirectory(prefix="graphopt-node-")
        self._buffer = b""
        self._process = subprocess.Popen(
            [node, *flags, str(runtime_folder() / "run.mjs"), str(loader)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(Path(self._work.name) / "stderr").open("wb"),
            env={key: value for key, value in os.environ.items() if key != "NODE_OPTIONS"},
        )
        try:
            found = self._reply(timeout_s)
            check_sizes(folder, model, workspace_bytes=found["workspaceBytes"], weights_bytes=found["weightsBytes"])
        except BaseException:
            self.close()
            raise

    @one_at_a_time
    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `graphopt.targets.runner.Runner`."""
        files = {spec.name: str(self._file(f"out{i}")) for i, spec in enumerate(self._model.outputs)}
        self._ask({"inputs": self._put(inputs), "outputs": files}, self._timeout_s)
        return [from_bytes(spec, Path(files[spec.name]).read_bytes()) for spec in self._model.outputs]

    @one_at_a_time
    def time(self, inputs: Sequence[np.ndarray], seconds: float) -> list[float]:
        """See `graphopt.targets.runner.Runner`. The loader's copies of inputs and outputs are part of a run."""
        reply = self._ask({"inputs": self._put(inputs), "seconds": seconds}, self._timeout_s + seconds)
        return [float(taken) for taken in reply["taken"]]

    @one_at_a_time
    def close(self) -> None:
        """See `graphopt.targets.runner.Runner`."""
        process = self._process
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._work.cleanup()

    def _file(self, name: str) -> Path:
        return Path(self._work.name) / name

    def _put(self, inputs: Sequence[np.ndarray]) -> dict[str, str]:
        files = {}
        for i, (spec, array) in enumerate(zip(self._model.inputs, dense(self._model.inputs, inputs), strict=True)):
            file = self._file(f"in{i}")
            file.write_bytes(array.tobytes())
            files[spec.name] = str(file)
        return files

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise self._failed(f"Node has ended: {self._said()}") from error
        return self._reply(timeout_s)

    def _reply(self, timeout_s: float) -> dict[str, Any]:
        """The next line that Node writes."""
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    self._process.kill()
                    raise self._failed(f"no answer within {timeout_s:g} seconds")
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise self._failed(f"Node has ended: {self._said()}")
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failed(reply["error"])
        return reply

    def _said(self) -> str:
        lines = self._file("stderr").read_text(errors="replace").split("\n")
        return next((line for line in lines if "Error" in line or "error" in line), lines[0]) or "it said nothing"

    def _failed(self, reason: str) -> RunFailed:
        return RunFailed(name=self._model.name, runner=self.name, reason=reason)
