"""Small models in every kind of file."""

from __future__ import annotations

import pytest
import torch

from tests.graphopt.small import Net, X


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
