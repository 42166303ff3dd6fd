"""Image networks run channels last from end to end, and compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import targets
from graphopt.codegen.dataflow import Dataflow, op_of
from graphopt.codegen.prepare import prepare


class SqueezeExcite(nn.Module):
    """Branches, a gate per channel, concatenation, padding, slices: what image networks do between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.tail = nn.Conv2d(16, 6, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.stem(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        y = torch.cat([self.norm(x) * gate, nn.functional.pad(x, (0, 2, 1, 0))[:, :, :-1, 2:]], 1)
        y = nn.functional.relu6(self.tail(y)).softmax(1)
        return (y - y.amax((2, 3), keepdim=True)).sum(3)


class UpAndDown(nn.Module):
    """Poolings and resizings of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 5, 2, 2)
        self.odd = nn.ConvTranspose2d(5, 3, 3, 2, 1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        f = nn.functional
        y = f.max_pool2d(x, 3, 2, 1) + f.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        y = self.odd(self.up(f.adaptive_avg_pool2d(y, (3, 5))))
        return f.interpolate(f.interpolate(y, scale_factor=2.0), size=(17, 15), mode="bilinear")


class Line(nn.Module):
    """One-dimensional convolutions, grouped and dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.GELU(), nn.Conv1d(8, 6, 5, 2, 4, 2, groups=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


NETS = {
    "squeeze-excite": (SqueezeExcite, (2, 3, 14, 18)),
    "up and down": (UpAndDown, (1, 4, 13, 16)),
    "line": (Line, (2, 4, 21)),
}


@pytest.mark.parametrize("net", NETS)
def test_networks_agree_with_pytorch(net: str) -> None:
    """Whatever lies between the convolutions, the compiled network computes what PyTorch does."""
    make, shape = NETS[net]
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(shape)
    with graphopt.compile(module, example_inputs=(x,)) as bundle:
        torch.testing.assert_close(torch.from_numpy(bundle(x)), module(x), rtol=2e-5, atol=2e-6)


def test_one_transpose_for_a_whole_network() -> None:
    """Between the image that comes in as NCHW and the sum that leaves, nothing is transposed."""
    program = graphopt.capture(SqueezeExcite().eval(), (torch.zeros(1, 3, 16, 16),))
    ops = [op_of(b.value) for b in Dataflow(prepare(program, targets.resolve("cpu"))[0]["main"]).bindings]
    assert ops.count("relax.permute_dims") == 2  # the input, and the output, which PyTorch has channels first
