"""`"taylor"`: the loss to first order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.calibration import calibration
from graphopt.passes import criteria
from tests.passes.criteria.nets import axis_of, mlp, residual, samples, score, seeded, stored, tied

NAMES = ("one.weight", "one.bias", "two.weight", "two.bias")


def labelled(axes, count=3):
    """Batches with class labels."""
    batches = [(seeded(3, 6, seed=n), torch.tensor([0, 2, n])) for n in range(count)]
    return calibration(batches, axes.program)


def gradients(axes, data):
    """w and g w of each parameter, batch by batch, of the cross-entropy."""
    for batch, labels in zip(data, data.labels, strict=True):
        w = {name: stored(axes, name).clone().requires_grad_() for name in NAMES}
        (x,) = batch.values()
        y = F.linear(F.relu(F.linear(x, w["one.weight"], w["one.bias"])), w["two.weight"], w["two.bias"])
        F.cross_entropy(y, labels).backward()
        yield {name: (value * value.grad).detach() for name, value in w.items()}


def test_sums_of_absolute_products():
    """Row, bias and column of a neuron; labels are what the loss is against."""
    axes = mlp()
    data = labelled(axes)
    each = [
        g["one.weight"].abs().sum(1) + g["one.bias"].abs() + g["two.weight"].abs().sum(0) for g in gradients(axes, data)
    ]
    got = score("taylor", axes, axis_of(axes, "one.weight"), data)
    torch.testing.assert_close(got, torch.stack(each).mean(0))


def test_signed_sums():
    """The absolute value of the sum, batch by batch."""
    axes = mlp()
    data = labelled(axes)
    each = [(g["one.weight"].sum(1) + g["one.bias"] + g["two.weight"].sum(0)).abs() for g in gradients(axes, data)]
    got = score("taylor", axes, axis_of(axes, "one.weight"), data, signed=True)
    torch.testing.assert_close(got, torch.stack(each).mean(0))


def test_of_rectified_units_both_ends_agree():
    """g w summed over what makes a unit equals that over what reads it, so the signed score counts it twice."""
    axes = mlp()
    for g in gradients(axes, labelled(axes)):
        torch.testing.assert_close(g["one.weight"].sum(1) + g["one.bias"], g["two.weight"].sum(0))


def test_without_labels_the_program_is_its_own_teacher():
    """A residual stream and a tied embedding get scores that are not all zero."""
    for axes in (residual(), tied()):
        found = criteria.make("taylor").scores(axes, axes.free(), samples(axes))
        assert all(bool((scores > 0).all()) for scores in found.values())


def test_tied_gradients_add_up():
    """Of a tensor under two names both gradients count: scores are those of g w with the whole gradient."""
    axes = tied()
    data = samples(axes, 1)
    labels = torch.arange(10).reshape(2, 5)
    data = calibration([({**data[0]}, labels)], axes.program)
    w = {
        n: stored(axes, n).clone().requires_grad_()
        for n in ("words.weight", "up.weight", "up.bias", "down.weight", "down.bias")
    }
    (ids,) = data[0].values()
    x = w["words.weight"][ids]
    x = x + F.linear(F.gelu(F.linear(x, w["up.weight"], w["up.bias"])), w["down.weight"], w["down.bias"])
    F.cross_entropy(F.linear(x, w["words.weight"]).movedim(-1, 1), labels).backward()
    g = {n: (v * v.grad).abs().detach() for n, v in w.items()}
    expected = g["words.weight"].sum(0) + g["up.weight"].sum(0) + g["down.weight"].sum(1) + g["down.bias"]
    torch.testing.assert_close(score("taylor", axes, axis_of(axes, "up.weight", 1), data), expected)


def test_elements_serve_sparsity():
    """Each element has the mean of |g w|, of the tensor's shape."""
    axes = mlp()
    data = labelled(axes)
    found = {member.names[0]: values for member, values in criteria.make("taylor").elements(axes, data)}
    expected = torch.stack([g["one.weight"].abs() for g in gradients(axes, data)]).mean(0)
    torch.testing.assert_close(found["p_one_weight"], expected)


def test_labels_that_are_asked_for_must_be_there():
    """The error is that of the gradients."""
    from graphopt.errors import BadLabels

    axes = mlp()
    with pytest.raises(BadLabels):
        score("taylor", axes, axis_of(axes, "one.weight"), samples(axes), loss="labels")
