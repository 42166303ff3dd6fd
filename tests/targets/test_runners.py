"""Running what was linked: natively, in Node, in wasmtime, and ARM code under qemu."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

from graphopt.errors import BundleCorrupt, Exit, RunFailed, ToolMissing
from graphopt.targets import open_runner, resolve, run_node, run_qemu
from graphopt.targets.run_node import Runner as NodeRunner
from graphopt.targets.run_qemu import Runner as QemuRunner
from graphopt.targets.runner import RUNNERS, why_not
from graphopt.targets.toolchain import link
from tests.targets.artefacts import artefact, expected, sample

ALL = [
    ("cpu", "native"),
    ("wasm", "node"),
    ("wasm", "wasmtime"),
    ("wasm:relaxed", "node"),
    ("wasm:relaxed", "wasmtime"),
]
# The way there is: emulated, or on an ARM machine natively.
ALL.append(("arm", "qemu" if shutil.which(run_qemu.QEMU) else "native"))


@pytest.fixture
def opened(linked):
    """Open a runner of the hand-made model; closed at the end."""
    runners = []

    def get(spec, name=None, **options):
        folder, made = linked(spec)
        runners.append(open_runner(folder, made, resolve(spec), runner=name, **options))
        return runners[-1]

    yield get
    for runner in runners:
        runner.close()


@pytest.mark.parametrize(("spec", "name"), ALL)
def test_every_runner_gives_the_right_numbers(spec, name, opened):
    """Twice, with other inputs the second time; dtypes and shapes as declared; the first results stay as they are."""
    runner = opened(spec, name)
    first = runner.run(sample())
    other = [-sample()[0], sample()[1] * 3]
    for got, inputs in ((runner.run(other), other), (first, sample())):
        for array, want in zip(got, expected(inputs), strict=True):
            assert array.dtype == want.dtype
            np.testing.assert_array_equal(array, want)


@pytest.mark.parametrize(("spec", "name"), ALL)
def test_every_runner_measures(spec, name, opened):
    """At least one run; all take some time; together about as long as was asked for."""
    runner = opened(spec, name)
    assert len(runner.time(sample(), 0.0)) == 1
    times = runner.time(sample(), 0.05)
    assert len(times) > 1
    assert all(0 < seconds < 1 for seconds in times)
    assert sum(times) < 1


@pytest.mark.parametrize(("spec", "name"), ALL)
def test_a_failing_kernel_is_reported(spec, name, tmp_path):
    """By its number, with exit code 1."""
    made = artefact(resolve(spec), before="if (*(const int64_t *)inputs[1] == 99) return -5;")
    link(made, resolve(spec), "bundle", tmp_path)
    runner = open_runner(tmp_path, made, resolve(spec), runner=name)
    x, ids = sample()
    try:
        with pytest.raises(RunFailed, match=f"tiny: did not run with {name}: .*kernel 5 failed") as caught:
            runner.run([x, np.full_like(ids, 99)])
        assert caught.value.exit is Exit.CHECK_FAILED
        np.testing.assert_array_equal(runner.run([x, ids])[0], expected([x, ids])[0])
    finally:
        runner.close()


@pytest.mark.parametrize(("spec", "name"), ALL)
def test_weights_of_another_size_are_refused(spec, name, linked, tmp_path):
    """No runner reads past their end."""
    folder, made = linked(spec)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(RunFailed, match=r"another size|has 5 bytes|have 5 bytes"):
        open_runner(tmp_path, made, resolve(spec), runner=name).run(sample())


@pytest.mark.parametrize(("spec", "name"), ALL)
@pytest.mark.parametrize("what", ["workspace_bytes", "weights_bytes"])
def test_code_of_other_sizes_is_not_run(spec, name, what, linked):
    """What the manifest says of the memory is held against what the code says of itself, before it runs."""
    folder, made = linked(spec)
    sizes = {"workspace_bytes": made.workspace_bytes, "weights_bytes": made.weights_bytes}
    model = SimpleNamespace(name=made.name, inputs=made.inputs, outputs=made.outputs, **{**sizes, what: 128})
    with pytest.raises(BundleCorrupt, match=f"made for {what[:-6]} of .* bytes, the manifest says 128") as caught:
        open_runner(folder, model, resolve(spec), runner=name).run(sample())
    assert caught.value.exit == Exit.BAD_INPUT


@pytest.mark.skipif(bool(run_node.why_not(resolve("wasm"))), reason="no Node")
def test_a_loader_of_another_build_is_refused(linked, tmp_path):
    """In browsers, too, where nobody reads the manifest: the loader asks the module for its sizes."""
    folder, made = linked("wasm")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    loader = tmp_path / f"{made.name}.mjs"
    loader.write_text(loader.read_text().replace('"workspaceBytes": 64', '"workspaceBytes": 32'))
    with pytest.raises(RunFailed, match="the module and this loader are not of the same build"):
        open_runner(tmp_path, made, resolve("wasm"), runner="node")


def test_numpys_own_alignment_is_enough(opened):
    """Inputs are used where they are, at any address."""
    x, ids = sample()
    odd = np.frombuffer(bytearray(b"\0" * 4 + x.tobytes()), np.float32, offset=4).reshape(x.shape)
    np.testing.assert_array_equal(opened("cpu").run([odd, ids])[0], expected([x, ids])[0])
    np.testing.assert_array_equal(opened("cpu").run([x[:, ::-1], ids])[0], expected([x[:, ::-1], ids])[0])


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 7, 300])
def test_any_number_of_threads_gives_the_same(threads, opened):
    """More than there are rows, too."""
    runner = opened("cpu", threads=threads)
    for _ in range(50):
        np.testing.assert_array_equal(runner.run(sample())[0], expected(sample())[0])


def test_several_threads_may_run_one_library(opened):
    """Each with a runner of its own; the pool serves one at a time, the others run alone."""

    def work(seed):
        runner = opened("cpu", threads=3)
        inputs = [np.random.default_rng(seed).standard_normal((37, 64)).astype(np.float32), sample()[1]]
        want = expected(inputs)[0]
        return all(np.array_equal(runner.run(inputs)[0], want) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize(("spec", "name"), ALL)
def test_several_threads_may_use_one_runner(spec, name, opened):
    """They do not share a workspace, an instance's memory or files."""
    runner = opened(spec, name)

    def work(seed):
        inputs = [np.random.default_rng(seed).standard_normal((37, 64)).astype(np.float32), sample()[1] + seed]
        want = expected(inputs)
        return all(all(map(np.array_equal, runner.run(inputs), want)) for _ in range(3 if name == "qemu" else 50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


_FORK = """
import os, sys
from pathlib import Path
import numpy as np
from graphopt.targets import open_runner, resolve
from tests.targets.artefacts import artefact, expected, sample
target = resolve("cpu")
runner = open_runner(Path(sys.argv[1]), artefact(target), target, threads=3)
right = lambda: all(np.array_equal(runner.run(sample())[0], expected(sample())[0]) for _ in range(20))
assert right()
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if right() else 9)
    assert right() and os.waitpid(child, 0)[1] == 0
print("done")
"""


def test_a_forked_process_starts_threads_of_its_own(linked):
    """No deadlock, as with torch's data loaders; and the process ends although workers sleep."""
    folder, _ = linked("cpu")
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _FORK, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_replaced_library_is_loaded_anew(tmp_path):
    """Linking over a loaded library leaves that one alone, and the next runner gets the new one."""
    target, runners = resolve("cpu"), []
    for factor in (2.0, 4.0):
        made = artefact(target, factor=factor)
        link(made, target, "bundle", tmp_path)
        runners.append(open_runner(tmp_path, made, target))
    for runner, factor in zip(runners, (2.0, 4.0), strict=True):
        np.testing.assert_array_equal(runner.run(sample())[0], expected(sample(), factor)[0])
        runner.close()


def test_what_hangs_is_stopped(tmp_path):
    """Node and qemu are killed after their time, with a clear error."""
    forever = "for (volatile int i = 0; i < 1;) i = -1;"
    for spec, make in (("wasm", NodeRunner), ("arm", QemuRunner)):
        target = resolve(spec)
        if spec == "arm" and not shutil.which(run_qemu.QEMU):
            continue
        made = artefact(target, before=forever)
        (tmp_path / spec).mkdir()
        link(made, target, "bundle", tmp_path / spec)
        runner = make(tmp_path / spec, made, target, timeout_s=1)
        with pytest.raises(RunFailed, match="within 1 seconds"):
            runner.run(sample())
        runner.close()


def test_nothing_is_left_behind(linked, tmp_path, monkeypatch):
    """Temporary files go with the runner, also where it could not be opened."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder, made = linked("wasm")
    runner = open_runner(folder, made, resolve("wasm"), runner="node")
    runner.run(sample())
    runner.close()
    with pytest.raises(RunFailed, match=r"did not run with node: .*tiny\.mjs"):
        open_runner(tmp_path, made, resolve("wasm"), runner="node")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("spec", "name", "module"), [("wasm", "node", run_node), ("arm", "qemu", run_qemu)])
def test_a_missing_tool_says_how_to_get_it(spec, name, module, monkeypatch, linked):
    """Exit 3."""
    folder, made = linked(spec)
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    monkeypatch.setattr("graphopt.targets.run_qemu.host_machine", lambda: "x86_64")
    with pytest.raises(ToolMissing) as caught:
        open_runner(folder, made, resolve(spec), runner=name)
    assert caught.value.exit is Exit.UNAVAILABLE
    assert caught.value.way_out == module.INSTALL


@pytest.mark.parametrize("kind", RUNNERS)
def test_every_registered_runner_has_a_module(kind):
    """Named as the table names it; and it says of every target of its kind whether it can run it."""
    target = resolve(kind)
    for name in RUNNERS[target.kind]:
        assert import_module(f"graphopt.targets.run_{name}").Runner.name == name
        assert isinstance(why_not(name, target), str)
