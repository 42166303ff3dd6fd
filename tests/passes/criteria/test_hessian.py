"""`"hessian"`: the loss to second order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.calibration import calibration
from graphopt.passes import criteria
from tests.passes.criteria.nets import attention, axes_of, axis_of, mlp, samples, score, seeded, stored
from tests.passes.criteria.test_taylor import NAMES, gradients, labelled
from tests.programs import program_of, tiny


def signed(axes, data):
    """The sum of g w of each neuron, batch by batch."""
    return torch.stack([g["one.weight"].sum(1) + g["one.bias"] + g["two.weight"].sum(0) for g in gradients(axes, data)])


@pytest.mark.parametrize(("normalise", "n"), [("tensors", 2), ("none", 1), ("nvit", 1)])
def test_squares_of_signed_sums(normalise, n):
    """Summed with signs over the item, divided, squared, averaged over batches: in this order."""
    axes = mlp()
    data = labelled(axes)
    got = score("hessian", axes, axis_of(axes, "one.weight"), data, normalise=normalise)
    torch.testing.assert_close(got, (signed(axes, data) / n).square().mean(0))


def test_on_a_quadratic_loss_the_order_is_that_of_the_true_change():
    """Against the network's own noisy output the score orders the units of a linear map as the true loss does."""
    from torch import nn

    one, two = nn.Linear(6, 5, bias=False).double(), nn.Linear(5, 4, bias=False).double()
    one.weight.data.copy_(seeded(5, 6))
    two.weight.data.copy_(seeded(4, 5, seed=1) * torch.tensor([0.1, 3.0, 1.0, 0.4, 1.7]))
    axes = axes_of(program_of(lambda s, x: s.two(s.one(x)), seeded(1, 6), one=one, two=two))
    data = calibration([seeded(1, 6, seed=n) for n in range(200)], axes.program)
    got = score("hessian", axes, axis_of(axes, "one.weight"), data, normalise="tensors")
    x = torch.cat([next(iter(batch.values())) for batch in data])
    whole = x @ one.weight.T @ two.weight.T
    change = []
    for unit in range(5):
        y = (x @ one.weight.T).index_fill(1, torch.tensor([unit]), 0) @ two.weight.T
        change.append(((whole - y).square().sum(1) / whole.square().mean(1)).mean())
    assert got.argsort().tolist() == torch.stack(change).argsort().tolist()


def test_noise_is_drawn_until_there_are_enough():
    """Few batches are gone through again with other noise; labels have none, so once will do."""
    from graphopt.observe import gradients as observed

    axes = mlp()
    data = samples(axes, 2)
    each = []
    for draw in range(3):
        for batch in observed(axes.program, data, seed=2 * draw):
            g = {name: batch.of["p_" + name.replace(".", "_")] * stored(axes, name) for name in NAMES}
            each.append((g["one.weight"].sum(1) + g["one.bias"] + g["two.weight"].sum(0)) / 2)
    got = score("hessian", axes, axis_of(axes, "one.weight"), data, draws=5, normalise="tensors")
    torch.testing.assert_close(got, torch.stack(each).square().mean(0))
    known = labelled(axes)
    atom = axis_of(axes, "one.weight")
    assert torch.equal(score("hessian", axes, atom, known), score("hessian", axes, atom, known, draws=1))


def test_each_sample_by_itself():
    """`per_sample`: the mean of squares of each sample's sum, which a batch of one gives, too."""
    axes = mlp()
    data = labelled(axes)
    single = []
    for batch, labels in zip(data, data.labels, strict=True):
        (x,) = batch.values()
        for n in range(len(x)):  # three times the same sample: its mean is that of one
            triple = calibration([(x[n : n + 1].expand(3, -1), labels[n : n + 1].expand(3))], axes.program)
            single.append(signed(axes, triple)[0] / 2)
    got = score("hessian", axes, axis_of(axes, "one.weight"), data, per_sample=True, normalise="tensors")
    torch.testing.assert_close(got, torch.stack(single).square().mean(0))


def test_products_are_additive_over_a_partition():
    """The sums of the head sizes of v are those of its heads: g w is additive."""
    axes = attention()
    data = samples(axes, 1)
    (head,) = axes.free("head")
    total = {}
    for atom in axes.free():
        total[atom] = criteria.make("taylor").scores(axes, [atom], data)[atom].sum()
    inner = sum(value for atom, value in total.items() if axes.role(atom) == "head_dim")
    torch.testing.assert_close(total[head], inner)


def test_one_layer_or_three_make_no_difference():
    """q, k and v in one tensor count as three, so that scores are those of three layers."""
    fused, apart = attention(True), attention(False)
    one, three = (
        score("hessian", axes, axes.free("head")[0], samples(axes), normalise="tensors") for axes in (fused, apart)
    )
    torch.testing.assert_close(one, three)


def test_the_paper_s_table():
    """Heads by 6, query sizes by 2, value sizes and neurons by 1, the embedding by the number of blocks."""
    axes = axes_of(tiny("deit_s"))
    data = samples(axes, 1)
    plain = criteria.make("hessian", normalise="none").scores(axes, axes.free(), data)
    own = criteria.make("hessian", normalise="nvit").scores(axes, axes.free(), data)
    found = {}
    for atom in axes.free():
        ratio = (plain[atom].sum() / own[atom].sum()).sqrt().item()
        found.setdefault(axes.role(atom), set()).add(round(ratio, 3))
    assert found["head"] == {6}
    assert found["embedding"] == {2}  # blocks
    assert found["neuron"] == {1}
    assert found["head_dim"] <= {1, 2}


def test_optimal_brain_damage():
    """`fisher`: half the mean over samples of the sum of squares of g w, sample by sample."""
    axes = mlp()
    data = labelled(axes)
    total, count = torch.zeros(8, dtype=torch.float64), 0
    for batch, labels in zip(data, data.labels, strict=True):
        (x,) = batch.values()
        for n in range(len(x)):
            w = {
                k: stored(axes, k).clone().requires_grad_()
                for k in ("one.weight", "one.bias", "two.weight", "two.bias")
            }
            y = F.linear(F.relu(F.linear(x[n : n + 1], w["one.weight"], w["one.bias"])), w["two.weight"], w["two.bias"])
            F.cross_entropy(y, labels[n : n + 1]).backward()
            g = {k: (v * v.grad).square().detach() / 2 for k, v in w.items()}
            total += g["one.weight"].sum(1) + g["one.bias"] + g["two.weight"].sum(0)
            count += 1
    got = score("hessian", axes, axis_of(axes, "one.weight"), data, fisher=True)
    torch.testing.assert_close(got, total / count)
    assert count == 9
