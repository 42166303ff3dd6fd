"""`--tune` and `--records`: records go there and back, equal ones give equal bytes, and what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.cost import LatencyTable
from graphopt.errors import BadOption, BadRecords
from graphopt.program import Program
from graphopt.targets import resolve
from graphopt.targets.cpu import host_machine
from graphopt.targets.timing import machine

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def program() -> Program:
    """Two linear layers; the first has nine tenths of its blocks of eight outputs zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
    weight = net[0].weight.data
    weight *= (torch.rand(32, 128) < 0.1).repeat_interleave(8, 0)
    return graphopt.capture(net, (torch.randn(32, 128),), name="net")


@pytest.fixture(scope="module")
def model(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file."""
    file = tmp_path_factory.mktemp("model") / "net.pt2"
    program.save(file)
    return file


@pytest.fixture(scope="module")
def measured(program: Program, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle that was tuned, and the records that this wrote."""
    folder = tmp_path_factory.mktemp("measured")
    graphopt.compile(program, output=folder / "net.bundle", tune=60, records=folder / "cpu.json", verify=False)
    return folder / "net.bundle", folder / "cpu.json"


def bytes_of(bundle: Path) -> dict[str, bytes]:
    """Every file of a bundle."""
    return {file.name: file.read_bytes() for file in bundle.iterdir()}


def test_records_are_for_people_and_for_reading_back(measured: tuple[Path, Path], tmp_path: Path) -> None:
    """JSON with the target, the machine and a line a kernel; read and written again, the same bytes."""
    _, file = measured
    found = json.loads(file.read_text())
    assert (found["target"], found["threads"], found["machine"]) == ("cpu", 1, machine(resolve("cpu")))
    first, second, *program = found["records"]
    assert first == "linear(float32:32x128, [float32:128x256]) dense"
    assert second.startswith("linear(float32:32x128, [float32:128x256]) sparse 8x1 0.1")
    assert [name.split()[:2] for name in program] == [["program", "net"]] * len(program)
    LatencyTable.load(file).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


def test_the_same_records_give_the_same_bytes(program: Program, measured: tuple[Path, Path], tmp_path: Path) -> None:
    """The run that measured, one that has nothing left to measure, and one that only reads."""
    bundle, file = measured
    before = file.read_bytes()
    graphopt.compile(program, output=tmp_path / "again.bundle", tune=60, records=file, verify=False)
    graphopt.compile(program, output=tmp_path / "read.bundle", records=file, verify=False)
    assert bytes_of(tmp_path / "again.bundle") == bytes_of(tmp_path / "read.bundle") == bytes_of(bundle)
    assert file.read_bytes() == before


def test_other_records_give_another_choice(program: Program, measured: tuple[Path, Path], tmp_path: Path) -> None:
    """Where they say that the sparse kernel is slower, the bundle has a dense one, and says by what."""
    table = LatencyTable.load(measured[1])
    for name in table.records:
        table.records[name] = 1e-6 if name.endswith(" dense") else 2e-6
    table.save(tmp_path / "slow.json")
    manifest = graphopt.compile(program, records=tmp_path / "slow.json").manifest
    assert "spmm" not in {kernel["template"] for kernel in manifest.kernels}
    (entry,) = manifest.sparse_weights
    assert (entry["picked"], entry["reason"]) == (False, "dense is faster, as measured")
    assert (entry["dense_measured_us"], entry["sparse_measured_us"]) == (1.0, 2.0)
    assert manifest.verification.passed


def test_without_a_file_records_are_not_kept(program: Program) -> None:
    """--tune alone measures and picks; nothing but the bundle has the times."""
    (entry,) = graphopt.compile(program, tune=60, verify=False).manifest.sparse_weights
    assert entry["dense_measured_us"] > 0
    assert entry["reason"].endswith(", as measured")


def test_what_is_over_before_it_starts_says_so(program: Program, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels that were not timed in time are counted, and the choice goes by estimates."""
    (entry,) = graphopt.compile(program, tune=1e-9, verify=False).manifest.sparse_weights
    assert entry["dense_measured_us"] is None
    assert "0 of 4 times" in caplog.text


# The command line -----------------------------------------------------------------------------------------------------


def test_explain_shows_both(cli: Cli, model: Path, measured: tuple[Path, Path], tmp_path: Path) -> None:
    """Two more columns, with what was measured; without records they are not there."""
    code, out, _ = cli(
        "compile", model, "-o", tmp_path / "a.bundle", "--no-verify", "--explain", "--records", measured[1]
    )
    assert code == 0
    assert "measured" in out
    assert "for one thread, estimated and as measured" in out
    (line,) = [line for line in out.splitlines() if line.startswith("0.weight")]
    assert len([word for word in line.split() if word.replace(".", "").isdigit()]) >= 4
    code, out, _ = cli("compile", model, "-o", tmp_path / "b.bundle", "--no-verify", "--explain")
    assert code == 0
    assert "measured" not in out


def test_a_dry_run_measures_nothing(cli: Cli, model: Path, tmp_path: Path) -> None:
    """It says that kernels would be timed, and for how long."""
    file = tmp_path / "cpu.json"
    code, out, _ = cli("compile", model, "--dry-run", "--tune", "30", "--records", file)
    assert code == 0
    assert "time the kernels of layers with zeros" in out
    assert "up to 30 s" in out
    assert not file.exists()


# What is refused ------------------------------------------------------------------------------------------------------


def refused(program: Program, error: type[Exception], match: str, **options: object) -> None:
    """It is, before anything is done."""
    with pytest.raises(error, match=match):
        graphopt.compile(program, **options)  # type: ignore[arg-type]


def test_records_of_something_else(program: Program, measured: tuple[Path, Path], tmp_path: Path) -> None:
    """Another target, another machine, or none that is named."""
    refused(program, BadRecords, "has times of cpu, not of wasm", target="wasm", records=measured[1])
    table = LatencyTable.load(measured[1])
    for name in ("a Cray-1, avx2", ""):
        table.machine = name
        table.save(tmp_path / "other.json")
        for tune in (None, 10.0):
            match = name or "it does not say which"
            refused(program, BadRecords, match, records=tmp_path / "other.json", tune=tune)


def test_files_that_are_no_records(program: Program, tmp_path: Path) -> None:
    """Missing, a folder, no JSON, another JSON, or times that cannot be."""
    refused(program, BadRecords, "cannot be read", records=tmp_path / "none.json")
    refused(program, BadRecords, "cannot be read", records=tmp_path)
    file = tmp_path / "bad.json"
    whole = {"format": 1, "target": "cpu", "threads": 1, "machine": machine(resolve("cpu"))}
    texts = ["", "[]", "{}", "\x00\xff", json.dumps({**whole, "format": 2, "records": {}})]
    texts += [json.dumps({**whole, "records": {"a": seconds}}) for seconds in (0, -1, "x", float("nan"))]
    for text in texts:
        file.write_bytes(text.encode("latin-1"))
        refused(program, BadRecords, "holds no records", records=file)


@pytest.mark.skipif(host_machine() == "aarch64", reason="arm is timed here")
def test_targets_that_do_not_run_here(program: Program, tmp_path: Path) -> None:
    """Nothing can be timed for them; records that were made on such a device serve."""
    refused(program, BadOption, "cannot be timed here", target="arm:cortex-a76", tune=10, verify=False)
    refused(program, BadOption, "no sparse kernels for cuda:sm_90", target="cuda:sm_90", tune=10, verify=False)
    name = "linear(float32:32x128, [float32:128x256])"
    kept = 1 - (program.tensors["p_0_weight"] == 0).double().mean()
    records = {f"{name} dense": 1e-6, f"{name} sparse 8x1 {kept:.2g} kept": 2e-6}
    LatencyTable("arm:cortex-a76", 1, records, "a board").save(tmp_path / "board.json")
    bundle = graphopt.compile(program, target="arm:cortex-a76", records=tmp_path / "board.json", verify=False)
    assert bundle.manifest.sparse_weights[0]["reason"] == "dense is faster, as measured"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_no_time(program: Program, seconds: float) -> None:
    """The time must be one."""
    refused(program, BadOption, "--tune", tune=seconds)
