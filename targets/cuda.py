"""NVIDIA GPUs: `cuda:sm_90` names a compute capability, `cuda` alone is sm_80.

A library for one capability carries its machine code (cubin) and its PTX. The cubin runs on that capability and on
later minor versions of the same major one; the driver compiles the PTX for anything newer when the library is loaded,
if the driver is as new as the CUDA of the compiler. So `cuda` alone, sm_80, runs as it is on Ampere and Ada (sm_80, 86,
87, 89) and through PTX on Hopper and Blackwell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from graphopt.targets.target import KIB, MIB, SSE4, Target

# The launcher is host code; the drivers that still exist run on any x86-64 Linux with glibc 2.28.
HOST = "x86_64-linux-gnu"
GLIBC = "2.28"


@dataclass(frozen=True)
class Gpu:
    """What one compute capability gives a kernel. Registers are 32 bits wide."""

    arch: str
    shared_bytes_per_sm: int
    shared_bytes_per_block: int  # at most, when asked for (cuFuncSetAttribute); 48 KiB without asking
    threads_per_sm: int
    blocks_per_sm: int
    l1d_bytes: int  # per multiprocessor, shared memory included
    l2_bytes: int  # of the part named in `source`
    bf16: bool  # bfloat16 arithmetic in hardware
    source: str
    registers_per_sm: int = 65536
    registers_per_thread: int = 255
    threads_per_block: int = 1024
    warp: int = 32
    static_shared_bytes: int = 48 * KIB

    def __post_init__(self) -> None:
        assert self.shared_bytes_per_block <= self.shared_bytes_per_sm <= self.l1d_bytes, f"{self.arch}: shared memory"
        assert self.threads_per_sm % self.warp == 0, f"{self.arch}: {self.threads_per_sm} threads"
        assert self.capability >= (7, 5), f"{self.arch}: CUDA 13 begins at sm_75"

    @property
    def capability(self) -> tuple[int, int]:
        """Major and minor number: (8, 6) for sm_86."""
        number = int(self.arch.removeprefix("sm_"))
        return number // 10, number % 10


_GUIDE = "CUDA C++ Programming Guide 13, technical specifications per compute capability; L2: "

GPUS: dict[str, Gpu] = {
    gpu.arch: gpu
    for gpu in (
        Gpu("sm_75", 64 * KIB, 64 * KIB, 1024, 16, 96 * KIB, 4 * MIB, False, _GUIDE + "T4 data sheet"),
        Gpu("sm_80", 164 * KIB, 163 * KIB, 2048, 32, 192 * KIB, 40 * MIB, True, _GUIDE + "A100 40 GB white paper"),
        Gpu("sm_86", 100 * KIB, 99 * KIB, 1536, 16, 128 * KIB, 6 * MIB, True, _GUIDE + "A10 data sheet"),
        Gpu("sm_89", 100 * KIB, 99 * KIB, 1536, 24, 128 * KIB, 48 * MIB, True, _GUIDE + "L4 data sheet"),
        Gpu("sm_90", 228 * KIB, 227 * KIB, 2048, 32, 256 * KIB, 50 * MIB, True, _GUIDE + "H100 white paper"),
        Gpu("sm_100", 228 * KIB, 227 * KIB, 2048, 32, 256 * KIB, 126 * MIB, True, _GUIDE + "B200 data sheet"),
    )
}
DEFAULT = "sm_80"


def gpu_of(target: Target) -> Gpu:
    """The GPU facts behind a CUDA target."""
    return GPUS[target.arch]


def _named(arch: str) -> Target:
    gpu = GPUS[arch]
    return Target(
        spec=f"cuda:{arch}",
        kind="cuda",
        llvm={"kind": "llvm", "mtriple": HOST, "mcpu": "x86-64"},
        zig=f"{HOST}.{GLIBC}",
        zig_cpu="x86_64",
        isa=SSE4,
        l1d_bytes=gpu.l1d_bytes,
        l2_bytes=gpu.l2_bytes,
        source=gpu.source,
        threads=False,
        arch=arch,
    )


# What may follow the colon of `cuda:`; the empty name stands for `cuda` alone.
TARGETS: dict[str, Callable[[], Target]] = {"": partial(_named, DEFAULT), **{a: partial(_named, a) for a in GPUS}}
WARNINGS: dict[str, str] = {}
