"""Models compiled once for all tests: the networks, what PyTorch gives for them, and their artefacts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.codegen.cuda.artefact import CudaArtefact
from graphopt.codegen.cuda.lower import compile_program
from graphopt.program import Program
from graphopt.targets import resolve


class Mlp(nn.Module):
    """Products, a norm, a softmax; sizes that no tile divides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(61, 97), nn.LayerNorm(97), nn.Linear(97, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.norm(F.gelu(self.a(x)))
        return torch.softmax(self.b(hidden), -1), x


class Cnn(nn.Module):
    """Strided, depthwise and 1x1 convolutions, a residual, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.point, self.head = nn.Conv2d(16, 24, 1), nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + F.hardswish(self.depthwise(x))
        x = F.max_pool2d(F.relu(self.point(x)), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Block(nn.Module):
    """One transformer block, causal."""

    def __init__(self, width: int = 48, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.norm, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.silu(self.up(self.norm2(x))))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (33, 61)),
    "cnn": (Cnn, (1, 3, 22, 22)),
    "block": (Block, (2, 19, 48)),
}


@dataclass(frozen=True)
class Compiled:
    """A model in PyTorch and for the GPU."""

    program: Program
    artefact: CudaArtefact
    inputs: list[np.ndarray]  # bfloat16 as int16
    want: list[np.ndarray]  # float32


@functools.cache
def compiled(name: str, dtype: str = "float32", spec: str = "cuda:sm_80") -> Compiled:
    make, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval().to(getattr(torch, dtype))
        x = torch.randn(shape).to(getattr(torch, dtype))
    program = graphopt.capture(module, {"x": x}, name=name)
    artefact = compile_program(program, resolve(spec))
    raw = x.view(torch.int16) if dtype == "bfloat16" else x
    want = [value.float().numpy() for value in program.run({"x": x}).values()]
    return Compiled(program, artefact, [raw.numpy()], want)


def as_float(array: np.ndarray) -> np.ndarray:
    """An output of the emulator as float32; uint16 holds bfloat16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
