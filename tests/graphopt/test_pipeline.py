"""The whole way: the same bytes each time, every artefact kind, a dump of every phase, nothing half-written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from graphopt import pipeline
from graphopt.errors import BadOption, BadSample, CannotWrite, OutputInTheWay, ToolMissing, VerificationFailed
from tests.graphopt.two_outputs import small, small_inputs


def expected() -> dict[str, np.ndarray]:
    """What PyTorch computes on the example inputs."""
    with torch.inference_mode():
        return {name: tensor.numpy() for name, tensor in small()(*small_inputs()).items()}


def test_bundle_computes_what_pytorch_does(small_bundle: graphopt.Bundle) -> None:
    """Both outputs, by name, in this process; the manifest says how it was checked."""
    results = small_bundle(*small_inputs())
    assert isinstance(results, dict)
    np.testing.assert_allclose(results["logits"], expected()["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(results["best"], expected()["best"])
    found = small_bundle.manifest
    assert found.verification.passed
    assert found.flops > 0
    assert found.records[0].name == "remove-noops"


def test_same_input_gives_the_same_bytes(small_bundle: graphopt.Bundle, model_file: Path, tmp_path: Path) -> None:
    """Built again elsewhere, every file is equal, the manifest included."""
    again = graphopt.compile(model_file, output=tmp_path / "again.bundle")
    names = sorted(file.name for file in small_bundle.path.iterdir())
    assert names == sorted(file.name for file in again.path.iterdir())
    different = [n for n in names if (small_bundle.path / n).read_bytes() != (again.path / n).read_bytes()]
    assert different == []


def test_no_paths_in_a_bundle(small_bundle: graphopt.Bundle) -> None:
    """Neither this machine's folders nor temporary ones are in any file."""
    for file in small_bundle.path.iterdir():
        content = file.read_bytes()
        for trace in (b"/graphopt-", os.fsencode(Path.home()) + b"/", b"/tmp/", os.fsencode(Path.cwd()) + b"/"):
            assert trace not in content, f"{trace!r} in {file.name}"


def test_an_argument_called_input(tmp_path: Path) -> None:
    """A name that is a Python builtin goes through every copy of the graph."""
    bundle = graphopt.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), example_inputs=(torch.ones(2, 4),))
    assert [spec.name for spec in bundle.manifest.inputs] == ["input"]


def test_a_temporary_bundle_goes_when_unused() -> None:
    """Without an output the folder lives as long as the bundle."""
    bundle = graphopt.compile(small(), example_inputs=small_inputs(), verify=False)
    path = bundle.path
    assert bundle.manifest.verification.status == "not verified"
    assert path.is_dir()
    bundle.close()
    del bundle
    assert not path.exists()


@pytest.mark.parametrize("suffix", [".so", ".a"])
def test_libraries_come_with_header_and_weights(model_file: Path, tmp_path: Path, suffix: str) -> None:
    """-o model.so and model.a: nothing else is left in the folder."""
    graphopt.compile(model_file, output=tmp_path / f"model{suffix}", verify=False)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert f"model{suffix}" in names
    assert any(name.endswith(".h") for name in names)
    assert any("weights" in name for name in names)
    assert not [name for name in names if name.startswith(".")]


def test_every_phase_is_dumped(model_file: Path, tmp_path: Path) -> None:
    """Numbered in order: graph, Relax, assembly, C."""
    graphopt.compile(model_file, dump_dir=tmp_path / "dump", verify=False)
    names = sorted(file.name for file in (tmp_path / "dump").iterdir())
    assert names[0] == "00-captured.txt"
    assert names[1] == "01-canonical.txt"
    assert [name[:2] for name in names] == [f"{number:02d}" for number in range(len(names))]
    for ending in ("relax.py", ".s", ".c"):
        assert any(name.endswith(ending) for name in names), names


def test_calibration(model_file: Path, tmp_path: Path) -> None:
    """Samples from a .npz are what is verified on; wrong ones are refused before anything is compiled."""
    image, shift = (tensor.numpy() for tensor in small_inputs())
    np.savez(tmp_path / "good.npz", image=np.stack([image, image * 2]), shift=np.stack([shift, shift]))
    bundle = graphopt.compile(model_file, calibration=tmp_path / "good.npz")
    assert bundle.manifest.verification.inputs == "2 sets of calibration inputs"
    np.savez(tmp_path / "bad.npz", image=image[:, :2], shift=shift)
    with pytest.raises(BadSample, match=r"image has shape \[1, 2, 8, 8\]; wanted \[1, 3, 8, 8\]"):
        graphopt.compile(model_file, calibration=tmp_path / "bad.npz")


# Nothing half-written ------------------------------------------------------------------------------------------------


def test_a_failing_check_writes_nothing(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VerificationFailed leaves the folder as it was."""

    class Wrong:
        def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
            return [np.ones((1, 4), np.float32), np.zeros(1, np.int64)]

        def close(self) -> None:
            pass

    monkeypatch.setattr(pipeline, "open_runner", lambda *_, **__: Wrong())
    with pytest.raises(VerificationFailed, match="small: output logits"):
        graphopt.compile(model_file, output=tmp_path / "x.bundle")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("output", ["x.bundle", "x.so"])
def test_a_full_disk_leaves_nothing(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """ENOSPC at the last moment: CannotWrite and an empty folder."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match="No space left"):
        graphopt.compile(model_file, output=tmp_path / output, verify=False)
    assert not os.listdir(tmp_path)


def test_a_file_size_limit_leaves_nothing(small_bundle: graphopt.Bundle, tmp_path: Path) -> None:
    """The system refuses to let the weights grow: one error, exit code 5, nothing left.

    The bundle of another model was made before, so that the toolchain's own files are there.
    """
    (tmp_path / "out").mkdir()
    large = nn.Sequential(nn.Linear(1200, 1200))
    torch.export.save(torch.export.export(large, (torch.ones(1, 1200),)), tmp_path / "large.pt2")
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20)); "
    call = "from graphopt.cli import execute; sys.exit(execute(['compile', '../large.pt2', '-o', 'x.bundle']))"
    command = [sys.executable, "-c", limit + call]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "error[cannot-write]" in done.stderr
    assert "File too large" in done.stderr
    assert done.stderr.count("error[") == 1
    assert "Traceback" not in done.stderr
    assert not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_compile_leaves_nothing(model_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ended while the output is being made: nothing there, exit code 128 plus the signal, no traceback."""
    command = [sys.executable, "-m", "graphopt.cli", "compile", str(model_file), "-o", "x.bundle", "--verbose"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    deadline = time.monotonic() + 60
    while "lowering" not in process.stderr.readline() and time.monotonic() < deadline:
        pass
    assert os.listdir(tmp_path), "the output's temporary folder is there by now"
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(60) == 128 + number
    assert "Traceback" not in rest
    assert "interrupted; nothing was written" in rest
    assert not os.listdir(tmp_path)


# Refused at once -----------------------------------------------------------------------------------------------------


def test_what_stands_in_the_way_is_seen_before_compiling(model_file: Path, tmp_path: Path) -> None:
    """A foreign folder, a missing folder, a suffix that the target has no form for."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(OutputInTheWay):
        graphopt.compile(model_file, output=tmp_path / "mine")
    with pytest.raises(CannotWrite, match="there is no folder"):
        graphopt.compile(model_file, output=tmp_path / "none" / "x.bundle")
    with pytest.raises(BadOption, match=r"cpu has no \.wasm form"):
        graphopt.compile(model_file, output=tmp_path / "x.wasm")
    with pytest.raises(BadOption, match="brings its own inputs"):
        graphopt.compile(graphopt.capture(model_file), example_inputs=small_inputs())


def test_a_missing_toolchain_is_named(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without zig: ToolMissing with what to install, nothing written."""
    monkeypatch.setitem(sys.modules, "ziglang", None)
    monkeypatch.setattr("graphopt.targets.zig.zig_installed", lambda: False)
    with pytest.raises(ToolMissing, match="ziglang is needed") as caught:
        graphopt.compile(model_file, output=tmp_path / "x.bundle")
    assert "pip install ziglang" in str(caught.value)
    assert not os.listdir(tmp_path)
