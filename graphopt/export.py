"""Libraries instead of a bundle folder: model.so, model.a or model.wasm, with what belongs to it beside."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from graphopt.bundle import Bundle
from graphopt.staging import publish_files, resolved, staged

Kind = Literal["bundle", "shared", "static", "wasm"]

SUFFIXES: dict[str, Kind] = {".so": "shared", ".a": "static", ".wasm": "wasm"}
KINDS: dict[str, tuple[Kind, ...]] = {
    "cpu": ("bundle", "shared", "static"),
    "arm": ("bundle", "shared", "static"),
    "cuda": ("bundle", "shared"),
    "wasm": ("bundle", "wasm"),
}


def export(bundle: Bundle, output: str | os.PathLike[str], kind: Kind) -> tuple[Path, ...]:
    """Write the bundle's library to `output`, and its header or loader and its weights into the same folder.

    Raises:
        CannotWrite: the file system refuses; nothing is left half-written.
    """
    place = resolved(output)
    with staged(output) as stage:
        for name in bundle.manifest.files:
            suffix = Path(name).suffix
            if SUFFIXES.get(suffix) == kind:
                shutil.copyfile(bundle.path / name, stage / place.name)
            elif suffix not in SUFFIXES:
                shutil.copyfile(bundle.path / name, stage / name)
        return tuple(publish_files(stage, place.parent))
