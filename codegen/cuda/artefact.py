"""What the cuda target's code generation hands over: an artefact with kernels as images, and its launches as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graphopt.codegen.artefact import Artefact
from graphopt.codegen.cuda.kernels import Extent
from graphopt.codegen.cuda.nvrtc import Usage


@dataclass(frozen=True)
class Place:
    """An address in device memory: a program input or output by its index, the weights, or the arena."""

    space: Literal["input", "output", "weight", "arena"]
    index: int = 0
    offset: int = 0  # bytes


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of the program, in order; everything in it is known at compile time."""

    kernel: str
    grid: Extent  # blocks
    block: Extent  # threads
    dynamic_shared_bytes: int
    arguments: tuple[Place, ...]


@dataclass(frozen=True)
class OutputCopy:
    """An output that no kernel writes where the caller wants it: an input, a weight, or a value returned twice."""

    output: int
    source: Place


@dataclass(frozen=True)
class CudaArtefact(Artefact):
    """An artefact for a GPU. `workspace_bytes` is the arena in device memory; `objects` is empty.

    `files` are the kernels to look at, NAME.cubin, NAME.ptx and NAME.cu; the last is also what the emulator runs.
    `sources` hold the complete library in C (NAME.c, NAME.h, images.c, and the launcher's own files): compile all .c
    files and link them into one shared library with -ldl. The interface is described in `launcher.py`.
    """

    arch: str = ""
    cuda_source: str = ""
    launches: tuple[KernelLaunch, ...] = ()
    copies: tuple[OutputCopy, ...] = ()
    input_bytes: tuple[int, ...] = ()
    output_bytes: tuple[int, ...] = ()
    usage: tuple[Usage, ...] = ()
