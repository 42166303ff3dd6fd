"""What the tests of sparsification share: small networks, their matrices, and what must hold whatever the pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.program import Program
from graphopt.sparsity import as_matrix
from tests.programs import program_of


def weights(program: Program) -> dict[str, Tensor]:
    """Stored tensors by the user's names."""
    specs = program.exported.graph_signature.input_specs
    return {spec.target: program.tensors[spec.arg.name] for spec in specs if spec.arg.name in program.tensors}


def matrices(program: Program, *, outputs_last: bool = False) -> dict[str, np.ndarray]:
    """The weights of layers as (outputs, inputs), by the user's names."""
    return {
        name: as_matrix(tensor.numpy(), outputs_last)
        for name, tensor in weights(program).items()
        if name.endswith("weight") and tensor.dim() > 1
    }


def nonzeros(program: Program) -> dict[str, int]:
    """How many elements of each layer's weight are not zero."""
    return {name: int(np.count_nonzero(matrix)) for name, matrix in matrices(program).items()}


def mlp(ins: int = 24, hidden: int = 48, outs: int = 20, tokens: int = 50, seed: int = 0) -> Program:
    """linear a, GELU, linear b; the hidden axis is free."""
    torch.manual_seed(seed)
    a, b = nn.Linear(ins, hidden), nn.Linear(hidden, outs)
    return program_of(lambda s, x: s.b(torch.nn.functional.gelu(s.a(x))), torch.randn(tokens, ins), a=a, b=b)


def given(*rows: list[float], name: str = "a") -> Program:
    """One linear layer with these weights."""
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return program_of(lambda s, x: getattr(s, name)(x), torch.randn(3, len(rows[0])), **{name: layer})


def convnet(channels: int = 16, seed: int = 0) -> Program:
    """A stem, then two convolutions that meet in a residual, one depthwise, one in groups, and a head."""
    torch.manual_seed(seed)
    layers = {
        "stem": nn.Conv2d(3, channels, 3, padding=1),
        "one": nn.Conv2d(channels, 2 * channels, 3, padding=1),
        "two": nn.Conv2d(2 * channels, channels, 1),
        "depthwise": nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        "groups": nn.Conv2d(channels, channels, 3, padding=1, groups=2),
        "head": nn.Linear(channels, 10),
    }

    def forward(s, x):
        x = s.stem(x).relu()
        x = x + s.two(s.one(x).relu())
        return s.head(s.groups(s.depthwise(x).relu()).mean((2, 3)))

    return program_of(forward, torch.randn(4, 3, 8, 8), **layers)


def details(program: Program) -> dict[str, dict]:
    """The rows that the last pass left, by layer."""
    return {row["layer"]: dict(row) for row in program.records[-1].details}
