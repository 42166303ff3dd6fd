"""Several sequences of tokens in one program."""

from __future__ import annotations

from graphopt.passes import make
from tests.passes.tokens.visual import logits_of, program_of
from tests.vision_language import example, llava


def test_the_tower_is_a_stream_of_its_own() -> None:
    """stream=0 reduces in the vision tower by its class token; the decoder gets all tokens back."""
    model, inputs = llava(), example()
    small = make("prune-tokens", stream=0, counts=(10, 6))(program_of(model, inputs))
    assert [row["name"] for row in small.records[-1].details if "kept" in row] == ["tower.0", "tower.1"]
    assert logits_of(small, inputs).shape == (1, 24, 50)
