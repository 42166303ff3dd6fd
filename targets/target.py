"""What a target is: facts with units and a source. A descriptor checks itself, so a wrong number fails at import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

KIB = 1024
MIB = 1024 * KIB

Kind = Literal["cpu", "wasm", "arm", "cuda"]


@dataclass(frozen=True)
class Isa:
    """A vector instruction set, as the kernel templates see it."""

    name: str
    vector_bits: int
    vector_registers: int
    has_fma: bool
    # Fused multiply-adds that can start each cycle, and the cycles until the result may be used: enough independent
    # accumulators (their product) hide the latency.
    fma_per_cycle: int = 2
    fma_latency_cycles: int = 4

    def __post_init__(self) -> None:
        assert self.vector_bits in (128, 256, 512), f"{self.name}: {self.vector_bits} vector bits"
        assert self.vector_registers in (16, 32), f"{self.name}: {self.vector_registers} vector registers"

    def lanes(self, dtype_bits: int = 32) -> int:
        """Elements of `dtype_bits` in one vector register."""
        return self.vector_bits // dtype_bits


SSE4 = Isa("sse4", 128, 16, has_fma=False)
AVX2 = Isa("avx2", 256, 16, has_fma=True)
AVX512 = Isa("avx512", 512, 32, has_fma=True)
NEON = Isa("neon", 128, 32, has_fma=True)
SIMD128 = Isa("simd128", 128, 16, has_fma=False)
RELAXED_SIMD = Isa("relaxed-simd", 128, 16, has_fma=True)


@dataclass(frozen=True)
class Target:
    """One device family to build for.

    `llvm` is TVM's target dictionary for the host-side code; `zig` the triple that the linker driver takes, `zig_cpu`
    its -mcpu. `spec` is what the user may write to get exactly this target again.
    """

    spec: str
    kind: Kind
    llvm: dict[str, Any]
    zig: str
    zig_cpu: str
    isa: Isa
    l1d_bytes: int
    l2_bytes: int
    source: str
    threads: bool = True
    arch: str = ""  # CUDA only: sm_80, sm_90
    features: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        assert 8 * KIB <= self.l1d_bytes <= 256 * KIB, f"{self.spec}: L1 of {self.l1d_bytes} bytes"
        assert self.l1d_bytes < self.l2_bytes, f"{self.spec}: L2 is not larger than L1"

    def __str__(self) -> str:
        return self.spec
