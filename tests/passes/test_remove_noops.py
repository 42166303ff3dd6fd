"""remove-noops: each kind of identity, and its look-alikes that do something."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.passes.remove_noops import RemoveNoops
from tests.programs import assert_same, ops, program_of, tiny

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))

NOOPS = {
    "dropout": lambda x: F.dropout(x, 0.3, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "same dtype": lambda x: x.to(torch.float32).float(),
    "type_as": lambda x: x.type_as(x + 0),
    "expand": lambda x: x.expand(2, -1, 4),
    "view": lambda x: x.view(2, 3, 4).reshape(2, -1, 4),
    "there and back": lambda x: x.view(6, 4).view(2, 12).view(2, 3, 4),
    "permute": lambda x: x.permute(0, -2, 2),
    "transpose": lambda x: x.transpose(1, -2),
    "slice": lambda x: x[:, :, 0:],
    "repeat": lambda x: x.repeat(1, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(1, 0),
    "roll": lambda x: torch.roll(x, (0, 0), (0, 1)),
    "pad": lambda x: F.pad(x, (0, 0, 0, 0)),
    "arithmetic": lambda x: ((x + 0) * 1 - 0.0) / 1.0,
    "power": lambda x: x**1,
    "cat": lambda x: torch.cat([x + 0, x[..., 4:]], -1),
}

NOT_NOOPS = {
    "other dtype": lambda x: x.to(torch.float64),
    "expand": lambda x: x.unsqueeze(0).expand(3, -1, -1, -1),
    "permute": lambda x: x.transpose(1, 2).permute(0, 2, 1).permute(2, 0, 1),
    "square permute": lambda x: x[:, :, :3].transpose(1, 2) * 2,
    "slice": lambda x: x[:, 1:],
    "roll": lambda x: torch.roll(x, 1, 0),
    "pad": lambda x: F.pad(x, (1, -1)),
    "add half": lambda x: x + 0.5,
    "add tensor": lambda x: x + torch.zeros(1),
    "divide": lambda x: 1 / x,
    "subtract from": lambda x: 0 - x,
    "whole to float": lambda x: (x > 0) * 1,
}


@pytest.mark.parametrize("name", NOOPS)
def test_noops_go(name):
    """Between two calls that stay, the identity leaves nothing behind, and the result is the same to the bit."""
    before = program_of(lambda s, x: NOOPS[name](x.sin()).cos(), X)
    after = RemoveNoops()(before)
    left = [op for op in ops(after) if op not in ("transpose", "add")]
    assert left == ["sin", "cos"]
    assert_same(before, after)


@pytest.mark.parametrize("name", NOT_NOOPS)
def test_look_alikes_stay(name):
    """Calls that change shape, dtype, order or values stay, and the result is the same to the bit."""
    before = program_of(lambda s, x: NOT_NOOPS[name](x.sin()), X)
    after = RemoveNoops()(before)
    assert len(ops(after)) > 1
    assert_same(before, after)


def test_training_dropout_stays():
    """Dropout that drops is no identity."""
    before = program_of(lambda s, x: F.dropout(x, 0.5, training=True), X)
    assert "dropout" in "".join(ops(RemoveNoops()(before))) or "bernoulli" in "".join(ops(RemoveNoops()(before)))


def test_copies_for_the_sake_of_views_go():
    """transpose, contiguous, view becomes transpose, reshape; later views see the other memory order and still work."""

    def forward(s, x):
        y = x.transpose(1, 2).contiguous().view(2, 12)
        z = (x.transpose(0, 2).contiguous() + 1).view(-1)
        return y.sum() + z

    before = program_of(forward, X)
    after = RemoveNoops()(before)
    assert "clone" not in ops(after)
    assert "view" not in ops(after)
    assert_same(before, after)


def test_outputs_that_are_inputs_stay_values():
    """A copy of an input that is an output stays, with its reason: the input itself is no result."""
    after = RemoveNoops()(program_of(lambda s, x: (x.clone(), x + 1), X))
    assert ops(after) == ["clone", "add"]
    assert "makes an input of the program an output" in after.records[-1].declined[0].reason


@pytest.mark.parametrize("name", ["bert", "swin", "unet"])
def test_zoo_is_unchanged(name):
    """Models with many views, copies and skips give the same to the bit, and are no longer than before."""
    after = RemoveNoops()(tiny(name))
    assert len(ops(after)) <= len(ops(tiny(name)))
    assert_same(tiny(name), after)
