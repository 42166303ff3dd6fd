"""The models that tests and benchmarks run: plain torch, random weights from fixed seeds.

`ZOO[name]()` builds a model at the size that its paper gives, `TINY[name]()` the same structure at a size for tests;
both return (module in eval mode, example inputs by argument name). Models from transformers are in `hf_models.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tests.convnets import Basic, Bottleneck, ConvNext, Crnn, InvertedResidual, MobileNetV1, MobileNetV2, ResNet, UNet
from tests.transformer_nets import Decoder, Encoder, Llama, Swin, VisionTransformer

Built = tuple[nn.Module, dict[str, Tensor]]


def settle(model: nn.Module) -> None:
    """Weights and statistics such that signals neither die nor explode, and batch norms do something."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(1 / module.in_features))
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
        if getattr(module, "bias", None) is not None and isinstance(
            module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        ):
            nn.init.normal_(module.bias, std=0.02)
    for module in model.modules():  # the last norm of a residual branch is small, as trained networks have it
        if isinstance(module, (Basic, Bottleneck, InvertedResidual)):
            module.body[-1][1].weight.data.mul_(0.3)


def image(size: int, channels: int = 3, width: int | None = None, name: str = "x") -> dict[str, Tensor]:
    """One seeded image, square where no width is given."""
    return {name: torch.randn(1, channels, size, width or size, generator=torch.Generator().manual_seed(2))}


def tokens(length: int, words: int, mask: bool = False) -> dict[str, Tensor]:
    """One seeded sequence of word numbers; with a mask, its last quarter is padding."""
    inputs = {"input_ids": torch.randint(0, words, (1, length), generator=torch.Generator().manual_seed(2))}
    if mask:
        inputs["attention_mask"] = (torch.arange(length) < length - length // 4)[None].long()
    return inputs


def build(make: Callable[[], nn.Module], inputs: Callable[[], dict[str, Tensor]]) -> Built:
    """A module with settled weights, in eval mode, and its inputs; the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            settle(model)
    return model.eval(), inputs()


def table(
    entries: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]],
) -> dict[str, Callable[[], Built]]:
    """Builders by name, of pairs that make a module and its inputs."""
    return {name: partial(build, make, inputs) for name, (make, inputs) in entries.items()}


ZOO: dict[str, Callable[[], Built]] = table(
    {
        "mobilenet_v1": (MobileNetV1, lambda: image(224)),
        "mobilenet_v2": (MobileNetV2, lambda: image(224)),
        "resnet18": (lambda: ResNet(Basic, [2, 2, 2, 2]), lambda: image(224)),
        "resnet50": (lambda: ResNet(Bottleneck, [3, 4, 6, 3]), lambda: image(224)),
        "unet": (UNet, lambda: image(128)),
        "deit_s": (VisionTransformer, lambda: image(224)),
        "bert": (Encoder, lambda: tokens(128, 30522, mask=True)),
        "gpt2": (Decoder, lambda: tokens(128, 50257)),
        "llama": (Llama, lambda: tokens(128, 32000)),
        "convnext": (ConvNext, lambda: image(224)),
        "swin": (Swin, lambda: image(224)),
        "crnn": (Crnn, lambda: image(32, 1, 128, "image")),
    }
)

TINY: dict[str, Callable[[], Built]] = table(
    {
        "mobilenet_v1": (lambda: MobileNetV1(0.25, 10, 5), lambda: image(64)),
        "mobilenet_v2": (lambda: MobileNetV2(0.25, 10, 3), lambda: image(64)),
        "resnet18": (lambda: ResNet(Basic, [1, 1, 1, 1], 8, 10), lambda: image(64)),
        "resnet50": (lambda: ResNet(Bottleneck, [1, 2, 1, 1], 8, 10), lambda: image(64)),
        "unet": (lambda: UNet(8, 2), lambda: image(32)),
        "deit_s": (lambda: VisionTransformer(32, 4, 2, 32, 8, 10), lambda: image(32)),
        "bert": (lambda: Encoder(32, 4, 2, 16, 100), lambda: tokens(16, 100, mask=True)),
        "gpt2": (lambda: Decoder(32, 4, 2, 16, 100), lambda: tokens(16, 100)),
        "llama": (lambda: Llama(32, 4, 2, 2, 48, 100), lambda: tokens(16, 100)),
        "convnext": (lambda: ConvNext((16, 32), (1, 2), 10), lambda: image(32)),
        "swin": (lambda: Swin(16, 2, 8, 4, 2, 4, 10), lambda: image(32)),
        "crnn": (lambda: Crnn(8, 20, 2), lambda: image(32, 1, 64, "image")),
    }
)
