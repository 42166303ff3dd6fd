"""`"l1"` and `"l2"`: sums over all tensors of an axis."""

from __future__ import annotations

import pytest
import torch

from tests.passes.criteria.nets import attention, axis_of, concatenated, mlp, residual, score, stored, tied


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_rows_and_columns(name, power):
    """A neuron has its row of the layer before and its column of the layer behind."""
    axes = mlp()
    one, two = (stored(axes, f"{n}.weight").abs() ** power for n in ("one", "two"))
    torch.testing.assert_close(score(name, axes, axis_of(axes, "one.weight")), one.sum(1) + two.sum(0))


@pytest.mark.parametrize(("reduce", "of"), [("mean", torch.mean), ("max", torch.amax)])
def test_reductions_over_tensors(reduce, of):
    """Tensors may be averaged, or the largest taken, instead of summed."""
    axes = mlp()
    both = torch.stack([stored(axes, "one.weight").abs().sum(1), stored(axes, "two.weight").abs().sum(0)])
    torch.testing.assert_close(score("l1", axes, axis_of(axes, "one.weight"), reduce=reduce), of(both, 0))


def test_vectors_are_an_option():
    """Biases and scales of norms count where that is asked for."""
    axes = residual()
    atom = axis_of(axes, "inner.weight")
    more = score("l1", axes, atom, vectors=True) - score("l1", axes, atom)
    expected = sum(stored(axes, name).abs() for name in ("inner.bias", "norm1.weight", "norm1.bias"))
    torch.testing.assert_close(more, expected)


def test_residual_partners_add_up():
    """The channels of a residual stream have all tensors that write to it or read from it."""
    axes = residual()
    produced = stored(axes, "stem.weight").abs().sum((1, 2, 3)) + stored(axes, "outer.weight").abs().sum((1, 2, 3))
    consumed = stored(axes, "inner.weight").abs().sum((0, 2, 3)) + stored(axes, "last.weight").abs().sum((0, 2, 3))
    torch.testing.assert_close(score("l1", axes, axis_of(axes, "stem.weight")), produced + consumed)


def test_segments_of_a_concatenation():
    """Each part of a concatenation has its own columns of what reads all of it."""
    axes = concatenated()
    last = stored(axes, "last.weight").square().sum((0, 2, 3))
    for name, own in (("a", last[:4]), ("b", last[4:])):
        expected = stored(axes, f"{name}.weight").square().sum((1, 2, 3)) + own
        torch.testing.assert_close(score("l2", axes, axis_of(axes, f"{name}.weight")), expected)


def test_tied_weights_count_once():
    """An embedding that is the output layer, too, is one tensor."""
    axes = tied()
    expected = stored(axes, "words.weight").abs().sum(0) + stored(axes, "up.weight").abs().sum(0)
    expected = expected + stored(axes, "down.weight").abs().sum(1)
    torch.testing.assert_close(score("l1", axes, axis_of(axes, "up.weight", 1)), expected)


def test_heads_and_head_sizes():
    """Factors of (qkv heads dim) get what of the tensor is theirs; v's size is another axis than q's and k's."""
    axes = attention()
    weight = stored(axes, "qkv.weight").abs().sum(1).view(3, 3, 4)
    out = stored(axes, "out.weight").abs().sum(0).view(3, 4)
    by_role = {(axes.role(atom), atom.extent): score("l1", axes, atom) for atom in axes.free("head")}
    torch.testing.assert_close(by_role["head", 3], weight.sum((0, 2)) + out.sum(1))
    sizes = [score("l1", axes, atom) for atom in axes.free("head_dim")]
    wanted = [weight[:2].sum((0, 1)), weight[2].sum(0) + out.sum(0)]
    assert len(sizes) in (1, 2)
    if len(sizes) == 2:
        for got, expected in zip(sizes, wanted, strict=True):
            torch.testing.assert_close(got, expected)
    else:
        torch.testing.assert_close(sizes[0], sum(wanted))


def test_normalised():
    """DepGraph's: divided by the mean of the axis."""
    axes = mlp()
    atom = axis_of(axes, "one.weight")
    plain = score("l2", axes, atom)
    torch.testing.assert_close(score("l2", axes, atom, normalise="mean"), plain / plain.mean())
