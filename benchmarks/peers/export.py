"""One model with its weights, in the formats that the engines read. Each file is written when it is first asked for."""

from __future__ import annotations

import copy
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import graphopt
from benchmarks.peers.registry import HERE, PeerFailed
from graphopt.bench import to_onnx
from graphopt.program import Program


@dataclass
class Case:
    """A model with one set of weights; `changed` has those with zeros."""

    label: str
    module: nn.Module
    inputs: dict[str, Tensor]
    changed: dict[str, np.ndarray]
    folder: Path
    peers: Path | None
    _files: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def program(self) -> Program:
        """The module, captured."""
        return graphopt.capture(self.module, self.inputs, name=self.label.partition("-")[0])

    def file(self, reads: str) -> Path:
        """The model in the format `reads`, a key of WRITERS. Raises PeerFailed."""
        if reads not in self._files:
            path = self.folder / f"{self.label}.{reads}"
            WRITERS[reads](self, path)
            self._files[reads] = path
        return self._files[reads]

    def input_files(self) -> list[dict[str, object]]:
        """The inputs as `worker.py` takes them."""
        items = []
        for name, tensor in self.inputs.items():
            array, file = tensor.numpy(), self.folder / f"{self.label}.{name}.bin"
            array.tofile(file)
            items.append({"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "file": str(file)})
        return items

    def forget(self) -> None:
        """Remove the files."""
        for file in self._files.values():
            file.unlink(missing_ok=True)
        self._files.clear()


class _Positional(nn.Module):
    """A module that takes its inputs in order and returns its tensors as a tuple."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        results = self.module(**dict(zip(self.names, args, strict=True)))
        if isinstance(results, Tensor):
            return (results,)
        return tuple(results.values()) if isinstance(results, dict) else tuple(results)


def write_pt2(case: Case, path: Path) -> None:
    """What torch.export saves."""
    torch.export.save(case.program.exported, path)


def write_onnx(case: Case, path: Path) -> None:
    """By torch's present exporter, from the program."""
    path.write_bytes(to_onnx(case.program))


def write_onnx_legacy(case: Case, path: Path) -> None:
    """By the exporter before, opset 14 and IR 7: what old engines read. It traces the module, not the program."""
    module = copy.deepcopy(case.module)
    if hasattr(module, "set_attn_implementation"):
        module.set_attn_implementation("eager")  # fewer operators for NaN that nobody recognises
    names = list(case.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Positional(module, names),
            tuple(case.inputs.values()),
            str(path),
            dynamo=False,
            opset_version=14,
            do_constant_folding=True,
            input_names=names,
        )


def write_tflite(case: Case, path: Path) -> None:
    """By litert-torch, zeros encoded."""
    _litert(case, "convert_litert.py", str(case.file("pt2")), str(path))
    _litert(case, "sparse_tflite.py", str(path))


def _litert(case: Case, script: str, *args: str) -> None:
    """Run a script in LiteRT's environment."""
    python = (case.peers or Path()) / "litert" / "bin" / "python"
    if not python.exists():
        raise PeerFailed("tflite files need LiteRT's environment: benchmarks/peers/setup.sh FOLDER litert")
    done = subprocess.run([str(python), str(HERE / script), *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerFailed(f"{script}: {(done.stderr.strip().splitlines() or ['failed'])[-1][:300]}")


WRITERS: dict[str, Callable[[Case, Path], None]] = {
    "pt2": write_pt2,
    "onnx": write_onnx,
    "onnx-legacy": write_onnx_legacy,
    "tflite": write_tflite,
}
