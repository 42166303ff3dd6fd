"""Whole models: every free axis cut, and reordered, gives what the masked program gives; nothing is unknown."""

from __future__ import annotations

from functools import cache

import pytest
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphopt.axes import Axes, infer
from graphopt.capture import capture
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from tests.graphopt.axes.single import assert_shrinks
from tests.hard_nets import HARD
from tests.hf_models import HF
from tests.models import TINY

MODELS = {
    **TINY,
    **{f"hard-{name}": build for name, build in HARD.items()},
    **{f"hf-{name}": build for name, build in HF.items()},
}
# These make float32 tensors in their forward method, so they run in float32 only.
SINGLE = {"hard-dit", "hard-gqa_einsum", "hard-mqa", "hard-raft", "hard-gru"}
# How many atoms of each model may shrink. A missing rule shows here as a smaller number.
_COUNTS = """
    mobilenet_v1:6 mobilenet_v2:10 resnet18:8 resnet50:15 unet:12 deit_s:7 bert:8 gpt2:7 llama:10 convnext:5
    swin:7 crnn:4 hard-shufflenet:10 hard-yolo:28 hard-densenet:13 hard-unet_upsample:5 hard-mobilenet_v3:8
    hard-excite_einsum:3 hard-resnext:8 hard-multiplier:5 hard-transposed:4 hard-wavenet:5 hard-video:3
    hard-group_norm:2 hard-instance_norm:2 hard-super_resolution:3 hard-tied_convs:2 hard-two_branches:2
    hard-weight_norm:3 hard-mha_bmm:9 hard-mha_einsum:9 hard-mha_unbind:7 hard-mha_index:7
    hard-mha_interleaved:9 hard-mha_chunk:9 hard-mha_module:8 hard-deit_distilled:7 hard-mvit:8 hard-hiera:11
    hard-dit:10 hard-t5:9 hard-gqa_sdpa:10 hard-gqa_repeat:10 hard-gqa_expand:10 hard-gqa_einsum:10
    hard-gqa_matmul:10 hard-gqa_fused:10 hard-gqa_norm_heads:10 hard-mqa:8 hard-raft:9 hard-lstm:2 hard-gru:2
    hard-elman:3 hard-moe_dense:2 hard-moe_gather:2 hard-mamba:3 hf-bert:8 hf-gpt2:9 hf-llama:10 hf-convnext:4
    hf-swin:16 hf-vit:8 hf-deit:8
"""
FREE = {name: int(count) for name, _, count in (item.partition(":") for item in _COUNTS.split())}


@cache
def axes_of(name: str) -> Axes:
    """The axes of a model, in float64 where it can be."""
    module, inputs = MODELS[name]()
    if name not in SINGLE:
        module, inputs = module.double(), {key: _double(value) for key, value in inputs.items()}
    return infer(run_passes(capture(module, inputs, name=name), PREPARE, check=False))


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


@pytest.mark.parametrize("name", MODELS)
def test_shrink_equals_mask(name: str) -> None:
    """All free axes at once, and in another order; as many are free as there should be."""
    axes = axes_of(name)
    assert not axes.unknown
    assert len(axes.free()) == FREE[name], "\n".join(line for a in axes.atoms for line in axes.explain(a))
    tolerance = 2e-4 if name in SINGLE else 1e-6 if name == "hf-llama" else 1e-9  # its norms go through float32
    # PyTorch's own attention kernel misreads a float32 mask among float64 tensors; its plain arithmetic does not.
    with sdpa_kernel(SDPBackend.MATH):
        assert_shrinks(axes.program, axes=axes, alone=False, tolerance=tolerance)


@pytest.mark.parametrize("name", ["llama", "swin", "hard-shufflenet", "hard-mha_unbind", "hard-hiera"])
def test_each_axis_alone(name: str) -> None:
    """Each free axis on its own."""
    with sdpa_kernel(SDPBackend.MATH):
        assert_shrinks(axes_of(name).program, axes=axes_of(name), tolerance=1e-9)
