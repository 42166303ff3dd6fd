"""Small models in every kind of file, and a bundle of one, made once per test run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graphopt
from graphopt.bundle import Bundle
from graphopt.cli import execute
from tests.graphopt.small import Net, X
from tests.graphopt.two_outputs import small, small_inputs


@pytest.fixture(scope="package")
def files(tmp_path_factory):
    """One small model in every kind of file."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    net = Net().eval()
    torch.export.save(torch.export.export(net, (X,)), folder / "net.pt2")
    (folder / "exported.pt").write_bytes((folder / "net.pt2").read_bytes())
    torch.save(net, folder / "module.pt")
    torch.save(net.state_dict(), folder / "weights.pt")
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, folder / "checkpoint.pth")
    torch.save(net.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(net, folder / "legacy_module.pt", _use_new_zipfile_serialization=False)
    torch.save([1, 2], folder / "list.pt")
    torch.jit.save(torch.jit.trace(net, X), folder / "script.pt")
    return folder


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small.pt2 with example inputs."""
    path = tmp_path_factory.mktemp("model") / "small.pt2"
    torch.export.save(torch.export.export(small(), small_inputs()), path)
    return path


@pytest.fixture(scope="session")
def small_bundle(model_file: Path) -> Bundle:
    """The model compiled for this machine, beside its file."""
    return graphopt.compile(model_file, output=model_file.with_suffix(".bundle"))


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Carry out a command line in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = execute([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call
