"""graphopt optimize, and what compile shares with it: what is said where, and what is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.program import Program

Cli = Callable[..., tuple[int, str, str]]
DATA = "tests.graphopt.calibration_data"


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mlp.pt2: (2, 3) -> (2, 4), with hidden layers of 64 and 64; samples in mlp.npz."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("mlp") / "mlp.pt2"
    module = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    torch.export.save(torch.export.export(module, (torch.randn(2, 3),)), file)
    np.savez(file.with_suffix(".npz"), input=np.random.default_rng(0).random((32, 3), np.float32))
    return file


def recipe(folder: Path, text: str) -> Path:
    """A recipe file."""
    file = folder / "recipe.toml"
    file.write_text(text)
    return file


# What is said --------------------------------------------------------------------------------------------------------


def test_a_budget_that_is_not_used_up_is_noted(cli: Cli, mlp: Path) -> None:
    """On standard error and in the JSON, without --explain; with -q only there."""
    command = ("optimize", mlp, "--dry-run", "--no-measure", "--pass", "prune-neurons:step=48", "--flops", "0.7")
    code, out, err = cli(*command)
    assert code == 0
    assert "note: prune-neurons: 0." in err
    assert "of 0.7 flops is used, because no extents come nearer; step=1 rounds nothing" in err
    code, out, err = cli(*command, "--json", "-q")
    (note,) = json.loads(out)["notes"]
    assert note.startswith("prune-neurons: ")
    assert json.loads(out)["records"][0]["notes"] == [note.removeprefix("prune-neurons: ")]
    assert err == ""


def test_nothing_is_measured_that_nobody_sees(cli: Cli, mlp: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """With -q and without --json both models would be compiled and timed for nothing."""

    def measured(*_: object, **__: object) -> None:
        pytest.fail("it was measured")

    module = importlib.import_module("graphopt.optimize")  # the package has a function of this name
    monkeypatch.setattr(module, "measured", measured)
    monkeypatch.setattr(module, "estimated", measured)
    code, out, err = cli("optimize", mlp, "--pass", "prune-neurons:keep=0.5", "-q", "-o", tmp_path / "small.pt2")
    assert (code, out, err) == (0, "", "")
    assert (tmp_path / "small.pt2").exists()


@pytest.mark.parametrize("name", ["merge-experts:groups=2", "pool-kv-heads:kv-heads=1", "prune-heads:keep=0.5"])
def test_passes_that_do_nothing_say_why(cli: Cli, mlp: Path, name: str) -> None:
    """On standard error, and in the JSON."""
    code, out, err = cli("optimize", mlp, "--dry-run", "--no-measure", "--pass", name, "--json")
    assert code == 0
    assert f"note: {name.partition(':')[0]}: it changed nothing: " in err
    assert "changed nothing" in json.loads(out)["notes"][0]


def test_compile_says_the_same(cli: Cli, mlp: Path, tmp_path: Path) -> None:
    """Notes of passes, and the estimate before and after."""
    command = ("compile", mlp, "-o", tmp_path / "x.bundle", "--no-verify", "--pass", "prune-heads:keep=0.5")
    code, out, err = cli(*command)
    assert code == 0
    assert "note: prune-heads: it changed nothing" in err
    assert "estimated latency" in out
    reduced = json.loads(cli(*command, "--json")[1])["reduced"]
    assert reduced["latency_seconds"]["estimated"]["before"] > 0
    assert len(reduced["notes"]) == 1


def test_the_estimate_needs_no_measuring(cli: Cli, mlp: Path) -> None:
    """--no-measure leaves out what is measured; a budget of latency is still seen to be met."""
    code, out, _ = cli("optimize", mlp, "--dry-run", "--no-measure", "--latency", "0.8", "--json")
    assert code == 0
    latency = json.loads(out)["latency_seconds"]
    assert list(latency) == ["estimated"]
    assert latency["estimated"]["after"] <= 0.8 * latency["estimated"]["before"]
    code, out, _ = cli("optimize", mlp, "--dry-run", "--no-measure", "--flops", "0.5")
    assert "estimated latency" in out
    assert "measured latency" not in out


def test_recipe_and_passes(cli: Cli, mlp: Path, tmp_path: Path) -> None:
    """Those of the recipe first."""
    file = recipe(tmp_path, 'round-to = 4\n[[pass]]\nname = "prune-neurons"\nkeep = 0.5\n')
    code, out, err = cli("optimize", mlp, "--dry-run", "--recipe", file, "--pass", "factor-low-rank:rank=4", "--json")
    assert code == 0, err
    assert [record["name"] for record in json.loads(out)["records"]] == ["prune-neurons", "factor-low-rank"]


def test_optin_is_a_pass_and_a_criterion(cli: Cli, mlp: Path) -> None:
    """By either way it cuts; `passes optin` explains both, each option with its text."""
    data = ("--calib", mlp.with_suffix(".npz"), "--dry-run", "--no-measure", "--json")
    for how in (("--pass", "optin", "--macs", "0.6"), ("--criterion", "optin", "--flops", "0.6")):
        code, out, err = cli("optimize", mlp, *how, *data)
        assert code == 0, err
        assert json.loads(out)["after"]["flops"] <= 0.65 * json.loads(out)["before"]["flops"]
    found = json.loads(cli("passes", "optin", "--json")[1])["passes"]
    assert [entry["kind"] for entry in found] == ["reducing pass", "criterion"]
    texts = [{option["name"]: option["text"] for option in entry["options"]} for entry in found]
    assert texts[0]["step"].startswith("what stays is a multiple of it")
    assert texts[1]["temperature"] == "its square multiplies KL."
    assert "its square multiplies KL" in cli("passes", "optin")[1]


def test_every_option_of_every_pass_is_explained(cli: Cli) -> None:
    """`graphopt passes --json` has a text for each, and a paper for each pass that loses something."""
    entries = json.loads(cli("passes", "--json")[1])["passes"]
    assert len(entries) > 40
    missing = [
        f"{entry['name']}.{option['name']}"
        for entry in entries
        for option in entry["options"]
        if not option["text"] and f"`{option['name'].replace('-', '_')}`" not in entry["text"]
    ]
    assert missing == []
    assert all(entry["source"] for entry in entries if entry["kind"] == "reducing pass")
    code, _, err = cli("passes", "prune-neuron")
    assert code == 2
    assert "did you mean prune-neurons?" in err


def test_compile_for_wasm_with_recipe_and_data(cli: Cli, mlp: Path, tmp_path: Path) -> None:
    """The bundle is held to the reduced program on the calibration data; its manifest has the records."""
    file = recipe(tmp_path, 'flops = 0.6\n[[pass]]\nname = "prune-neurons"\ncriterion = "wanda"\n')
    data = mlp.with_suffix(".npz")
    command = ("compile", mlp, "--target", "wasm", "--recipe", file, "--calib", data, "-o", tmp_path / "web", "--json")
    code, out, err = cli(*command)
    assert code == 0, err
    done = json.loads(out)
    assert done["verification"]["status"] == "passed"
    assert done["reduced"]["after"]["flops"] <= 0.6 * done["reduced"]["before"]["flops"]
    assert done["reduced"]["calibration"] == {"is_example": False, "origin": str(data)}
    manifest = json.loads((tmp_path / "web" / "manifest.json").read_text())
    assert "prune-neurons" in [record["name"] for record in manifest["records"]]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (("--latency", "nan"), "bad-recipe", "--latency nan: is no amount"),
        (("--latency", "-3ms"), "bad-recipe", "--latency -3ms: is no amount"),
        (("--flops", "1.5"), "bad-recipe", "neither a share, which is at most 1, nor an amount with a unit"),
        (("--flops", "1e400"), "bad-recipe", "is infinite"),
        (("--flops", "1e-9"), "budget-unreachable", "--flops 1e-09 cannot be met; the least reachable is 0.0"),
        (("--flops", "0.5", "--params", "0.5"), "bad-recipe", "has two budgets"),
        (("--flops", "0.5", "--keep", "0.5"), "bad-option", "prune has a budget and keep"),
        (("--keep", "nan"), "usage", "--keep"),
        (("--keep", "0"), "bad-option", "keep=0"),
        (("--keep", "0.5", "--include", "nothing*"), "bad-option", "include nothing* matches no axis"),
        (("--flops", "0.5", "--pass", "prune-heads"), "nothing-to-cut", "no free axis of role head"),
        (("--flops", "0.5", "--exclude", "*"), "nothing-to-cut", "include and exclude leave no axis"),
        (("--pass", "factor-low-rank:rank=0"), "bad-option", "factor-low-rank: rank=0"),
        (("--pass", "merge-experts:groups=0"), "bad-option", "merge-experts: groups=0"),
        (("--keep", "0.5", "--round-to", "0"), "bad-option", "step=0"),
    ],
)
def test_bad_options(cli: Cli, mlp: Path, more: tuple[str, ...], code: str, says: str) -> None:
    """Each has one error that says what is wrong, and the exit code of bad input."""
    status, out, err = cli("optimize", mlp, "--dry-run", "--no-measure", *more)
    assert (status, out) == (2, "")
    assert f"error[{code}]: " in err
    assert says in err
    assert err.count("error[") == 1


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("shape.npz", "input has shape [8, 5]; wanted [2, 3]"),
        ("nan.npz", "input has 1 of 6 numbers NaN or infinite in batch 2 of 4"),
        (f"{DATA}:breaks", "raised KeyError: 'image_7'"),
        (f"{DATA}:nothing", "returned None"),
        ("none.npz", "cannot be read"),
    ],
)
def test_bad_calibration(cli: Cli, mlp: Path, tmp_path: Path, source: str, says: str) -> None:
    """Of optimize and compile alike; nothing is written."""
    np.savez(tmp_path / "shape.npz", input=np.zeros((8, 5), np.float32))
    broken = np.zeros((8, 3), np.float32)
    broken[3, 1] = np.nan
    np.savez(tmp_path / "nan.npz", input=broken)
    given = source if ":" in source else tmp_path / source
    for verb, file in (("optimize", "small.pt2"), ("compile", "small.bundle")):
        status, out, err = cli(verb, mlp, "--flops", "0.5", "--calib", given, "-o", tmp_path / file)
        assert status in (2, 5)
        assert out == ""
        assert says in err
        assert not (tmp_path / file).exists()


def test_outputs_that_are_in_the_way(cli: Cli, mlp: Path, tmp_path: Path) -> None:
    """A folder, the model itself, another suffix, a missing folder: refused before anything is done."""
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "text.txt").write_text("mine")
    for place, says in (
        (tmp_path / "folder.pt2", "is a folder, so it is not replaced"),
        (mlp, "is the model itself"),
        (tmp_path / "text.txt", "optimize writes a .pt2 file"),
        (tmp_path / "none" / "x.pt2", "there is no folder"),
    ):
        status, _, err = cli("optimize", mlp, "--flops", "0.5", "-o", place)
        assert status in (2, 5)
        assert says in err
    assert (tmp_path / "text.txt").read_text() == "mine"


def test_what_is_written_runs(cli: Cli, mlp: Path, tmp_path: Path) -> None:
    """A .pt2 that PyTorch reads, with half of the FLOPs, and measured where this machine is the target."""
    small = tmp_path / "small.pt2"
    code, out, err = cli("optimize", mlp, "--flops", "0.5", "-o", small, "--json")
    assert code == 0, err
    done = json.loads(out)
    assert 0.48 <= done["after"]["flops"] / done["before"]["flops"] <= 0.5
    assert set(done["latency_seconds"]) == {"estimated", "measured"}
    assert torch.export.load(small).module()(torch.zeros(2, 3)).shape == (2, 4)
    assert Program(torch.export.load(small), name="small").outputs[0].shape == (2, 4)
