"""Given segments of tokens go, the same for every input."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import BadOption
from graphopt.passes import make
from tests.passes.tokens.visual import logits_of, program_of
from tests.transformer_nets import tables
from tests.vision_language import example, llava


@pytest.mark.parametrize("segments", [("4:7",), ("0:2", "10:15"), ("5:24",)])
def test_segments_are_dropped_behind_a_block(segments: tuple[str, ...]) -> None:
    """The same tokens for every input; what stays is where it was."""
    model, inputs = llava(), example(2)
    small = make("drop-segments", segments=segments, sites=(1,))(program_of(model, inputs))
    gone = {place for each in segments for place in range(*map(int, each.split(":")))}
    index = torch.tensor([place for place in range(24) if place not in gone])
    decoder = model.decoder
    with torch.no_grad():
        x = model.embed(inputs["input_ids"], inputs["pixels"])
        for number, block in enumerate(decoder.blocks):
            x = block(x, *tables(index if number > 1 else torch.arange(24), decoder.size))
            x = x[:, index] if number == 1 else x
        wanted = decoder.head(decoder.norm(x))
    torch.testing.assert_close(logits_of(small, inputs), wanted, atol=2e-5, rtol=1e-4)


GONE = {"segments": ("1:2", "6:12")}
STAY = torch.tensor([place for place in range(24) if place != 1 and not 6 <= place < 12])


def test_dropping_before_the_first_layer_is_a_shorter_input_with_its_positions() -> None:
    """No layer has ever seen what is gone; the others are where they were."""
    model, inputs = llava(True), example(2)
    small = make("drop-segments", where="input", **GONE)(program_of(model, inputs))
    decoder, cache = model.decoder, []
    with torch.no_grad():
        x = model.embed(inputs["input_ids"], inputs["pixels"])[:, STAY]
        for block in decoder.blocks:
            x = block(x, *tables(STAY, decoder.size), cache)
        wanted = decoder.head(decoder.norm(x))
    for mine, theirs in zip(small.run(inputs).values(), [wanted, *cache], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_dropping_behind_the_last_layer_leaves_what_stays_as_it_is() -> None:
    """Keys and values are those of all tokens, logits those of the tokens that stay, bit by bit."""
    program, inputs = program_of(llava(True), example(2)), example(2)
    small = make("drop-segments", sites=(3,), **GONE)(program)
    whole = list(program.run(inputs).values())
    got = list(small.run(inputs).values())
    torch.testing.assert_close(got[0], whole[0][:, STAY], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(got[1:], whole[1:], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("segments", [(), ("5:3",), ("4:4",), ("a:b",), ("3",)])
def test_segments_that_are_none_are_refused(segments: tuple[str, ...]) -> None:
    """Empty, backwards, no numbers: one error that says how to write them."""
    program = program_of(llava(), example())
    with pytest.raises(BadOption, match="START:STOP"):
        make("drop-segments", segments=segments, sites=(1,))(program)
    with pytest.raises(BadOption, match="leave it out"):
        make("drop-segments", segments=("4:7",), sites=(1,), keep=0.5)(program)
