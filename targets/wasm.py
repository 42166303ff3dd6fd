"""WebAssembly: `wasm` needs 128-bit SIMD, `wasm:relaxed` also relaxed SIMD, which has a fused multiply-add.

wasm            Chrome 91, Firefox 89, Safari 16.4, Node 16.4, wasmtime 0.33
wasm:relaxed    Chrome 114, Firefox 145, Node 21 (Node 20 with --experimental-wasm-relaxed-simd), wasmtime 15
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from graphopt.targets.target import KIB, RELAXED_SIMD, SIMD128, Isa, Target

# No system interface: such a module can import nothing, and runs wherever WebAssembly does.
WASM32 = "wasm32-freestanding"


def _target(spec: str, isa: Isa, features: tuple[str, ...], source: str) -> Target:
    return Target(
        spec=spec,
        kind="wasm",
        llvm={
            "kind": "llvm",
            "mtriple": "wasm32-unknown-unknown",
            "vector-width": isa.vector_bits,
            "mattr": [f"+{name}" for name in features],
        },
        zig=WASM32,
        # For the entry and the runtime: one for both, as the toolchain builds its own library anew for every processor.
        zig_cpu="generic+" + "+".join(name.replace("-", "_") for name in _COMMON),
        isa=isa,
        # The machine below is unknown; these are what phones and laptops of the last ten years have at least.
        l1d_bytes=32 * KIB,
        l2_bytes=256 * KIB,
        source=source,
        threads=False,
        features=features,
    )


_COMMON = ("simd128", "bulk-memory", "nontrapping-fptoint", "sign-ext")

# What may follow the colon of `wasm:`; the empty name stands for `wasm` alone.
TARGETS: dict[str, Callable[[], Target]] = {
    "": partial(_target, "wasm", SIMD128, _COMMON, "WebAssembly Core Specification 2.0, fixed-width SIMD"),
    "relaxed": partial(
        _target,
        "wasm:relaxed",
        RELAXED_SIMD,
        (*_COMMON, "relaxed-simd"),
        "WebAssembly Core Specification 3.0, relaxed SIMD",
    ),
}
WARNINGS: dict[str, str] = {}
