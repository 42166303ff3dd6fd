"""Convolutions over a line: they have the kernels of images, those for zeros too, and compute what PyTorch does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt import targets
from graphopt.codegen.dataflow import Dataflow, op_of
from graphopt.codegen.prepare import prepare
from tests.programs import program_of

# Inputs, outputs, kernel, and the rest of a layer.
LAYERS = {
    "one tap": (48, 64, 1, {}),
    "padded": (48, 64, 3, {"padding": 1}),
    "strided": (32, 64, 5, {"stride": 2, "padding": 2}),
    "dilated": (32, 64, 3, {"dilation": 4, "padding": 4}),
    "grouped": (64, 64, 3, {"groups": 2, "padding": 1}),
}


def layer_of(name: str, keep: float) -> nn.Conv1d:
    """With this share of its blocks of four outputs."""
    torch.manual_seed(0)
    inputs, outputs, taps, more = LAYERS[name]
    layer = nn.Conv1d(inputs, outputs, taps, **more)
    kept = torch.rand(outputs // 4, *layer.weight.shape[1:]) < keep
    layer.weight.data *= kept.repeat_interleave(4, 0)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_zeros_pay_over_a_line(name):
    """A sparse kernel takes it, the report says what it is in the model, and the bundle agrees with PyTorch."""
    layer = layer_of(name, 0.1)
    x = torch.randn(2, layer.in_channels, 77)
    with graphopt.compile(program_of(lambda net, x: net.a(x).relu(), x, a=layer)) as bundle:
        (entry,) = bundle.manifest.sparse_weights
        assert (entry["weight"], entry["operator"], entry["picked"]) == ("a.weight", "conv1d", True)
        assert "spmm" in {kernel["template"] for kernel in bundle.manifest.kernels}
        torch.testing.assert_close(torch.from_numpy(bundle(x)), layer(x).relu(), rtol=2e-5, atol=2e-6)


def test_weights_at_run_time_stay_over_a_line():
    """Only constant weights have kernels; others keep their operator, and are right."""
    x, w = torch.randn(1, 4, 20), torch.randn(6, 4, 3)

    class Net(nn.Module):
        def forward(self, x, w):
            return nn.functional.conv1d(x, w, padding=1)

    program = graphopt.capture(Net().eval(), (x, w))
    bindings = Dataflow(prepare(program, targets.resolve("cpu"))[0]["main"]).bindings
    assert "relax.nn.conv1d" in [op_of(binding.value) for binding in bindings]
    with graphopt.compile(program) as bundle:
        torch.testing.assert_close(torch.from_numpy(bundle(x, w)), Net()(x, w), rtol=2e-5, atol=2e-6)
