"""CUDA targets and their libraries, on the emulated driver for all that can go wrong, and on a GPU where one is."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import BundleCorrupt, RunFailed
from graphopt.targets import open_runner, resolve, run_cuda, run_emulated_gpu
from graphopt.targets.cuda import DEFAULT, GPUS, gpu_of
from graphopt.targets.toolchain import link
from graphopt.targets.zig import zig
from tests.codegen.cuda.conftest import Compiled, compiled


@pytest.fixture(scope="module")
def model() -> Compiled:
    return compiled("mlp", "float32", "cuda:sm_80")


@pytest.fixture(scope="module")
def folder(model: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's linked bundle, without a manifest."""
    place = tmp_path_factory.mktemp("mlp")
    link(model.artefact, resolve("cuda:sm_80"), "bundle", place)
    return place


@pytest.fixture(scope="module")
def emulated(model: Compiled, folder: Path):
    runner = run_emulated_gpu.Runner(folder, model.artefact, resolve("cuda:sm_80"))
    yield runner
    runner.close()


@pytest.fixture
def driver(emulated, tmp_path):
    """Set what the emulated driver shall do; gives the file of its log."""

    def configure(**settings: str) -> Path:
        log = tmp_path / "log"
        names = {f"GRAPHOPT_EMULATED_{key.upper()}": value for key, value in settings.items()}
        emulated.environment = {"GRAPHOPT_EMULATED_LOG": str(log), **names}
        return log

    yield configure
    emulated.environment = {}


def test_every_architecture_is_a_target():
    """`cuda` alone is the documented default; each name gives itself back."""
    assert resolve("cuda").arch == DEFAULT == "sm_80"
    for arch, gpu in GPUS.items():
        target = resolve(f"cuda:{arch}")
        assert (target.spec, target.arch, gpu_of(target)) == (f"cuda:{arch}", arch, gpu)
    assert GPUS["sm_100"].capability == (10, 0)


def test_a_bundle_has_the_library_and_its_kernels(folder):
    """What is written for a GPU, and that the library asks for no other."""
    names = {path.name for path in folder.iterdir()}
    assert {"libmlp.so", "libmlp.a", "mlp.h", "weights.bin", "mlp.cubin", "mlp.ptx", "mlp.cu"} == names
    assert b"libcuda.so.1\0" in (folder / "libmlp.so").read_bytes()
    assert b"site-packages" not in (folder / "libmlp.so").read_bytes()


def test_the_library_runs_on_the_emulated_driver(model, emulated, driver):
    """Load, upload, launch with the planned grids, copy out: PyTorch's numbers; all memory is given back."""
    log = driver()
    results = emulated.run(model.inputs)
    for got, want in zip(results, model.want, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    lines = log.read_text().splitlines()[: len(log.read_text().splitlines()) // 2]  # it ran twice
    weights = len(model.artefact.weights)
    assert lines[:3] == ["load ptx", f"alloc {weights}", f"upload {weights}"]
    launches = [line for line in lines if line.startswith("launch")]
    assert launches == [
        f"launch {x.kernel} {','.join(map(str, x.grid))} {','.join(map(str, x.block))} {x.dynamic_shared_bytes}"
        for x in model.artefact.launches
    ]
    assert lines[-1] == "release 0 blocks left"


def test_a_library_of_other_sizes_is_not_run(model, folder):
    """What the manifest says of the memory is held against what the library says of itself, before it is loaded."""
    other = replace(model.artefact, workspace_bytes=model.artefact.workspace_bytes + 64)
    runner = run_emulated_gpu.Runner(folder, other, resolve("cuda:sm_80"))
    with pytest.raises(BundleCorrupt, match="made for workspace of"):
        runner.run(model.inputs)
    runner.close()


@pytest.mark.parametrize(("capability", "image"), [("8.0", "cubin"), ("8.9", "cubin"), ("9.0", "ptx"), ("12.0", "ptx")])
def test_the_image_fits_the_device(capability, image, model, emulated, driver):
    """The cubin within its major version, the PTX for newer ones."""
    log = driver(capability=capability)
    emulated.run(model.inputs)
    assert log.read_text().startswith(f"load {image}\n")


def test_a_cubin_that_the_driver_refuses_gives_way_to_ptx(model, emulated, driver):
    """Error 209, no binary for this GPU, is not the end."""
    log = driver(capability="8.0", fault="cuModuleLoadDataEx:1:209")
    emulated.run(model.inputs)
    assert log.read_text().startswith("load ptx\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capability": "7.5"}, "mlp: was compiled for sm_80 and newer, and the device is sm_75"),
        ({"fault": "cuInit:1:100"}, "starting the CUDA driver failed: no CUDA-capable device is detected"),
        ({"fault": "cuMemAlloc_v2:1:2"}, "allocating the weights failed: out of memory (CUDA_ERROR_OUT_OF_MEMORY, 2)"),
        ({"fault": "cuMemAlloc_v2:2:2"}, "allocating the arena failed: out of memory"),
        ({"fault": "cuMemAlloc_v2:3:2"}, "allocating an input failed: out of memory"),
        ({"fault": "cuModuleLoadDataEx:1:218"}, "compiling the PTX failed"),
        (
            {"fault": "cuLaunchKernel:2:719"},
            "failed: unspecified launch failure (CUDA_ERROR_LAUNCH_FAILED, 719) (status -2)",
        ),
        ({"fault": "cuStreamSynchronize:2:700"}, "running the kernels failed"),
    ],
)
def test_errors_are_told_in_the_drivers_words(settings, message, model, emulated, driver):
    """Each failure is one message with what was being done, and gives back what was taken."""
    log = driver(**settings)
    with pytest.raises(RunFailed) as caught:
        emulated.run(model.inputs)
    assert message in str(caught.value)
    if log.exists() and "release" in log.read_text():
        assert log.read_text().splitlines()[-1] == "release 0 blocks left"


def test_no_driver_is_one_clear_error(folder):
    """The library loads where there is no GPU, and says what is missing."""
    if run_cuda.device_count():
        pytest.skip("this machine has a CUDA driver")
    library = ctypes.CDLL(str(folder / "libmlp.so"))
    library.mlp_load.restype, library.mlp_error.restype = ctypes.c_void_p, ctypes.c_char_p
    assert library.mlp_load(None, 0) is None
    assert library.mlp_error().startswith(b"mlp: no CUDA driver: libcuda.so.1")


def test_a_c_program_can_use_it(folder, tmp_path):
    """The header compiles as C11 with every warning, and the static library needs -ldl only."""
    (tmp_path / "main.c").write_text(
        '#include "mlp.h"\n#include <stdio.h>\n#include <string.h>\n'
        "int main(void) {\n"
        "  mlp_context *context = mlp_load(NULL, 99);\n"
        "  puts(mlp_error());\n"
        "  mlp_unload(NULL);\n"
        "  return context != NULL || MLP_WEIGHTS_BYTES != mlp_weights_bytes();\n}\n"
    )
    target = resolve("cuda:sm_80")
    command = [
        "cc",
        "-target",
        target.zig,
        "-O2",
        "-fno-sanitize=all",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pedantic",
    ]
    zig(
        [*command, f"-I{folder}", "main.c", str(folder / "libmlp.a"), "-ldl", "-o", "main"],
        tmp_path,
        name="main",
        target="cuda",
    )
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mlp: ")


def test_on_a_real_gpu(model, folder):
    """The same bundle on hardware gives PyTorch's numbers."""
    if reason := run_cuda.why_not(resolve("cuda:sm_80")):
        pytest.skip(f"test on a real GPU: {reason}")
    runner = open_runner(folder, model.artefact, resolve("cuda:sm_80"), runner="cuda")
    for got, want in zip(runner.run(model.inputs), model.want, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
    runner.close()
