"""Several sequences of tokens in one program."""

from __future__ import annotations

import re

import pytest
import torch

import graphopt
from graphopt.errors import BadOption
from graphopt.passes import make
from graphopt.passes.base import run_passes
from graphopt.program import Program
from tests.hf_vision_language import PLACES, START, hf_example, hf_llava
from tests.passes.tokens.vision import image_of, model_of
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


def reduced(*passes: dict[str, object], batch: int = 1) -> Program:
    """Three blocks of a vision transformer of 16 patches, after passes given by options."""
    x = image_of(0, batch)
    program = graphopt.capture(model_of(0), (x,))
    return run_passes(program, [make(str(own.pop("name")), **own) for own in map(dict, passes)])


def found(program: Program) -> list[tuple[int, str, int, int]]:
    rows = [row for record in program.records for row in record.details if "kept" in row]
    return [(row["block"], row["name"], row["tokens"], row["kept"]) for row in rows]


MERGE = {"name": "merge-tokens", "counts": (12,), "sites": (0,)}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("where", ["attention", "block"])
def test_blocks_behind_a_reduction_keep_their_numbers(where: str, batch: int) -> None:
    """A second pass counts the model's blocks, and starts from what the first left."""
    second = {"name": "prune-tokens", "counts": (5,), "sites": (1,), "where": where}
    small = reduced({**MERGE, "where": where}, second, batch=batch)
    assert found(small) == [(0, "blocks.0", 16, 12), (1, "blocks.1", 12, 5)]


def test_blocks_whose_tokens_came_back_keep_their_numbers() -> None:
    """All tokens are there again behind `until`, and blocks are counted on."""
    small = reduced({**MERGE, "until": 1}, {"name": "prune-tokens", "counts": (5,), "sites": (2,)})
    assert found(small) == [(0, "blocks.0", 16, 12), (2, "blocks.2", 16, 5)]


def test_two_passes_without_sites_take_turns() -> None:
    """The second has its places behind the first's, and says what it left alone."""
    small = reduced(MERGE, {"name": "prune-tokens", "counts": (8, 4)})
    assert found(small) == [(0, "blocks.0", 16, 12), (1, "blocks.1", 12, 8), (2, "blocks.2", 8, 4)]
    assert any("an earlier pass reduces tokens behind it" in each.reason for each in small.records[-1].declined)


def test_the_first_pass_may_stand_behind_the_second() -> None:
    """What is in front of an earlier reduction can be named; there all tokens come back."""
    small = reduced({**MERGE, "sites": (2,)}, {"name": "prune-tokens", "counts": (9,), "sites": (0,)})
    assert found(small) == [(2, "blocks.2", 16, 12), (0, "blocks.0", 16, 9)]


def test_places_on_both_sides_of_an_earlier_pass_are_refused() -> None:
    """Their tokens are not the same, so one falling list of counts means nothing."""
    with pytest.raises(BadOption, match="reduces tokens between sites=0 and 2") as caught:
        reduced({**MERGE, "sites": (1,)}, {"name": "prune-tokens", "counts": (9, 5), "sites": (0, 2)})
    assert "in front of block 2" in caught.value.way_out


def test_marks_in_a_file_join_streams_as_well(tmp_path: object) -> None:
    """A .pt2 that a reduction wrote is reduced further by the model's block numbers."""
    torch.manual_seed(0)
    file = f"{tmp_path}/small.pt2"
    reduced(MERGE).save(file)
    small = make("prune-tokens", counts=(5,), sites=(2,))(graphopt.capture(file))
    assert found(small)[-1] == (2, "blocks.2", 12, 5)
