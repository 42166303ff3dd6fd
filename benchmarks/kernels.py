"""Time the dense kernels alone on the shapes of four models, beside PyTorch, one thread.

    python -m benchmarks.kernels [mobilenet resnet deit minilm] [--seconds 0.2]

Prints for each shape the minimum time, GFLOP/s, the share of the peak that a loop over registers reaches in the same
run, and PyTorch's time; for each model the sum over its layers.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from graphopt.codegen.kernels.conv2d import Conv2d
from graphopt.codegen.kernels.depthwise import DepthwiseConv2d
from graphopt.codegen.kernels.gemm import Gemm
from tests.codegen.kernels.dense import Case, Shape, convolution, linear
from tests.codegen.kernels.harness import Library, aligned

PEAK = """
#include <immintrin.h>
void peak(float *out, int steps) {
    __m256 a[12], x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(0.5f);
    for (int i = 0; i < 12; i++) a[i] = _mm256_set1_ps(i);
    for (int k = 0; k < steps; k++) {
        for (int i = 0; i < 12; i++) a[i] = _mm256_fmadd_ps(a[i], x, y);
        __asm__ volatile("" : "+x"(a[0]), "+x"(a[1]));
    }
    for (int i = 0; i < 12; i++) _mm256_storeu_ps(out + 8 * i, a[i]);
}
"""


@dataclass(frozen=True)
class Layer:
    """One layer of a model, and how often it occurs."""

    label: str
    times: int
    flops: int
    case: Callable[[], Case]
    rival: Callable[[], object]


def conv(size: int, cin: int, cout: int, kernel: int, stride: int = 1, times: int = 1, groups: int = 1) -> Layer:
    """A convolution with bias and activation, padded to keep its size (patches are not padded)."""
    pad = (kernel - 1) // 2 if kernel < 16 else 0
    shape = Shape((size, size), cin, cout, (kernel, kernel), (stride, stride), padding=(pad,) * 4, groups=groups)
    template = Gemm() if kernel == stride == 1 else DepthwiseConv2d() if groups == cin else Conv2d()
    x = torch.randn(1, cin, size, size).contiguous(memory_format=torch.channels_last)
    w = torch.randn(cout, cin // groups, kernel, kernel).contiguous(memory_format=torch.channels_last)
    out = (size + 2 * pad - kernel) // stride + 1
    bias = torch.randn(cout)
    return Layer(
        f"{kernel}x{kernel} s{stride} {size}x{size} {cin}->{cout}" + (" depthwise" if groups > 1 else ""),
        times,
        2 * out * out * cout * cin // groups * kernel * kernel,
        lambda: convolution(shape, "bias", template),
        lambda: F.conv2d(x, w, bias, stride, pad, 1, groups),
    )


def dense(m: int, k: int, n: int, times: int = 1, tail: str = "bias") -> Layer:
    """A linear layer."""
    x, w, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    return Layer(
        f"linear {m}x{k} -> {n}",
        times,
        2 * m * k * n,
        lambda: linear((m, k), n, tail, Gemm()),
        lambda: F.linear(x, w, bias),
    )


def _mobilenet() -> list[Layer]:
    layers, size, cin = [conv(224, 3, 32, 3, 2)], 112, 32
    for cout, stride, times in (
        *((64, 1, 1), (128, 2, 1), (128, 1, 1), (256, 2, 1), (256, 1, 1), (512, 2, 1), (512, 1, 5)),
        *((1024, 2, 1), (1024, 1, 1)),
    ):
        layers.append(conv(size, cin, cin, 3, stride, times, groups=cin))
        size //= stride
        layers.append(conv(size, cin, cout, 1, 1, times))
        cin = cout
    return [*layers, dense(1, 1024, 1000)]


def _resnet() -> list[Layer]:
    layers, size, cin = [conv(224, 3, 64, 7, 2)], 56, 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        layers += [
            conv(size, cin, width, 1),
            conv(size, width, width, 3, stride),
            conv(size, cin, 4 * width, 1, stride),
        ]
        size, cin = size // stride, 4 * width
        layers += [conv(size, cin, width, 1, 1, blocks - 1), conv(size, width, width, 3, 1, blocks - 1)]
        layers += [conv(size, width, cin, 1, 1, blocks)]
    return [*layers, dense(1, 2048, 1000)]


def _encoder(tokens: int, width: int, blocks: int) -> list[Layer]:
    return [
        dense(tokens, width, 3 * width, blocks),
        dense(tokens, width, width, blocks),
        dense(tokens, width, 4 * width, blocks),
        dense(tokens, 4 * width, width, blocks),
    ]


MODELS: dict[str, Callable[[], list[Layer]]] = {
    "mobilenet": _mobilenet,
    "resnet": _resnet,
    "deit": lambda: [conv(224, 3, 384, 16, 16), *_encoder(197, 384, 12), dense(1, 384, 1000)],
    "minilm": lambda: _encoder(128, 384, 6),
}


def fastest(work: Callable[[], object], seconds: float) -> float:
    """Minimum time of one call."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def measure_peak(folder: Path) -> float:
    """GFLOP/s of multiply-adds that touch no memory, AVX2."""
    (folder / "peak.c").write_text(PEAK)
    flags = ["-O2", "-mcpu=x86_64_v3", "-shared", "-fPIC"]
    subprocess.run(
        [sys.executable, "-m", "ziglang", "cc", *flags, str(folder / "peak.c"), "-o", str(folder / "peak.so")],
        check=True,
    )
    function, out = ctypes.CDLL(str(folder / "peak.so")).peak, aligned(np.zeros(96, np.float32))
    steps = 200_000
    return 2 * 12 * 8 * steps / fastest(lambda: function(ctypes.c_void_p(out.ctypes.data), steps), 0.5) / 1e9


def main() -> None:
    """Measure the models named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        peak = measure_peak(Path(name))
        print(f"peak {peak:.1f} GFLOP/s")
        for model in options.models:
            layers = MODELS[model]()
            cases = [layer.case() for layer in layers]
            folder = Path(name) / model
            folder.mkdir()
            library = Library({f"k{i}": c.call.kernel for i, c in enumerate(cases)}, folder, tasks=1)
            total = rival_total = 0.0
            for i, (layer, case) in enumerate(zip(layers, cases, strict=True)):
                arrays = [aligned(a) for a in (*case.inputs, *case.call.constants)]
                arrays.append(aligned(np.zeros(case.expected.shape, np.float32)))
                arrays += [aligned(np.zeros(n // 4, np.float32)) for n in case.call.scratch_bytes]
                pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
                function = library.library[f"k{i}"]
                ours = fastest(lambda f=function, p=pointers: f(*p), options.seconds)
                rival = fastest(layer.rival, options.seconds)
                total += ours * layer.times
                rival_total += rival * layer.times
                rate = layer.flops / ours / 1e9
                print(
                    f"{model:10} {layer.times}x {layer.label:34} {case.call.name:36} {ours * 1e6:8.1f} us"
                    f" {rate:6.1f} GFLOP/s {rate / peak:5.0%} of peak, PyTorch {rival * 1e6:8.1f} us"
                )
            print(f"{model:10} sum {total * 1e3:.2f} ms, PyTorch {rival_total * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
