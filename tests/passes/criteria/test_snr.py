"""`"snr"`: weights that are normal distributions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.axes import infer
from graphopt.errors import BadOption
from graphopt.passes import criteria
from graphopt.passes.criteria.snr import measure
from tests.passes.criteria.nets import axes_of, axis_of, mlp, score, seeded, stored
from tests.programs import program_of


class Bayesian(nn.Module):
    """A linear layer whose output is normal, given the noise."""

    def __init__(self, i: int, o: int, seed: int) -> None:
        super().__init__()
        self.weight_mu = nn.Parameter(seeded(o, i, seed=seed))
        self.weight_rho = nn.Parameter(seeded(o, i, seed=seed + 1) - 2)

    def forward(self, x, noise):
        mean = F.linear(x, self.weight_mu)
        variance = F.linear(x.square(), F.softplus(self.weight_rho).square()) + 1e-8
        return mean + variance.sqrt() * noise


def network(find=axes_of):
    """x[3, 5] -> one (7) -> relu -> two (4), with noise for both."""
    parts = {"one": Bayesian(5, 7, 0), "two": Bayesian(7, 4, 10)}

    def forward(s, x, noise):
        return s.two(F.relu(s.one(x, noise)), noise[:, :1])

    return find(program_of(forward, seeded(3, 5), seeded(3, 1), **parts))


@pytest.mark.parametrize("mu", [0.0, 0.3, -2.0, 12.0])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 3.0])
def test_moments_of_the_folded_normal(mu, sigma):
    """Mean and spread of |w| are those of numerical integration."""
    w = torch.linspace(mu - 12 * sigma, mu + 12 * sigma, 400001, dtype=torch.float64)
    density = torch.exp(-((w - mu) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

    def expected(values):
        return torch.trapezoid(values * density, w)

    first, second = expected(w.abs()), expected(w.square())
    m, s = torch.tensor([mu]), torch.tensor([sigma])
    m, s = m.double(), s.double()
    torch.testing.assert_close(measure(m, s, "magnitude")[0], first, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(measure(m, s, "snr")[0], first / (second - first.square()).sqrt(), rtol=1e-3, atol=1e-6)
    assert measure(m, s, "mean")[0] == pytest.approx(abs(mu), rel=1e-6)
    assert measure(m, s, "ratio")[0] == pytest.approx(abs(mu) / sigma, rel=1e-5)
    if sigma < 1 and abs(mu) < 3:
        one, two = expected(torch.exp(w.abs())), expected(torch.exp(2 * w.abs()))
        torch.testing.assert_close(measure(m, s, "exp")[0], one / (two - one**2).sqrt(), rtol=1e-3, atol=1e-6)


def test_far_from_zero_it_is_the_plain_ratio():
    """|w| is w there, with no cancellation left."""
    got = measure(torch.tensor([1e3]), torch.tensor([1e-6]))
    assert got.item() == pytest.approx(1e9, rel=1e-6)


def test_items_have_the_mean_of_their_weights():
    """A neuron has its row and its column, and both tensors of each pair."""
    axes = network(infer)
    one, two = (
        measure(stored(axes, f"{n}.weight_mu"), F.softplus(stored(axes, f"{n}.weight_rho"))) for n in ("one", "two")
    )
    expected = (one.sum(1) + two.sum(0)) / (5 + 4)
    torch.testing.assert_close(score("snr", axes, axis_of(axes, "one.weight_mu")), expected)


def test_a_noisy_unit_goes_first():
    """A unit of large weights that are mostly noise is below one of small sure weights."""
    axes = network()
    atom = axis_of(axes, "one.weight_mu")
    rho = {
        "one.weight_rho": torch.full((7, 5), -6.0),
        "two.weight_rho": torch.full((4, 7), -6.0),
    }
    rho["one.weight_rho"][2] = 5
    rho["two.weight_rho"][:, 2] = 5
    assert int(score("snr", axes, atom, spreads=rho).argmin()) == 2


def test_checkpoints_bring_what_was_folded(tmp_path):
    """The state_dict of the module gives what the program itself gave before it was prepared."""
    whole, prepared = network(infer), network()
    with pytest.raises(BadOption, match="no pair"):
        score("snr", prepared, axis_of(prepared, "one.weight_mu"))
    names = ("one.weight_mu", "one.weight_rho", "two.weight_mu", "two.weight_rho")
    torch.save({name: stored(whole, name) for name in names}, tmp_path / "own.pt")
    got = score("snr", prepared, axis_of(prepared, "one.weight_mu"), checkpoint=str(tmp_path / "own.pt"))
    torch.testing.assert_close(got, score("snr", whole, axis_of(whole, "one.weight_mu")))
    with pytest.raises(BadOption, match="nothing"):
        score("snr", prepared, axis_of(prepared, "one.weight_mu"), checkpoint=str(tmp_path / "nothing.pt"))
    with pytest.raises(BadOption, match="has shape"):
        score("snr", prepared, axis_of(prepared, "one.weight_mu"), spreads={"one.weight_rho": torch.zeros(2)})


def test_other_networks_are_refused():
    """Without spreads there is nothing to compute, and the error says what is looked for."""
    axes = mlp()
    with pytest.raises(BadOption, match="no pair of tensors called"):
        criteria.make("snr").scores(axes, axes.free(), None)


def test_spreads_may_be_given():
    """For a program that has only means, and with names of the user's."""
    axes = mlp()
    atom = axis_of(axes, "one.weight")
    rho = torch.zeros(8, 6)
    values = measure(stored(axes, "one.weight"), F.softplus(rho.double()))
    torch.testing.assert_close(score("snr", axes, atom, spreads={"one.weight": rho}), values.mean(1))
    assert criteria.make("snr", spreads={"one.weight": rho}).fallbacks(axes, [atom]) == []
