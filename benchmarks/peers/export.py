"""One model with its weights, in the formats that the engines read. Each file is written when it is first asked for."""

from __future__ import annotations

import copy
import json
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import graphopt
from benchmarks.peers.registry import HERE, PeerFailed
from graphopt.bench import to_onnx
from graphopt.passes import CANONICALISE
from graphopt.passes.base import run_passes
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


def write_tfjs(case: Case, path: Path) -> None:
    """For `run_tfjs.mjs`: a line of JSON, which has the steps of a convolutional network in NHWC, and all weights.

    What a converted graph model has: batch norms folded, an activation done by the convolution in front of it. Its own
    converter wants TensorFlow, which has no such model.

    Raises:
        PeerFailed: an operator that is not of these networks.
    """
    program = run_passes(case.program, CANONICALISE, check=False)
    steps: list[dict[str, Any]] = []
    arrays: list[np.ndarray] = []
    places: dict[Any, int] = {}  # of a value: the number of the step that gives it

    def stored(node: Any, turned: tuple[int, ...]) -> dict[str, Any]:
        array = np.ascontiguousarray(program.tensors[node.name].numpy().transpose(turned), dtype=np.float32)
        arrays.append(array)
        return {"weights": len(arrays) - 1, "shape": list(array.shape)}

    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in program.tensors:
                places[node] = -1
            continue
        if node.op != "call_function":
            continue
        name, args = str(node.target).split(".")[1], list(node.args)
        if name in ("hardtanh", "relu") and len(args[0].users) == 1 and steps[places[args[0]]].get("op") == "conv2d":
            steps[places[args[0]]]["activation"] = "relu" if name == "relu" else "relu6"
            places[node] = places[args[0]]
            continue
        step: dict[str, Any] = {"op": name, "x": places[args[0]]}
        if name == "conv2d":
            stride, padding, dilation, groups = (args[3:] + [[1, 1], [0, 0], [1, 1], 1][len(args) - 3 :])[:4]
            weight = args[1].meta["val"].shape
            depthwise = groups > 1
            if dilation != [1, 1] or len(set(padding)) > 1 or (depthwise and (groups, 1) != (weight[0], weight[1])):
                raise PeerFailed(f"no tfjs for {node.format_node()}")
            step |= {"weight": stored(args[1], (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)), "depthwise": depthwise}
            step |= {"bias": stored(args[2], (0,)), "strides": stride, "pad": padding[0]}
        elif name == "add":
            step["y"] = places[args[1]]
        elif name == "max_pool2d":
            step |= {"size": args[1], "strides": args[2], "pad": args[3][0]}
        elif name == "linear":
            step |= {"weight": stored(args[1], (1, 0)), "bias": stored(args[2], (0,))}
        elif name == "mean" or (name == "adaptive_avg_pool2d" and args[1] == [1, 1]):
            step["op"] = "mean"
        elif name not in ("hardtanh", "relu", "reshape"):
            raise PeerFailed(f"no tfjs for {name}")
        places[node] = len(steps)
        steps.append(step)
    with path.open("wb") as file:
        file.write(json.dumps(steps).encode() + b"\n")
        for array in arrays:
            file.write(array.tobytes())


WRITERS: dict[str, Callable[[Case, Path], None]] = {
    "pt2": write_pt2,
    "onnx": write_onnx,
    "onnx-legacy": write_onnx_legacy,
    "tflite": write_tflite,
    "tfjs": write_tfjs,
}
