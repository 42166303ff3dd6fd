"""Bundles: written whole or not at all, refused when damaged, called with arrays or tensors."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphopt import bundle as bundles
from graphopt import staging
from graphopt.bundle import Bundle, load, new_bundle, seal
from graphopt.errors import (
    BundleCorrupt,
    BundleNotFound,
    BundleTooNew,
    CannotWrite,
    Exit,
    NotABundle,
    OutputInTheWay,
    WrongInputs,
)
from graphopt.manifest import CHECKSUM, MANIFEST, NOT_VERIFIED, Manifest, Verification, checksum_of, read_manifest
from graphopt.record import Record
from graphopt.spec import TensorSpec
from graphopt.staging import staged

X = TensorSpec("x", (2, 3), "float32")
IDS = TensorSpec("ids", (4,), "int64")


def manifest(**changes: object) -> Manifest:
    """That of a small made-up model."""
    made = Manifest(
        name="net",
        target={
            "spec": "cpu",
            "kind": "cpu",
            "isa": "avx2",
            "triple": "t",
            "cpu": "c",
            "arch": "",
            "features": "avx2,fma",
        },
        inputs=(X, IDS),
        outputs=(TensorSpec("y", (2, 3), "float32"),),
        flops=12,
        params=3,
        weights_bytes=12,
        workspace_bytes=64,
        kernels=({"symbol": "net_gemm_0", "template": "gemm", "where": "fc", "parameters": {"mr": 4}},),
        declined=(),
        records=(Record("fold-constants", {"folded": 2}, seconds=1.5),),
        versions={"graphopt": "0.1.0"},
        verification=NOT_VERIFIED,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def write(path: Path, made: Manifest | None = None, **files: bytes) -> Path:
    """A bundle with the given files, a few made-up ones by default."""
    with new_bundle(path) as stage:
        for name, content in (files or {"weights": b"\0" * 12, "code": b"machine code"}).items():
            (stage / f"{name}.bin").write_bytes(content)
        seal(stage, made or manifest())
    return path


class Echo:
    """A runner that gives its first input back."""

    def __init__(self) -> None:
        self.got: list[np.ndarray] = []

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        self.got = arrays
        return [arrays[0].copy()]

    def close(self) -> None:
        pass


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle, Echo]:
    """A bundle whose runner is an Echo."""
    runner = Echo()
    monkeypatch.setattr(bundles, "open_runner", lambda *_, **__: runner)
    return load(write(tmp_path / "net.bundle")), runner


def test_manifest_survives_the_disk(tmp_path: Path) -> None:
    """What is read back equals what was written, files and hashes included; seconds are not written."""
    read = load(write(tmp_path / "net.bundle")).manifest
    assert replace(read, files={}) == manifest()
    assert read.files["weights.bin"].bytes == 12
    assert "seconds" not in (tmp_path / "net.bundle" / MANIFEST).read_text()


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """Nothing of the place or the time is in a manifest."""
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    assert (one / MANIFEST).read_bytes() == (two / MANIFEST).read_bytes()


# Calling it ----------------------------------------------------------------------------------------------------------


def test_call_takes_tensors_and_arrays_by_place_and_by_name(echo: tuple[Bundle, Echo]) -> None:
    """Torch tensors, strided numpy arrays and lists arrive dense, in the order of the inputs."""
    bundle, runner = echo
    x = torch.arange(6.0).reshape(3, 2).T
    y = bundle(x, ids=[1, 2, 3, 4])
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, x.numpy())
    assert runner.got[0].flags.c_contiguous
    assert runner.got[1].dtype == np.int64
    np.testing.assert_array_equal(bundle.run({"ids": np.zeros(4, np.int64), "x": x.numpy()}), x.numpy())


def test_safe_casts_are_made_and_noted(echo: tuple[Bundle, Echo]) -> None:
    """int32 becomes int64 with a note; float64 to float32 would lose digits and is refused."""
    bundle, _ = echo
    notes: list[str] = []
    bundle.run({"x": np.zeros((2, 3), np.float16), "ids": np.zeros(4, np.int32)}, note=notes.append)
    assert [note.split(":")[0] for note in notes] == ["x", "ids"]
    with pytest.raises(WrongInputs, match="x is float64, wants float32; converting would lose values"):
        bundle.run({"x": np.zeros((2, 3)), "ids": np.zeros(4, np.int64)})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.zeros((2, 3), np.float32)}, "no tensor for ids"),
        ({"x": 0, "ids": 0, "z": 0}, "it has no input z"),
        ({"x": np.zeros((3, 2), np.float32), "ids": np.zeros(4, np.int64)}, r"x has shape \[3, 2\], wants \[2, 3\]"),
        ({"x": np.full((2, 3), "a"), "ids": np.zeros(4, np.int64)}, "x is <U1, wants float32"),
    ],
)
def test_wrong_inputs_are_named(echo: tuple[Bundle, Echo], inputs: dict[str, object], message: str) -> None:
    """The message says which input, what it is and what is wanted."""
    with pytest.raises(WrongInputs, match=message) as caught:
        echo[0].run(inputs)
    assert "x: float32[2,3], ids: int64[4]" in str(caught.value)


def test_too_many_or_doubled_arguments_are_refused(echo: tuple[Bundle, Echo]) -> None:
    """As a Python function would."""
    with pytest.raises(WrongInputs, match="got 3 tensors, wants 2"):
        echo[0](1, 2, 3)
    with pytest.raises(WrongInputs, match="x is given twice"):
        echo[0](1, x=1)


# Damage --------------------------------------------------------------------------------------------------------------


def test_damage_is_refused(tmp_path: Path) -> None:
    """A changed byte, a shorter file and a missing one each give BundleCorrupt with the file's name."""
    path = write(tmp_path / "net.bundle")
    (path / "code.bin").write_bytes(b"Machine code")
    with pytest.raises(BundleCorrupt, match=r"code\.bin has SHA-256"):
        load(path)
    (path / "code.bin").write_bytes(b"machine")
    with pytest.raises(BundleCorrupt, match=r"code\.bin has 7 bytes, expected 12"):
        load(path)
    (path / "code.bin").unlink()
    with pytest.raises(BundleCorrupt, match=r"code\.bin is missing"):
        load(path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda data: data.update(format=99), BundleTooNew),
        (lambda data: data.update(format="1"), BundleCorrupt),
        (lambda data: data.update(kind="other"), NotABundle),
        (lambda data: data.pop("inputs"), BundleCorrupt),
        (lambda data: data.update(inputs=[{"name": "x", "shape": [-1], "dtype": "float32"}]), BundleCorrupt),
        (lambda data: data.update(files={"../../x": {"bytes": 1, "sha256": ""}}), BundleCorrupt),
        (lambda data: data.update(verification=None), BundleCorrupt),
        (lambda data: data.update(records=[{}]), BundleCorrupt),
        (lambda data: data["target"].update(isa="sve9"), BundleCorrupt),
    ],
)
def test_strange_manifests_are_refused(tmp_path: Path, change: object, error: type[Exception]) -> None:
    """Newer formats, lacking or senseless fields, and names that reach out of the folder."""
    path = write(tmp_path / "net.bundle")
    data = json.loads((path / MANIFEST).read_text())
    change(data)  # type: ignore[operator]
    # Whoever makes such a manifest may well add the checksum: what it says must not be trusted because of that.
    (path / MANIFEST).write_text(json.dumps({**data, CHECKSUM: checksum_of(data)}))
    with pytest.raises(error):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(workspace_bytes=0),
        lambda data: data.update(flops=1),
        lambda data: data["inputs"][0].update(shape=[1, 3]),
        lambda data: data["outputs"][0].update(shape=[200, 300]),
        lambda data: data["verification"].update(status="passed"),
        lambda data: data.update(extra="field"),
        lambda data: data.pop(CHECKSUM),
        lambda data: data.update({CHECKSUM: None}),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Any value that is not the one written, added or missing: BundleCorrupt, exit code 2; other spaces are fine."""
    path = write(tmp_path / "net.bundle")
    data = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(data))
    assert load(path).manifest.workspace_bytes == 64
    change(data)
    (path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleCorrupt, match=f"changed by hand or damaged|{CHECKSUM}") as caught:
        load(path)
    assert caught.value.exit == Exit.BAD_INPUT


def test_nothing_measured_is_null(tmp_path: Path) -> None:
    """A bundle that was not verified states no error and no tolerance: 0 would read as perfect."""
    found = json.loads((write(tmp_path / "net.bundle") / MANIFEST).read_text())["verification"]
    assert [found[key] for key in ("max_abs_error", "max_rel_error", "rtol", "atol")] == [None] * 4
    assert load(tmp_path / "net.bundle").manifest.verification == NOT_VERIFIED


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    """Truncated, empty, binary and absurdly nested ones; never another exception."""
    path = write(tmp_path / "net.bundle")
    (path / MANIFEST).write_bytes(content)
    with pytest.raises((BundleCorrupt, NotABundle)):
        load(path)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    """Nothing there: input/output failed; a file or another folder: bad input."""
    with pytest.raises(BundleNotFound) as caught:
        load(tmp_path / "none")
    assert caught.value.exit == Exit.IO_FAILED
    with pytest.raises(NotABundle, match=r"no manifest\.json"):
        load(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NotABundle, match="it is a file"):
        load(tmp_path / "file")


# Writing -------------------------------------------------------------------------------------------------------------


def test_a_bundle_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    """A bundle and an empty folder give way; a file, another folder and a bundle with a foreign file do not."""
    path = write(tmp_path / "net.bundle")
    write(path, manifest(name="second"))
    assert load(path).name == "second"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")

    (path / "index.html").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for place, what in ((path, "holds index.html"), (tmp_path / "folder", "not a bundle"), (tmp_path / "file", "file")):
        with pytest.raises(OutputInTheWay, match=what):
            write(place)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "folder", "net.bundle"]


def _begin(path: Path, error: BaseException) -> None:
    with new_bundle(path) as stage:
        (stage / "half").write_bytes(b"x")
        raise error


def test_an_error_leaves_the_old_bundle_and_no_litter(tmp_path: Path) -> None:
    """Whatever comes out of the block, the place is as it was before."""
    path = write(tmp_path / "net.bundle")
    for error in (RuntimeError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            _begin(path, error)
    assert load(path).name == "net"
    assert os.listdir(tmp_path) == ["net.bundle"]


def test_a_full_disk_is_an_input_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while writing or while syncing gives CannotWrite, exit code 5, and leaves nothing."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match="No space left on device") as caught:
        write(tmp_path / "net.bundle")
    assert caught.value.exit == Exit.IO_FAILED
    assert not os.listdir(tmp_path)


def test_a_missing_folder_is_an_input_output_error(tmp_path: Path) -> None:
    """The folder above the output is not made."""
    with pytest.raises(CannotWrite, match="No such file or directory"):
        write(tmp_path / "none" / "net.bundle")


def test_a_link_to_a_bundle_stays_a_link(tmp_path: Path) -> None:
    """What it points to is replaced."""
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", manifest(name="second"))
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "real").name == "second"


def test_what_a_killed_process_left_is_removed_next_time(tmp_path: Path) -> None:
    """SIGKILL leaves a hidden folder; the next writer removes it, but not one whose writer still lives."""
    script = f"""
        import os, signal
        from graphopt.staging import staged
        with staged({str(tmp_path / "net.bundle")!r}) as stage:
            (stage / "half").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert len(os.listdir(tmp_path)) == 1
    with staged(tmp_path / "other.bundle") as alive:
        assert len(os.listdir(tmp_path)) == 1
        write(tmp_path / "third.bundle")
        assert alive.exists()
    assert os.listdir(tmp_path) == ["third.bundle"]


def test_only_what_is_certainly_ours_is_swept(tmp_path: Path) -> None:
    """A bundle that a killed process had moved aside comes back; what a link leads to and other names stay."""
    write(tmp_path / "old.bundle").rename(tmp_path / "aside")
    (tmp_path / ".old.bundle.graphopt-abcd_123").mkdir()
    (tmp_path / "aside").rename(tmp_path / ".old.bundle.graphopt-abcd_123" / "replaced")
    (tmp_path / ".notes.graphopt-2026").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / ".x.graphopt-aaaaaaaa").symlink_to("mine")
    write(tmp_path / "net.bundle")
    assert load(tmp_path / "old.bundle").name == "net"
    left = [".notes.graphopt-2026", ".x.graphopt-aaaaaaaa", "mine", "net.bundle", "old.bundle"]
    assert sorted(os.listdir(tmp_path)) == left


def test_a_sweeper_that_comes_too_early_is_outrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is swept between its making and its locking is made anew."""
    really = staging._lock
    swept: list[Path] = []

    def slow(stage: Path, stack: ExitStack) -> None:
        if not swept:
            swept.append(stage)
            staging.sweep(tmp_path)
        really(stage, stack)

    monkeypatch.setattr(staging, "_lock", slow)
    write(tmp_path / "net.bundle")
    assert not swept[0].exists()
    assert os.listdir(tmp_path) == ["net.bundle"]


def test_save_copies(tmp_path: Path) -> None:
    """A saved copy is a bundle of its own with the same bytes."""
    made = manifest(verification=Verification("passed", "1 set of example inputs", ("native",), 1e-7, 1e-6, 1e-4, 1e-4))
    first = load(write(tmp_path / "one", made))
    second = first.save(tmp_path / "two")
    assert second.manifest == read_manifest(tmp_path / "two") == first.manifest
    assert second.manifest.verification.passed
