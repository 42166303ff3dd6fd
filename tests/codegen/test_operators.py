"""Operators one by one: what PyTorch exports, the artefact computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt

# Per family: functions of x (2, 3, 8, 9) in (-2, 2), y like it, and i (2, 3, 8, 9) of indices 0..2.
FAMILIES: dict[str, list[Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]]]] = {
    "elementwise": [
        lambda x, y, i: torch.exp(x) + torch.log(x.abs() + 1),
        lambda x, y, i: torch.sin(x) * torch.cos(y) - torch.tanh(x),
        lambda x, y, i: torch.erf(x) / (y.abs() + 0.5),
        lambda x, y, i: torch.rsqrt(x.abs() + 1) + torch.pow(x.abs() + 0.1, 1.7),
        lambda x, y, i: F.silu(x) + F.hardswish(y) + F.hardsigmoid(x) + F.leaky_relu(y, 0.1),
        lambda x, y, i: F.elu(x) + F.softplus(y) + F.gelu(x) + F.gelu(y, approximate="tanh") + F.mish(x),
        lambda x, y, i: torch.where(x > y, x, y.clamp(-0.5, 0.5)) + torch.maximum(x, y).floor(),
        lambda x, y, i: torch.atan2(x, y.abs() + 0.1) + torch.round(x * 3) + torch.sign(y) + torch.log1p(x.abs()),
        lambda x, y, i: torch.fmod(x, 0.7) + torch.remainder(y, 0.7) + torch.div(x, 0.3, rounding_mode="floor"),
        lambda x, y, i: F.selu(x) + F.elu(y, 0.7) + F.celu(x, 0.5),
        lambda x, y, i: torch.expm1(x) + torch.log2(y.abs() + 1) + torch.asin(x / 3) + torch.sinh(y),
    ],
    "integers": [
        lambda x, y, i: i // 2 + i % 2,
        lambda x, y, i: (i == 1) & (x > 0) | ~(y > 0),
        lambda x, y, i: i.to(torch.int32) * 3 - 1,
        lambda x, y, i: i.to(x.dtype) * x,
        lambda x, y, i: torch.cumsum(i, 2),
        lambda x, y, i: (i + 60).to(torch.int8).prod(1) + (i + 60).to(torch.int16).prod(),
        lambda x, y, i: torch.sigmoid(i) + torch.sigmoid(i.to(torch.int8)),
        lambda x, y, i: F.one_hot(i[0, 0], 3),
        lambda x, y, i: i / 3 + i.div(2, rounding_mode="trunc"),
        lambda x, y, i: i.clamp(min=1) - (i - 1).clamp(0, 1) + i.clamp_max(1),
        lambda x, y, i: (i * 256).any(1) | (x * 0.3).all(1) | (i * 256).any(),
    ],
    "reductions": [
        lambda x, y, i: x.sum((1, 3)) + x.mean((1, 3)) + x.amax((1, 3)) - x.amin((1, 3)),
        lambda x, y, i: x.var((1, 2), unbiased=True),
        lambda x, y, i: x.std(-1, keepdim=True) + torch.var_mean(y, 3, keepdim=True)[0],
        lambda x, y, i: F.layer_norm(x, (8, 9)),
        lambda x, y, i: x.prod(1) + x.norm(dim=1) + torch.logsumexp(x, 1),
        lambda x, y, i: x.max(2).values + x.min(2).values,
        lambda x, y, i: x.argmax(1) + x.argmin(1),
        lambda x, y, i: (x > 1.5).any() | (y > -1).all(),
        lambda x, y, i: x.max() + y.sum(),
        lambda x, y, i: torch.cumsum(x, 1) + torch.cumprod(y, 1),
        lambda x, y, i: F.normalize(x, dim=1) + F.softmin(y, dim=2),
    ],
    "layout": [
        lambda x, y, i: torch.cat([x, y.transpose(2, 3).reshape(2, 3, 8, 9)], 1),
        lambda x, y, i: torch.cat([i, x, y > 0], 1),
        lambda x, y, i: torch.stack([x, y], 2).flatten(1, 3),
        lambda x, y, i: x.roll((1, -2), (2, 3)) + y.flip(2),
        lambda x, y, i: x[:, 1:, ::2, -3:],
        lambda x, y, i: x[-1] + y.select(0, -2) + x[:, -1].sum(),
        lambda x, y, i: F.pixel_unshuffle(x[..., :8], 2),
        lambda x, y, i: F.pixel_shuffle(x.reshape(2, 12, 2, 9), 2),
        lambda x, y, i: F.pad(x, (1, 2, 0, 1), value=0.5)[..., 1:] + F.pad(y, (1, 1, 0, 1), mode="reflect"),
        lambda x, y, i: F.pad(x, (1, 1, 2, 0), mode="replicate"),
        lambda x, y, i: x.unfold(3, 3, 3).sum(-1),
        lambda x, y, i: torch.tril(x) + torch.triu(y, 1),
        lambda x, y, i: x.repeat(1, 2, 1, 1) + y.repeat_interleave(2, 1),
        lambda x, y, i: x.select_scatter(y[:, 0], 1, 2) + x.slice_scatter(y[:, :, :2], 2, 3, 5),
        lambda x, y, i: x.diagonal(dim1=2, dim2=3),
        lambda x, y, i: x.chunk(3, 1)[1] + x.split([2, 7], 3)[0].sum(3, keepdim=True)[:, :1],
        lambda x, y, i: x.expand(4, 2, 3, 8, 9).mean(0) + x.movedim(1, 3).permute(0, 3, 1, 2),
    ],
    "indexing": [
        lambda x, y, i: torch.gather(x, 1, i),
        lambda x, y, i: x[:, i[0, 0, 0]],
        lambda x, y, i: x.index_select(1, i[0, 0, 0]),
        lambda x, y, i: x.scatter_add(1, i, y),
        lambda x, y, i: x.scatter(1, i[:, :1], y),
        lambda x, y, i: x.masked_fill(i == 1, -3.0),
        lambda x, y, i: x.index_put((i[0, 0, 0, :1],), y[:1]),
        lambda x, y, i: F.embedding(i, y[0, 0]),
        lambda x, y, i: x.masked_scatter(i == 1, y) + x.masked_scatter(i[:, :1] == 2, y),
        lambda x, y, i: x[:, i[0, 0, :, :1], i[0, 1, :1] - 3],
        lambda x, y, i: x[i[0, 0, 0] % 2, :, i[0, 1, 0]] + y[:, :, i[0, 2, 0], i[0, 1, 0]].mT.sum(),
        lambda x, y, i: x[:, torch.arange(3)[:, None, None, None], i[1, 0, :2, :4, None], torch.arange(5)],
        lambda x, y, i: F.unfold(x, (3, 2), padding=(1, 0), stride=(2, 1)),
    ],
    "products": [
        lambda x, y, i: x @ y.transpose(2, 3),
        lambda x, y, i: torch.einsum("bchw,bdhw->bcd", x, y),
        lambda x, y, i: torch.bmm(x[0], y[0].transpose(1, 2)) + torch.baddbmm(x[1, :, :, :8], x[1], y[1].mT),
        lambda x, y, i: torch.outer(x[0, 0, 0], y[0, 0, 1]),
        lambda x, y, i: x[0, 0] @ y[0, 0, 0],
        lambda x, y, i: torch.addmm(x[0, 0, :, :8], x[0, 0], y[0, 1].T, beta=0.5, alpha=2.0),
    ],
    "sorting": [
        lambda x, y, i: torch.topk(x, 3, 2).values,
        lambda x, y, i: torch.topk(x, 3, 2).indices,
        lambda x, y, i: torch.sort(x, 1).values,
        lambda x, y, i: torch.argsort(y, 3, descending=True),
        lambda x, y, i: torch.sort(i, dim=2, descending=True, stable=True).indices,
        lambda x, y, i: torch.topk(y, 2, 1, largest=False).values + x.median(1, keepdim=True).values,
        lambda x, y, i: torch.where(x > 1.9, torch.nan, x).median(3).values + y.median(),
        lambda x, y, i: torch.cumsum(x > y, 1) + torch.cumsum(i.to(torch.int32), 0),
    ],
    "histograms": [
        lambda x, y, i: torch.histc(i.float(), bins=3, min=0, max=2),
        lambda x, y, i: torch.histc(x, bins=7, min=-1.5, max=1),
    ],
    "transforms": [
        lambda x, y, i: torch.fft.fftn(x, dim=(1, 3)).real,
        lambda x, y, i: torch.view_as_real(torch.fft.ifft(torch.fft.fft(x, dim=2, norm="ortho") * 2, dim=3)),
        lambda x, y, i: torch.fft.rfft2(x).abs() + torch.fft.rfft(y, dim=3).imag,
        lambda x, y, i: torch.fft.irfft(torch.fft.rfft(x, dim=2) * torch.fft.rfft(y, dim=2), n=8, dim=2),
        lambda x, y, i: torch.fft.irfft2(torch.fft.rfft2(x, norm="forward"), s=(8, 9), norm="forward"),
        lambda x, y, i: torch.view_as_real(torch.complex(x, y) * torch.polar(y.abs(), x)[:, :1]),
        lambda x, y, i: torch.view_as_real(torch.view_as_complex(x[..., :2] + 1).conj() - y[..., 0]),
    ],
    "vision": [
        lambda x, y, i: F.interpolate(x, scale_factor=2, mode="nearest"),
        lambda x, y, i: F.interpolate(x, size=(5, 7), mode="nearest") + F.interpolate(y, size=(5, 7), mode="nearest"),
        lambda x, y, i: F.max_pool2d(x, 3, 2, 1, return_indices=True)[1],
        lambda x, y, i: F.avg_pool2d(x, (3, 2), 2, divisor_override=5),
        lambda x, y, i: F.interpolate(x, size=(5, 20), mode="bilinear", align_corners=False),
        lambda x, y, i: F.interpolate(x, size=(5, 20), mode="bilinear", align_corners=True),
        lambda x, y, i: F.interpolate(x, size=(12, 12), mode="bicubic"),
        lambda x, y, i: F.max_pool2d(x, 3, 2, 1, ceil_mode=True) + F.avg_pool2d(y, 3, 2, 1, ceil_mode=True),
        lambda x, y, i: F.adaptive_avg_pool2d(x, (3, 2)) + F.lp_pool2d(y.abs(), 2, 2)[:, :, :3, :2],
        lambda x, y, i: F.group_norm(x, 3) + F.instance_norm(y) + F.local_response_norm(x, 2),
        lambda x, y, i: F.avg_pool1d(x[0], 2) + F.max_pool1d(y[0], 2),
        lambda x, y, i: F.grid_sample(x, y[..., :2], align_corners=False),
        lambda x, y, i: F.grid_sample(x, y[..., :2], padding_mode="border", align_corners=True),
        lambda x, y, i: F.grid_sample(x, y[..., :2], padding_mode="reflection", align_corners=False),
        lambda x, y, i: F.grid_sample(x, y[..., :2], mode="nearest", align_corners=False),
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_operators_agree_with_pytorch(family: str) -> None:
    """Every operator of the family, compiled together, gives what PyTorch gives."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand((2, 3, 8, 9), generator=generator) * 4 - 2 for _ in range(2))
    i = torch.randint(0, 3, (2, 3, 8, 9), generator=generator)

    class Net(nn.Module):
        def forward(self, x: Tensor, y: Tensor, i: Tensor) -> list[Tensor]:
            return [f(x, y, i) for f in FAMILIES[family]]  # type: ignore[misc]

    expected = Net()(x, y, i)
    with graphopt.compile(Net(), example_inputs=(x, y, i)) as bundle:
        results = list(bundle.run({"x": x, "y": y, "i": i}).values())
    assert len(results) == len(expected)
    for number, (got, want) in enumerate(zip(results, expected, strict=True)):
        torch.testing.assert_close(
            torch.from_numpy(got),
            want,
            rtol=3e-5,
            atol=3e-6,
            equal_nan=True,
            msg=lambda m, n=number: f"{family} {n}: {m}",
        )


def test_groups_of_rows_have_a_matrix_each() -> None:
    """Experts whose rows are counted at run time: none, all, some, and rows behind the last group, which are zero."""
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(7, 5, generator=generator), torch.randn(4, 5, 6, generator=generator)

    class Net(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
            return torch.ops.transformers.grouped_mm_fallback(x, weight, offs)

    import transformers.integrations.moe  # noqa: F401  (registers the operator)

    counts = [[2, 2, 5, 7], [0, 0, 0, 7], [7, 7, 7, 7], [0, 3, 3, 4], [0, 0, 0, 0]]
    examples = (x, weight, torch.tensor(counts[0], dtype=torch.int32))
    with graphopt.compile(Net(), example_inputs=examples) as bundle:
        for row in counts:
            offs = torch.tensor(row, dtype=torch.int32)
            torch.testing.assert_close(torch.from_numpy(bundle(x, weight, offs)), Net()(x, weight, offs))


def test_scatter_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """TVM's scatters carry a pragma that its code generator does not know; nobody hears of it."""

    class Net(nn.Module):
        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            return x.scatter(1, i, 2 * x)

    with graphopt.compile(Net(), example_inputs=(torch.arange(15.0).view(3, 5), torch.tensor([[4], [0], [2]]))):
        pass
    assert capfd.readouterr() == ("", "")
