"""Bundles in use: by several threads, and while other files take the place of theirs."""

from __future__ import annotations

import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import graphopt
from graphopt import bundle as bundles
from graphopt.bundle import Bundle, load
from graphopt.errors import BundleCorrupt, CannotWrite
from graphopt.spec import identifier
from graphopt.staging import staged
from tests.graphopt.test_bundle import Echo, write


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle, Echo]:
    """A bundle whose runner is an Echo, and the Echo."""
    runner = Echo()
    monkeypatch.setattr(bundles, "open_runner", lambda *_, **__: runner)
    return load(write(tmp_path / "net.bundle")), runner


def test_one_bundle_called_by_several_threads() -> None:
    """Four threads, 200 calls each, every result PyTorch's."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)).eval()
    made = graphopt.compile(net, example_inputs=(torch.randn(8, 64),))

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x = torch.randn(8, 64, generator=generator)
            with torch.no_grad():
                want = net(x).numpy()
            np.testing.assert_allclose(made(x), want, rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_what_was_checked_is_what_runs(tmp_path: Path, opened: tuple[Bundle, Echo]) -> None:
    """Another bundle in its place before the first call is refused, and not copied; the same one again is taken."""
    bundle, runner = opened
    x, ids = np.zeros((2, 3), np.float32), np.zeros(4, np.int64)
    write(tmp_path / "net.bundle", code=b"another code", weights=b"\1" * 12)
    with pytest.raises(BundleCorrupt, match="SHA-256"):
        bundle(x, ids)
    with pytest.raises(BundleCorrupt, match="another bundle has taken its place"):
        bundle.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    write(tmp_path / "net.bundle")
    bundle(x, ids)
    assert len(runner.got) == 2


def test_a_bundle_replaced_while_it_is_opened(
    tmp_path: Path, opened: tuple[Bundle, Echo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the new one that was opened, so it does not run."""

    def replaced(*_: object, **__: object) -> Echo:
        write(tmp_path / "net.bundle", code=b"another code", weights=b"\1" * 12)
        return opened[1]

    monkeypatch.setattr(bundles, "open_runner", replaced)
    with pytest.raises(BundleCorrupt, match="SHA-256"):
        opened[0](np.zeros((2, 3), np.float32), np.zeros(4, np.int64))
    assert not opened[1].got


def test_a_pipe_in_a_bundle_is_not_waited_for(tmp_path: Path) -> None:
    """Only files are opened."""
    path = write(tmp_path / "net.bundle")
    (path / "code.bin").unlink()
    os.mkfifo(path / "code.bin")
    with pytest.raises(BundleCorrupt, match=r"code\.bin is no file"):
        load(path)


def test_a_full_disk_is_named_by_the_output(tmp_path: Path) -> None:
    """The copy's error names the source first, which is a temporary file that nobody knows."""
    full = re.escape(f"{tmp_path / 'o.so'}: cannot be written: No space left")
    with pytest.raises(CannotWrite, match=full), staged(tmp_path / "o.so") as stage:
        raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere/o.so", None, str(stage / "o.so"))


def test_long_names() -> None:
    """Two long names that differ at the end stay different, and both fit into a file's name."""
    made = {identifier("x" * 240 + end) for end in "ab"}
    assert len(made) == 2
    assert {len(name) for name in made} == {128}
