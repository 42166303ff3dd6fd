"""Latency: estimates follow what kernels do, and measured tables are exact where something was measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.axes import Axes, infer
from graphopt.cost import LatencyModel, alignment, latency_model
from graphopt.targets import names, resolve
from graphopt.targets.speed import speed_of
from tests.models import TINY
from tests.programs import program_of, tiny

HASWELL = resolve("cpu:haswell")
TARGETS = [name for name in names() if name != "cpu"]


def model_of(function, *examples, target=HASWELL, **modules) -> tuple[Axes, LatencyModel]:
    axes = infer(program_of(function, *examples, **modules))
    return axes, latency_model(axes, target)


@pytest.mark.parametrize("spec", TARGETS)
def test_every_target_has_an_estimate(spec):
    """Positive, the same each time, and less for less; a Cortex-A53 is the slowest, an H100 the fastest."""
    target = resolve(spec)
    axes, model = model_of(
        lambda s, x: s.b(s.a(x).relu()), torch.ones(512, 512), a=nn.Linear(512, 4096), b=nn.Linear(4096, 512)
    )
    model = latency_model(axes, target)
    (n,) = axes.free()
    assert 0 < model({n: 2048}) < model() == latency_model(axes, target)()
    flops = 4 * 512 * 512 * 4096
    assert flops / model() < (speed_of(target).peak_flops or 2e11)
    slow, fast = (latency_model(axes, resolve(name))() for name in ("arm:cortex-a53", "cuda:sm_90"))
    assert fast < latency_model(axes, HASWELL)() < slow
    assert fast <= model() <= slow


@pytest.mark.parametrize("name", TINY)
def test_whole_models(name):
    """Every model of the zoo: each call counted once, many sizes at once as one by one, smaller never much slower."""
    axes = infer(tiny(name))
    model = latency_model(axes, HASWELL)
    assert model() == pytest.approx(sum(seconds for _, seconds in model.rows()))
    half = {axis: max(1, axis.extent // 2) for axis in axes.free()}
    assert model(half) < model()
    table = np.array([[axis.extent for axis in axes.free()], list(half.values())])
    assert model.many(table, axes.free()).tolist() == pytest.approx([model(), model(half)])
    assert model.corrected(1e-3)() == pytest.approx(1e-3)
    assert model.corrected(1e-3)(half) == pytest.approx(1e-3 * model(half) / model())


def test_sizes_between_multiples_save_nothing():
    """One column less than a multiple of the tile costs as much; a whole tile less costs less."""
    axes, model = model_of(
        lambda s, x: s.b(s.a(x)), torch.ones(64, 256), a=nn.Linear(256, 256), b=nn.Linear(256, 64, bias=False)
    )
    (n,) = axes.free()
    first = [model.rows({n: size})[0][1] for size in (256, 255, 241, 192)]
    assert first[0] == first[1] == first[2] > first[3]


def test_elementwise_calls_join_the_kernel_before_them():
    """A bias, a relu and a residual cost no call of their own; a second user keeps the result in memory."""
    _, model = model_of(lambda s, x: F.relu(s.a(x)) + x, torch.ones(8, 16), a=nn.Linear(16, 16))
    assert [work.kind for work in model.works] == ["product", "fused", "fused"]
    _, model = model_of(lambda s, x: (y := s.a(x)) + F.softmax(y, -1), torch.ones(8, 16), a=nn.Linear(16, 16))
    assert [work.kind for work in model.works] == ["product", "stream", "stream"]


def test_kinds():
    """Convolutions know their groups, attention its heads, look-ups move only what they find."""
    _, model = model_of(lambda s, x: s.a(x), torch.ones(1, 8, 6, 6), a=nn.Conv2d(8, 16, 3, groups=4))
    (work,) = model.works
    assert (work.kind, [p() for p in work.extents[:5]]) == ("conv", [16, 8, 16, 2, 9])
    q, k = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 5, 8)
    _, model = model_of(lambda s, q, k: F.scaled_dot_product_attention(q, k, k), q, k)
    assert [p() for p in model.works[0].extents[:5]] == [2, 3, 5, 8, 8]
    ids = torch.zeros(5, dtype=torch.int64)
    _, model = model_of(lambda s, ids: s.t(ids), ids, t=nn.Embedding(100_000, 8))
    assert model() < 1e-5
    _, model = model_of(lambda s, x: x @ x.transpose(1, 2), torch.ones(2, 3, 4))
    assert [p() for p in model.works[0].extents[:4]] == [2, 3, 3, 4]


def test_weights_from_memory_cost_more():
    """One row times a large matrix takes as long as reading it."""
    _, model = model_of(lambda s, x: s.a(x), torch.ones(1, 4096), a=nn.Linear(4096, 4096, bias=False))
    assert model() == pytest.approx(4096 * 4096 * 4 / speed_of(HASWELL).memory_bytes_per_second, rel=0.01)


def test_alignment():
    """Whole vectors for what is a column of a tile, any number for what a loop counts."""
    assert alignment(resolve("arm:cortex-a76"), "channel") == alignment(resolve("wasm"), "neuron") == 4
    assert alignment(HASWELL, "channel") == alignment(HASWELL, "head_dim") == 8
    assert alignment(resolve("cpu:znver4"), "embedding") == 16
    assert alignment(resolve("cuda:sm_80"), "neuron") == 16
    assert {alignment(resolve(spec), "head") for spec in TARGETS} == {1}
