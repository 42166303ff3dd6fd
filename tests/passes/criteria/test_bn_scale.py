"""`"bn-scale"`: scales of batch norms, and what axes without any get."""

from __future__ import annotations

import torch

from graphopt.passes import criteria
from tests.passes.criteria.nets import attention, axes_of, axis_of, concatenated, residual, score, stored
from tests.programs import tiny


def test_residual_partners_add_up():
    """Channels of a residual stream have the scales of all batch norms on it."""
    axes = residual()
    expected = stored(axes, "norm.weight").abs() + stored(axes, "norm2.weight").abs()
    torch.testing.assert_close(score("bn-scale", axes, axis_of(axes, "stem.weight")), expected)


def test_shifts_are_an_option():
    """gamma = 0 still sends act(beta); with `shift` only a channel with neither is free."""
    axes = residual()
    expected = stored(axes, "norm1.weight").abs() + stored(axes, "norm1.bias").abs()
    torch.testing.assert_close(score("bn-scale", axes, axis_of(axes, "inner.weight"), shift=True), expected)


def test_one_norm_over_a_concatenation():
    """A norm behind a concatenation has the scales of each part."""
    axes = concatenated()
    scale = stored(axes, "norm.weight").abs()
    torch.testing.assert_close(score("bn-scale", axes, axis_of(axes, "a.weight")), scale[:4])
    torch.testing.assert_close(score("bn-scale", axes, axis_of(axes, "b.weight")), scale[4:])


def test_axes_without_batch_norm_are_named():
    """They get the norm of their weights, with the mean of the scales that there are, and the record can say so."""
    axes = attention()
    criterion = criteria.make("bn-scale")
    named = criterion.fallbacks(axes, axes.free())
    assert len(named) == len(axes.free())
    assert "no batch norm" in named[0].reason
    atom = axes.free("head")[0]
    found = criterion.scores(axes, [atom], None)[atom]
    norm = score("l2", axes, atom).sqrt()
    torch.testing.assert_close(found, norm / norm.mean())


def test_the_stand_in_has_the_scale_of_the_others():
    """Where some axes have batch norms, all means agree with theirs."""
    axes = axes_of(tiny("mobilenet_v2"))
    criterion = criteria.make("bn-scale")
    assert criterion.fallbacks(axes, axes.free("channel")) == []
    mixed = criteria.make("bn-scale").scores(residual(), residual().free(), None)
    assert set(mixed) == set(residual().free())


def test_other_norms_are_an_option():
    """Scales of layer norms count where that is asked for."""
    axes = axes_of(tiny("deit_s"))
    atom = axes.free("embedding")[0]
    criterion = criteria.make("bn-scale", every_norm=True)
    assert criterion.fallbacks(axes, [atom]) == []
    names = [s for s in axes.program.exported.graph_signature.input_specs if s.target]
    scales = [
        axes.program.tensors[s.arg.name].detach().double().abs()
        for s in names
        if s.arg.name in axes.program.tensors
        and axes.program.tensors[s.arg.name].shape == (atom.extent,)
        and "norm" in str(s.target)
        and str(s.target).endswith("weight")
    ]
    if scales:
        torch.testing.assert_close(criterion.scores(axes, [atom], None)[atom], torch.stack(scales).sum(0))
