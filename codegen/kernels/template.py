"""What a kernel template is: a piece of the graph in, a scheduled TIR function and packed weights out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from tvm import relax
from tvm.tirx import PrimFunc

from graphopt.codegen.dataflow import Dataflow
from graphopt.errors import Decline
from graphopt.targets.target import Target


@dataclass(frozen=True)
class KernelCall:
    """One call that replaces some bindings of the program.

    The kernel's parameters are, in this order, `inputs`, `constants`, the output (of a tuple each of its tensors), and
    one buffer per entry of `scratch_bytes`. All are dense and 64-byte aligned; the output never overlaps an input.
    """

    name: str  # f32_gemm_relu_6x16__avx2: what it is, for people and for the C symbol
    key: Hashable  # calls with equal keys share one kernel
    kernel: PrimFunc
    output: relax.Var  # the variable whose value it computes: the last one it covers
    covers: tuple[relax.Var, ...]
    inputs: tuple[relax.Expr, ...]  # variables of the program
    constants: tuple[np.ndarray, ...] = ()
    scratch_bytes: tuple[int, ...] = ()
    parameters: Mapping[str, int | str] = field(default_factory=dict)  # tile sizes, for the report


class Template(ABC):
    """A kernel family. Stateless; one instance per family stands in `TEMPLATES`."""

    name: ClassVar[str]
    anchors: ClassVar[tuple[str, ...]]  # the operators it starts from, as "relax.matmul"

    @abstractmethod
    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Turn the anchor and what can be fused behind it into one call, or say why not."""
