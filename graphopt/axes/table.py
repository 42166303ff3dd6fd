"""The table of signatures: what each operator does to axes, in a line. What a line cannot say is in `rules_*.py`.

Operators that PyTorch tags as pointwise need no entry: their tensors are broadcast against each other.
"""

from __future__ import annotations

from typing import Any

from graphopt.axes.signature import Signature

_CHANNELS = {"o": "channel", "i": "channel", "g": "channel", "c": "channel"}
_GROUPS = {"groups": "g"}
_BY_EXPERT: dict[str, Any] = {"reason": "sorted by expert", "roles": {"k": "neuron", "n": "neuron"}}


def _convolution(space: str, transposed: bool = False) -> Signature:
    names = space.split()
    before, after = (" ".join(f"{name}{mark}!" for name in names) for mark in ("", "'"))
    kernel = " ".join(f"k{name}!" for name in names)
    weight = f"(g i) o {kernel}" if transposed else f"(g o) i {kernel}"
    return Signature(f"... (g i) {before}, {weight}, (g o)? -> ... (g o) {after}", literals=_GROUPS, roles=_CHANNELS)


_POOL1 = Signature("... x! -> ... x'!, ... x'!")
_POOL2 = Signature("... y! x! -> ... y'! x'!, ... y'! x'!")
_POOL3 = Signature("... z! y! x! -> ... z'! y'! x'!, ... z'! y'! x'!")

SIGNATURES: dict[str, Signature] = {
    # Linear algebra
    "linear": Signature("... i, o i, o? -> ... o", roles={"o": "neuron", "i": "neuron"}),
    "mm": Signature("m k, k n -> m n", roles={"k": "neuron"}),
    "mv": Signature("m k, k -> m"),
    **dict.fromkeys(("dot", "vdot"), Signature("k, k ->")),
    "outer": Signature("m, n -> m n"),
    "inner": Signature("... k, n k -> ... n"),
    "addr": Signature("m n, m, n -> m n"),
    "bilinear": Signature("... i, ... j, o i j, o? -> ... o", roles={"o": "neuron", "i": "neuron", "j": "neuron"}),
    "cdist": Signature("... m k, ... n k -> ... m n"),
    # A matrix for each run of rows, which ends where the last argument says.
    "transformers.grouped_mm_fallback": Signature("t! k, x! k n, x! -> t! n", **_BY_EXPERT),
    "_grouped_mm": Signature("t! k, x! k n, x!, x! n? -> t! n", bytes_of={"k": 16, "n": 16}, **_BY_EXPERT),
    "embedding": Signature("v! c, ... -> ... c", reason="looked up by index", roles={"c": "embedding"}),
    # Convolutions
    "conv1d": _convolution("x"),
    "conv2d": _convolution("y x"),
    "conv3d": _convolution("z y x"),
    "conv_transpose1d": _convolution("x", transposed=True),
    "conv_transpose2d": _convolution("y x", transposed=True),
    "conv_transpose3d": _convolution("z y x", transposed=True),
    # Pooling and resizing
    **dict.fromkeys(("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d"), _POOL1),
    **dict.fromkeys(("max_pool1d_with_indices", "upsample_nearest1d", "upsample_linear1d"), _POOL1),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"), _POOL2),
    **dict.fromkeys(("max_pool2d_with_indices", "adaptive_max_pool2d", "upsample_nearest2d"), _POOL2),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d"), _POOL2),
    **dict.fromkeys(("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), _POOL2),
    **dict.fromkeys(("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "max_pool3d_with_indices"), _POOL3),
    **dict.fromkeys(("upsample_nearest3d", "upsample_trilinear3d"), _POOL3),
    "grid_sampler": Signature("n c y! x!, n v! u! d! -> n c v! u!"),
    "grid_sampler_2d": Signature("n c y! x!, n v! u! d! -> n c v! u!"),
    # Rearrangements of channels and space
    **dict.fromkeys(
        ("channel_shuffle", "native_channel_shuffle"),
        Signature("n (g c) y! x! -> n (c g) y! x!", literals=_GROUPS, roles=_CHANNELS),
    ),
}
