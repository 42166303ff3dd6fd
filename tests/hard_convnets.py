"""Convolutional networks whose channels are hard to follow, for the table in `hard_nets.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.convnets import conv_bn

# Splits and concatenations -------------------------------------------------------------------------------------------


class ShuffleUnit(nn.Module):
    """One half of the channels passes, the other is convolved; then the halves are shuffled into each other."""

    def __init__(self, i: int, o: int, stride: int, flat: bool) -> None:
        super().__init__()
        self.stride, self.flat = stride, flat
        half = o // 2
        enter = i if stride > 1 else half
        self.left = nn.Sequential(conv_bn(i, i, 3, stride, i, None), conv_bn(i, half, 1)) if stride > 1 else None
        self.right = nn.Sequential(
            conv_bn(enter, half, 1), conv_bn(half, half, 3, stride, half, None), conv_bn(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.left is not None:
            x = torch.cat([self.left(x), self.right(x)], 1)
        else:
            left, right = x.chunk(2, 1)
            x = torch.cat([left, self.right(right)], 1)
        b, c, h, w = x.shape
        if self.flat:  # torchvision views the images, Megvii's original the rows
            return x.reshape(b, 2, c // 2, h * w).permute(0, 2, 1, 3).reshape(b, c, h, w)
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


class ShuffleNet(nn.Module):
    """ShuffleNetV2 (arXiv:1807.11164): channel split, concatenation and shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 10, 3, 2), nn.MaxPool2d(3, 2, 1))
        self.units = nn.Sequential(
            ShuffleUnit(10, 28, 2, False), ShuffleUnit(28, 28, 1, False),
            ShuffleUnit(28, 44, 2, True), ShuffleUnit(44, 44, 1, True),
        )  # fmt: skip
        self.last, self.head = conv_bn(44, 52, 1), nn.Linear(52, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.units(self.stem(x))).mean([2, 3]))


class C2f(nn.Module):
    """Two halves of a convolution's output, a chain of residual bottlenecks on the second, all of them concatenated."""

    def __init__(self, i: int, half: int, o: int, count: int, split: bool = False) -> None:
        super().__init__()
        self.half, self.split = half, split
        self.enter, self.leave = conv_bn(i, 2 * half, 1, act=nn.SiLU), conv_bn((2 + count) * half, o, 1, act=nn.SiLU)
        self.chain = nn.ModuleList(
            nn.Sequential(conv_bn(half, half, 3, act=nn.SiLU), conv_bn(half, half, 3, act=nn.SiLU))
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        parts = list(x.split((self.half, self.half), 1) if self.split else x.chunk(2, 1))
        for layer in self.chain:
            parts.append(parts[-1] + layer(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Sppf(nn.Module):
    """Max pools in a row, all of them concatenated."""

    def __init__(self, i: int, half: int, o: int) -> None:
        super().__init__()
        self.enter, self.leave = conv_bn(i, half, 1, act=nn.SiLU), conv_bn(4 * half, o, 1, act=nn.SiLU)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Yolo(nn.Module):
    """YOLOv8's structure: C2f blocks, SPPF, a neck of two scales, and a head whose box sides are 16-bin integrals."""

    bins, classes, strides = 16, 5, (8, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, 3, 2, act=nn.SiLU), conv_bn(8, 14, 3, 2, act=nn.SiLU))
        self.fine = nn.Sequential(C2f(14, 9, 18, 1), conv_bn(18, 26, 3, 2, act=nn.SiLU), C2f(26, 11, 22, 2, split=True))
        self.coarse = nn.Sequential(conv_bn(22, 34, 3, 2, act=nn.SiLU), C2f(34, 15, 30, 1), Sppf(30, 17, 38))
        self.neck = C2f(22 + 38, 13, 24, 1)
        self.boxes = nn.ModuleList(
            nn.Sequential(conv_bn(c, 20, 3, act=nn.SiLU), nn.Conv2d(20, 4 * self.bins, 1)) for c in (24, 38)
        )
        self.labels = nn.ModuleList(
            nn.Sequential(conv_bn(c, 21, 3, act=nn.SiLU), nn.Conv2d(21, self.classes, 1)) for c in (24, 38)
        )
        self.register_buffer("integral", torch.arange(self.bins, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.stem(x))
        coarse = self.coarse(fine)
        fine = self.neck(torch.cat([F.interpolate(coarse, scale_factor=2, mode="nearest"), fine], 1))
        scales = [
            torch.cat([box(y), label(y)], 1)
            for y, box, label in zip((fine, coarse), self.boxes, self.labels, strict=True)
        ]
        b = x.shape[0]
        flat = torch.cat([y.view(b, 4 * self.bins + self.classes, -1) for y in scales], 2)
        box, label = flat.split((4 * self.bins, self.classes), 1)
        anchors, strides = [], []
        for y, stride in zip(scales, self.strides, strict=True):
            h, w = y.shape[2:]
            rows, columns = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            anchors.append(torch.stack([columns, rows]).flatten(1))
            strides.append(torch.full((1, h * w), float(stride)))
        anchor, scale = torch.cat(anchors, 1)[None], torch.cat(strides, 1)
        sides = box.view(b, 4, self.bins, -1).transpose(2, 1).softmax(1)
        sides = F.conv2d(sides, self.integral).view(b, 4, -1)
        before, after = sides.chunk(2, 1)
        low, high = anchor - before, anchor + after
        return torch.cat([torch.cat([(low + high) / 2, high - low], 1) * scale, label.sigmoid()], 1)


class DenseNet(nn.Module):
    """DenseNet (arXiv:1608.06993): norms of concatenations, which no convolution before them can take in."""

    def __init__(self, growth: int = 6) -> None:
        super().__init__()
        self.stem, channels, layers = conv_bn(3, 11, 3, 2), 11, []
        for count in (2, 3):
            block = nn.ModuleList()
            for _ in range(count):
                block.append(self.layer(channels, 4 * growth, growth))
                channels += growth
            move = nn.Sequential(
                nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)
            )
            channels //= 2
            layers += [block, move]
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = nn.BatchNorm2d(channels), nn.Linear(channels, 7)

    @staticmethod
    def layer(i: int, middle: int, o: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, middle, 1, bias=False),
            nn.BatchNorm2d(middle), nn.ReLU(), nn.Conv2d(middle, o, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            if isinstance(layer, nn.ModuleList):
                for dense in layer:
                    x = torch.cat([x, dense(x)], 1)
            else:
                x = layer(x)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


class UpsampleUNet(nn.Module):
    """Skips by concatenation, upsampling without weights, once nearest and once bilinear."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv_bn(3, 10, 3), conv_bn(10, 18, 3)])
        self.middle = conv_bn(18, 26, 3)
        self.up = nn.ModuleList([conv_bn(18 + 10, 12, 3), conv_bn(26 + 18, 18, 3)])
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            skips.append(layer(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for level, mode in ((1, "nearest"), (0, "bilinear")):
            x = F.interpolate(x, scale_factor=2, mode=mode)
            x = self.up[level](torch.cat([x, skips[level]], 1))
        return self.head(x)


# Groups --------------------------------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class MobileNetV3(nn.Module):
    """MobileNetV3 (arXiv:1905.02244): inverted residuals with squeeze and excite, hardswish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 10, 3, 2, act=nn.Hardswish)
        self.blocks = nn.ModuleList([self.block(10, 22, 14, 2, 6), self.block(14, 36, 14, 1, 9)])
        self.last = conv_bn(14, 50, 1, act=nn.Hardswish)
        self.head = nn.Sequential(nn.Linear(50, 30), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(30, 7))

    @staticmethod
    def block(i: int, hidden: int, o: int, stride: int, squeezed: int) -> nn.Module:
        return nn.Sequential(
            conv_bn(i, hidden, 1, act=nn.Hardswish), conv_bn(hidden, hidden, 5, stride, hidden, nn.Hardswish),
            SqueezeExcite(hidden, squeezed), conv_bn(hidden, o, 1, act=None),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.stem(x))
        x = x + self.blocks[1](x)
        return self.head(self.last(x).mean((2, 3)))


class EinsumExcite(nn.Module):
    """Squeeze and excite with a matrix product and einsum in place of convolutions and broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = conv_bn(3, 18, 3, 2), conv_bn(18, 14, 3)
        self.down, self.up = nn.Linear(18, 5), nn.Linear(5, 18)
        self.head = nn.Linear(14, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((-2, -1))))))
        return self.head(self.next(torch.einsum("bchw,bc->bchw", x, gate)).amax((2, 3)))


class ResNext(nn.Module):
    """ResNeXt (arXiv:1611.05431): bottlenecks of four groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 14, 3, 2)
        self.bodies = nn.ModuleList([self.body(14, 20, 30, 2), self.body(30, 28, 30, 1)])
        self.shortcut, self.head = conv_bn(14, 30, 1, 2, act=None), nn.Linear(30, 7)

    @staticmethod
    def body(i: int, width: int, o: int, stride: int) -> nn.Module:
        return nn.Sequential(conv_bn(i, width, 1), conv_bn(width, width, 3, stride, 4), conv_bn(width, o, 1, act=None))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.bodies[0](x) + self.shortcut(x))
        x = F.relu(self.bodies[1](x) + x)
        return self.head(x.mean((2, 3)))


class Multiplier(nn.Module):
    """Depthwise convolutions that make two channels of each, then groups that go from more to fewer channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 9, 3)
        self.depthwise, self.point = conv_bn(9, 18, 3, 2, groups=9), conv_bn(18, 20, 1)
        self.uneven = nn.Conv2d(20, 12, 3, padding=1, groups=4)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.uneven(self.point(self.depthwise(self.stem(x))))))


# Other convolutions --------------------------------------------------------------------------------------------------


class TransposedDecoder(nn.Module):
    """A latent vector to an image: transposed convolutions, one with groups, one that overlaps."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(13, 20 * 3 * 5)
        self.norm = nn.BatchNorm2d(20)
        self.first = nn.Sequential(nn.ConvTranspose2d(20, 12, 4, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.second = nn.ConvTranspose2d(12, 8, 3, 2, 1, output_padding=1, groups=4)
        self.last = nn.ConvTranspose2d(8, 3, 2, 2)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.norm(self.enter(z).view(-1, 20, 3, 5)))
        return torch.tanh(self.last(F.leaky_relu(self.second(self.first(x)), 0.2)))


class WaveNet(nn.Module):
    """Causal dilated 1d convolutions, gates of tanh and sigmoid, residuals, a sum of skips (arXiv:1609.03499)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 12, 1)
        self.layers = nn.ModuleList(nn.Conv1d(12, 2 * 14, 2, dilation=2**n) for n in range(3))
        self.residual = nn.ModuleList(nn.Conv1d(14, 12, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(14, 18, 1) for _ in range(3))
        self.norm, self.head = nn.BatchNorm1d(18), nn.Conv1d(18, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), 0
        for layer, residual, skip in zip(self.layers, self.residual, self.skip, strict=True):
            signal, gate = layer(F.pad(x, (layer.dilation[0], 0))).chunk(2, 1)
            y = torch.tanh(signal) * torch.sigmoid(gate)
            x, total = x + residual(y), total + skip(y)
        return self.head(F.relu(self.norm(total)))


class Video(nn.Module):
    """3d convolutions, once with groups, 3d norms and pools; a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 8, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(8), nn.ReLU())
        self.pool = nn.MaxPool3d(2)
        self.body = nn.Sequential(
            nn.Conv3d(8, 12, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(12), nn.ReLU(),
            nn.Conv3d(12, 8, (3, 1, 1), padding=(1, 0, 0), groups=2),
        )  # fmt: skip
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        return self.head(F.relu(x + self.body(x)).mean((2, 3, 4)))


class GroupNormNet(nn.Module):
    """Groups of channels share statistics: a group's size may shrink, and not its members' count alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 20, 3, 2, 1), nn.GroupNorm(4, 20)
        self.body = nn.Sequential(nn.Conv2d(20, 14, 3, padding=1), nn.GroupNorm(2, 14), nn.SiLU(), nn.Conv2d(14, 20, 1))
        self.last, self.head = nn.GroupNorm(5, 20), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.first(x)))
        return self.head(F.silu(self.last(x + self.body(x))).mean((2, 3)))


class InstanceNormNet(nn.Module):
    """Style transfer's blocks: instance norm with weights and without, reflection padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, 2), nn.InstanceNorm2d(12, affine=True)
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(12, 18, 3), nn.InstanceNorm2d(18), nn.ReLU(), nn.Conv2d(18, 12, 1)
        )
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(F.pad(x, (1, 1, 1, 1), mode="reflect"))))
        return self.head(x + self.body(x))


class SuperResolution(nn.Module):
    """Pixels to channels, residual blocks, channels to pixels, and the image itself added at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.after = nn.Conv2d(3 * 4, 14, 3, padding=1), nn.Conv2d(14, 14, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(14, 22, 3, padding=1), nn.PReLU(22), nn.Conv2d(22, 14, 3, padding=1))
        self.grow = nn.Sequential(nn.Conv2d(14, 9 * 4, 3, padding=1), nn.PixelShuffle(2), nn.PReLU())
        self.leave = nn.Sequential(nn.Conv2d(9, 3 * 4, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        y = first = self.enter(F.pixel_unshuffle(x, 2))
        y = self.after(y + self.body(y)) + first
        return self.leave(self.grow(y)) + F.interpolate(x, scale_factor=2, mode="nearest")


# Weights and values that are used more than once ---------------------------------------------------------------------


class TiedConvs(nn.Module):
    """One convolution three times in a row, and one that reads two tensors of different origin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = conv_bn(3, 14, 3, 2), nn.Conv2d(14, 14, 3, padding=1)
        self.both, self.other = nn.Conv2d(14, 10, 1), conv_bn(3, 14, 5, 2)
        self.head = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x), self.other(x)
        for _ in range(3):
            left = left + F.relu(self.same(left))
        return self.head(torch.cat([self.both(left), self.both(right)], 1).mean((2, 3)))


class TwoBranches(nn.Module):
    """The input feeds two branches that are multiplied; later a product of one convolution's own halves."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv_bn(3, 12, 3, 2), nn.Conv2d(3, 12, 5, 2, 2)
        self.wide, self.head = nn.Conv2d(12, 2 * 9, 1), nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.wide(self.left(x) * torch.sigmoid(self.right(x))).chunk(2, 1)
        return self.head((first * second).mean((2, 3)))


class WeightNormed(nn.Module):
    """Convolutions whose weights are made of a length and a direction, as vocoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv1d(4, 14, 7, padding=3))
        self.second = weight_norm(nn.Conv1d(14, 10, 3, 2, 1))
        self.grow = weight_norm(nn.ConvTranspose1d(10, 6, 4, 2, 1))
        self.head = nn.Conv1d(6, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.second(F.leaky_relu(self.first(x), 0.1)), 0.1)
        return torch.tanh(self.head(F.leaky_relu(self.grow(x), 0.1)))
