"""Where zeros pay, tensors lie with channels or features in front, and stay so; whole models compute the same."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import targets
from graphopt.codegen.dataflow import Dataflow, op_of
from graphopt.codegen.prepare import prepare
from graphopt.codegen.select import Selection, select
from graphopt.sparsity import parse_format
from tests.convnets import conv_bn
from tests.models import TINY, settle
from tests.transformer_nets import Block


def make_sparse(layer: nn.Module, word: str, keep: float, seed: int = 0) -> None:
    """Leave some blocks of a weight: `keep` of them, or as many as N:M says."""
    form, weight = parse_format(word), layer.weight
    with torch.no_grad():
        matrix = weight.flatten(1)
        outputs, inputs = matrix.shape
        score = torch.rand(
            -(-outputs // form.rows), -(-inputs // form.cols), generator=torch.Generator().manual_seed(seed)
        )
        if form.m > 1:
            groups = nn.functional.pad(score, (0, -score.shape[1] % form.m)).unflatten(1, (-1, form.m))
            kept = (groups.argsort(-1).argsort(-1) < form.n).flatten(1)[:, : score.shape[1]]
        else:
            kept = score < keep
        kept = kept.repeat_interleave(form.rows, 0).repeat_interleave(form.cols, 1)[:outputs, :inputs]
        matrix *= kept
        weight.copy_(matrix.view_as(weight))


def selected(module: nn.Module, *shape: int, spec: str = "cpu:x86-64-v3") -> tuple[Counter[str], Counter[str]]:
    """How many kernels of each template are chosen, and how many of TVM's operators are left."""
    program = graphopt.capture(module.eval(), (torch.zeros(shape),))
    target = targets.resolve(spec)
    selection: Selection = select(prepare(program, target)[0], target)
    left = (op_of(b.value) for b in Dataflow(selection.module["main"]).bindings)
    return (
        Counter(chosen.template for chosen in selection.calls.values()),
        Counter(name for name in left if name and name != "relax.call_dps_packed"),
    )


def mobile(word: str | None) -> nn.Module:
    """Separable convolutions with a pooling between; with a format, the 1 x 1 ones have 90 % zeros."""
    torch.manual_seed(0)
    layers = [conv_bn(3, 32, 3, 2)]
    for channels, stride in ((64, 1), (96, 2), (96, 1)):
        before = layers[-1][0].out_channels if isinstance(layers[-1], nn.Sequential) else 64
        layers += [conv_bn(before, before, 3, stride, before), conv_bn(before, channels, 1)]
        if channels == 64:
            layers.append(nn.MaxPool2d(3, 2, 1))
    net = nn.Sequential(*layers, nn.AvgPool2d(2))
    settle(net)
    for layer in net.modules():
        if word and isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            make_sparse(layer, word, 0.1)
    return net


@pytest.mark.parametrize("spec", ["cpu:x86-64-v3", "wasm", "arm"])
def test_a_sparse_network_keeps_its_channels_in_front(spec):
    """From the image that comes in to the one that leaves, nothing is transposed, and all kernels are ours."""
    chosen, left = selected(mobile("4x1"), 1, 3, 96, 96, spec=spec)
    assert chosen == {"spmm": 4, "depthwise_planes": 3, "pool_planes": 2}
    assert not left


def test_a_dense_network_keeps_its_channels_last():
    """The image is turned once, the result once, and no kernel is one of those for channels in front."""
    chosen, left = selected(mobile(None), 1, 3, 96, 96)
    assert not {"spmm", "depthwise_planes", "pool_planes"} & set(chosen)
    assert chosen["depthwise"] == 3
    assert chosen["transpose"] + left["relax.permute_dims"] == 2
    assert chosen["pool"] == 2


class Transformer(nn.Module):
    """Blocks of a transformer, each linear layer in blocks of 4 outputs, or dense."""

    def __init__(self, word: str | None, count: int = 2, pre: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*[Block(128, 4, pre=pre) for _ in range(count)])
        settle(self)
        for layer in self.modules():
            if word and isinstance(layer, nn.Linear):
                make_sparse(layer, word, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@pytest.mark.parametrize("pre", [True, False], ids=["norm first", "norm last"])
def test_a_sparse_transformer_is_turned_as_a_whole(pre):
    """Tokens are turned when they come in and when they leave: attention and norms take features in front, so more
    blocks need no more transposes."""
    (one, left), (three, rest) = (selected(Transformer("4x1", count, pre), 1, 196, 128) for count in (1, 3))
    assert three - one == {"spmm": 8 if pre else 12, "attention": 2, "layer-norm-columns": 4}
    assert not {"gemm", "softmax"} & set(three)
    assert left == rest
    # The first block's input is turned for each of its readers, and the result.
    assert one["transpose"] <= (3 if pre else 5)


def test_a_dense_transformer_is_not_turned():
    """Without zeros, features stay innermost."""
    chosen, left = selected(Transformer(None), 1, 196, 128)
    assert (chosen["gemm"], chosen["layer-norm"], chosen["attention"]) == (8, 4, 2)
    assert not chosen["transpose"] + left["relax.permute_dims"]
    assert not {"spmm", "layer-norm-columns"} & set(chosen)


@pytest.mark.parametrize("word", ["4x1", "unstructured"])
def test_few_zeros_turn_nothing(word):
    """A linear layer with 5 % zeros is a dense one."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 256)
    make_sparse(layer, word, 0.95)
    chosen, left = selected(layer, 1, 128, 256)
    assert chosen == {"gemm": 1}
    assert not left


def sparsified(name: str, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of the zoo, some of its layers with zeros in formats drawn at random."""
    model, inputs = TINY[name]()
    rng = random.Random(seed)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    # Tied weights and those of depthwise convolutions too: whatever has zeros must compute the same.
    words = ("unstructured", "2x1", "4x1", "8x1", "16x1", "2x2", "1x4", "2:4", "1:4", "8:2:4")
    most = rng.choice([0.5, 0.9, 1.0])
    for n, layer in enumerate(layers):
        if rng.random() < most:
            make_sparse(layer, rng.choice(words), rng.choice([0.0, 0.1, 0.1, 0.3, 0.6]), seed * 1000 + n)
    return model, inputs


@pytest.mark.parametrize(
    ("name", "seed", "target"),
    [("mobilenet_v2", 5, "wasm"), ("resnet18", 2, "cpu"), ("deit_s", 4, "cpu"), ("bert", 5, "wasm")],
)
def test_hybrid_models_agree_with_pytorch(name, seed, target):
    """Some layers sparse in some format, others dense: the bundle is verified when it is compiled."""
    model, inputs = sparsified(name, seed)
    program = graphopt.capture(model, inputs)
    with graphopt.compile(program, target=target) as bundle:
        assert bundle.manifest.verification.passed
        assert bundle.manifest.verification.max_rel_error <= 2e-5
        assert any(kernel["template"] in ("spmm", "spmv") for kernel in bundle.manifest.kernels)
