"""sparsify-patterns: groups of kernels go as wholes, channels permuted through the network first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.errors import BadOption
from graphopt.passes.sparsify_patterns import SparsifyPatterns
from tests.passes.sparsifying import convnet, details, matrices, mlp, weights
from tests.programs import program_of


def groups(tensor, rows):
    """Which groups of `rows` kernels have something: (ceil(outs / rows), channels)."""
    kernels = (tensor.flatten(2) != 0).any(2) if tensor.dim() > 2 else tensor != 0
    return torch.stack([part.any(0) for part in kernels.split(rows)])


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_groups_of_kernels(rows, share):
    """Zeros are whole groups, floor(p blocks) of each layer where groups are alike; what stays is whole."""
    after = SparsifyPatterns(format=f"{rows}x1", keep=1 - share, include=("one", "two"))(convnet())
    for name in ("one.weight", "two.weight"):
        tensor = weights(after)[name]
        kept = groups(tensor, rows)
        assert int((tensor != 0).sum()) == sum(
            int(own.sum()) * tensor[0, 0].numel() * len(part)
            for own, part in zip(kept, tensor.split(rows), strict=True)
        )
        if len(tensor) % rows == 0:
            assert int((~kept).sum()) == int(share * kept.numel() + 1e-6)


def test_short_groups_at_the_end():
    """Outputs that are no multiple of N leave a smaller group, which is not forgotten."""
    conv = nn.Conv2d(8, 10, 3)
    before = program_of(lambda s, x: s.conv(x), torch.randn(1, 8, 5, 5), conv=conv)
    kept = groups(weights(SparsifyPatterns(keep=0.5)(before))["conv.weight"], 4)
    assert kept.shape == (3, 8)
    assert kept[2].any()
    conv.weight.data[8:] = 9.0
    kept = groups(weights(SparsifyPatterns(keep=0.5)(before.copy()))["conv.weight"], 4)
    assert kept.shape == (3, 8)


def test_single_kernels():
    """N = 1 is the pruning of single kernels by their L1 norm."""
    before = convnet()
    after = SparsifyPatterns(format="1x1", keep=0.5, include=("one",))(before)
    norms = weights(before)["one.weight"].abs().sum((2, 3))
    expected = norms >= norms.flatten().sort().values[norms.numel() // 2]
    assert torch.equal(groups(weights(after)["one.weight"], 1), expected)


def test_whole_inputs():
    """N = all outputs removes input channels, and the record counts those that a shrink could take."""
    after = SparsifyPatterns(format="32x1", keep=0.25, include=("one",))(convnet())
    assert details(after)["one"]["unused_inputs"] == 12
    assert int((weights(after)["one.weight"] != 0).any(0).any(-1).any(-1).sum()) == 4


@pytest.mark.parametrize("rows", [2, 4, 8, 16])
def test_rearranged_groups_hold_more(rows):
    """On random weights the kept norm is higher with the rearrangement, for every N that leaves a choice."""
    before = mlp(ins=40, hidden=64, outs=32)
    held = [
        np.abs(matrices(SparsifyPatterns(format=f"{rows}x1", keep=0.5, rearrange=on)(before))["a.weight"]).sum()
        for on in (False, True)
    ]
    assert held[1] > held[0]


def test_formats():
    """Blocks of several inputs and N:M are other passes'."""
    for form in ("2x2", "2:4"):
        with pytest.raises(BadOption, match="is not N x 1"):
            SparsifyPatterns(format=form, keep=0.5)(mlp())
    after = SparsifyPatterns(keep=0.5)(convnet())
    assert {annotation.word for annotation in after.annotations.values()} == {"4x1"}
