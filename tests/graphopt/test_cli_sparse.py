"""Models that were pruned elsewhere, on the command line: no flag, and what --explain and inspect say of it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from graphopt.bundle import load
from graphopt.cli import execute
from graphopt.manifest import Manifest

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pruned.pt2: torch's own pruning, made permanent, of the first two of three layers; no annotations in it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    for layer in (net[0], net[2]):
        prune.l1_unstructured(layer, "weight", 0.95)
        prune.remove(layer, "weight")
    file = tmp_path_factory.mktemp("pruned") / "pruned.pt2"
    torch.export.save(torch.export.export(net, (torch.randn(32, 128),)), file)
    return file


def run(*arguments: object) -> str:
    """What a command prints; it must succeed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert execute([str(argument) for argument in arguments]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def compiled(pruned: Path) -> tuple[Path, str]:
    """The bundle that `compile pruned.pt2 --explain` makes, checked against PyTorch; and what it prints."""
    bundle = pruned.with_suffix(".bundle")
    return bundle, run("compile", pruned, "-o", bundle, "--explain")


def entries(bundle: Path) -> list[dict[str, Any]]:
    """As `inspect --json` gives them."""
    return json.loads(run("inspect", bundle, "--json"))["sparse_weights"]


def test_zeros_are_made_use_of_without_a_flag(compiled: tuple[Path, str]) -> None:
    """Every layer with zeros runs on a sparse kernel, picked because it is estimated to take less."""
    bundle, _ = compiled
    found = entries(bundle)
    assert [(entry["weight"], entry["format"], entry["picked"]) for entry in found] == [
        ("0.weight", "unstructured", True),
        ("2.weight", "unstructured", True),
    ]
    for entry in found:
        assert entry["density"] == pytest.approx(0.05, abs=0.001)
        assert entry["sparse_us"] < entry["dense_us"]
    assert [kernel["template"] for kernel in load(bundle).manifest.kernels].count("spmm") == 2
    assert load(bundle).manifest.verification.passed


def test_explain_prints_a_table(compiled: tuple[Path, str]) -> None:
    """A line for each such layer: name, format, share kept, both estimates, the kernel and why; and how many."""
    _, printed = compiled
    (line,) = [line for line in printed.splitlines() if line.startswith("0.weight")]
    name, layer, form, kept, dense, sparse, kernel, *why = line.split()
    assert (name, layer, form, kept, kernel) == ("0.weight", "linear", "unstructured", "5.0%", "sparse")
    assert float(sparse) < float(dense)
    assert " ".join(why).endswith("times as fast")
    assert "4.weight" not in printed
    assert "sparse kernels for 2 of 2" in printed


def test_inspect_shows_it_again(compiled: tuple[Path, str]) -> None:
    """The same table, from the manifest; and sparse kernels with the share that they keep, in percent."""
    bundle, printed = compiled
    shown = run("inspect", bundle)
    table = printed[printed.index("sparse weight") :]
    assert table in shown
    kernels = [line for line in shown.splitlines() if " spmm " in line]
    assert len(kernels) == 2
    assert all("height=" in line and "kept=" in line and "%" in line for line in kernels)


def test_without_explain_nothing_is_printed_of_it(cli: Cli, pruned: Path, tmp_path: Path) -> None:
    """But --json has the entries always, and they are those of the manifest."""
    code, out, _ = cli("compile", pruned, "-o", tmp_path / "a.bundle", "--no-verify", "--json")
    assert code == 0
    assert json.loads(out)["sparse_weights"] == entries(tmp_path / "a.bundle")
    code, out, _ = cli("compile", pruned, "-o", tmp_path / "b.bundle", "--no-verify")
    assert code == 0
    assert "sparse" not in out


def test_a_model_without_zeros(cli: Cli, model_file: Path, tmp_path: Path) -> None:
    """--explain says that there is nothing to explain."""
    code, out, _ = cli("compile", model_file, "-o", tmp_path / "x.bundle", "--no-verify", "--explain")
    assert code == 0
    assert "no layer has a weight with zeros" in out
    assert entries(tmp_path / "x.bundle") == []


def test_manifests_go_there_and_back(compiled: tuple[Path, str]) -> None:
    """Entries are the same after writing and reading; a manifest from before there were any reads as without."""
    manifest = load(compiled[0]).manifest
    data = json.loads(manifest.text())
    assert Manifest.from_json(data) == manifest
    del data["sparse_weights"]
    assert Manifest.from_json(data) == dataclasses.replace(manifest, sparse_weights=())
