"""Models whose tokens are no plain sequence: a diffusion transformer, state-space models, a head for every pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.transformer_nets import Attention, Block


class DitBlock(nn.Module):
    """adaLN-zero: shift, scale and gate of both halves come from the condition."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, 1e-6, elementwise_affine=False) for _ in range(2))
        self.attention = Attention(dim, heads, fused)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))
        self.condition = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(c)).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Dit(nn.Module):
    """DiT (arXiv:2212.09748): patches of a latent, time and class as condition, pixels again at the end."""

    def __init__(self, dim=32, heads=4, layers=8, side=8, patch=2, channels=3, classes=5, fused=True) -> None:
        super().__init__()
        self.side, self.patch, self.channels = side, patch, channels
        self.enter = nn.Conv2d(channels, dim, patch, patch)
        self.register_buffer("position", torch.randn(1, (side // patch) ** 2, dim) * 0.5)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(classes, dim)
        self.blocks = nn.ModuleList([DitBlock(dim, heads, fused) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.condition, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, patch * patch * channels)

    def conditioned(self, t: Tensor, y: Tensor) -> Tensor:
        """The condition, (b, dim)."""
        half = self.label.weight.shape[1] // 2
        angle = t[:, None] * torch.exp(-torch.arange(half) * (9.2 / half))
        return self.time(torch.cat([angle.cos(), angle.sin()], -1)) + self.label(y)

    def head(self, x: Tensor, c: Tensor) -> Tensor:
        """Pixels from tokens."""
        shift, scale = self.condition(F.silu(c)).unsqueeze(1).chunk(2, -1)
        x = self.out(self.norm(x) * (1 + scale) + shift)
        side = self.side // self.patch
        x = x.view(-1, side, side, self.patch, self.patch, self.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, self.channels, self.side, self.side)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.conditioned(t, y)
        x = self.enter(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, c)
        return self.head(x, c)


class ScanBlock(nn.Module):
    """A selective scan (arXiv:2312.00752) in several directions of a grid, as cumulative sums of logarithms.

    `orders` (directions, n): the token that each direction visits at each step; "flip" is a flip in the program. With
    `near`, a causal depthwise convolution stands in front of the scan of every direction.
    """

    def __init__(self, dim: int, inner: int, state: int, orders: list[Tensor], near: int = 0) -> None:
        super().__init__()
        self.inner, self.state, self.near = inner, state, near
        self.norm = nn.LayerNorm(dim)
        self.enter, self.leave = nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)
        self.select, self.step = nn.Linear(inner, 2 * state), nn.Linear(inner, inner)
        self.conv = nn.Conv1d(inner, inner, near, groups=inner, padding=near - 1) if near else None
        self.rates = nn.Parameter(torch.rand(inner, state) + 0.1)
        self.skip = nn.Parameter(torch.randn(inner))
        self.orders = [order.tolist() for order in orders]
        for number, order in enumerate(orders):
            self.register_buffer(f"order{number}", order)
            self.register_buffer(f"back{number}", order.argsort())

    def scan(self, x: Tensor, gap: Tensor | None = None, fed: Tensor | None = None) -> Tensor:
        """One direction on (b, n, inner). `gap` (b, n): steps since the last token; `fed` (b, n): 0 where B x is 0."""
        if self.conv is not None:
            x = self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        x = F.silu(x)
        step = F.softplus(self.step(x) - 2)
        read, write = self.select(x).chunk(2, -1)
        passed = step
        if gap is not None:
            passed = step + (gap[..., None] - 1) * F.pad(step, (0, 0, 1, -1))
        decay = torch.exp(torch.cumsum(passed, 1)[..., None] * -self.rates)
        drive = (step * x)[..., None] * read[:, :, None]
        drive = drive if fed is None else drive * fed[..., None, None]
        h = decay * torch.cumsum(drive / decay, 1)
        return (h * write[:, :, None]).sum(-1) + x * self.skip

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.enter(self.norm(x)).chunk(2, -1)
        total = None
        for number, order in enumerate(self.orders):
            turned = order == list(range(len(order)))[::-1]
            own, back = getattr(self, f"order{number}"), getattr(self, f"back{number}")
            one = y if order == sorted(order) else y.flip(1) if turned else y[:, own]
            one = self.scan(one)
            one = one if order == sorted(order) else one.flip(1) if turned else one[:, back]
            total = one if total is None else total + one
        return x + self.leave(total * F.silu(gate))


class StepwiseBlock(ScanBlock):
    """The same scan as a loop over the tokens, as `selective_scan_ref` and transformers write it."""

    def scan(self, x: Tensor, gap: Tensor | None = None, fed: Tensor | None = None) -> Tensor:
        assert gap is None
        assert fed is None
        if self.conv is not None:
            x = self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        x = F.silu(x)
        step = F.softplus(self.step(x) - 2)
        read, write = self.select(x).chunk(2, -1)
        decay = torch.exp(step[..., None] * -self.rates)
        drive = (step * x)[..., None] * read[:, :, None]
        h, results = torch.zeros(x.shape[0], self.inner, self.state), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + drive[:, t]
            results.append((h * write[:, t, None]).sum(-1))
        return torch.stack(results, 1) + x * self.skip


def stepwise(model: nn.Module) -> nn.Module:
    """A model of scan blocks with its scans as loops; the same weights."""
    for module in model.modules():
        if isinstance(module, ScanBlock):
            module.__class__ = StepwiseBlock
    return model


def grid_orders(side: int) -> list[Tensor]:
    """PlainMamba's continuous ways through a grid (arXiv:2403.17695): rows and columns in turns, and both backwards."""
    grid = torch.arange(side * side).view(side, side).clone()
    rows, columns = grid.clone(), grid.t().clone()
    rows[1::2], columns[1::2] = rows[1::2].flip(1), columns[1::2].flip(1)
    return [rows.flatten(), rows.flatten().flip(0), columns.flatten(), columns.flatten().flip(0)]


class PlainMamba(nn.Module):
    """PlainMamba's structure: four ways through the grid in every block, the mean of the tokens at the end."""

    def __init__(self, side: int = 4, dim: int = 16, inner: int = 12, layers: int = 3, classes: int = 7) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.ModuleList([ScanBlock(dim, inner, 3, grid_orders(side)) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Vim(nn.Module):
    """Vision Mamba's structure (arXiv:2401.09417): forwards and backwards, the class token in the middle."""

    def __init__(self, side: int = 4, dim: int = 16, inner: int = 12, layers: int = 3, classes: int = 7) -> None:
        super().__init__()
        n = side * side + 1
        self.middle = side * side // 2
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, n, dim))
        orders = [torch.arange(n), torch.arange(n).flip(0)]
        self.blocks = nn.ModuleList([ScanBlock(dim, inner, 3, orders, near=3) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        m = self.middle
        x = torch.cat([x[:, :m], self.cls.expand(x.shape[0], -1, -1), x[:, m:]], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, m])


class CrossScanBlock(nn.Module):
    """VMamba's scan (arXiv:2401.10166) on a grid (b, h, w, c): rows, columns, both backwards, all in one tensor."""

    def __init__(self, dim: int, inner: int, state: int) -> None:
        super().__init__()
        self.inner, self.state = inner, state
        self.norm, self.enter, self.leave = nn.LayerNorm(dim), nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.select = nn.Parameter(torch.randn(4, 2 * state + inner, inner) * 0.2)
        self.rates = nn.Parameter(torch.rand(4, inner, state) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        y = F.silu(self.enter(self.norm(x))).permute(0, 3, 1, 2)
        both = torch.stack([y.flatten(2), y.transpose(2, 3).flatten(2)], 1)
        ways = torch.cat([both, both.flip(-1)], 1)
        chosen = torch.einsum("bkdl,kcd->bkcl", ways, self.select)
        step, read, write = chosen.split([self.inner, self.state, self.state], 2)
        step = F.softplus(step - 2)
        decay = torch.exp(torch.cumsum(step, -1)[..., None, :] * -self.rates[None, ..., None])
        drive = (step * ways)[..., None, :] * read[:, :, None]
        y = (decay * torch.cumsum(drive / decay, -1) * write[:, :, None]).sum(3)
        y = y[:, :2] + y[:, 2:].flip(-1)
        y = y[:, 0] + y[:, 1].view(b, -1, w, h).transpose(2, 3).flatten(2)
        return x + self.leave(y.transpose(1, 2).view(b, h, w, -1))


class VMamba(nn.Module):
    """VMamba's structure, without its convolutions."""

    def __init__(self, dim: int = 16, inner: int = 12, layers: int = 2, classes: int = 7) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.Sequential(*(CrossScanBlock(dim, inner, 3) for _ in range(layers)))
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x).permute(0, 2, 3, 1)).mean((1, 2)))


class Segmenter(nn.Module):
    """A vision transformer with a head for every pixel: its tokens are a grid again in front of a convolution."""

    def __init__(self, dim: int = 32, heads: int = 4, layers: int = 3, side: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.side = side
        self.patch = nn.Conv2d(3, dim, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, side * side + 1, dim))
        self.blocks = nn.ModuleList([Block(dim, heads, pre=True) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.near, self.head = nn.Conv2d(dim, 12, 3, padding=1), nn.ConvTranspose2d(12, classes, 8, 8)

    def dense(self, x: Tensor) -> Tensor:
        """Classes of pixels from all tokens of the last block."""
        x = self.norm(x)[:, 1:].transpose(1, 2).reshape(x.shape[0], -1, self.side, self.side)
        return self.head(F.relu(self.near(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.dense(x)


def random(model: nn.Module, scale: float = 2.0) -> nn.Module:
    """The model with larger weights, so that attention is not flat and conditions matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.eval()
