"""`"activation"`: values of items on data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.passes.criteria.nets import attention, axis_of, concatenated, mlp, samples, score, stored

MEASURES = {
    "mean": lambda x: x.abs().mean(0),
    "rms": lambda x: x.square().mean(0).sqrt(),
    "std": lambda x: x.std(0, correction=0),
    "nonzero": lambda x: (x != 0).double().mean(0),
}


def hidden(axes, data):
    """What the second layer of the perceptron reads, all samples."""
    return torch.cat(
        [
            F.relu(
                F.linear(b["x" if "x" in b else next(iter(b))], stored(axes, "one.weight"), stored(axes, "one.bias"))
            )
            for b in data
        ]
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_values_that_are_consumed(measure):
    """Behind the activation function, over all samples."""
    axes = mlp()
    data = samples(axes)
    expected = MEASURES[measure](hidden(axes, data))
    torch.testing.assert_close(score("activation", axes, axis_of(axes, "one.weight"), data, measure=measure), expected)


def test_channels_of_a_concatenation():
    """Channels are seen where they are consumed: concatenated, normalised, rectified."""
    axes = concatenated()
    data = samples(axes)
    atom = axis_of(axes, "b.weight")
    values = []
    for batch in data:
        (x,) = batch.values()
        y = F.conv2d(x, stored(axes, "b.weight"), stored(axes, "b.bias"))
        norm = [stored(axes, f"norm.{n}")[4:] for n in ("running_mean", "running_var", "weight", "bias")]
        values.append(F.relu(F.batch_norm(y, *norm)))
    expected = torch.cat(values).abs().mean((0, 2, 3))
    torch.testing.assert_close(score("activation", axes, atom, data), expected)


def test_sizes_of_heads_that_nothing_stored_consumes():
    """Those of queries and keys have the values that the projection gives."""
    axes = attention()
    data = samples(axes)
    q_atom = axes.free("head_dim")[0]
    found = score("activation", axes, q_atom, data)
    assert bool((found > 0).all())
    (head,) = axes.free("head")
    y = []
    for batch in data:
        (x,) = batch.values()
        q, k, v = (
            F.linear(x, stored(axes, "qkv.weight"), stored(axes, "qkv.bias"))
            .reshape(2, 5, 3, 3, 4)
            .permute(2, 0, 3, 1, 4)
        )
        y.append(F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(score("activation", axes, head, data), torch.cat(y).abs().mean((0, 2, 3)))
