"""The C compiler and linker: `python -m ziglang`, from pip, which carries libc's headers and stubs for every target."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from graphopt.errors import LinkFailed, NoRoom, ToolMissing

# What a first link for a target takes, libc's stubs included, on a slow and busy machine.
TIMEOUT_S = 900
_LINES = 6
# What compiler and linker say where the file system is at fault, in the words of libc and in Zig's own.
_NO_ROOM = {
    "No space left on device": ("No space left on device", "NoSpaceLeft"),
    "File too large": ("File too large", "FileTooBig"),
    "Disk quota exceeded": ("Disk quota exceeded", "DiskQuota"),
    "Read-only file system": ("Read-only file system", "ReadOnlyFileSystem"),
}


def zig_installed() -> bool:
    """Whether the toolchain can be called."""
    return importlib.util.find_spec("ziglang") is not None


@functools.cache
def cache_folder() -> Path:
    """Where libc's stubs and the like are kept between runs, made if need be.

    $GRAPHOPT_CACHE, else the user's cache folder, else (a read-only home) one in the folder of temporary files that
    only this user can write.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    wanted = os.environ.get("GRAPHOPT_CACHE") or os.path.join(base, "graphopt")
    temporary = Path(tempfile.gettempdir()) / f"graphopt-cache-{os.getuid()}"
    for folder in (Path(wanted).expanduser() / "zig", temporary / "zig"):
        try:
            if folder.is_relative_to(temporary):
                # Anybody may have made a folder of that name; code is built from what is in it.
                temporary.mkdir(mode=0o700, exist_ok=True)
                state = temporary.lstat()
                if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
                    continue
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except (OSError, RuntimeError):
            continue
    return Path(tempfile.mkdtemp(prefix="graphopt-cache-"))


def zig(arguments: Sequence[str], folder: Path, *, name: str, target: str, purpose: str = "link") -> None:
    """Run `zig ARGUMENTS` in `folder`, a folder of its own, as its local cache grows there.

    Args:
        arguments: paths relative to `folder`, so that none gets into the output.
        folder: where to run, and to put temporary files.
        name, target, purpose: for the message.

    Raises:
        ToolMissing: the pip package is not installed.
        NoRoom: its temporary files cannot be written.
        LinkFailed: it says what the linker said.
    """
    if not zig_installed():
        raise ToolMissing(tool="ziglang", purpose=f"{purpose} for {target}", install="pip install ziglang")
    local = folder / ".zig-cache"
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("ZIG_", "SOURCE_DATE_EPOCH"))},
        "ZIG_GLOBAL_CACHE_DIR": str(cache_folder()),
        "ZIG_LOCAL_CACHE_DIR": str(local),
        "LC_ALL": "C",
    }
    command = [sys.executable, "-m", "ziglang", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        reason = f"{purpose} took more than {TIMEOUT_S} seconds"
        raise LinkFailed(name=name, target=target, reason=reason) from error
    if done.returncode != 0:
        if reason := _no_room(done.stderr + done.stdout, done.returncode):
            raise NoRoom(folder=folder.parent, reason=reason)
        raise LinkFailed(name=name, target=target, reason=_reason(done.stderr or done.stdout, done.returncode))


def _no_room(output: str, status: int) -> str:
    """What the file system refused; empty where it is not at fault."""
    # The module that starts zig passes a signal on as the low byte of its negative number.
    if status in (-signal.SIGXFSZ, 256 - signal.SIGXFSZ):
        return "File too large"
    return next((reason for reason, words in _NO_ROOM.items() if any(word in output for word in words)), "")


def _reason(output: str, status: int) -> str:
    """The undefined symbols where that is what is wrong, else the first lines that the compiler or linker wrote."""
    undefined = dict.fromkeys(re.findall(r"undefined (?:hidden |protected )?symbol: (\S+)", output))
    if undefined:
        return f"undefined symbol{'s' * (len(undefined) > 1)} {', '.join(undefined)}"
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if "error" in line.lower()]
    start = errors[0] if errors else 0
    text = "\n  ".join(lines[start : start + _LINES])
    return text or f"the linker ended with status {status} and said nothing"
