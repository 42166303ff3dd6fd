"""What code generation hands to a target for linking, and to a bundle for keeping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphopt.codegen.sparse_weights import SparseWeight
from graphopt.errors import Decline
from graphopt.spec import TensorSpec


@dataclass(frozen=True)
class KernelInfo:
    """One call in the generated program, for reports."""

    symbol: str  # C symbol of the kernel
    template: str  # "gemm", "conv2d", ...; "tvm" for what TVM's own legalisation made
    where: str  # the operators it stands for
    parameters: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Artefact:
    """A compiled program before linking: C text, kernel objects and weights. Equal programs give equal bytes.

    The C interface that `sources` implement, with NAME for `name`; all functions may be called from any thread:

        size_t   NAME_workspace_bytes(void);
        size_t   NAME_weights_bytes(void);
        int32_t  NAME_run(const void *weights, const void *const *inputs, void *const *outputs, void *workspace);
                 0, or -n where the n-th kernel failed; `weights` and `workspace` are 64-byte aligned, inputs and
                 outputs dense, row-major, in the order of `inputs` and `outputs`, of any alignment.

    and what `runtime/` adds to it on cpu and arm:

        void        NAME_set_threads(int32_t threads);        0: one per processor available (the default)
        const void *NAME_map_weights(const char *path);       NULL if the file is missing or has another size
        void        NAME_unmap_weights(const void *weights);
    """

    name: str
    sources: Mapping[str, str]  # file name to text: NAME.c, NAME.h
    objects: Mapping[str, bytes]  # file name to content: kernels.o
    weights: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    workspace_bytes: int
    kernels: tuple[KernelInfo, ...]
    declined: tuple[Decline, ...] = ()  # templates that looked and did not apply
    sparse_weights: tuple[SparseWeight, ...] = ()  # layers whose weights have zeros, and the kernels picked for them
    files: Mapping[str, bytes] = field(default_factory=dict)  # what else belongs into the bundle, as it is

    @property
    def weights_bytes(self) -> int:
        """The size of the weights."""
        return len(self.weights)
