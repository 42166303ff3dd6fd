"""fold-batch-norm: what folds, exactly, and what is left alone with its reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.passes.fold_batch_norm import FoldBatchNorm
from tests.models import TINY
from tests.programs import assert_same, ops, program_of, tiny

FOLD = FoldBatchNorm()


def lively(norm: nn.Module) -> nn.Module:
    """Eval mode, with statistics and weights that make a difference."""
    generator = torch.Generator().manual_seed(3)
    norm.running_mean.normal_(0, 1, generator=generator)
    norm.running_var.uniform_(0.2, 3, generator=generator)
    if norm.affine:
        with torch.no_grad():
            norm.weight.uniform_(-2, 2, generator=generator)
            norm.bias.normal_(0, 1, generator=generator)
    return norm.eval()


def after_layer(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return program_of(lambda s, x: s.norm(s.layer(x)), x, layer=layer, norm=lively(norm))


def test_convolution_takes_the_norm_behind_it():
    """Two calls become one, with a bias that was not there, under the user's names."""
    before = after_layer(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), (2, 3, 6, 6))
    after = FOLD(before)
    assert ops(after) == ["conv2d"]
    assert f"aten.conv2d({before.inputs[0].name}, layer.weight, layer.bias)" in str(after)
    assert after.records[-1].changed == {"conv2d + batch_norm": 1}
    assert_same(before, after, tolerance=1e-5)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.Conv2d(4, 4, 3, stride=2, groups=4), nn.BatchNorm2d(4), (2, 4, 7, 7)),
        (nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.BatchNorm2d(4), (2, 3, 6, 6)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (1, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(3, 4, 2), nn.BatchNorm1d(4), (1, 3, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (1, 4, 4, 4)),
        (nn.ConvTranspose3d(4, 2, 2, bias=False), nn.BatchNorm3d(2), (1, 4, 3, 3, 3)),
        (nn.Linear(3, 4), nn.BatchNorm1d(4), (5, 3)),
        (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False), (5, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_every_kind_of_layer_folds(layer, norm, shape):
    """Plain, grouped, depthwise, dilated, transposed, in 1, 2 and 3 dimensions, with and without bias and affine."""
    before = after_layer(layer, norm, shape)
    after = FOLD(before)
    assert len(ops(after)) == 1
    assert sum(after.records[-1].changed.values()) == 1
    assert_same(before, after, tolerance=2e-5)


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_any_grouped_convolution(data):
    """Any number of groups and channels, transposed or not: the folded program is the original."""
    groups = data.draw(st.integers(1, 3))
    i, o = groups * data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 3))
    kind = data.draw(st.sampled_from([nn.Conv1d, nn.ConvTranspose1d]))
    layer = kind(i, o, data.draw(st.integers(1, 3)), groups=groups, bias=data.draw(st.booleans()))
    before = after_layer(layer, nn.BatchNorm1d(o), (2, i, 6))
    after = FOLD(before)
    assert len(ops(after)) == 1
    assert_same(before, after, tolerance=5e-5)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(4), (2, 4, 6, 6)),
        (nn.Conv1d(4, 6, 3, padding="valid", bias=False), nn.BatchNorm1d(4), (2, 4, 6)),
        (nn.Linear(4, 6), nn.BatchNorm1d(4), (5, 4)),
    ],
)
def test_layer_takes_the_norm_in_front_of_it(layer, norm, shape):
    """Where no padding comes between, a norm in front folds as well."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = program_of(lambda s, x: s.layer(s.norm(x)), x, layer=layer, norm=lively(norm))
    after = FOLD(before)
    assert len(ops(after)) == 1
    assert_same(before, after, tolerance=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay(dtype):
    """The weights keep their dtype; in float64 folding is exact to 1e-12."""
    layer, norm = nn.Conv1d(3, 4, 3).to(dtype), lively(nn.BatchNorm1d(4)).to(dtype)
    before = program_of(lambda s, x: s.norm(s.layer(x)), torch.ones(1, 3, 9, dtype=dtype), layer=layer, norm=norm)
    after = FOLD(before)
    assert {tensor.dtype for tensor in after.tensors.values() if tensor.is_floating_point()} == {dtype}
    assert_same(before, after, tolerance=1e-12 if dtype is torch.float64 else 5e-2)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet18", "resnet50", "unet", "crnn"])
def test_whole_networks_lose_every_norm(name):
    """In the usual networks all norms fold, one for one; the original is unchanged."""
    before = tiny(name)
    text = str(before)
    norms = sum(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in TINY[name]()[0].modules())
    after = FOLD(before)
    assert sum(after.records[-1].changed.values()) == norms
    assert not any("batch_norm" in op for op in ops(after))
    assert_same(before, after, tolerance=1e-4)
    assert str(before) == text


# What is left alone ---------------------------------------------------------------------------------------------------


def _declined(program) -> list[str]:
    after = FOLD(program)
    assert sum(after.records[-1].changed.values()) == 0
    assert_same(program, after)
    return [decline.reason for decline in after.records[-1].declined]


def test_convolution_with_two_readers():
    """Somebody else needs the convolution's own result."""
    net = {"conv": nn.Conv1d(3, 4, 1), "norm": lively(nn.BatchNorm1d(4))}

    def forward(s, x):
        y = s.conv(x)
        return s.norm(y) + y.relu()

    (reason,) = _declined(program_of(forward, torch.ones(1, 3, 5), **net))
    assert reason == "conv1d also feeds relu"


def test_padded_convolution_behind():
    """Padding with zeros is not padding with the shift."""
    net = {"conv": nn.Conv1d(3, 4, 3, padding=1), "norm": lively(nn.BatchNorm1d(3))}
    (reason,) = _declined(program_of(lambda s, x: s.conv(s.norm(x)), torch.ones(1, 3, 5), **net))
    assert reason == "its input is an input, no convolution or linear"


def test_linear_on_sequences():
    """A linear layer's features come last; a batch norm on (n, c, l) normalises c."""
    net = {"fc": nn.Linear(5, 5), "norm": lively(nn.BatchNorm1d(3))}
    (reason,) = _declined(program_of(lambda s, x: s.norm(s.fc(x)), torch.ones(2, 3, 5), **net))
    assert "has its features last" in reason


def test_weights_from_the_graph():
    """A convolution whose weights are an input cannot be folded into."""
    weight = torch.ones(4, 3, 1)
    program = program_of(
        lambda s, x, w: s.norm(nn.functional.conv1d(x, w)), torch.ones(1, 3, 5), weight, norm=lively(nn.BatchNorm1d(4))
    )
    assert _declined(program) == ["weights or statistics are computed at run time"]


def test_shared_convolution_gets_weights_of_its_own():
    """One convolution in front of two norms: each call gets its own weights, and neither spoils the other."""
    net = {
        "conv": nn.Conv1d(3, 4, 1, bias=False), "a": lively(nn.BatchNorm1d(4)), "b": lively(nn.BatchNorm1d(4, eps=0.5))
    }  # fmt: skip
    before = program_of(lambda s, x: s.a(s.conv(x)) + s.b(s.conv(x + 1)), torch.ones(1, 3, 5), **net)
    after = FOLD(before)
    assert after.records[-1].changed == {"conv1d + batch_norm": 2}
    assert_same(before, after, tolerance=1e-5)
