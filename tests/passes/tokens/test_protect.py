"""Which tokens never go where the user names none, and what scores do where no class token is there to look at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import BadOption
from tests.passes.tokens.vision import LAYERS, PATCHES, after, image_of, model_of
from tests.transformer_nets import VisionTransformer

HALF = (PATCHES // 2,) * LAYERS


class Classless(VisionTransformer):
    """Patches alone, and a query of the head's own that looks at all of them, as SigLIP has."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2) + self.position[:, 1:]))
        return self.head(((x @ self.cls.transpose(1, 2)).softmax(1) * x).sum(1))


class Words(VisionTransformer):
    """Tokens that nothing was put in front of; the head reads one of them, as BERT's does."""

    def __init__(self, *args: int, **sizes: int) -> None:
        super().__init__(*args, **sizes)
        self.read, self.words = 0, nn.Embedding(50, self.position.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x) + self.position[:, 1:]
        return self.head(self.norm(self.blocks(x))[:, self.read])


def test_without_a_class_token_all_tokens_attention_counts() -> None:
    """The default score says so and is mean attention; the first patch is one like others."""
    model, x = model_of(1, Classless), image_of(2, 2)
    small, got = after(model, x, "prune-tokens", counts=HALF)
    assert any("there is no class token" in note for note in small.records[-1].notes)
    assert torch.equal(got, after(model, x, "prune-tokens", counts=HALF, score="mean-attention")[1])


def test_a_class_token_that_is_none_is_refused() -> None:
    """Who names one that may go is told; not where the user says which may go."""
    model, x = model_of(1, Classless), image_of(2, 1)
    options = {"counts": HALF, "score": "class-attention:token=3"}
    with pytest.raises(BadOption, match="token 3 may go"):
        after(model, x, "prune-tokens", **options)
    after(model, x, "prune-tokens", tokens="0:16", **options)


@pytest.mark.parametrize(("read", "others"), [(0, "1:16"), (-1, "0:15")])
def test_the_token_that_the_head_reads_stays(read: int, others: str) -> None:
    """It is none of those that may go, at either end of the sequence."""
    model = model_of(3, Words)
    model.read = read
    ids = torch.randint(50, (2, PATCHES), generator=torch.Generator().manual_seed(4))
    options = {"counts": (5,), "sites": (0,), "trace": True, "score": "norm"}
    small, got = after(model, ids, "prune-tokens", **options)
    trace = small.run({small.inputs[0].name: ids})["tokens_0"]
    assert trace.shape == (2, PATCHES - 1)
    assert (trace >= 0).sum(1).tolist() == [5, 5]
    assert torch.equal(got, after(model, ids, "prune-tokens", tokens=others, **options)[1])


@pytest.mark.parametrize("sites", [(1, 0), (1, 1)])
def test_places_are_named_in_order(sites: tuple[int, ...]) -> None:
    """Counts belong to places by their order, so places that are out of it, or named twice, are an error."""
    with pytest.raises(BadOption, match="sites=1"):
        after(model_of(1), image_of(2, 1), "prune-tokens", counts=(9, 5), sites=sites)


def test_all_that_stay_are_said_to() -> None:
    """Counts of all tokens change nothing, and that is the reason which is given."""
    small, _ = after(model_of(1), image_of(2, 1), "prune-tokens", counts=(PATCHES,) * LAYERS)
    assert "all 16 tokens stay" in small.records[-1].remarks[-1]
