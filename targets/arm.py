"""64-bit ARM processors under Linux: `arm:NAME` with LLVM's name of the core, `arm` alone is a Cortex-A76."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from graphopt.targets.target import KIB, NEON, Isa, Target

AARCH64 = "aarch64-linux-gnu"
GLIBC = "2.28"

# In-order cores with 64-bit or single vector pipes: half the multiply-adds per cycle of the wide ones.
_ONE_PIPE = replace(NEON, fma_per_cycle=1)
_FOUR_PIPES = replace(NEON, fma_per_cycle=4)

_TRM = "Arm {} Core Technical Reference Manual and Software Optimization Guide"

# Name to vector unit, L1 data and L2 cache per core in KiB (the smallest that licensees may build), architecture
# extensions beyond ARMv8.0, and source. The names are LLVM's.
_NAMED: dict[str, tuple[Isa, int, int, tuple[str, ...], str]] = {
    "cortex-a53": (_ONE_PIPE, 32, 128, (), _TRM.format("Cortex-A53") + "; L2 is shared by the cluster"),
    "cortex-a55": (_ONE_PIPE, 32, 64, ("fullfp16", "dotprod"), _TRM.format("Cortex-A55")),
    "cortex-a72": (NEON, 32, 512, (), _TRM.format("Cortex-A72") + "; L2 is shared by the cluster"),
    "cortex-a73": (NEON, 32, 256, (), _TRM.format("Cortex-A73") + "; L2 is shared by the cluster"),
    "cortex-a75": (NEON, 64, 256, ("fullfp16", "dotprod"), _TRM.format("Cortex-A75")),
    "cortex-a76": (NEON, 64, 256, ("fullfp16", "dotprod"), _TRM.format("Cortex-A76")),
    "cortex-a77": (NEON, 64, 256, ("fullfp16", "dotprod"), _TRM.format("Cortex-A77")),
    "cortex-a78": (NEON, 32, 256, ("fullfp16", "dotprod"), _TRM.format("Cortex-A78")),
    "cortex-x1": (_FOUR_PIPES, 64, 512, ("fullfp16", "dotprod"), _TRM.format("Cortex-X1")),
    "neoverse-n1": (NEON, 64, 512, ("fullfp16", "dotprod"), _TRM.format("Neoverse N1")),
    "neoverse-n2": (NEON, 64, 512, ("fullfp16", "dotprod", "bf16", "i8mm"), _TRM.format("Neoverse N2")),
    "neoverse-v1": (_FOUR_PIPES, 64, 1024, ("fullfp16", "dotprod", "bf16", "i8mm"), _TRM.format("Neoverse V1")),
    "neoverse-v2": (_FOUR_PIPES, 64, 1024, ("fullfp16", "dotprod", "bf16", "i8mm"), _TRM.format("Neoverse V2")),
    "generic": (NEON, 32, 128, (), "Arm Architecture Reference Manual for A-profile, ARMv8.0-A; caches: Cortex-A53's"),
}
DEFAULT = "cortex-a76"


def _named(name: str) -> Target:
    isa, l1d_kib, l2_kib, extensions, source = _NAMED[name]
    return Target(
        spec=f"arm:{name}",
        kind="arm",
        # The templates are written for 128-bit NEON; with SVE on, LLVM would use vectors of unknown width elsewhere.
        llvm={"kind": "llvm", "mtriple": AARCH64, "mcpu": name, "mattr": ["+neon", "-sve"]},
        zig=f"{AARCH64}.{GLIBC}",
        # For the entry and the runtime: one for all, as the toolchain builds its own library anew for every processor.
        zig_cpu="generic",
        isa=isa,
        l1d_bytes=l1d_kib * KIB,
        l2_bytes=l2_kib * KIB,
        source=source,
        features=("neon", *extensions),
    )


# What may follow the colon of `arm:`; the empty name stands for `arm` alone.
TARGETS: dict[str, Callable[[], Target]] = {"": partial(_named, DEFAULT), **{n: partial(_named, n) for n in _NAMED}}
WARNINGS: dict[str, str] = {}
