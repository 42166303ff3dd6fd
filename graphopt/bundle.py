"""A compiled model in one folder: manifest.json, the code for its target, weights.bin, a header or a loader."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.arrays import Array, Note, fit_inputs
from graphopt.errors import BundleCorrupt, GraphoptError, NotABundle, OutputInTheWay, WrongInputs
from graphopt.manifest import MANIFEST, Manifest, check_files, entry_of, file_states, read_manifest
from graphopt.staging import publish_folder, resolved, staged

if TYPE_CHECKING:
    from graphopt.targets.runner import Runner


class Bundle:
    """A compiled model: call it with arrays or tensors, read what it is from `manifest`.

    Running it loads the machine code in it: the hashes tell damage from an intact bundle, they do not tell a friend's
    bundle from a foe's.

    Code and weights are mapped into memory, not read: its folder may be replaced or removed while it is open, but its
    files must not be truncated or written to in place, which ends the process (SIGBUS) or changes the numbers.
    """

    def __init__(self, path: Path, manifest: Manifest, *, threads: int = 0) -> None:
        """Use `load` for a bundle that is on disk."""
        self.path = path
        self.manifest = manifest
        self._threads = threads
        self._runner: Runner | None = None
        self._opening = threading.Lock()
        # What was on the disk when the hashes were last compared.
        self._checked: Mapping[str, object] = {}

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.name

    @property
    def target(self) -> str:
        """The target that it is for, as the user may write it: "cpu", "arm:cortex-a76"."""
        return self.manifest.target["spec"]

    @property
    def total_bytes(self) -> int:
        """The size of all its files, the manifest included."""
        return sum(entry.bytes for entry in self.manifest.files.values()) + len(self.manifest.text().encode())

    def __repr__(self) -> str:
        takes, gives = (", ".join(map(str, s)) for s in (self.manifest.inputs, self.manifest.outputs))
        return f"<Bundle {self.name} for {self.target}: ({takes}) -> ({gives})>"

    def __call__(self, *args: Any, **kwargs: Any) -> Array | dict[str, Array]:
        """Run on arrays or tensors, in the order of the inputs, by name, or both. Returns as `run` does."""
        specs = self.manifest.inputs
        if len(args) > len(specs):
            what = f"got {len(args)} tensors, wants {len(specs)}"
            raise WrongInputs(model=self.name, what=what, expected=", ".join(map(str, specs)) or "no inputs")
        by_place = {spec.name: value for spec, value in zip(specs, args, strict=False)}
        if twice := sorted(by_place.keys() & kwargs.keys()):
            what = f"{', '.join(twice)} is given twice"
            raise WrongInputs(model=self.name, what=what, expected=", ".join(map(str, specs)))
        return self.run(by_place | kwargs)

    def run(self, inputs: Mapping[str, Any], *, note: Note | None = None) -> Array | dict[str, Array]:
        """Run on numpy arrays or torch tensors by name. Any number of threads may do so at once.

        An index that is out of range of the table that it looks up is moved to the nearest one in range, where PyTorch
        raises.

        Args:
            inputs: one per input of the manifest, with its shape; a dtype that converts without loss is converted.
            note: hears about such conversions.

        Returns:
            A new numpy array where the model has one output, else a dict of them by name.

        Raises:
            WrongInputs: a name, shape or dtype does not fit.
            BundleCorrupt: before the first run, the files are no longer those that were loaded.
            ToolMissing: what the target needs to run here is not installed.
            RunFailed: the code cannot be loaded, or stopped.
        """
        arrays = fit_inputs(self.name, self.manifest.inputs, inputs, note)
        results = self.runner.run(arrays)
        if len(self.manifest.outputs) == 1:
            return results[0]
        return {spec.name: result for spec, result in zip(self.manifest.outputs, results, strict=True)}

    @property
    def runner(self) -> Runner:
        """What runs it on its target, opened at the first use.

        Raises:
            ToolMissing: nothing can run it here.
            BundleCorrupt: the files are no longer those that were loaded.
        """
        with self._opening:
            if self._runner is None:
                self.check()
                runner = open_runner(self.path, self.manifest, threads=self._threads)
                try:
                    self.check()  # it may have opened what was put there a moment ago
                except BaseException:
                    runner.close()
                    raise
                self._runner = runner
            return self._runner

    def check(self) -> None:
        """Compare the hashes of the files, where those on the disk are not the ones compared before.

        Raises:
            BundleCorrupt, BundleNotFound: as `load`.
        """
        found = file_states(self.path, self.manifest)
        if found != self._checked:
            check_files(self.path, self.manifest)
            self._checked = found

    def time(self, inputs: Mapping[str, Any], seconds: float) -> list[float]:
        """Run on `inputs` for at least `seconds`; the seconds that each run took, by the clock of what runs it.

        Raises:
            WrongInputs, ToolMissing, RunFailed: as `run`.
        """
        return self.runner.time(fit_inputs(self.name, self.manifest.inputs, inputs), seconds)

    def close(self) -> None:
        """Let go of the library, the weights and, where there is one, the process that runs it."""
        with self._opening:
            runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, path: str | os.PathLike[str]) -> Bundle:
        """Copy it to `path` and return the bundle there. A bundle at that place is replaced, nothing else is.

        Raises:
            OutputInTheWay: something else stands there.
            BundleCorrupt: the files are no longer those that were loaded.
            CannotWrite: the file system refuses; nothing is left half-written.
        """
        with new_bundle(path) as stage:
            for name in (*self.manifest.files, MANIFEST):
                shutil.copyfile(self.path / name, stage / name)
            if read_manifest(stage) != self.manifest:
                raise BundleCorrupt(file=self.path, what="another bundle has taken its place since it was loaded")
            check_files(stage, self.manifest)
        return Bundle(resolved(path), self.manifest, threads=self._threads)


def load(path: str | os.PathLike[str], *, threads: int = 0) -> Bundle:
    """Open a bundle, having checked every file's hash.

    Args:
        path: the bundle's folder.
        threads: how many it may use; 0 for one per processor.

    Raises:
        BundleNotFound, NotABundle: there is nothing at the path, or something else.
        BundleCorrupt: a file is missing, damaged or changed.
        BundleTooNew: its format is newer than this graphopt.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    bundle = Bundle(folder.resolve(), manifest, threads=threads)
    states = file_states(folder, manifest)
    check_files(folder, manifest)
    bundle._checked = states
    return bundle


def seal(stage: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json for the files that lie in `stage`, with their sizes and hashes. Raises OSError."""
    files = {file.name: entry_of(file) for file in sorted(stage.iterdir()) if file.name != MANIFEST}
    manifest = replace(manifest, files=files)
    (stage / MANIFEST).write_text(manifest.text(), encoding="utf-8")
    return manifest


@contextmanager
def new_bundle(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder for a bundle's files; at the end of the block it becomes `output`, after an error nothing.

    Raises:
        OutputInTheWay: something that is not a bundle stands there.
        CannotWrite: the file system refuses; nothing is left half-written.
    """
    check_replaceable(output)
    with staged(output) as stage:
        yield stage
        check_replaceable(output)  # once more: compiling takes a while
        publish_folder(stage, output)


def keep_while(bundle: Bundle, folder: tempfile.TemporaryDirectory[str]) -> Bundle:
    """Remove `folder` when `bundle` is no longer used."""
    weakref.finalize(bundle, folder.cleanup)
    return bundle


def check_replaceable(output: str | os.PathLike[str]) -> None:
    """A bundle may be written where nothing, an empty folder or a bundle is; nothing else is ever removed.

    Raises:
        OutputInTheWay: with what stands there.
    """
    place = resolved(output)
    if not place.exists():
        return
    if not place.is_dir():
        raise OutputInTheWay(file=output, what="is a file, and a bundle is a folder")
    present = {child.name for child in place.iterdir()}
    if not present:
        return
    try:
        manifest = read_manifest(place)
    except NotABundle as error:
        raise OutputInTheWay(file=output, what="is a folder that is not a bundle") from error
    except BundleCorrupt as error:
        raise OutputInTheWay(file=output, what="is a folder with a damaged manifest.json") from error
    except GraphoptError as error:
        raise OutputInTheWay(file=output, what=f"cannot be looked into ({error.args[0]})") from error
    if extra := sorted(present - manifest.files.keys() - {MANIFEST}):
        raise OutputInTheWay(file=output, what=f"holds {extra[0]}, which is not part of the bundle")


def open_runner(path: Path, manifest: Manifest, *, threads: int = 0, runner: str | None = None) -> Runner:
    """What runs the bundle's code here: `runner` by name, or the first that can.

    Raises:
        ToolMissing: nothing can; it says what to install.
        RunFailed: the code cannot be loaded.
    """
    from graphopt import targets

    return targets.open_runner(path, manifest, manifest.target_here(), threads=threads, runner=runner)
