"""x86-64 processors under Linux: `cpu` is this machine as detected, `cpu:NAME` is a named level or processor.

What matters to the kernels is the vector unit and the caches. The processor's model says little about the first: a
hypervisor may mask AVX-512 off on a processor that has it. So LLVM's processor name only picks the scheduling model,
and every vector extension is switched on or off explicitly.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Collection
from functools import cache, partial
from pathlib import Path

from graphopt.errors import UnknownTarget
from graphopt.targets.target import AVX2, AVX512, KIB, MIB, NEON, SSE4, Isa, Target

# glibc 2.28 (2018) is the oldest that any supported distribution still ships.
X86_64 = "x86_64-linux-gnu"
GLIBC = "2.28"

# /proc/cpuinfo's name of each vector extension, and LLVM's. Other features don't matter to generated code.
_FLAGS = {
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi1": "bmi",
    "bmi2": "bmi2",
    "avx_vnni": "avxvnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
}
_AVX512_LEVEL = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_AVX2_LEVEL = ("avx2", "fma", "bmi", "bmi2", "f16c")


def vector_unit(features: Collection[str]) -> Isa:
    """The widest instruction set of the templates that `features`, by LLVM's names, has in full."""
    if all(name in features for name in (*_AVX2_LEVEL, *_AVX512_LEVEL)):
        return AVX512
    return AVX2 if all(name in features for name in _AVX2_LEVEL) else SSE4


def x86(spec: str, processor: str, features: tuple[str, ...], *, l1d_bytes: int, l2_bytes: int, source: str) -> Target:
    """A target for an x86-64 processor.

    Args:
        spec: what the user writes.
        processor: LLVM's name, for the scheduling model.
        features: vector extensions by LLVM's names, all that may be used.
        l1d_bytes, l2_bytes: data caches that one core has.
        source: where the facts come from.
    """
    isa = vector_unit(features)
    switches = [f"{'+' if name in features else '-'}{name}" for name in _FLAGS.values()]
    if isa is AVX512:
        # Intel's models split 512-bit vectors in two otherwise; the templates choose their width themselves.
        switches.append("-prefer-256-bit")
    return Target(
        spec=spec,
        kind="cpu",
        llvm={"kind": "llvm", "mtriple": X86_64, "mcpu": processor, "mattr": switches},
        zig=f"{X86_64}.{GLIBC}",
        # For the entry and the runtime: one for all, as the toolchain builds its own library anew for every processor.
        zig_cpu="x86_64",
        isa=isa,
        l1d_bytes=l1d_bytes,
        l2_bytes=l2_bytes,
        source=source,
        features=features,
    )


_LEVEL_2 = ("sse4.1", "sse4.2")
_LEVEL_3 = (*_LEVEL_2, "avx", *_AVX2_LEVEL)
_LEVEL_4 = (*_LEVEL_3, *_AVX512_LEVEL)
_PSABI = "x86-64 psABI, microarchitecture levels; caches: the smallest among processors of that level"
_INTEL = "Intel 64 and IA-32 Architectures Optimization Reference Manual"
_AMD = "AMD Software Optimization Guide"

# Name to features, L1 data and L2 cache per core in KiB, source. The names are LLVM's.
_NAMED: dict[str, tuple[tuple[str, ...], int, int, str]] = {
    "generic": (_LEVEL_2, 32, 256, _PSABI + "; SSE4.2 only: name a processor to use wider vectors"),
    "x86-64-v2": (_LEVEL_2, 32, 256, _PSABI),
    "x86-64-v3": (_LEVEL_3, 32, 256, _PSABI),
    "x86-64-v4": (_LEVEL_4, 32, 512, _PSABI),
    "haswell": (_LEVEL_3, 32, 256, _INTEL + ", Haswell"),
    "broadwell": (_LEVEL_3, 32, 256, _INTEL + ", Broadwell"),
    "skylake": (_LEVEL_3, 32, 256, _INTEL + ", Skylake client"),
    "skylake-avx512": (_LEVEL_4, 32, 1024, _INTEL + ", Skylake server"),
    "cascadelake": ((*_LEVEL_4, "avx512vnni"), 32, 1024, _INTEL + ", Cascade Lake"),
    "icelake-client": ((*_LEVEL_4, "avx512vnni"), 48, 512, _INTEL + ", Ice Lake client"),
    "icelake-server": ((*_LEVEL_4, "avx512vnni"), 48, 1280, _INTEL + ", Ice Lake server"),
    "alderlake": ((*_LEVEL_3, "avxvnni"), 32, 1280, _INTEL + ", Alder Lake; L1 of the efficient cores"),
    "sapphirerapids": (
        (*_LEVEL_4, "avxvnni", "avx512vnni", "avx512bf16", "avx512fp16"),
        48,
        2048,
        _INTEL + ", Sapphire Rapids",
    ),
    "znver1": (_LEVEL_3, 32, 512, _AMD + " for family 17h"),
    "znver2": (_LEVEL_3, 32, 512, _AMD + " for family 17h, models 30h and up"),
    "znver3": (_LEVEL_3, 32, 512, _AMD + " for family 19h"),
    "znver4": ((*_LEVEL_4, "avx512vnni", "avx512bf16"), 32, 1024, _AMD + " for the Zen 4 microarchitecture"),
    "znver5": ((*_LEVEL_4, "avxvnni", "avx512vnni", "avx512bf16"), 48, 1024, _AMD + " for the Zen 5 microarchitecture"),
}


def _named(name: str) -> Target:
    features, l1d_kib, l2_kib, source = _NAMED[name]
    processor = "x86-64-v2" if name == "generic" else name
    return x86(f"cpu:{name}", processor, features, l1d_bytes=l1d_kib * KIB, l2_bytes=l2_kib * KIB, source=source)


@cache
def host_features() -> frozenset[str]:
    """Vector extensions that this machine offers, by LLVM's names; empty where /proc/cpuinfo does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return frozenset(llvm for flag, llvm in _FLAGS.items() if flag in flags)


def host_machine() -> str:
    """x86_64, aarch64, ...: the architecture that this Linux runs on; empty on other systems."""
    if platform.system() != "Linux":
        return ""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def host_cache_bytes(level: int, otherwise: int) -> int:
    """Size of the data cache of `level` (1 or 2) of the first processor, in bytes, or `otherwise`."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, found = (index / "type").read_text().strip(), int((index / "level").read_text())
            size = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if found == level and kind in ("Data", "Unified") and size.endswith(("K", "M")):
            return int(size[:-1]) * (KIB if size.endswith("K") else MIB)
    return otherwise


@cache
def host() -> Target:
    """This machine, with the extensions that it really offers.

    Raises:
        UnknownTarget: it is not x86-64 or 64-bit ARM under Linux.
    """
    # Asking LLVM takes the import of TVM, a second or more; the named targets don't need it.
    from tvm.target.codegen import llvm_get_system_cpu

    machine = host_machine()
    l1d_bytes = host_cache_bytes(1, 32 * KIB)
    l2_bytes = host_cache_bytes(2, 512 * KIB)
    if machine == "x86_64":
        features = tuple(name for name in _FLAGS.values() if name in host_features())
        source = "/proc/cpuinfo and /sys/devices/system/cpu of this machine"
        return x86("cpu", llvm_get_system_cpu(), features, l1d_bytes=l1d_bytes, l2_bytes=l2_bytes, source=source)
    if machine == "aarch64":
        return Target(
            spec="cpu",
            kind="cpu",
            llvm={"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": llvm_get_system_cpu(), "mattr": ["+neon"]},
            zig=f"aarch64-linux-gnu.{GLIBC}",
            zig_cpu="generic",
            isa=NEON,
            l1d_bytes=l1d_bytes,
            l2_bytes=l2_bytes,
            source="LLVM's detection and /sys/devices/system/cpu of this machine",
            features=("neon",),
        )
    near = f": this machine is {platform.system()} on {platform.machine()}, not Linux on x86-64 or 64-bit ARM"
    raise UnknownTarget(target="cpu", near=near)


# What may follow the colon of `cpu:`; the empty name stands for `cpu` alone.
TARGETS: dict[str, Callable[[], Target]] = {"": host, **{name: partial(_named, name) for name in _NAMED}}

# Said once when such a target is resolved.
WARNINGS = {
    "cpu:generic": "cpu:generic uses SSE4.2 only and is several times slower than this machine may be; "
    "`cpu` is this machine, `cpu:x86-64-v3` anything since 2015"
}


def runs_here(target: Target) -> bool:
    """Whether this machine executes `target`'s code itself."""
    machine = host_machine()
    if not target.zig.startswith(f"{machine}-linux") or not machine:
        return False
    return machine == "aarch64" or set(target.features) <= host_features()


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
