"""manifest.json: what a bundle is, what was done to make it, and the hashes of its files and of itself.

Equal inputs give equal bytes: keys are sorted, and there are no times, paths or machine names in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from graphopt.errors import BundleCorrupt, BundleNotFound, BundleTooNew, NotABundle
from graphopt.record import Record
from graphopt.spec import TensorSpec
from graphopt.staging import reason_of
from graphopt.targets.target import AVX2, AVX512, KIB, MIB, NEON, RELAXED_SIMD, SIMD128, SSE4, Kind, Target

MANIFEST = "manifest.json"
FORMAT = 1
KIND = "graphopt-bundle"
CHECKSUM = "manifest_sha256"
# No manifest of a real model comes near; a larger one is not worth the memory that parsing it takes.
_MAX_BYTES = 64 << 20
ISAS = {isa.name: isa for isa in (SSE4, AVX2, AVX512, NEON, SIMD128, RELAXED_SIMD)}
TARGET_FACTS = {"spec", "kind", "isa", "triple", "cpu", "arch", "features"}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 (hexadecimal) of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Verification:
    """What comparing the artefact with PyTorch gave. `status` is "passed" or "not verified"; then nothing was measured,
    and the numbers are None."""

    status: str
    inputs: str = ""  # "1 set of example inputs, 1 set of random inputs"
    runners: tuple[str, ...] = ()
    max_abs_error: float | None = None
    max_rel_error: float | None = None  # relative to the largest magnitude of the output in question
    rtol: float | None = None
    atol: float | None = None  # as a share of the largest magnitude of the output in question
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the artefact was run and agreed."""
        return self.status == "passed"

    def __str__(self) -> str:
        if not self.passed:
            return self.status + (f" ({self.note})" if self.note else "")
        absolute, relative, allowed = (value or 0.0 for value in (self.max_abs_error, self.max_rel_error, self.atol))
        return (
            f"passed: {', '.join(self.runners)}, {self.inputs}; largest error {absolute:.2g}, "
            f"{relative:.2g} of the largest output; allowed {allowed:g}" + (f" ({self.note})" if self.note else "")
        )


NOT_VERIFIED = Verification("not verified", note="--no-verify")


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle knows about itself."""

    name: str
    target: Mapping[str, str]  # spec, kind, isa, triple, cpu, arch, features (by LLVM's names, with commas)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    flops: int  # per run, two per multiply-add
    params: int
    weights_bytes: int
    workspace_bytes: int
    kernels: tuple[Mapping[str, Any], ...]  # one per call: symbol, template, where, parameters
    declined: tuple[Mapping[str, str], ...]
    records: tuple[Record, ...]
    versions: Mapping[str, str]
    verification: Verification
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    # One per layer whose weight has zeros: what was weighed for it; the fields of codegen's SparseWeight.
    sparse_weights: tuple[Mapping[str, Any], ...] = ()
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the checksum of all the others."""
        data = {"kind": KIND, **asdict(self)}
        for key in ("inputs", "outputs"):
            data[key] = [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in getattr(self, key)]
        data["records"] = [record.to_json() for record in self.records]
        return {**data, CHECKSUM: checksum_of(data)}

    def text(self) -> str:
        """The content of manifest.json."""
        return json.dumps(self.to_json(), sort_keys=True, indent=1) + "\n"

    def target_here(self) -> Target:
        """The target as it was when the bundle was made: `cpu` stands for another processor on each machine."""
        facts = self.target
        return Target(
            spec=facts["spec"],
            kind=facts["kind"],  # type: ignore[arg-type]
            llvm={},
            zig=facts["triple"],
            zig_cpu=facts["cpu"],
            isa=ISAS[facts["isa"]],
            # Nothing is generated from this one, so its caches do not matter.
            l1d_bytes=32 * KIB,
            l2_bytes=MIB,
            source="a bundle's manifest",
            arch=facts["arch"],
            features=tuple(name for name in facts["features"].split(",") if name),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError where `data` is no manifest."""
        fields = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        for key in ("inputs", "outputs"):
            specs = tuple(TensorSpec(_text(s["name"]), _shape(s["shape"]), _text(s["dtype"])) for s in data[key])
            fields[key] = specs
        for key in ("flops", "params", "weights_bytes", "workspace_bytes"):
            fields[key] = int(data[key])
        files = {name: FileEntry(int(e["bytes"]), _text(e["sha256"])) for name, e in data["files"].items()}
        # A name such as ../x would reach out of the bundle.
        if strange := [name for name in files if not _FILE_NAME.fullmatch(name)]:
            raise ValueError(f"file name {strange[0]!r}")
        target = {str(key): _text(value) for key, value in data["target"].items()}
        if not target.keys() >= TARGET_FACTS or target["isa"] not in ISAS or target["kind"] not in get_args(Kind):
            raise ValueError(f"target {target}")
        verification = data["verification"]
        runners = tuple(map(_text, verification["runners"]))
        return cls(
            **{
                **fields,
                "name": _text(data["name"]),
                "target": target,
                "kernels": tuple(map(dict, data["kernels"])),
                "declined": tuple(map(dict, data["declined"])),
                "sparse_weights": tuple(map(dict, data.get("sparse_weights", ()))),
                "records": tuple(map(Record.from_json, data["records"])),
                "versions": {str(key): _text(value) for key, value in data["versions"].items()},
                "files": files,
                "verification": Verification(**{**verification, "runners": runners}),
            }
        )


def checksum_of(data: Mapping[str, Any]) -> str:
    """SHA-256 (hexadecimal) of a manifest's JSON values but the checksum itself; spaces and order do not count."""
    plain = {key: value for key, value in data.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if any(not isinstance(size, int) or size < 0 for size in value):
        raise ValueError(f"shape {value!r}")
    return tuple(value)


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest, without looking at the other files.

    Raises:
        BundleNotFound: there is nothing at the path, or it may not be read.
        NotABundle: what stands there is something else.
        BundleTooNew: its format is newer than this code.
        BundleCorrupt: its manifest cannot be understood, or was changed since it was written.
    """
    file = folder / MANIFEST
    try:
        if not folder.is_dir():
            folder.stat()
            raise NotABundle(file=folder, what="it is a file")
        if not file.is_file():
            raise NotABundle(file=folder, what=f"it has no {MANIFEST}")
        if file.stat().st_size > _MAX_BYTES:
            raise BundleCorrupt(file=file, what=f"is {file.stat().st_size:,} bytes large, which no manifest is")
        raw = file.read_bytes()
    except OSError as error:
        raise BundleNotFound(file=folder, reason=reason_of(error)) from error
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleCorrupt(file=file, what=f"is truncated or damaged: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise NotABundle(file=folder, what=f"its {MANIFEST} is not graphopt's")
    version = data.get("format")
    if not isinstance(version, int) or version < 1:
        raise BundleCorrupt(file=file, what=f"has no valid format number: {version!r}")
    if version > FORMAT:
        raise BundleTooNew(file=folder, found=version, known=FORMAT)
    if CHECKSUM not in data:
        raise BundleCorrupt(file=file, what=f"lacks {CHECKSUM}, its checksum")
    # Shapes and sizes in it decide how much memory the code is given: a slip in one would be a crash.
    if (found := checksum_of(data)) != data[CHECKSUM]:
        what = f"was changed by hand or damaged: its values have SHA-256 {found[:12]}, {CHECKSUM} says "
        raise BundleCorrupt(file=file, what=what + f"{data[CHECKSUM]!s:.12}")
    try:
        return Manifest.from_json(data)
    except KeyError as error:
        raise BundleCorrupt(file=file, what=f"lacks {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise BundleCorrupt(file=file, what=f"cannot be understood: {error}") from error


def entry_of(file: Path) -> FileEntry:
    """Size and hash of a file. Raises OSError."""
    with file.open("rb") as stream:
        return FileEntry(file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def file_states(folder: Path, manifest: Manifest) -> dict[str, object]:
    """What tells a bundle's files from others that take their places, without reading them: None where one is missing.

    The times are those of the file system, which nobody can set back.
    """
    states: dict[str, object] = {}
    for name in manifest.files:
        try:
            state = (folder / name).stat()
        except OSError:
            states[name] = None
        else:
            states[name] = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return states


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises BundleCorrupt where a file is missing or is not what the manifest says."""
    for name, entry in manifest.files.items():
        file = folder / name
        if file.exists() and not file.is_file():  # a named pipe would be waited for
            raise BundleCorrupt(file=folder, what=f"{name} is no file")
        try:
            found = entry_of(file)
        except FileNotFoundError as error:
            raise BundleCorrupt(file=folder, what=f"{name} is missing") from error
        except OSError as error:
            raise BundleNotFound(file=file, reason=reason_of(error)) from error
        if found.bytes != entry.bytes:
            raise BundleCorrupt(file=folder, what=f"{name} has {found.bytes:,} bytes, expected {entry.bytes:,}")
        if found.sha256 != entry.sha256:
            raise BundleCorrupt(
                file=folder, what=f"{name} has SHA-256 {found.sha256[:12]}, expected {entry.sha256[:12]}"
            )


def versions() -> dict[str, str]:
    """The versions of what makes a bundle: with the same ones, the same input gives the same bytes."""
    from importlib import metadata

    from graphopt import __version__

    found = {"graphopt": __version__}
    for key, package in {"torch": "torch", "tvm": "apache-tvm", "zig": "ziglang"}.items():
        try:
            found[key] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[key] = "unknown"
    return found
