"""Random small programs: any keep on their axes gives what the masked program gives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.axes import infer
from graphopt.capture import capture
from tests.graphopt.axes.single import assert_shrinks

Step = Callable[[nn.Module, Tensor], Tensor]
_GENERATOR = torch.Generator()


def _weight(net: nn.Module, *shape: int) -> Tensor:
    """A parameter of the network, made when the step first runs."""
    place = net.place
    net.place += 1
    if place == len(net.weights):
        fan = max(1, torch.Size(shape).numel() // shape[0])
        net.weights.append(nn.Parameter(torch.randn(shape, generator=_GENERATOR, dtype=torch.float64) / fan**0.5))
    return net.weights[place]


# Steps of sequences, (2, 6 tokens, c) to (2, 6, c): c is a multiple of 8, and small.


def linear(net: nn.Module, x: Tensor) -> Tensor:
    return F.gelu(F.linear(x, _weight(net, 8, x.shape[-1]), _weight(net, 8)))


def wide(net: nn.Module, x: Tensor) -> Tensor:
    hidden = F.linear(x, _weight(net, 24, x.shape[-1]))
    gate, up = hidden.chunk(2, -1)
    return F.linear(F.silu(gate) * up, _weight(net, 16, 12))


def residual(net: nn.Module, x: Tensor) -> Tensor:
    return x + torch.tanh(F.linear(x, _weight(net, x.shape[-1], x.shape[-1])))


def dense(net: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([x, torch.relu(F.linear(x, _weight(net, 8, x.shape[-1])))], -1) if x.shape[-1] < 32 else x


def halves(net: nn.Module, x: Tensor) -> Tensor:
    one, other = x.split([x.shape[-1] // 4, x.shape[-1] - x.shape[-1] // 4], -1)
    return torch.cat([other, one * _weight(net, one.shape[-1])], -1)


def attention(net: nn.Module, x: Tensor) -> Tensor:
    b, n, c = x.shape
    qkv = F.linear(x, _weight(net, 3 * 8, c)).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(b, n, 8)
    return F.linear(y, _weight(net, 8, 8))


def grouped_attention(net: nn.Module, x: Tensor) -> Tensor:
    b, n, c = x.shape
    q = F.linear(x, _weight(net, 24, c)).view(b, n, 2, 3, 4)
    k, v = (F.linear(x, _weight(net, 8, c)).view(b, n, 2, 4) for _ in range(2))
    scores = torch.einsum("bngsd,bmgd->bgsnm", q, k).softmax(-1)
    return F.linear(torch.einsum("bgsnm,bmgd->bngsd", scores, v).reshape(b, n, 24), _weight(net, 16, 24))


def spelled_attention(net: nn.Module, x: Tensor) -> Tensor:
    b, n, c = x.shape
    q, k, v = (F.linear(x, _weight(net, 8, c)).reshape(b, n, 2, 4).transpose(1, 2).reshape(b * 2, n, 4) for _ in "qkv")
    y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(b, 2, n, 4)
    return y.permute(0, 2, 1, 3).flatten(2)


def norm(net: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], _weight(net, x.shape[-1]), _weight(net, x.shape[-1]))


def rms(net: nn.Module, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * _weight(net, x.shape[-1])


def shuffle(net: nn.Module, x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)


def depthwise(net: nn.Module, x: Tensor) -> Tensor:
    c = x.shape[-1]
    return F.conv1d(x.mT, _weight(net, c, 1, 3), _weight(net, c), padding=1, groups=c).mT


def grouped(net: nn.Module, x: Tensor) -> Tensor:
    return F.conv1d(x.mT, _weight(net, 16, x.shape[-1] // 4, 3), padding=1, groups=4).mT


def group_norm(net: nn.Module, x: Tensor) -> Tensor:
    return F.group_norm(x.mT, 4, _weight(net, x.shape[-1])).mT


def excite(net: nn.Module, x: Tensor) -> Tensor:
    c = x.shape[-1]
    hidden = torch.relu(F.linear(x.mean(1, keepdim=True), _weight(net, 4, c)))
    return x * torch.sigmoid(F.linear(hidden, _weight(net, c, 4)))


def repeated(net: nn.Module, x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1) * _weight(net, 2 * x.shape[-1]) if x.shape[-1] < 32 else x


def rotate(net: nn.Module, x: Tensor) -> Tensor:
    one, other = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * _weight(net, x.shape[-1]) + torch.cat([-other, one], -1) * _weight(net, x.shape[-1])


def interleaved(net: nn.Module, x: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even - odd, even + odd], -1).flatten(-2)


def gram(net: nn.Module, x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1) @ x


def padded(net: nn.Module, x: Tensor) -> Tensor:
    return F.pad(x[..., :-4], (2, 2))


STEPS: list[Step] = [
    linear, wide, residual, dense, halves, attention, grouped_attention, spelled_attention, norm, rms, shuffle,
    depthwise, grouped, group_norm, excite, repeated, rotate, interleaved, gram, padded,
]  # fmt: skip


class Net(nn.Module):
    """Steps between two layers that leave the axes between them free; branches are added or concatenated."""

    def __init__(self, steps: list[Step], branch: list[Step], joined: bool) -> None:
        super().__init__()
        self.steps, self.branch, self.joined = steps, branch, joined
        self.weights = nn.ParameterList()
        self.place = 0

    def forward(self, x: Tensor) -> Tensor:
        self.place = 0
        x = F.linear(x, _weight(self, 16, x.shape[-1]))
        for step in self.steps:
            x = step(self, x)
        y = x
        for step in self.branch:
            y = step(self, y)
        x = torch.cat([x, y], -1) if self.joined or x.shape != y.shape else x + y
        return F.linear(torch.tanh(x), _weight(self, 5, x.shape[-1]))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=4),
    branch=st.lists(st.sampled_from(STEPS), max_size=2),
    joined=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_shrink_equals_mask(steps: list[Step], branch: list[Step], joined: bool, seed: int) -> None:
    """Whatever the operators are chained to: no operator unknown, no error, and the masked program's numbers."""
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    _GENERATOR.manual_seed(seed)
    net = Net(steps, branch, joined).eval()
    net(x)  # makes the weights
    axes = infer(capture(net, (x,)))
    assert not axes.unknown
    assert_shrinks(axes.program, axes=axes, alone=False, seed=seed, tolerance=1e-9)
