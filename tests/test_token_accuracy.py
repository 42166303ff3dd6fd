"""What fewer tokens cost in accuracy, on the trained network: methods that look at tokens beat a random choice."""

from __future__ import annotations

import statistics

from benchmarks.token_accuracy import METHODS, measure
from tests import glyphs

RIGHT = 504  # of the 512 held-out images, as the checkpoint in data/ answers them


def test_the_checkpoint_answers_as_it_did() -> None:
    """The network is trained well, and the drawn images are the same on every machine, or nearly."""
    assert abs(glyphs.accuracy(glyphs.load()) * glyphs.HELD_OUT - RIGHT) <= 5


def test_random_is_worst() -> None:
    """With half of the FLOPs every published method is 2 % of the images or more above random choices."""
    luck = [measure(f"prune-tokens:score=random:seed={seed}", 0.5) for seed in range(3)]
    mean = statistics.mean(row["accuracy"] for row in luck if row)
    for label in ("Token Merging", "DiffRate", "Token Transforming", "top-k by class attention"):
        row = measure(METHODS[label], 0.5)
        assert row is not None
        assert row["stays"] <= 0.5
        assert row["accuracy"] > mean + 0.02, label
