"""The command line: what it prints where, exit codes, and one clear error for each kind of bad input."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.main import get_command

import graphopt
from graphopt import pipeline
from graphopt.cli import make_app
from graphopt.cli.common import VERBS
from graphopt.errors import Exit
from tests.graphopt.two_outputs import small, small_inputs

Cli = Callable[..., tuple[int, str, str]]
FACTORY = "tests.graphopt.two_outputs:small"


def test_help_is_quick_and_lists_the_verbs() -> None:
    """No PyTorch for --help; it names every verb and the exit codes."""
    probe = "import sys; from graphopt.cli import execute; execute(['--help']); print('torch' in sys.modules)"
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - started < 10  # a loaded machine; 0.3 s on an idle one
    assert out.endswith("False\n")
    assert all(verb in out for verb in VERBS)
    assert "Exit codes" in out


def test_options_are_kebab_case_and_described() -> None:
    """Every option of every verb; and those that verbs share mean the same."""
    commands = get_command(make_app()).commands  # type: ignore[attr-defined]
    assert list(commands) == list(VERBS)
    for verb, command in commands.items():
        names = [name for parameter in command.params for name in parameter.opts + parameter.secondary_opts]
        assert {"--json", "--quiet", "--verbose", "--debug"} <= set(names), verb
        for parameter in command.params:
            assert parameter.help, f"{verb} {parameter.name}"
            for name in parameter.opts + parameter.secondary_opts:
                assert "_" not in name or not name.startswith("-"), f"{verb} {name}"


def test_version(cli: Cli) -> None:
    """One line."""
    assert cli("--version") == (0, f"graphopt {graphopt.__version__}\n", "")


# compile -------------------------------------------------------------------------------------------------------------


def test_compile_with_json(cli: Cli, model_file: Path, tmp_path: Path) -> None:
    """The result is the only thing on standard output; progress goes to standard error."""
    code, out, err = cli("compile", model_file, "-o", tmp_path / "x.bundle", "--json", "--verbose")
    data = json.loads(out)
    assert code == 0, err
    assert data["verification"]["status"] == "passed"
    assert data["target"]["kind"] == "cpu"
    assert str(tmp_path / "x.bundle" / "manifest.json") in data["written"]
    assert "graphopt: linking" in err


def test_compile_says_what_it_made(cli: Cli, model_file: Path, tmp_path: Path) -> None:
    """For people: sizes, inputs, verification; without --verbose standard error stays empty."""
    code, out, err = cli("compile", model_file, "-o", tmp_path / "x.bundle", "--no-verify", "--name", "tiny")
    assert (code, err) == (0, "")
    assert "tiny for cpu" in out
    assert "image: float32[1,3,8,8]" in out
    assert "not verified (--no-verify)" in out


def test_quiet_prints_nothing_but_errors(
    cli: Cli, model_file: Path, small_bundle: graphopt.Bundle, samples: Path
) -> None:
    """Neither results nor notes, for every verb; errors stay, and so does what --json asks for."""
    np.save(samples / "half.npy", np.load(samples / "image.npy").astype(np.float16))
    named = ("-i", f"image={samples}/half.npy", "-i", f"shift={samples}/shift.npy")
    for arguments in (
        ("compile", model_file, "--dry-run"),
        ("run", small_bundle.path, *named, "-o", samples / "all.npz"),
        ("inspect", small_bundle.path),
        ("bench", small_bundle.path, "--seconds", "0"),
        ("targets",),
    ):
        assert cli(*arguments, "-q", "--verbose") == (0, "", ""), arguments
    assert json.loads(cli("targets", "-q", "--json")[1])["targets"]
    code, out, err = cli("inspect", samples / "none.bundle", "-q")
    assert (code, out) == (Exit.IO_FAILED, "")
    assert "error[model-not-found]" in err


def test_a_folder_that_is_not_there_is_noticed_at_once(tmp_path: Path) -> None:
    """Before PyTorch is imported, with the first folder that is missing; a wrong target likewise."""
    probe = "import sys; from graphopt.cli import execute; execute(sys.argv[1:]); print('torch' in sys.modules)"
    (tmp_path / "there").mkdir()
    for more, words in (
        (("-o", "there/none/deep/x.bundle"), "there is no folder there/none; folders above"),
        (("-t", "amr"), "did you mean arm"),
    ):
        command = [sys.executable, "-c", probe, "compile", "model.pt2", *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert words in done.stderr
        assert done.stdout == "False\n"
    assert not os.listdir(tmp_path / "there")


def test_dry_run_writes_nothing(cli: Cli, model_file: Path, tmp_path: Path) -> None:
    """The steps, in order, and an empty folder."""
    code, out, _ = cli("compile", model_file, "-o", tmp_path / "x.bundle", "--dry-run", "--dump-dir", tmp_path / "d")
    assert code == 0
    assert [line.split()[1].rstrip(":") for line in out.splitlines()[:4]] == [
        "capture",
        "canonicalise",
        "lower",
        "link",
    ]
    assert not os.listdir(tmp_path)


def test_a_state_dict_with_its_factory(cli: Cli, tmp_path: Path) -> None:
    """--model and --input-shape make a program of bare weights."""
    torch.save(small().state_dict(), tmp_path / "weights.pt")
    shapes = ("--input-shape", "image=1x3x8x8", "--input-shape", "shift=4")
    code, out, err = cli("inspect", tmp_path / "weights.pt", "--model", FACTORY, *shapes, "--json")
    assert code == 0, err
    assert [item["shape"] for item in json.loads(out)["inputs"]] == [[1, 3, 8, 8], [4]]


def test_a_pickled_module_only_when_trusted(cli: Cli, tmp_path: Path) -> None:
    """Refused with the reason; --unsafe-load takes it."""
    torch.save(small(), tmp_path / "module.pt")
    shapes = ("--input-shape", "image=1x3x8x8", "--input-shape", "shift=4")
    code, _, err = cli("inspect", tmp_path / "module.pt", *shapes)
    assert code == Exit.BAD_INPUT
    assert "error[unsafe-model]" in err
    assert "--unsafe-load" in err
    assert cli("inspect", tmp_path / "module.pt", *shapes, "--unsafe-load")[0] == 0


# Bad input -----------------------------------------------------------------------------------------------------------


def bad_files(folder: Path, model: Path) -> dict[str, tuple[bytes, int, str]]:
    """Name to content, exit code and a word of the error."""
    good = model.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    return {
        "truncated.pt2": (good[: len(good) // 2], Exit.BAD_INPUT, "corrupt-model"),
        "head.pt2": (good[:40], Exit.BAD_INPUT, "corrupt-model"),
        "flipped.pt2": (bytes(flipped), Exit.BAD_INPUT, "corrupt-model"),
        "empty.pt2": (b"", Exit.BAD_INPUT, "error["),
        "text.pt2": (b"import torch\n" * 50, Exit.BAD_INPUT, "-model]"),
        "picture.pt": (b"\x89PNG\r\n\x1a\n" + bytes(100), Exit.BAD_INPUT, "-model]"),
        "zeros.pt": (bytes(4096), Exit.BAD_INPUT, "error["),
    }


@pytest.mark.parametrize("name", bad_files(Path(), Path(__file__)))
def test_bad_model_files(cli: Cli, model_file: Path, tmp_path: Path, name: str) -> None:
    """One error line with a hint, the right exit code, no traceback, nothing written."""
    content, wanted, word = bad_files(tmp_path, model_file)[name]
    (tmp_path / name).write_bytes(content)
    code, out, err = cli("compile", tmp_path / name, "-o", tmp_path / "x.bundle")
    assert code == wanted, err
    assert word in err
    assert err.count("error[") == 1
    assert "Traceback" not in err
    assert out == ""
    assert os.listdir(tmp_path) == [name]


def test_a_huge_file_is_refused_without_reading_it(cli: Cli, tmp_path: Path) -> None:
    """A sparse file far larger than memory; the answer comes at once."""
    with (tmp_path / "huge.pt2").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(1 << 43)
    started = time.monotonic()
    code, _, err = cli("inspect", tmp_path / "huge.pt2")
    assert code == Exit.BAD_INPUT
    assert err.count("error[") == 1
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["compile", "none.pt2"], Exit.IO_FAILED, "model-not-found"),
        (["compile", "{folder}"], Exit.BAD_INPUT, "is a directory"),
        (["compile", "{model}", "--target", "amr"], Exit.BAD_INPUT, "did you mean arm"),
        (["compile", "{model}", "--target", "arm:cortex-a67"], Exit.BAD_INPUT, "did you mean arm:cortex-a"),
        (["compile", "{model}", "--target", "cpu:haswel"], Exit.BAD_INPUT, "did you mean cpu:haswell"),
        (["compile", "{model}", "--input-shape", "image=1x3xQ"], Exit.BAD_INPUT, "bad-input-shape"),
        (["compile", "{model}", "--input-shape", "image=1x5x8x8"], Exit.BAD_INPUT, "error["),
        (["compile", "{model}", "--input-shape", "x=1", "--input-shape", "x=2"], Exit.BAD_INPUT, "twice"),
        (["compile", "{model}", "--calib", "none.npz"], Exit.IO_FAILED, "none.npz"),
        (["compile", "{model}", "--calib", "{model}"], Exit.BAD_INPUT, "bad-sample"),
        (["compile", "{model}", "-o", "none/x.bundle"], Exit.IO_FAILED, "cannot-write"),
        (["compile", "{model}", "-o", "x.wasm"], Exit.BAD_INPUT, "bad-option"),
        (["compile", "{model}", "--outptu", "x"], Exit.BAD_INPUT, "No such option: --outptu"),
        (["compile"], Exit.BAD_INPUT, "MODEL"),
        (["compile", "a", "b"], Exit.BAD_INPUT, "error[usage]"),
        ([], Exit.BAD_INPUT, "Usage"),
        (["frobnicate"], Exit.BAD_INPUT, "frobnicate"),
        (["run", "none.bundle"], Exit.IO_FAILED, "bundle-not-found"),
        (["run", "{folder}"], Exit.BAD_INPUT, "not-a-bundle"),
        (["run", "{model}"], Exit.BAD_INPUT, "not-a-bundle"),
        (["bench", "{bundle}", "--against", "onnxruntim"], Exit.BAD_INPUT, "did you mean onnxruntime"),
        (["bench", "{bundle}", "--threads", "0"], Exit.BAD_INPUT, "--threads"),
    ],
)
def test_bad_usage(
    cli: Cli,
    model_file: Path,
    small_bundle: graphopt.Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    """Exit code and message, the same on standard output with --json, and nothing written."""
    monkeypatch.chdir(tmp_path)
    filled = [a.format(model=model_file, folder=tmp_path, bundle=small_bundle.path) for a in arguments]
    found, out, err = cli(*filled)
    assert (found, out) == (code, ""), err
    assert words in err
    assert err.count("error[") == 1
    assert "Traceback" not in err
    again, out, _ = cli(*filled, "--json")
    assert again == code
    assert {"code", "message", "hint"} == json.loads(out)["error"].keys()
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(cli: Cli, model_file: Path, tmp_path: Path) -> None:
    """Refused before anything is compiled."""
    (tmp_path / "locked").mkdir(mode=0o555)
    code, _, err = cli("compile", model_file, "-o", tmp_path / "locked" / "x.bundle")
    assert code == Exit.IO_FAILED
    assert "Permission denied" in err


@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs ARM code by itself")
def test_a_missing_emulator(cli: Cli, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without qemu nothing can check ARM code: exit code 3 before anything is compiled, with what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = cli("compile", model_file, "--target", "arm:cortex-a76", "-o", tmp_path / "x.bundle")
    assert code == Exit.UNAVAILABLE
    assert "qemu" in err
    assert not os.listdir(tmp_path)
    code, out, _ = cli("compile", model_file, "--target", "arm:cortex-a76", "--dry-run")
    assert code == 0
    assert "missing: " in out


def test_internal_errors_are_one_line(cli: Cli, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 70 and where to get more; the traceback with --debug."""

    def broken(*_: object) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(pipeline, "check_options", broken)
    code, out, err = cli("compile", model_file)
    assert (code, out) == (Exit.INTERNAL, "")
    assert err == "error[internal]: KeyError: 'a mistake of ours'\n  hint: run with --debug for the traceback\n"
    assert "Traceback" in cli("compile", model_file, "--debug")[2]


def test_an_operating_system_error_is_no_internal_one(
    cli: Cli, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk anywhere, such as in a temporary folder, is exit code 5."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    monkeypatch.setattr(pipeline, "check_options", full)
    code, _, err = cli("compile", model_file)
    assert code == Exit.IO_FAILED
    assert "somewhere: No space left on device" in err


# run, inspect, targets -----------------------------------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """image.npy, shift.npy and both.npz with the example inputs."""
    image, shift = (tensor.numpy() for tensor in small_inputs())
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "shift.npy", shift)
    np.savez(tmp_path / "both.npz", image=image, shift=shift)
    return tmp_path


def test_run(cli: Cli, small_bundle: graphopt.Bundle, samples: Path) -> None:
    """Inputs by name from .npy and .npz; one output to .npy, all to .npz."""
    with torch.inference_mode():
        want = small()(*small_inputs())
    named = ("--input", f"image={samples}/image.npy", "--input", f"shift={samples}/shift.npy")
    code, out, err = cli("run", small_bundle.path, *named, "--output", f"logits={samples}/logits.npy")
    assert code == 0, err
    assert "logits: float32[1, 4]" in out
    np.testing.assert_allclose(np.load(samples / "logits.npy"), want["logits"], rtol=1e-4, atol=1e-5)

    code, out, _ = cli("run", small_bundle.path, "-i", samples / "both.npz", "-o", samples / "all.npz", "--json")
    assert code == 0
    assert json.loads(out)["outputs"]["best"]["shape"] == [1]
    with np.load(samples / "all.npz") as written:
        assert sorted(written.files) == ["best", "logits"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "image={dir}/image.npy"], "no tensor for shift"),
        (["-i", "{dir}/image.npy"], "does not say which input"),
        (["-i", "{dir}/both.npz", "-i", "image={dir}/image.npy"], "image is given twice"),
        (["-i", "{dir}/both.npz", "-i", "z={dir}/image.npy"], "it has no input z"),
        (["-i", "image={dir}/shift.npy", "-i", "shift={dir}/shift.npy"], "image has shape [4], wants [1, 3, 8, 8]"),
        (["-i", "{dir}/both.npz", "-o", "y.npy"], "a .npy file holds one array"),
        (["-i", "{dir}/both.npz", "-o", "z=y.npy"], "no such output"),
        (["-i", "{dir}/both.npz", "-o", "y.csv"], "the suffix is '.csv'"),
        (["-i", "{dir}/broken.npy"], "truncated or damaged"),
        (["-i", "{dir}/pickle.npy"], "bad-sample"),
    ],
)
def test_wrong_inputs_of_run(
    cli: Cli, small_bundle: graphopt.Bundle, samples: Path, arguments: list[str], words: str
) -> None:
    """Each says what is wrong; exit code 2."""
    (samples / "broken.npy").write_bytes((samples / "image.npy").read_bytes()[:200])
    np.save(samples / "pickle.npy", np.array([{}], dtype=object))
    code, _, err = cli("run", small_bundle.path, *(argument.format(dir=samples) for argument in arguments))
    assert code == Exit.BAD_INPUT, err
    assert words in err
    assert "Traceback" not in err


def test_run_notes_safe_casts(cli: Cli, small_bundle: graphopt.Bundle, samples: Path) -> None:
    """float16 to float32 keeps every value: done, and said on standard error."""
    np.save(samples / "half.npy", np.load(samples / "image.npy").astype(np.float16))
    named = ("-i", f"image={samples}/half.npy", "-i", f"shift={samples}/shift.npy")
    code, _, err = cli("run", small_bundle.path, *named)
    assert code == 0
    assert "note: image: float16 converted to float32" in err


def test_inspect(cli: Cli, model_file: Path, small_bundle: graphopt.Bundle) -> None:
    """A model's layers with totals; a bundle's manifest with its kernels."""
    code, out, _ = cli("inspect", model_file)
    assert code == 0
    assert "aten.conv2d" in out
    assert out.splitlines()[-2].startswith("total")
    data = json.loads(cli("inspect", model_file, "--json")[1])
    assert data["total"]["flops"] == sum(layer["flops"] for layer in data["layers"])
    code, out, _ = cli("inspect", small_bundle.path)
    assert code == 0
    assert "verification: passed" in out
    assert "weights.bin" in out
    assert json.loads(cli("inspect", small_bundle.path, "--json")[1])["kind"] == "graphopt-bundle"


def test_targets(cli: Cli) -> None:
    """Every family is listed, with what is missing for it."""
    code, out, _ = cli("targets")
    assert code == 0
    assert all(family in out for family in ("cpu", "wasm", "arm"))
    listed = json.loads(cli("targets", "--json")[1])["targets"]
    assert {"cpu", "wasm"} <= {item["target"] for item in listed}
