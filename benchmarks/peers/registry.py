"""The engines that graphopt is compared with: a line each, and a script beside this file that runs it.

An engine runs in a process of its own, because most need an environment of their own; `setup.sh` makes those. It loads
models and times runs when it is asked to (`worker.py` says how), so that all engines can be asked in turns.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Loading compiles; the slowest takes a minute.
TIMEOUT_S = 600.0


class PeerFailed(Exception):
    """An engine did not load or run a model; the message is its own."""


@dataclass(frozen=True)
class Peer:
    """An engine: how it is started and what it reads."""

    name: str
    kind: str  # cpu or wasm
    script: str
    environment: str  # a folder that setup.sh makes; empty: graphopt's own
    reads: str  # a key of export.WRITERS
    gains: bool = False  # whether it has kernels for zeros
    wants_more: bool = False  # whether zeros of FAVOUR in sparse.models turn its kernels for zeros on
    node: tuple[str, ...] = ()  # flags for Node
    args: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()  # what graphopt's own environment must have
    default: bool = True

    def why_not(self, folder: Path | None) -> str:
        """What is missing to run it, with the way to get it; empty where nothing is."""
        if not self.environment:
            return "" if all(map(find_spec, self.modules)) else "pip install 'graphopt[onnx]'"
        if folder is not None and (folder / self.environment).is_dir():
            return "" if self.kind == "cpu" or shutil.which("node") else "Node 20 is not installed"
        return f"benchmarks/peers/setup.sh FOLDER {self.environment}, then --peers FOLDER"

    def command(self, folder: Path | None) -> list[str]:
        """What starts it."""
        script = str(HERE / self.script)
        if not self.environment:
            return [sys.executable, script]
        assert folder is not None
        place = folder / self.environment
        if self.kind == "wasm":
            return ["node", *self.node, script, str(place / "node_modules"), *self.args]
        return [str(place / "bin" / "python"), script]


RELAXED = ("--experimental-wasm-relaxed-simd",)
XNNPACK: dict[str, Any] = {"gains": True, "wants_more": True}
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("onnxruntime", "cpu", "run_onnxruntime.py", "", "onnx", modules=("onnx", "onnxscript", "onnxruntime")),
        Peer("openvino", "cpu", "run_openvino.py", "openvino", "onnx"),
        Peer("litert", "cpu", "run_litert.py", "litert", "tflite"),
        Peer("deepsparse", "cpu", "run_deepsparse.py", "deepsparse", "onnx-legacy", gains=True),
        Peer("inductor", "cpu", "run_inductor.py", "", "pt2", default=False),
        Peer("onnxruntime-web", "wasm", "run_onnxruntime_web.mjs", "web", "onnx"),
        Peer("tfjs-wasm", "wasm", "run_tfjs.mjs", "web", "tfjs"),
        Peer("litertjs", "wasm", "run_litertjs.mjs", "web", "tflite", args=("compat",), **XNNPACK),
        Peer(
            "litertjs-relaxed", "wasm", "run_litertjs.mjs", "web", "tflite", node=RELAXED, args=("relaxed",), **XNNPACK
        ),
    )
}


class Worker:
    """A running engine."""

    def __init__(self, peer: Peer, folder: Path | None, log: Path) -> None:
        self.peer, self.log = peer, log
        self._rest = b""
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "NODE_OPTIONS")}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                peer.command(folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one reply. Raises PeerFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerFailed(self._last_words()) from None
        reply = json.loads(self._line())
        if "error" in reply:
            raise PeerFailed(reply["error"].splitlines()[0])
        return dict(reply)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        end = time.monotonic() + TIMEOUT_S
        while b"\n" not in self._rest:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise PeerFailed(f"no reply in {TIMEOUT_S:g} s")
            if not (part := os.read(pipe, 1 << 16)):
                raise PeerFailed(self._last_words())
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"has ended: {lines[-1][:300] if lines else 'without a word'}"
