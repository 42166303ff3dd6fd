"""Several sequences of tokens in one program."""

from __future__ import annotations

import re

import pytest

from graphopt.errors import BadOption
from graphopt.passes import make
from tests.hf_vision_language import PLACES, START, hf_example, hf_llava
from tests.passes.tokens.visual import logits_of, program_of
from tests.vision_language import example, llava


def test_the_tower_is_a_stream_of_its_own() -> None:
    """stream=0 reduces in the vision tower by its class token; the decoder gets all tokens back."""
    model, inputs = llava(), example()
    small = make("prune-tokens", stream=0, counts=(10, 6))(program_of(model, inputs))
    assert [row["name"] for row in small.records[-1].details if "kept" in row] == ["tower.0", "tower.1"]
    assert logits_of(small, inputs).shape == (1, 24, 50)


def test_an_error_names_the_other_sequences() -> None:
    """Which of a decoder's tokens are an image's cannot be told: that there is a tower, and its number, is said."""
    with pytest.raises(BadOption) as problem:
        make("prune-tokens", keep=0.5)(program_of(hf_llava(), hf_example()))
    assert f"tokens={START}:{START + PLACES}" in problem.value.way_out
    assert re.search(r"take another sequence: stream=0 \(.*layers.0 to .*layers.0, 10 tokens\)", problem.value.way_out)
