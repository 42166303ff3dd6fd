"""CUDA C to cubin and PTX with pip's NVRTC, called through ctypes: no GPU, no driver, no nvcc."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from graphopt.errors import ToolMissing

# Where the wheels nvidia-cuda-nvrtc, -runtime, -crt and -cccl put their files, below a folder of sys.path.
_WHEELS = "nvidia/cu13"
# A compiled model refers to no path of the machine that compiled it.
_FILE_NAME = b"kernels.cu"


@dataclass(frozen=True)
class Usage:
    """What ptxas says that one kernel takes; registers and bytes are per thread, shared memory per block."""

    kernel: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int  # static only

    @property
    def spills(self) -> bool:
        """Whether values that did not fit into registers go through memory."""
        return self.spill_store_bytes + self.spill_load_bytes > 0


@dataclass(frozen=True)
class Image:
    """All kernels of a model for one architecture."""

    arch: str
    cubin: bytes
    ptx: str
    usage: tuple[Usage, ...]


class CompileFailed(Exception):
    """NVRTC refused source that we generated. The message is its log."""


def _missing() -> ToolMissing:
    return ToolMissing(tool="NVRTC", purpose="compile CUDA kernels", install="pip install 'graphopt[cuda]'")


@cache
def _root() -> Path:
    for folder in sys.path:
        root = Path(folder) / _WHEELS
        if (root / "include" / "cuda_fp16.h").is_file() and any((root / "lib").glob("libnvrtc.so.*")):
            return root
    raise _missing()


@cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(min((_root() / "lib").glob("libnvrtc.so.*"))))
    except OSError as error:
        raise _missing() from error


def available() -> bool:
    """Whether the wheels of the [cuda] extra are installed and can be loaded."""
    try:
        _library()
    except ToolMissing:
        return False
    return True


def version() -> str:
    """NVRTC's version, as "13.0". Raises ToolMissing."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_cuda(source: str, arch: str, options: Sequence[str] = ()) -> Image:
    """Compile CUDA C for one architecture.

    Args:
        source: kernels declared `extern "C"`.
        arch: "sm_80"; the cubin is for it, the PTX for the compute capability of the same number.
        options: further NVRTC options.

    Raises:
        ToolMissing: the wheels are not installed.
        CompileFailed: with NVRTC's log.
    """
    nvrtc, root = _library(), _root()
    flags = [
        f"--gpu-architecture={arch}",
        "-default-device",
        "--device-int128",
        f"-I{root / 'include'}",
        f"-I{root / 'include' / 'cccl'}",
        "--ptxas-options=-v",
        *options,
    ]
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), _FILE_NAME, 0, None, None))
    try:
        array = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), array)
        log = _take(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise CompileFailed(log)
        # Compiling for a real architecture leaves the PTX that it went through as well.
        ptx = _take(nvrtc, program, "PTX").rstrip(b"\0").decode()
        return Image(arch, _take(nvrtc, program, "CUBIN"), ptx, parse_usage(log))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _take(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.raw


def _check(code: int) -> None:
    assert code == 0, f"NVRTC failed with code {code}"


_FUNCTION = re.compile(r"Function properties for '?(\w+)|Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def parse_usage(log: str) -> tuple[Usage, ...]:
    """Read the report of `ptxas -v`, one entry per kernel, by name."""
    found: dict[str, Usage] = {}
    kernel, frame = "", (0, 0, 0)
    for line in log.splitlines():
        if match := _FUNCTION.search(line):
            kernel = match[1] or match[2]
        elif match := _STACK.search(line):
            frame = (int(match[1]), int(match[2]), int(match[3]))
        if (match := _USED.search(line)) and kernel:
            found[kernel] = Usage(kernel, int(match[1]), *frame, shared_bytes=int(match[2] or 0))
    return tuple(found[name] for name in sorted(found))
