"""prune-embeddings: the residual stream gets narrower, with norms over what is kept."""

from __future__ import annotations

import pytest

from graphopt.budget import Budget
from graphopt.passes.prune_embeddings import PruneEmbeddings
from tests.passes.reducing import assert_is_masked, prepared, shapes, share


def test_every_layer_follows():
    """One axis: embeddings, norms and all layers that read or write the stream."""
    after = PruneEmbeddings(keep=0.5)(prepared("deit_s"))
    assert after.records[-1].changed == {"embedding axis": 1}
    assert all(16 in shape for shape in shapes(after).values())


@pytest.mark.parametrize("name", ["deit_s", "gpt2", "llama", "swin"])
def test_result_is_the_program_with_statistics_over_the_kept(name):
    """The result equals the original whose norms ignore the dropped features."""
    reduction, before = PruneEmbeddings(budget=Budget("flops", 0.6), step=1), prepared(name)
    after = reduction(before)
    assert share(after, "flops") <= 0.6
    assert_is_masked(reduction, before, after)


def test_last_hidden_state_keeps_its_width():
    """An encoder's output is its stream: pinned, and the record says so."""
    record = PruneEmbeddings(keep=0.5)(prepared("bert")).records[-1]
    assert not record.changed
    assert "axis is pinned: program output" in [decline.reason for decline in record.declined]
