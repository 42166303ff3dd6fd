"""The masked program, which keeps all tokens, computes what the program on fewer tokens does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import graphopt
from graphopt.edit import Edit
from graphopt.errors import BadOption
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.passes.diffrate import Diffrate
from graphopt.passes.tokens.job import Job
from graphopt.passes.tokens.masked import KEPT, THROUGH, masked
from graphopt.program import Program
from tests.passes.tokens import reference
from tests.passes.tokens.vision import LAYERS, PATCHES, Dense, Pooled, image_of, model_of
from tests.transformer_nets import Attention, VisionTransformer


class WrittenOut(nn.Module):
    """The attention of a block as two products and a softmax."""

    def __init__(self, own: Attention) -> None:
        super().__init__()
        self.heads, self.project, self.out = own.heads, own.project, own.out

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.project[0](x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, c))


def written_out(model: VisionTransformer) -> VisionTransformer:
    """The same model with its attention written out."""
    for block in model.blocks:
        block.attention = WrittenOut(block.attention)
    return model


def prepared(model: nn.Module, x: Tensor) -> Program:
    return run_passes(graphopt.capture(model, (x,)), PREPARE)


def tables_of(counts: list[int]) -> Tensor:
    return torch.stack([(torch.arange(PATCHES) < count).float() for count in counts])


@settings(max_examples=5, deadline=None)
@given(
    batch=st.sampled_from([1, 3]),
    out=st.booleans(),
    falls=st.lists(st.integers(1, PATCHES), min_size=2 * LAYERS, max_size=2 * LAYERS),
    seed=st.integers(0, 100),
)
def test_masked_program_computes_what_fewer_tokens_do(batch: int, out: bool, falls: list[int], seed: int) -> None:
    """Any counts, dropped and merged, one sample or several, attention fused or written out: pass and reference too."""
    falls = sorted(falls, reverse=True)
    through, kept = falls[::2], falls[1::2]
    model, x = model_of(seed), image_of(seed + 1, batch)
    with torch.no_grad():
        wanted = reference.reduced(model, x, reference.prune_merge(through, kept))
    program = prepared(written_out(model) if out else model, x)
    options = Diffrate(counts=tuple(kept), through=tuple(through))
    module = masked(Job(options, Edit(program))).to_module().eval()
    tables = {THROUGH: tables_of(through), KEPT: tables_of(kept)}
    with torch.no_grad():
        got = functional_call(module, tables, (x,))
    torch.testing.assert_close(got, wanted, atol=5e-5, rtol=1e-3)
    torch.testing.assert_close(options(program).run({"x": x})["output"], wanted, atol=5e-5, rtol=1e-3)


def test_masked_program_with_tables_of_ones_is_the_dense_one() -> None:
    """The logarithm of sizes of one is zero, and no key is hidden."""
    model, x = model_of(1), image_of(2, 2)
    program = masked(Job(Diffrate(keep=0.5), Edit(prepared(model, x))))
    with torch.no_grad():
        torch.testing.assert_close(program.run({"x": x})["output"], model(x), atol=1e-5, rtol=1e-4)


def test_hidden_tokens_may_be_huge() -> None:
    """What is hidden overflows nowhere, however large its logits would be; gradients stay finite."""
    model, x = model_of(3), image_of(4, 1)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.project[0].weight *= 30
    module = masked(Job(Diffrate(keep=0.5), Edit(prepared(model, x)))).to_module().eval()
    tables = {name: tables_of([9, 6, 4]).requires_grad_() for name in (THROUGH, KEPT)}
    got = functional_call(module, tables, (x,))
    got.square().sum().backward()
    assert got.isfinite().all()
    assert all(table.grad is not None and table.grad.isfinite().all() for table in tables.values())


@pytest.mark.parametrize("kind", [Pooled, Dense])
def test_models_that_look_at_all_tokens_are_refused(kind: Any) -> None:
    """A mean over tokens, or an output of all of them, is no masked attention; what to do instead is said."""
    model = kind(dim=32, heads=4, layers=LAYERS, image=32, patch=8, classes=10).eval()
    program = prepared(model, image_of(1, 1))
    with pytest.raises(BadOption, match="looks at all tokens"):
        masked(Job(Diffrate(keep=0.5), Edit(program)))
