"""Small programs in float64 whose scores can be worked out by hand, and data for them."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.axes import Axes, Axis, infer
from graphopt.calibration import Calibration, calibration
from graphopt.passes import PREPARE, criteria
from graphopt.passes.base import run_passes
from graphopt.program import Program
from tests.programs import program_of


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settled(module: nn.Module, seed: int = 1) -> nn.Module:
    """In float64 and eval mode, with random weights and statistics."""
    module = module.double().eval()
    with torch.no_grad():
        for place, (name, tensor) in enumerate(module.state_dict().items()):
            if tensor.is_floating_point():
                tensor.copy_(seeded(*tensor.shape, seed=seed + place) * 0.5)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module


def axes_of(program: Program) -> Axes:
    """The axes of a program after what axis inference wants done first."""
    return infer(run_passes(program, PREPARE))


def axis_of(axes: Axes, target: str, place: int = 0) -> Axis:
    """The atom that is a whole dimension of a stored tensor of the user's."""
    names = {str(spec.target): spec.arg.name for spec in axes.program.exported.graph_signature.input_specs}
    nodes = {node.name: node for node in axes.dims}
    (atom,) = (a for a in axes.free() if a in _atoms(axes.dims[nodes[names[target]]][place]))
    return atom


def _atoms(dim: Axis) -> list[Axis]:
    from graphopt.axes import atoms

    return atoms(dim)


def stored(axes: Axes, target: str) -> Tensor:
    """A tensor of the program by the user's name."""
    names = {str(spec.target): spec.arg.name for spec in axes.program.exported.graph_signature.input_specs}
    return axes.program.tensors[names[target]].detach()


def samples(axes: Axes, count: int = 4, seed: int = 3) -> Calibration:
    """Batches of normal numbers; words for whole numbers."""
    batches = []
    for n in range(count):
        batch = {}
        for spec in axes.program.inputs:
            value = seeded(*spec.shape, seed=seed + n)
            batch[spec.name] = (
                value.to(spec.torch_dtype) if spec.torch_dtype.is_floating_point else (value * 40).long().abs() % 20
            )
        batches.append(batch)
    return calibration(batches, axes.program)


def score(name: str, axes: Axes, atom: Axis, data: Calibration | None = None, **options: object) -> Tensor:
    """The scores of one axis."""
    found = criteria.make(name, **options).scores(axes, [atom], data)
    assert list(found) == [atom]
    return found[atom]


# Programs -------------------------------------------------------------------------------------------------------------


@cache
def mlp() -> Axes:
    """x[3, 6] -> one (8) -> relu -> two (5)."""
    parts = {"one": settled(nn.Linear(6, 8)), "two": settled(nn.Linear(8, 5), 20)}
    return axes_of(program_of(lambda s, x: s.two(F.relu(s.one(x))), seeded(3, 6), **parts))


def residual_of(**changed: Tensor) -> Axes:
    """stem -> norm -> + branch(norm2) -> relu -> last: the stem's and the branch's channels are one axis."""
    parts = {
        "stem": settled(nn.Conv2d(3, 8, 3, padding=1)),
        "norm": settled(nn.BatchNorm2d(8), 10),
        "inner": settled(nn.Conv2d(8, 6, 1), 20),
        "norm1": settled(nn.BatchNorm2d(6), 60),
        "outer": settled(nn.Conv2d(6, 8, 3, padding=1), 30),
        "norm2": settled(nn.BatchNorm2d(8), 40),
        "last": settled(nn.Conv2d(8, 4, 3, stride=2), 50),
    }
    for name, value in changed.items():
        module, leaf = name.rsplit("_", 1)
        getattr(parts[module], leaf).data.copy_(value)

    def forward(s, x):
        y = s.norm(s.stem(x))
        y = F.relu(y + s.norm2(s.outer(F.relu(s.norm1(s.inner(y))))))
        return s.last(y).mean((2, 3))

    return axes_of(program_of(forward, seeded(2, 3, 6, 6), **parts))


@cache
def residual() -> Axes:
    """As `residual_of`, with its own weights."""
    return residual_of()


@cache
def concatenated() -> Axes:
    """Two convolutions of 4 and 6 channels side by side, a norm over both, and one more convolution."""
    parts = {
        "a": settled(nn.Conv2d(3, 4, 1)),
        "b": settled(nn.Conv2d(3, 6, 1), 10),
        "norm": settled(nn.BatchNorm2d(10), 30),
        "last": settled(nn.Conv2d(10, 5, 3), 20),
    }

    def forward(s, x):
        return s.last(F.relu(s.norm(torch.cat([s.a(x), s.b(x)], 1))))

    return axes_of(program_of(forward, seeded(2, 3, 5, 5), **parts))


@cache
def tied() -> Axes:
    """Words (20) -> embedding (8) -> a neuron layer (12) with residual -> the same embedding as output layer."""
    parts = {
        "words": settled(nn.Embedding(20, 8)),
        "up": settled(nn.Linear(8, 12), 10),
        "down": settled(nn.Linear(12, 8), 20),
    }

    def forward(s, ids):
        x = s.words(ids)
        x = x + s.down(F.gelu(s.up(x)))
        return F.linear(x, s.words.weight)

    return axes_of(program_of(forward, torch.arange(10).reshape(2, 5), **parts))


def attention_of(fused: bool) -> Axes:
    """Self-attention of 3 heads of 4, q, k and v from one layer or from three of the same weights."""
    whole = settled(nn.Linear(10, 36))
    parts = {"out": settled(nn.Linear(12, 10), 9)}
    if fused:
        parts["qkv"] = whole
    else:
        for n, name in enumerate("qkv"):
            parts[name] = nn.Linear(10, 12).double()
            parts[name].weight.data.copy_(whole.weight[12 * n : 12 * n + 12])
            parts[name].bias.data.copy_(whole.bias[12 * n : 12 * n + 12])

    def forward(s, x):
        if fused:
            q, k, v = s.qkv(x).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).reshape(2, 5, 3, 4).transpose(1, 2) for layer in (s.q, s.k, s.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return s.out(y.transpose(1, 2).reshape(2, 5, 12)).sum(1)

    return axes_of(program_of(forward, seeded(2, 5, 10), **parts))


@cache
def attention(fused: bool = True) -> Axes:
    """As `attention_of`."""
    return attention_of(fused)


NETS = {"mlp": mlp, "residual": residual, "concatenated": concatenated, "tied": tied, "attention": attention}
