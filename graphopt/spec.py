"""What a tensor at a program's edge is called and looks like. Runs without torch, for those who only run a bundle."""

from __future__ import annotations

import keyword
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype ("float32") of one input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return math.prod(self.shape) * dtype_bytes(self.dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        import torch

        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{','.join(map(str, self.shape))}]"


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element: "float32" -> 4. What has fewer than eight bits, a bool too, takes a byte."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits.group()) // 8) if bits else 1


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def identifier(text: str, fallback: str = "model") -> str:
    """A name that is safe in C, Python and file names: [A-Za-z_][A-Za-z0-9_]*."""
    name = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
    if not name:
        return fallback
    return f"_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name
