"""Outputs that are whole or not there: made in a hidden sibling folder, then renamed into place.

A process that is killed outright cannot clean up after itself. So the sibling is locked while its maker lives, and
whoever writes into the same folder next removes the siblings that nobody locks.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from graphopt.errors import CannotWrite

_MARK = ".graphopt-"
# As `tempfile.mkdtemp` completes it: what else begins so was made by somebody else.
_STAGE = re.compile(r"\.(?P<output>.+)" + re.escape(_MARK) + "[a-z0-9_]{8}")


def reason_of(error: OSError) -> str:
    """What went wrong in a few words, without the path that the caller names anyway."""
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def staged(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder beside `output` that is removed in the end, whatever happens.

    Raises:
        CannotWrite: the folder above is missing or may not be written to; or an OSError came out of the block, such as
            a full disk, that names no file outside of the folder.
    """
    place = resolved(output)
    with ExitStack() as stack:
        try:
            sweep(place.parent)
            stage = _new_stage(place, stack)
        except OSError as error:
            raise CannotWrite(file=output, reason=reason_of(error)) from error
        try:
            content = stage / "content"
            content.mkdir()
            yield content
        except OSError as error:
            # An error of copying names the file that is read first, whichever of the two is the trouble.
            named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if name is not None]
            if named and not any(name.is_relative_to(stage) for name in named):
                raise  # another file's trouble
            raise CannotWrite(file=output, reason=reason_of(error)) from error


def publish_folder(stage: Path, output: str | os.PathLike[str]) -> None:
    """Rename the folder `stage` to `output`; a folder that stands there is replaced, and put back where that fails."""
    place = resolved(output)
    for file in stage.rglob("*"):
        if file.is_file():
            _sync(file)
    stage.chmod(0o777 & ~_umask())
    old = stage.parent / "replaced"
    if place.exists():
        place.rename(old)
    try:
        stage.rename(place)
    except BaseException:
        if old.exists():
            old.rename(place)
        raise
    _sync(place.parent)


def publish_files(stage: Path, folder: Path) -> list[Path]:
    """Rename every file in `stage` into `folder`, over files of the same name; returns where they are now.

    Renaming needs no room on the disk, so either all arrive or, where a name is refused, those that are new go again.
    """
    made: list[Path] = []
    arrived: list[Path] = []
    files = sorted(file for file in stage.iterdir() if file.is_file())
    for file in files:
        _sync(file)
    try:
        for file in files:
            place = folder / file.name
            is_new = not place.exists()
            file.rename(place)
            arrived.append(place)
            if is_new:
                made.append(place)
    except BaseException:
        for place in made:
            place.unlink(missing_ok=True)
        raise
    return arrived


def resolved(output: str | os.PathLike[str]) -> Path:
    """The absolute path; through a symbolic link to what it points to, so that the link itself stays."""
    return Path(output).resolve()


def sweep(folder: Path) -> None:
    """Remove what killed processes left in `folder`, whatever their outputs were called. A replaced bundle is put back
    where the new one had not arrived."""
    for stage in folder.glob(f".*{_MARK}*"):
        if (match := _STAGE.fullmatch(stage.name)) is None:
            continue
        with ExitStack() as stack:
            try:
                _lock(stage, stack)
            except OSError:
                continue  # its maker is alive, or it is not ours to touch
            place = folder / match["output"]
            if (stage / "replaced").exists() and not place.exists():
                (stage / "replaced").rename(place)
            _remove(stage)


def _new_stage(place: Path, stack: ExitStack) -> Path:
    """A new locked sibling of `place`, unlocked and removed by `stack`."""
    while True:
        stage = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}{_MARK}"))
        with ExitStack() as attempt:
            attempt.callback(_remove, stage)
            # Before it is locked, another process may take it for a dead one's and sweep it away.
            with suppress(FileNotFoundError, BlockingIOError):
                _lock(stage, attempt)
                if stage.is_dir():
                    stack.push(attempt.pop_all())
                    return stage


def _lock(stage: Path, stack: ExitStack) -> None:
    # A link could lead anywhere, and what is in a stage gets removed.
    handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    stack.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(path: Path) -> None:
    # Renamed before its content is on the disk, a file can be found empty after a power cut.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove(stage: Path) -> None:
    try:
        shutil.rmtree(stage, ignore_errors=True)
    except KeyboardInterrupt:  # a second Ctrl-C must not leave half of it behind
        shutil.rmtree(stage, ignore_errors=True)
        raise
