"""Libraries instead of a bundle folder: model.so, model.a or model.wasm, with what belongs to it beside."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from graphopt.bundle import Bundle
from graphopt.spec import identifier
from graphopt.staging import publish_files, resolved, staged
from graphopt.targets.toolchain import WEIGHTS

Kind = Literal["bundle", "shared", "static", "wasm"]

SUFFIXES: dict[str, Kind] = {".so": "shared", ".a": "static", ".wasm": "wasm"}
KINDS: dict[str, tuple[Kind, ...]] = {
    "cpu": ("bundle", "shared", "static"),
    "arm": ("bundle", "shared", "static"),
    "cuda": ("bundle", "shared", "static"),
    "wasm": ("bundle", "wasm"),
}
# Header and types; what else is in a bundle is either the library in another form or for its readers.
_BESIDE = (".h", ".ts", ".mts")


def name_for(output: str | os.PathLike[str]) -> str:
    """What a library is called that goes to `output`: net for libnet.so, web_net for web-net.wasm."""
    return identifier(_base(Path(output)))


def _base(output: Path) -> str:
    return output.stem.removeprefix("lib") or output.stem


def export(bundle: Bundle, output: str | os.PathLike[str], kind: Kind) -> tuple[Path, ...]:
    """Write the bundle's library to `output`, and its header or loader and its weights into the same folder.

    The files beside it are called like it, so that several models can share a folder.

    Raises:
        CannotWrite: the file system refuses; nothing is left half-written.
    """
    place = resolved(output)
    base = _base(place)
    with staged(output) as stage:
        for name in bundle.manifest.files:
            source, suffix = bundle.path / name, Path(name).suffix
            if SUFFIXES.get(suffix) == kind:
                shutil.copyfile(source, stage / place.name)
            elif name == WEIGHTS:
                shutil.copyfile(source, stage / f"{base}.{WEIGHTS}")
            elif suffix == ".mjs":
                text = source.read_text(encoding="utf-8").replace(f"./{WEIGHTS}", f"./{base}.{WEIGHTS}")
                text = text.replace(f"./{bundle.name}.wasm", f"./{place.name}")
                (stage / f"{base}.mjs").write_text(text, encoding="utf-8")
            elif suffix in _BESIDE:
                shutil.copyfile(source, stage / name.replace(bundle.name, base, 1))
        return tuple(publish_files(stage, place.parent))
