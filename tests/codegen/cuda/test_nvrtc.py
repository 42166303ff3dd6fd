"""Compilation without a GPU: images for every architecture, and the limits that they keep."""

from __future__ import annotations

import pytest

from graphopt.codegen.cuda import nvrtc
from graphopt.errors import Exit, ToolMissing
from graphopt.targets.cuda import GPUS

SOURCE = 'extern "C" __global__ void k(float* x) { __shared__ float s[256]; s[threadIdx.x] = x[threadIdx.x]; %s }\n'


@pytest.mark.parametrize("arch", GPUS)
def test_every_architecture_compiles(arch):
    """A cubin is an ELF file; the PTX names the architecture; the usage is read."""
    image = nvrtc.compile_cuda(SOURCE % "__syncthreads(); x[threadIdx.x] = s[255 - threadIdx.x];", arch)
    assert image.cubin[:4] == b"\x7fELF"
    assert f".target {arch}" in image.ptx
    (usage,) = image.usage
    assert usage.kernel == "k"
    assert usage.registers > 0
    assert usage.shared_bytes >= 1024
    assert not usage.spills


def test_equal_source_gives_equal_images():
    """Bundles of the same model have the same bytes, and no path of this machine in them."""
    first, second = (nvrtc.compile_cuda(SOURCE % "", "sm_80") for _ in range(2))
    assert first == second
    assert b"site-packages" not in first.cubin


def test_refused_source_comes_with_the_log():
    """NVRTC's words are the message."""
    with pytest.raises(nvrtc.CompileFailed, match="no_such_thing"):
        nvrtc.compile_cuda(SOURCE % "no_such_thing();", "sm_80")


def test_missing_wheels_say_what_to_install(monkeypatch):
    """Without the extra there is one clear error, exit code 3."""
    monkeypatch.setattr("sys.path", [])
    nvrtc._root.cache_clear()
    nvrtc._library.cache_clear()
    try:
        assert not nvrtc.available()
        with pytest.raises(ToolMissing, match=r"pip install 'graphopt\[cuda\]'") as caught:
            nvrtc.compile_cuda(SOURCE % "", "sm_80")
        assert caught.value.exit == Exit.UNAVAILABLE
    finally:
        nvrtc._root.cache_clear()
        nvrtc._library.cache_clear()


def test_usage_is_read_from_either_form_of_the_report():
    """ptxas words its report differently from release to release."""
    log = """ptxas info    : Compiling entry function 'a' for 'sm_80'
ptxas info    : Function properties for a
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'b' for 'sm_80'
ptxas info    : Used 8 registers, 380 bytes cmem[0]
"""
    a, b = nvrtc.parse_usage(log)
    assert (a.registers, a.stack_bytes, a.spill_store_bytes, a.spill_load_bytes, a.shared_bytes) == (
        255,
        16,
        4,
        8,
        2048,
    )
    assert a.spills
    assert (b.registers, b.shared_bytes) == (8, 0)
