"""Linking: what the files are, that they are enough by themselves, and that their bytes depend on the model only."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from graphopt.errors import CannotWrite, Exit, LinkFailed
from graphopt.targets import resolve
from graphopt.targets.cpu import host_machine
from graphopt.targets.elf import global_symbols
from graphopt.targets.toolchain import LIBRARIES, PARTS, link, wasm_imports
from graphopt.targets.zig import zig
from tests.targets.artefacts import OUTPUTS, artefact, expected, sample

_PROGRAM = """
#include "NAME.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int NAME_main(const char *folder) {
  char path[4096], *x = malloc(37 * 64 * 4), *ids = malloc(40), *y = malloc(37 * 64 * 4), next[40], odd[5];
  void *workspace = aligned_alloc(64, (NAME_workspace_bytes() + 63) / 64 * 64);
  FILE *file;
  snprintf(path, sizeof path, "%s/x", folder);
  if (!(file = fopen(path, "rb")) || fread(x, 37 * 64 * 4, 1, file) != 1) return 1;
  fclose(file);
  snprintf(path, sizeof path, "%s/ids", folder);
  if (!(file = fopen(path, "rb")) || fread(ids, 40, 1, file) != 1) return 1;
  fclose(file);
  snprintf(path, sizeof path, "%s/NAME/weights.bin", folder);
  if (NAME_map_weights("/nowhere") || NAME_map_weights(folder)) return 2;
  const void *weights = NAME_map_weights(path), *inputs[] = {x, ids};
  if (!weights) return 3;
  void *outputs[] = {y, next, odd};
  for (int threads = 0; threads < 5; threads++) {
    NAME_set_threads(threads);
    memset(y, 0, 37 * 64 * 4);
    if (NAME_run(weights, inputs, outputs, workspace)) return 4;
  }
  NAME_unmap_weights(weights);
  snprintf(path, sizeof path, "%s/NAME/results", folder);
  file = fopen(path, "wb");
  fwrite(y, 37 * 64 * 4, 1, file), fwrite(next, 40, 1, file), fwrite(odd, 5, 1, file);
  return fclose(file) ? 5 : 0;
}
"""

native = pytest.mark.skipif(not host_machine(), reason="the libraries are for Linux")


def compile_program(folder, output, sources, *options):
    """With the machine's own compiler where there is one, as a user would; else with zig."""
    if compiler := shutil.which("gcc"):
        subprocess.run([compiler, "-O1", *sources, *options, "-o", output], cwd=folder, check=True, timeout=120)
    else:
        zig(["cc", "-O1", *sources, *options, "-o", output], folder, name="program", target="cpu")


def results(file):
    """The outputs that the program wrote."""
    data, arrays = file.read_bytes(), []
    for spec in OUTPUTS:
        array = np.frombuffer(data, spec.dtype, int(np.prod(spec.shape))).reshape(spec.shape)
        data = data[array.nbytes :]
        arrays.append(array)
    return arrays


@native
@pytest.mark.parametrize("kind", ["so", "a"])
def test_a_c_program_runs_two_models_without_python_or_tvm(kind, tmp_path):
    """Both models' kernels, threads and runtime have the same inner names, and do not meet."""
    target = resolve("cpu")
    models = {"first": 2.0, "second": -4.0}
    calls = " || ".join(f"{name}_main(arguments[1])" for name in models)
    declarations = "".join(f"int {name}_main(const char *);" for name in models)
    (tmp_path / "main.c").write_text(
        f"{declarations}\nint main(int n, char **arguments) {{ return n != 2 || {calls}; }}\n"
    )
    options = []
    for name, factor in models.items():
        (tmp_path / name).mkdir()
        link(artefact(target, name=name, factor=factor), target, kind, tmp_path / name)
        (tmp_path / f"{name}.c").write_text(_PROGRAM.replace("NAME", name))
        options += [f"-I{name}"]
    files = [f"{name}/lib{name}.{kind}" for name in models]
    compile_program(tmp_path, "main", ["main.c", *(f"{name}.c" for name in models)], *options, *files, *LIBRARIES)
    for name, array in zip(("x", "ids"), sample(), strict=True):
        array.tofile(tmp_path / name)
    paths = os.pathsep.join(str(tmp_path / name) for name in models)
    environment = {"LD_LIBRARY_PATH": paths, "PATH": ""}
    subprocess.run([tmp_path / "main", str(tmp_path)], env=environment, check=True, timeout=60)
    for name, factor in models.items():
        for got, want in zip(results(tmp_path / name / "results"), expected(sample(), factor), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("spec", ["cpu", "arm", "wasm"])
def test_the_same_artefact_gives_the_same_bytes(spec, linked, tmp_path):
    """In another folder, at another time; and nothing in the files tells where they were made."""
    first, made = linked(spec)
    link(made, resolve(spec), "bundle", tmp_path)
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in tmp_path.iterdir())
    for file in first.iterdir():
        content = file.read_bytes()
        assert content == (tmp_path / file.name).read_bytes(), file.name
        assert b"graphopt-link-" not in content, file.name
        assert os.path.expanduser("~").encode() + b"/" not in content, file.name


@pytest.mark.parametrize("spec", ["cpu", "arm"])
def test_a_library_shows_its_interface_only(spec, linked):
    """No kernel, no TVM, no path: and what it needs is in every libc."""
    folder, _ = linked(spec)
    archive = (folder / "libtiny.a").read_bytes()
    member = archive[archive.index(b"\x7fELF") :]
    functions = ["map_weights", "run", "set_threads", "unmap_weights", "weights_bytes", "workspace_bytes"]
    assert global_symbols(member, defined=True) == [f"tiny_{function}" for function in functions]
    foreign = ("TVM", "_Unwind", "__zig", "__ubsan", "tiny", "affine", "count")
    assert not [name for name in global_symbols(member, defined=False) if name.startswith(foreign)]


@pytest.mark.parametrize(
    ("spec", "file", "most"), [("cpu", "libtiny.so", 16384), ("arm", "libtiny.so", 16384), ("wasm", "tiny.wasm", 4096)]
)
def test_a_bundles_own_code_is_small(spec, file, most, linked):
    """Entry, runtime and two tiny kernels; the limit for a bundle is 50 KB. The loader has 8 KB of text."""
    folder, _ = linked(spec)
    assert (folder / file).stat().st_size < most
    if spec == "wasm":
        assert (folder / "tiny.mjs").stat().st_size < 8192


@pytest.mark.parametrize("kind", PARTS["cpu"])
def test_one_part_can_be_asked_for(kind, tmp_path):
    """A single library comes with the header and the weights that it takes."""
    target = resolve("cpu")
    made = link(artefact(target), target, kind, tmp_path)
    assert set(made) == {kind, "header", "weights"}
    assert {file.name for file in made.values()} == {file.name for file in tmp_path.iterdir()}


def test_a_module_that_needs_libm_still_imports_nothing(tmp_path):
    """erff is in no compiler's own library: it is linked in from WASI's libc."""
    target = resolve("wasm")
    made = artefact(
        target, extra="float erff(float);", before="((float *)inputs[0])[0] = erff(((float *)inputs[0])[0]);"
    )
    module = link(made, target, "wasm", tmp_path)["wasm"].read_bytes()
    assert wasm_imports(module) == []
    assert len(module) < 8192


@pytest.mark.parametrize("spec", ["cpu", "arm", "wasm"])
def test_an_undefined_symbol_is_named(spec, tmp_path):
    """Our fault, exit 70; nothing is written."""
    made = artefact(resolve(spec), extra="int not_there(void);", before="if (not_there()) return -9;")
    with pytest.raises(LinkFailed, match=r"tiny: could not be linked for .*: undefined symbol not_there") as caught:
        link(made, resolve(spec), "bundle", tmp_path)
    assert caught.value.exit is Exit.INTERNAL
    assert list(tmp_path.iterdir()) == []


def test_a_broken_object_is_refused(tmp_path):
    """The linker's words are in the message."""
    made = replace(artefact(resolve("cpu")), objects={"kernels.o": b"garbage"})
    with pytest.raises(LinkFailed, match=r"kernels\.o"):
        link(made, resolve("cpu"), "so", tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    """Exit 5, and the file is named."""
    target = resolve("wasm")
    with pytest.raises(CannotWrite, match=r"tiny\.wasm: cannot be written: No such file or directory") as caught:
        link(artefact(target), target, "bundle", tmp_path / "missing")
    assert caught.value.exit is Exit.IO_FAILED


def test_imports_of_a_module_are_read():
    """The check behind `imports nothing`: (import "env" "f" (func)) is seen."""
    head = b"\0asm\x01\0\0\0" + b"\x01\x04\x01\x60\0\0"
    assert wasm_imports(head) == []
    assert wasm_imports(head + b"\x02\x09\x01\x03env\x01f\0\0") == ["env.f"]


@pytest.mark.parametrize("name", ["NULL", "linux", "errno", "int"])
def test_a_name_may_be_a_macro_or_a_keyword(name, tmp_path):
    """The runtime's functions are named after the model, whatever C takes its name for."""
    target = resolve("cpu")
    made = link(artefact(target, name=name), target, "so", tmp_path)
    assert made["so"].name == f"lib{name}.so"
