"""detect-sparsity: what is found, what is left as it is, and what is said of zeros that are of no use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.annotate import annotate
from graphopt.capture import capture
from graphopt.errors import Decline
from graphopt.passes import CANONICALISE
from graphopt.passes.base import run_passes
from graphopt.passes.detect_sparsity import DetectSparsity
from graphopt.program import Program
from graphopt.sparsity import BLOCKS, PATTERNS, UNSTRUCTURED, Format
from tests.graphopt.test_sparsity import random_matrix
from tests.programs import assert_same, program_of, tiny

DETECT = DetectSparsity()


def bare(program: Program) -> Program:
    """Without what capture found."""
    return annotate(program, {"*": None})


def matrix(form: Format, outputs: int, inputs: int) -> Tensor:
    """A random matrix of a format."""
    return torch.from_numpy(random_matrix(form, outputs, inputs, 1)).float()


def layer_of(weight: Tensor) -> nn.Linear:
    """A linear layer with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight.clone()
    return layer


def words(program: Program) -> dict[str, str]:
    """The annotations in words."""
    return {name: item.word for name, item in program.annotations.items()}


@pytest.mark.parametrize("form", [UNSTRUCTURED, *BLOCKS, *PATTERNS, Format(8, 1, 2, 4)], ids=str)
def test_linear_layers(form):
    """Every format, counted by kind, with the values as they were; a second run has nothing to do."""
    layer = layer_of(matrix(form, 96, 80))
    program = bare(program_of(lambda net, x: net.layer(x), torch.randn(2, 80), layer=layer))
    after = DETECT(program)
    assert words(after) == {"layer.weight": str(form)}
    record = after.records[-1]
    assert record.changed == {f"{form} weight": 1}
    assert record.details == ({"tensor": "layer.weight", **after.annotations["layer.weight"].to_json()},)
    assert after.tensors["p_layer_weight"] is program.tensors["p_layer_weight"]
    assert DETECT(after).records[-1].changed == {}
    assert_same(program, after)


def test_matrix_products():
    """Outputs last, with and without an added bias, and the matrix that a program transposes itself."""
    weight = matrix(Format(4, 1), 64, 48)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product, self.added = nn.Parameter(weight.t().clone()), nn.Parameter(weight.t().clone() * 2)
            self.turned, self.bias = nn.Parameter(weight * 3), nn.Parameter(torch.ones(64))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x @ self.product, torch.addmm(self.bias, x, self.added), x @ self.turned.t()

    program = capture(Net(), (torch.randn(2, 48),))
    assert words(DETECT(bare(program))) == {"product": "4x1", "added": "4x1", "turned": "4x1"}
    folded = run_passes(bare(program), CANONICALISE)
    assert words(folded) == {"product": "4x1", "added": "4x1", "t_folded": "4x1"}


@pytest.mark.parametrize(
    ("conv", "form", "word"),
    [
        (nn.Conv2d(16, 32, 1), Format(4, 1), "4x1"),
        (nn.Conv2d(16, 32, 3), Format(4, 1), "4x1"),
        (nn.Conv1d(16, 32, 3), Format(1, 4), "1x4"),
        (nn.Conv3d(8, 16, 2), Format(16, 1), "16x1"),
        (nn.Conv2d(16, 32, 3), Format(1, 1, 2, 4), "2:4"),
        (nn.Conv2d(16, 32, 3, groups=4), Format(4, 1), "4x1"),
        (nn.Conv2d(32, 24, 3, groups=4), Format(4, 1), "2x1"),  # 6 outputs a group
        (nn.Conv2d(32, 32, 3, groups=32), Format(4, 1), "unstructured"),  # one output a group
        (nn.Conv2d(16, 32, 3, padding="same"), Format(2, 2), "2x2"),
    ],
    ids=str,
)
def test_convolutions(conv, form, word):
    """Taps with their channels are the inputs; blocks stay inside of a group."""
    shape = conv.weight.shape
    taps = shape[2:].numel()
    made = matrix(form, shape[0], shape[1] * taps).reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    conv.weight.data = made.contiguous()
    x = torch.randn(1, conv.in_channels, *[5] * (len(shape) - 2))
    after = DETECT(bare(program_of(lambda net, x: net.conv(x), x, conv=conv)))
    assert words(after) == {"conv.weight": word}


def test_half_precision():
    """Weights of any floating dtype, and those that are widened before use."""
    layer = layer_of(matrix(Format(4, 1), 32, 32)).bfloat16()
    x = torch.randn(1, 32)
    program = program_of(lambda net, x: x @ net.layer.weight.float().T, x, layer=layer)
    assert words(DETECT(bare(program))) == {"layer.weight": "4x1"}


# What is left alone ---------------------------------------------------------------------------------------------------


def test_the_user_knows_better():
    """A format or "dense" that was said stays, through the whole of canonicalise."""
    layer = layer_of(matrix(Format(4, 1), 32, 32))
    program = program_of(lambda net, x: net.layer(x), torch.randn(1, 32), layer=layer)
    assert words(program) == {"layer.weight": "4x1"}
    for word in ("dense", "unstructured", "2x1"):
        after = run_passes(annotate(program, {"layer.weight": word}), CANONICALISE)
        assert words(after) == {"layer.weight": word}


def test_dense_layers_are_not_mentioned():
    """No annotation and no line for any of them."""
    after = DETECT(tiny("bert"))
    assert not after.annotations
    assert (after.records[-1].changed, after.records[-1].declined, after.records[-1].details) == ({}, (), ())


def test_zeros_of_no_use_are_explained():
    """Too few, nothing but zeros, or an operator that no sparse kernel does; a table's padding row is no news."""
    torch.manual_seed(0)
    few, none = nn.Linear(10, 10), nn.Linear(10, 10)
    few.weight.data[0, :8] = 0
    none.weight.data.zero_()
    up, table = nn.ConvTranspose1d(10, 4, 2), nn.Embedding(4, 10, padding_idx=0)
    up.weight.data[:5] = 0

    def net(own, ids):
        return own.up(own.none(own.few(own.table(ids))).mT)

    program = program_of(net, torch.tensor([[1, 2]]), few=few, none=none, up=up, table=table)
    after = DETECT(program)
    assert not after.annotations
    first, second, third = after.records[-1].declined
    assert first == Decline("few.weight", "8% zeros, of use from 10% on")
    assert second == Decline("none.weight", "all of it is zero")
    assert third.where == "up.weight"
    assert third.reason.startswith("50% zeros, and no sparse kernel does aten.conv_transpose1d")
