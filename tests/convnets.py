"""Convolutional networks for the zoo in `models.py`, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(i: int, o: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU):
    """Convolution, batch norm and, unless `act` is None, an activation in place."""
    layers = [nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


class MobileNetV1(nn.Module):
    """Howard et al., arXiv:1704.04861: depthwise and pointwise convolutions in turn."""

    def __init__(self, width: float = 1.0, classes: int = 1000, blocks: int = 13) -> None:
        super().__init__()
        plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)] + [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
        plan = plan[:blocks]
        channels = int(32 * width)
        layers = [conv_bn(3, channels, 3, 2, act=nn.ReLU6)]
        for o, stride in plan:
            o = int(o * width)
            layers += [
                conv_bn(channels, channels, 3, stride, channels, nn.ReLU6),
                conv_bn(channels, o, 1, act=nn.ReLU6),
            ]
            channels = o
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, i: int, o: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = i * expand
        layers = [conv_bn(i, hidden, 1, act=nn.ReLU6)] if expand != 1 else []
        layers += [conv_bn(hidden, hidden, 3, stride, hidden, nn.ReLU6), conv_bn(hidden, o, 1, act=None)]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """Sandler et al., arXiv:1801.04381: inverted residuals with linear bottlenecks."""

    def __init__(self, width: float = 1.0, classes: int = 1000, stages: int = 7) -> None:
        super().__init__()
        plan = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        channels = int(32 * width)
        layers: list[nn.Module] = [conv_bn(3, channels, 3, 2, act=nn.ReLU6)]
        for expand, o, count, stride in plan[:stages]:
            for place in range(count):
                layers.append(InvertedResidual(channels, int(o * width), stride if place == 0 else 1, expand))
                channels = int(o * width)
        last = int(1280 * max(width, 0.1))
        self.features = nn.Sequential(*layers, conv_bn(channels, last, 1, act=nn.ReLU6))
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x).mean((2, 3))))


class Basic(nn.Module):
    expansion = 1

    def __init__(self, i: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(i, width, 3, stride), conv_bn(width, width, 3, act=None))
        same = stride == 1 and i == width
        self.shortcut = nn.Identity() if same else conv_bn(i, width, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, i: int, width: int, stride: int) -> None:
        super().__init__()
        o = 4 * width
        self.body = nn.Sequential(
            conv_bn(i, width, 1), conv_bn(width, width, 3, stride), conv_bn(width, o, 1, act=None)
        )
        same = stride == 1 and i == o
        self.shortcut = nn.Identity() if same else conv_bn(i, o, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """He et al., arXiv:1512.03385; stride on the 3x3 convolution, as everyone builds it now."""

    def __init__(
        self, block: type[Basic | Bottleneck], counts: list[int], width: int = 64, classes: int = 1000
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, width, 7, 2), nn.MaxPool2d(3, 2, 1))
        channels, stages = width, []
        for stage, count in enumerate(counts):
            blocks = []
            for place in range(count):
                stride = 2 if stage and not place else 1
                blocks.append(block(channels, width << stage, stride))
                channels = (width << stage) * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))


class UNet(nn.Module):
    """Ronneberger et al., arXiv:1505.04597, padded: skips by concatenation, transposed convolutions upwards."""

    def __init__(self, width: int = 32, depth: int = 4, classes: int = 2) -> None:
        super().__init__()
        sizes = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(self.pair(3 if not n else sizes[n - 1], sizes[n]) for n in range(depth))
        self.middle = self.pair(sizes[-2], sizes[-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(sizes[n + 1], sizes[n], 2, 2) for n in range(depth))
        self.up = nn.ModuleList(self.pair(2 * sizes[n], sizes[n]) for n in range(depth))
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def pair(i: int, o: int) -> nn.Module:
        return nn.Sequential(conv_bn(i, o, 3), conv_bn(o, o, 3))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat([skips[level], self.grow[level](x)], 1))
        return self.head(x)


class ConvNextBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.scale = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (self.scale * y).permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """ConvNeXt (arXiv:2201.03545); the defaults are ConvNeXt-T."""

    def __init__(self, dims=(96, 192, 384, 768), counts=(3, 3, 9, 3), classes=1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, dims[0], 4, 4)]
        for stage, (dim, count) in enumerate(zip(dims, counts, strict=True)):
            if stage:
                layers += [nn.GroupNorm(1, dims[stage - 1]), nn.Conv2d(dims[stage - 1], dim, 2, 2)]
            layers += [ConvNextBlock(dim) for _ in range(count)]
        self.features = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(dims[-1]), nn.Linear(dims[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x).mean((-2, -1))))


class Crnn(nn.Module):
    """Text recognition: convolutions squeeze the height, gated 1d convolutions stand where CRNN has an LSTM."""

    def __init__(self, width: int = 64, symbols: int = 97, layers: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(1, width, 3), nn.MaxPool2d(2), conv_bn(width, 2 * width, 3), nn.MaxPool2d(2),
            conv_bn(2 * width, 4 * width, 3), nn.MaxPool2d((2, 1)), conv_bn(4 * width, 4 * width, 3),
        )  # fmt: skip
        dim = 4 * width
        self.sequence = nn.ModuleList(
            nn.Sequential(nn.Conv1d(dim, 2 * dim, 3, padding=1), nn.BatchNorm1d(2 * dim), nn.GLU(1))
            for _ in range(layers)
        )
        self.head = nn.Linear(dim, symbols)

    def forward(self, image: Tensor) -> Tensor:
        x = self.features(image).mean(2)
        for layer in self.sequence:
            x = x + layer(x)
        return self.head(x.transpose(1, 2)).log_softmax(-1)
