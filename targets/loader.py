"""The ES module loader of a WebAssembly bundle, and its types: runtime/loader.mjs and loader.d.mts filled in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.spec import TensorSpec
from graphopt.targets.target import Target

if TYPE_CHECKING:
    from graphopt.codegen.artefact import Artefact

# JavaScript has neither 16-bit floats everywhere nor bool arrays: the bits come as integers.
ARRAYS = {
    "float32": "Float32Array",
    "float64": "Float64Array",
    "float16": "Uint16Array",
    "bfloat16": "Uint16Array",
    "int64": "BigInt64Array",
    "int32": "Int32Array",
    "int16": "Int16Array",
    "int8": "Int8Array",
    "uint8": "Uint8Array",
    "bool": "Uint8Array",
}


def loader(artefact: Artefact, target: Target, runtime: Path) -> str:
    """The text of NAME.mjs. `runtime` is the folder of the templates."""

    def described(specs: Sequence[TensorSpec]) -> list[dict[str, object]]:
        return [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "length": math.prod(s.shape)} for s in specs]

    model = {
        "name": artefact.name,
        "simd": "relaxed SIMD" if "relaxed-simd" in target.features else "SIMD",
        "workspaceBytes": artefact.workspace_bytes,
        "weightsBytes": len(artefact.weights),
        "inputs": described(artefact.inputs),
        "outputs": described(artefact.outputs),
    }
    template = (runtime / "loader.mjs").read_text()
    return template.replace("__MODEL__", json.dumps(model, indent=2)).replace("__NAME__", artefact.name)


def declarations(artefact: Artefact, runtime: Path) -> str:
    """The text of NAME.d.mts: TypeScript looks for types of NAME.mjs under no other name."""

    def interface(specs: Sequence[TensorSpec]) -> str:
        return "\n".join(
            f"  /** {s.dtype}[{', '.join(map(str, s.shape))}], {math.prod(s.shape)} elements, row-major. */\n"
            f"  {json.dumps(s.name)}: {ARRAYS[s.dtype]};"
            for s in specs
        )

    template = (runtime / "loader.d.mts").read_text()
    template = template.replace("  __INPUTS__: never;", interface(artefact.inputs))
    template = template.replace("  __OUTPUTS__: never;", interface(artefact.outputs))
    return template.replace("__NAME__", artefact.name)
