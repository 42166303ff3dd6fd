"""What a tensor at a program's edge is called and looks like. Runs without torch, for those who only run a bundle."""

from __future__ import annotations

import hashlib
import keyword
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Files are named by it, with prefixes and suffixes; file systems take 255 bytes.
_LONGEST = 128


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
    """A name that is safe in C, Python and file names: [A-Za-z_][A-Za-z0-9_]*, at most 128 characters of them.

    A longer one is cut, and its hash put behind, so that different ones stay different.
    """
    name = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
    if not name:
        return fallback
    name = f"_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
