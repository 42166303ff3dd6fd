"""Layers behind a cut are fitted anew: exactly where that is possible, and never to the worse."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import graphopt.compensate as compensation
from graphopt.axes import Axes, Axis, find, infer
from graphopt.budget import Budget
from graphopt.calibration import calibration
from graphopt.capture import capture
from graphopt.compensate import RIDGES, batch_statistics, compensate
from graphopt.hold_out import Split
from graphopt.least_squares import Moments, supports_of, work_of
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.passes.prune import Prune
from graphopt.program import Program
from graphopt.shrink import shrink
from tests import digits
from tests.transformer_nets import Attention

HALF = 4  # of 8 items


def planted(first: nn.Module, *rest: nn.Module) -> nn.Sequential:
    """A network whose first layer gives 8 items of which the last 4 are mixtures of the others, shifted by 1.

    Where the layer behind has no bias to take the shift, it is left out.
    """
    net = nn.Sequential(first, *rest)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mixture = torch.randn(HALF, HALF, generator=generator)
        weight, bias = first.weight, first.bias  # type: ignore[union-attr]
        weight[HALF:] = torch.tensordot(mixture, weight[:HALF], dims=1)
        bias[HALF:] = mixture @ bias[:HALF] + float(getattr(rest[0], "added", True))
    return net


def hidden(axes: Axes, name: str = "0.weight", dim: int = 0) -> Axis:
    """The axis that the first layer produces."""
    node = next(node for node in axes.dims if axes.name_of(node) == name)
    return find(axes.dims[node][dim])


def errors(before: Program, after: Program, inputs: Tensor) -> float:
    """Relative error of the first output over batches of what the program was captured for."""
    size = before.inputs[0].shape[0]
    pairs = [(before(batch), after(batch)) for batch in inputs.split(size) if len(batch) == size]
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (apart / sum(float(a.double().square().sum()) for a, _ in pairs)) ** 0.5


# What is redundant comes back exactly -------------------------------------------------------------------------------

NETS = {
    "linear": lambda: (planted(nn.Linear(5, 8), nn.Linear(8, 3)), (5,)),
    "addmm": lambda: (planted(nn.Linear(5, 8), Product()), (5,)),
    "matmul": lambda: (planted(nn.Linear(5, 8), Product(added=False)), (5,)),
    "conv": lambda: (planted(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), (3, 9, 9)),
    "stride": lambda: (planted(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, stride=2, dilation=2)), (3, 12, 11)),
    "same": lambda: (planted(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, (1, 1), padding="same")), (3, 6, 6)),
    "conv1d": lambda: (planted(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 3)), (3, 12)),
    "norm": lambda: (planted(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)), (3, 9, 9)),
}


class Product(nn.Module):
    """A product with a stored matrix (ins, outs); a stored vector is added, or not."""

    def __init__(self, added: bool = True) -> None:
        super().__init__()
        self.added = added
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight) if self.added else x @ self.weight


@pytest.mark.parametrize("name", NETS)
def test_redundant_items_are_made_up_for(name: str) -> None:
    """Items that are mixtures of those that stay are no loss, on the data and on what was never seen."""
    torch.manual_seed(0)
    net, shape = NETS[name]()
    program = capture(net.double().eval(), (torch.randn(16, *shape, dtype=torch.float64),))
    axes = infer(program)
    keep = {hidden(axes): range(HALF)}
    small = shrink(axes, keep)
    data, fresh = torch.randn(2, 128, *shape, dtype=torch.float64)
    after = compensate(axes, keep, small, data)
    assert errors(program, small, fresh) > 0.1
    assert errors(program, after, data) < 1e-6
    assert errors(program, after, fresh) < 1e-6
    assert after.records[-1].changed == {"weight fitted": 1}
    row = after.records[-1].details[0]
    assert row["error_before"] > 0.1
    assert row["error_after"] < 1e-6


def test_each_group_of_a_convolution_is_fitted_on_its_own() -> None:
    """A convolution in two groups, whose groups each lose the same half of their inputs."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 6, 3, groups=2)
    mixture = torch.randn(2, 4, 4)
    with torch.no_grad():
        for group in range(2):
            own = slice(8 * group, 8 * group + 8)
            first.weight[own][4:] = torch.tensordot(mixture[group], first.weight[own][:4], dims=1)
            first.bias[own][4:] = mixture[group] @ first.bias[own][:4]
    net = nn.Sequential(first, second).double()
    data = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    program = capture(net, (data[:16],))
    axes = infer(program)
    keep = {hidden(axes, "1.weight", 1): range(4)}
    after = compensate(axes, keep, shrink(axes, keep), data)
    assert errors(program, after, torch.randn(32, 3, 8, 8, dtype=torch.float64)) < 1e-6


def test_the_projection_behind_attention() -> None:
    """A head whose values are those of another can go: the output projection takes both on."""
    torch.manual_seed(0)
    net = Attention(16, 4).double()
    with torch.no_grad():
        for part in net.project[0].weight.view(3, 4, 4, 16), net.project[0].bias.view(3, 4, 4):
            part[:, 3] = part[:, 2]
    data = torch.randn(64, 6, 16, dtype=torch.float64)
    program = capture(net, (data[:8],))
    axes = infer(program)
    (heads,) = axes.free("head")
    keep = {heads: [0, 1, 2]}
    small = shrink(axes, keep)
    after = compensate(axes, keep, small, data)
    assert errors(program, small, data) > 0.1
    assert errors(program, after, torch.randn(32, 6, 16, dtype=torch.float64)) < 1e-6


def test_a_residual_makes_up_for_errors_further_up() -> None:
    """What a branch adds is fitted to the sum: the error that the other summand brings along is taken off."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.branch = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.up(x).tanh())
            return y + self.branch(x)

    data = torch.randn(512, 6)
    program = capture(Net(), (data[:32],))
    axes = infer(program)
    keep = {hidden(axes, "up.weight"): range(4)}
    record = compensate(axes, keep, shrink(axes, keep), data, merge=()).records[-1]
    assert [row["where"] for row in record.details] == ["down.weight", "branch.weight", "outputs"]


# Statistics ---------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_training_mode() -> None:
    """Mean and variance are what PyTorch's batch norm gathers in train mode with a cumulative average."""
    values = torch.randn(32, 5, 4, 4) * 3 + 1
    norm = nn.BatchNorm2d(5, momentum=None).train()
    norm(values)
    mean, var = batch_statistics([values])
    torch.testing.assert_close(mean.float(), norm.running_mean)
    torch.testing.assert_close(var.float(), norm.running_var)
    parts = batch_statistics(values.split(8))
    torch.testing.assert_close(parts, (mean, var))


def test_batch_norms_meet_their_own_statistics() -> None:
    """Behind a layer that cannot be fitted, here because its weight has two users, the batch norm is set anew."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x).relu()
            return self.norm(self.down(y) + self.down(y.square()))

    net, data = Net(), torch.randn(128, 6)
    net.down.weight.data.abs_()  # without half of the hidden items the mean is far too low
    net.norm.momentum = None
    net(data)
    program = capture(net.eval(), (data[:32],))
    axes = infer(program)
    keep = {hidden(axes, "up.weight"): range(4)}
    after = compensate(axes, keep, shrink(axes, keep), data)
    record = after.records[-1]
    assert record.changed == {"statistics fitted": 1}
    assert any("used more than once" in decline.reason for decline in record.declined)
    (mean,) = (t for name, t in after.tensors.items() if "running_mean" in name)
    x = torch.cat([data[32 * n : 32 * n + 32] for n in range(3)])  # the last of four batches is held out
    y = torch.relu(x @ net.up.weight[:4].T + net.up.bias[:4])
    torch.testing.assert_close(mean, ((y + y.square()) @ net.down.weight[:, :4].T).mean(0))


# Never to the worse -------------------------------------------------------------------------------------------------


@cache
def trained(name: str) -> Program:
    load = {"cnn": digits.load_cnn, "vit": digits.load_vit}[name]
    return run_passes(capture(load(), (digits.data()[0][:64],)), PREPARE, check=False)


@cache
def pruned(name: str, share: float, compensated: bool) -> Program:
    """Cut to a share of the FLOPs, with 256 images to make up for it."""
    images = digits.data()[0][:256]
    reduction = Prune(budget=Budget("flops", share), calibration=images, compensate=compensated)
    return reduction(trained(name))


@pytest.mark.parametrize(("name", "plain", "fitted"), [("cnn", 0.5, 0.97), ("vit", 0.75, 0.87)])
def test_accuracy_comes_back(name: str, plain: float, fitted: float) -> None:
    """Half of the FLOPs: on held-out images, which nothing was fitted to, most of the accuracy lost is regained."""
    assert digits.accuracy(pruned(name, 0.5, False)) < plain
    assert digits.accuracy(pruned(name, 0.5, True)) > fitted


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_every_fit_helps_on_held_out_rows(name: str) -> None:
    """The record has each layer with the error before and after; the FLOPs stay."""
    record = pruned(name, 0.5, True).records[-1]
    rows = [row for row in record.details if "fitted" in row]
    assert len(rows) > 4
    assert all(row["error_after"] <= row["error_before"] for row in rows)
    assert rows[-1]["where"] == "outputs"
    assert record.flops_after == pruned(name, 0.5, False).records[-1].flops_after


def test_noise_is_not_fitted() -> None:
    """With fewer samples than unknowns, fresh samples are no further off than without."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 10))
    program = capture(net, (torch.randn(4, 40),))
    axes = infer(program)
    keep = {hidden(axes): range(48)}
    small = shrink(axes, keep)
    after = compensate(axes, keep, small, torch.randn(16, 40))
    fresh = torch.randn(1024, 40)
    assert errors(program, after, fresh) <= errors(program, small, fresh)


def test_what_does_not_help_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the outputs come no nearer, all tensors are the old ones, and the record says so."""
    compare = compensation._Compensation._compare

    def swapped(*args) -> tuple[float, float, float]:
        before, after, size = compare(*args)
        return after, before, size

    monkeypatch.setattr(compensation._Compensation, "_compare", swapped)
    program = trained("cnn")
    axes = infer(program)
    keep = Prune(keep=0.5).plan(axes).keep
    small = shrink(axes, keep)
    after = compensate(axes, keep, small, digits.data()[0][:256])
    assert after.records[-1].changed == {}
    assert "taken back" in after.records[-1].declined[-1].reason
    assert all(torch.equal(tensor, small.tensors[name]) for name, tensor in after.tensors.items())


# When and with what -------------------------------------------------------------------------------------------------


def test_on_where_data_is_given() -> None:
    """Without calibration data, and with example inputs marked as such, nothing is fitted unless asked for."""
    program, images = trained("cnn"), digits.data()[0][:128]

    def fits(**options) -> bool:
        return any("fitted" in what for what in Prune(keep=0.5, **options)(program).records[-1].changed)

    assert fits(calibration=images)
    assert fits(compensate=True)
    assert not fits(calibration=images, compensate=False)
    assert not fits()
    assert not fits(calibration=calibration(None, program))


def test_equal_runs_agree() -> None:
    """Rows are drawn the same each time."""
    program = trained("cnn")
    reduction = Prune(keep=0.5, calibration=digits.data()[0][:256])
    first, second = reduction(program), reduction(program)
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    assert first.records == second.records


def test_memory_bounds_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the values of all batches do not fit, fewer are used, and the record says how many."""
    program = trained("cnn")
    monkeypatch.setattr(compensation, "MEMORY_BYTES", 5_000_000)
    record = Prune(keep=0.5, calibration=digits.data()[0][:256])(program).records[-1]
    assert any("of 4 batches: more do not fit into memory" in decline.reason for decline in record.declined)


def test_many_inputs_move_the_bias_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with more inputs than are solved for has the mean difference added to its bias, no more."""
    monkeypatch.setattr(compensation, "MOST_INPUTS", 8)
    program = trained("vit")
    after = Prune(keep=0.5, calibration=digits.data()[0][:256])(program)
    assert after.records[-1].changed["bias fitted"] > 0
    assert "weight fitted" not in after.records[-1].changed


def test_moments_are_those_of_all_rows() -> None:
    """The solution from sums over parts is that of ordinary ridge regression, and the error that of its residuals."""
    torch.manual_seed(0)
    x, e = torch.randn(2, 50, 4, dtype=torch.float64), torch.randn(2, 50, 3, dtype=torch.float64)
    moments = Moments(2, 4, 3)
    for part in range(0, 50, 10):
        moments.add(x[:, part : part + 10], e[:, part : part + 10])
    for ridge in RIDGES[:-1]:
        solved = moments.solve(ridge, shift=True)
        assert solved is not None
        centred, wanted = x - x.mean(1, keepdim=True), e - e.mean(1, keepdim=True)
        gram = centred.mT @ centred
        lam = ridge * gram.diagonal(dim1=1, dim2=2).mean(1)
        right = torch.linalg.solve(gram + lam[:, None, None] * torch.eye(4), centred.mT @ wanted).mT
        torch.testing.assert_close(solved[0], right)
        residual = e - x @ solved[0].mT - solved[1][:, None]
        assert moments.error(*solved) == pytest.approx(float(residual.square().sum()))


@pytest.mark.parametrize("batches", [1, 3, 4, 9])
def test_parts_share_no_row(batches: int) -> None:
    """Every row is fitted to or held out, about a quarter is; what is drawn is of these, no more than may be."""
    split = Split(batches)
    fitted = held = drawn = 0
    for batch in range(batches):
        a, b = set(split.fitted(batch, 100)), set(split.held(batch, 100))
        assert not a & b
        assert a | b == set(range(100))
        fitted, held = fitted + len(a), held + len(b)
        some = split.drawn(batch, 100, 40)
        assert set(some[0].tolist()) <= a
        assert set(some[1].tolist()) <= b
        drawn += len(some[0])
    assert 0.1 < held / (held + fitted) < 0.3
    assert drawn <= 40 + batches


@pytest.mark.parametrize("shift", [False, True])
def test_zeros_stay_zero(shift):
    """With supports each row is the least-squares fit on its own columns, and zero elsewhere."""
    torch.manual_seed(0)
    x, e = torch.randn(2, 60, 7, dtype=torch.float64), torch.randn(2, 60, 5, dtype=torch.float64)
    kept = torch.rand(2, 5, 7) < 0.4
    kept[0, 1] = kept[0, 0]  # rows of one support
    kept[1, 3] = False
    moments = Moments(2, 7, 5)
    moments.add(x, e)
    correction, moved = moments.solve(0.0, shift=shift, supports=supports_of(kept))
    assert bool((correction[~kept] == 0).all())
    for group, row in itertools.product(range(2), range(5)):
        columns = kept[group, row]
        inputs = x[group][:, columns]
        if shift:
            inputs = torch.cat([inputs, torch.ones(60, 1)], 1)
        best = torch.linalg.lstsq(inputs, e[group, :, row : row + 1]).solution[:, 0]
        found = correction[group, row, columns]
        torch.testing.assert_close(torch.cat([found, moved[group, row : row + 1]]) if shift else found, best)
    assert work_of(supports_of(kept)) <= 10 * 7**3 / 3
