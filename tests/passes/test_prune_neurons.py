"""prune-neurons: feed-forward layers get narrower, gates along with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.budget import Budget
from graphopt.passes.prune_neurons import PruneNeurons
from tests.passes.reducing import assert_is_masked, prepared, shapes, share
from tests.programs import program_of


def test_gate_goes_with_the_neuron():
    """The three matrices of a gated layer lose the same neurons."""

    def forward(s, x):
        return x + s.down(nn.functional.silu(s.gate(x)) * s.up(x))

    torch.manual_seed(0)
    layers = {"gate": nn.Linear(8, 24), "up": nn.Linear(8, 24), "down": nn.Linear(24, 8)}
    after = PruneNeurons(keep=0.5, step=1)(program_of(forward, torch.randn(2, 8), **layers))
    assert shapes(after) == {"gate.weight": [12, 8], "up.weight": [12, 8], "down.weight": [8, 12]}


@pytest.mark.parametrize("name", ["deit_s", "bert", "gpt2", "llama", "swin", "convnext"])
def test_result_is_the_masked_program(name):
    """Most of the parameters: the result equals the original with the dropped neurons masked."""
    reduction, before = PruneNeurons(budget=Budget("params", 0.7), step=8), prepared(name)
    after = reduction(before)
    assert share(after, "params") <= 0.7
    assert_is_masked(reduction, before, after)
    assert all(row["to"] % 8 == 0 for row in after.records[-1].details)


def test_classes_and_vocabulary_are_left_alone():
    """Neurons that are outputs or words are pinned, and the record says why."""
    declined = PruneNeurons(keep=0.5)(prepared("gpt2")).records[-1].declined
    assert any("looked up by index" in decline.reason for decline in declined)
