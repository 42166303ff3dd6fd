"""Calling the toolchain."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from graphopt.errors import Exit, LinkFailed, NoRoom, ToolMissing
from graphopt.targets import zig as toolchain
from graphopt.targets.zig import cache_folder, zig


@pytest.fixture
def fresh_cache_folder():
    """`cache_folder` looks at the environment anew."""
    cache_folder.cache_clear()
    yield cache_folder
    cache_folder.cache_clear()


def test_the_cache_is_where_the_environment_says(fresh_cache_folder, monkeypatch, tmp_path):
    """$GRAPHOPT_CACHE before $XDG_CACHE_HOME."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("GRAPHOPT_CACHE", raising=False)
    assert fresh_cache_folder() == tmp_path / "xdg" / "graphopt" / "zig"
    fresh_cache_folder.cache_clear()
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "own"))
    assert fresh_cache_folder() == tmp_path / "own" / "zig"


def test_a_home_that_cannot_be_written_is_no_obstacle(fresh_cache_folder, monkeypatch, tmp_path):
    """The cache goes to the folder of temporary files, readable by this user only."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(toolchain.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = fresh_cache_folder()
    assert folder == tmp_path / f"graphopt-cache-{os.getuid()}" / "zig"
    assert folder.parent.stat().st_mode & 0o077 == 0


def test_a_temporary_cache_that_others_can_write_is_not_trusted(fresh_cache_folder, monkeypatch, tmp_path):
    """What is built from it would be theirs."""
    (tmp_path / "file").write_text("")
    trap = tmp_path / f"graphopt-cache-{os.getuid()}"
    trap.mkdir()
    trap.chmod(0o777)
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(toolchain.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(toolchain.tempfile, "mkdtemp", lambda prefix: str(tmp_path / f"{prefix}new"))
    assert fresh_cache_folder() == tmp_path / "graphopt-cache-new"


def test_a_missing_toolchain_is_one_clear_error(monkeypatch, tmp_path):
    """Exit 3, with the command that installs it."""
    monkeypatch.setattr(toolchain, "zig_installed", lambda: False)
    with pytest.raises(ToolMissing, match="ziglang is needed to link for cpu") as caught:
        zig(["version"], tmp_path, name="model", target="cpu")
    assert caught.value.exit is Exit.UNAVAILABLE
    assert caught.value.way_out == "pip install ziglang"


def test_the_compilers_first_lines_are_in_the_error(tmp_path):
    """With the file and line that they are about, under a relative name."""
    (tmp_path / "broken.c").write_text("int f(void) {\n  return nothing;\n}\n")
    with pytest.raises(LinkFailed, match=r"broken\.c:2:10: error: use of undeclared identifier 'nothing'"):
        zig(["cc", "-c", "broken.c", "-o", "broken.o"], tmp_path, name="model", target="cpu")
    assert not (tmp_path / "broken.o").exists()


@pytest.mark.parametrize(
    ("said", "status", "reason"),
    [
        ("ld.lld: error: failed to open m.o: File too large", 1, "File too large"),
        ("error: unable to write: NoSpaceLeft", 1, "No space left on device"),
        ("", 256 - signal.SIGXFSZ, "File too large"),
    ],
)
def test_a_full_disk_is_not_the_linkers_fault(said, status, reason, tmp_path, monkeypatch):
    """Exit 5, with the folder that is full."""
    done = subprocess.CompletedProcess([], status, "", said)
    monkeypatch.setattr("graphopt.targets.zig.subprocess.run", lambda *_, **__: done)
    with pytest.raises(NoRoom, match=reason) as caught:
        zig(["cc"], tmp_path / "work", name="m", target="cpu")
    assert caught.value.exit == Exit.IO_FAILED
    assert str(tmp_path) in str(caught.value)
