"""How fast targets are: what an estimate of latency needs beyond the vector unit, with units and a source.

The clock of `cpu` and of WebAssembly's machine is not known from the target; theirs are conventions. Ratios of
latencies on one target hardly depend on them, and `graphopt.cost.LatencyTable` measures where the target runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.targets.target import Target


@dataclass(frozen=True)
class Speed:
    """One processor core, or for CUDA a whole GPU."""

    clock_hz: float
    memory_bytes_per_second: float  # from beyond the second-level cache, one core
    call_seconds: float  # per kernel: call, loop set-up, or launch
    source: str
    peak_flops: float = 0.0  # CUDA only: float32 without tensor cores, two per multiply-add
    multiprocessors: int = 0  # CUDA only

    def __post_init__(self) -> None:
        assert 1e8 < self.clock_hz < 1e10, f"a clock of {self.clock_hz} Hz"
        assert self.memory_bytes_per_second > 1e8, f"{self.memory_bytes_per_second} bytes per second"
        assert 0 < self.call_seconds < 1e-3, f"{self.call_seconds} s per call"


_CALL_CYCLES = 500
_CONVENTION = "a convention: 3 GHz; 30 GB/s from the third-level cache to one core"


def _core(ghz: float, gigabytes: float, source: str) -> Speed:
    return Speed(ghz * 1e9, gigabytes * 1e9, _CALL_CYCLES / (ghz * 1e9), source)


_X86 = _core(3.0, 30.0, _CONVENTION)
# The clock is that of the board or server named; what one core gets from its memory about half of the memory's peak.
_ARM = {
    "cortex-a53": _core(1.4, 2.0, "Raspberry Pi 3 B+ product brief; LPDDR2-900"),
    "cortex-a55": _core(1.8, 4.0, "Rockchip RK3568 and RK3588 data sheets"),
    "cortex-a72": _core(1.8, 4.0, "Raspberry Pi 4 B product brief; LPDDR4-3200"),
    "cortex-a73": _core(2.4, 6.0, "Snapdragon 835 product brief"),
    "cortex-a75": _core(2.8, 8.0, "Snapdragon 845 product brief"),
    "cortex-a76": _core(2.4, 8.0, "Raspberry Pi 5 product brief; LPDDR4X-4267"),
    "cortex-a77": _core(2.8, 10.0, "Snapdragon 865 product brief"),
    "cortex-a78": _core(2.4, 10.0, "Snapdragon 888 product brief"),
    "cortex-x1": _core(2.8, 12.0, "Snapdragon 888 product brief"),
    "neoverse-n1": _core(2.5, 12.0, "AWS Graviton2"),
    "neoverse-n2": _core(2.75, 14.0, "Alibaba Yitian 710"),
    "neoverse-v1": _core(2.6, 15.0, "AWS Graviton3"),
    "neoverse-v2": _core(2.8, 20.0, "AWS Graviton4"),
    "generic": _core(1.4, 2.0, "as cortex-a53"),
}
_LAUNCH = 3e-6


def _gpu(teraflops: float, gigabytes: float, ghz: float, multiprocessors: int, source: str) -> Speed:
    return Speed(ghz * 1e9, gigabytes * 1e9, _LAUNCH, source, teraflops * 1e12, multiprocessors)


_CUDA = {
    "sm_75": _gpu(8.1, 320, 1.59, 40, "T4 data sheet"),
    "sm_80": _gpu(19.5, 1555, 1.41, 108, "A100 40 GB data sheet"),
    "sm_86": _gpu(31.2, 600, 1.70, 72, "A10 data sheet"),
    "sm_89": _gpu(30.3, 300, 2.04, 58, "L4 data sheet"),
    "sm_90": _gpu(67.0, 3350, 1.98, 132, "H100 SXM data sheet"),
    "sm_100": _gpu(75.0, 8000, 1.96, 148, "B200 data sheet"),
}


def speed_of(target: Target) -> Speed:
    """The facts of a target, or the convention of its kind. The same on every machine."""
    if target.kind == "cuda":
        return _CUDA[target.arch]
    if target.kind == "arm":
        return _ARM[target.spec.partition(":")[2] or "cortex-a76"]
    return _X86
