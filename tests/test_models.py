"""Whole models, end to end: compiled for every target that can be run here, and compared with PyTorch.

`graphopt.compile` verifies by itself and raises where a bundle disagrees; here its verdict is read from the manifest,
and the error held against what the arithmetic should give. GPUs have tests of their own.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from graphopt.bundle import Bundle
from graphopt.program import Program
from tests.models import TINY

# The largest error as a share of the largest output. float32 sums in another order; float16 and bfloat16 keep 11 and 8
# bits, and a few layers add up.
FLOAT32 = 2e-5
HALVES = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
HF = ("bert", "gpt2", "llama", "convnext", "swin", "vit", "deit")


@cache
def tiny(name: str) -> Program:
    """The captured model, shared by all targets."""
    model, inputs = TINY[name]()
    return graphopt.capture(model, inputs)


def check(bundle: Bundle, most: float = FLOAT32) -> None:
    """The bundle was verified, on each of its outputs, and well within what it had to keep."""
    verification = bundle.manifest.verification
    assert verification.passed, str(verification)
    assert verification.runners
    assert verification.max_rel_error <= most, str(verification)


@pytest.mark.parametrize("target", ["cpu", "wasm", "arm"])
@pytest.mark.parametrize("name", TINY)
def test_model(name: str, target: str) -> None:
    """Every structure that we name as supported, on every processor."""
    with graphopt.compile(tiny(name), target=target) as bundle:
        check(bundle)


@pytest.mark.parametrize("name", HF)
def test_transformers_model(name: str) -> None:
    """The same families as transformers writes them, with its own attention masks, caches and outputs."""
    from tests import hf_models

    assert set(hf_models.HF) == set(HF), "the names stand here too, since importing transformers takes seconds"
    model, inputs = hf_models.HF[name]()
    with graphopt.compile(model, example_inputs=inputs) as bundle:
        check(bundle)


@pytest.mark.parametrize("name", ["fnet", "mixtral", "llava", "convbert", "phi3"])
def test_architecture(name: str) -> None:
    """What few models have: transforms, experts, an image among words, odd look-ups, parts without elements.

    All of the table go through `benchmarks/reach.py`.
    """
    from tests.architectures import ARCHITECTURES

    model, inputs = ARCHITECTURES[name]()
    with graphopt.compile(model, example_inputs=inputs) as bundle:
        check(bundle)


@pytest.mark.parametrize("target", ["cpu", "wasm", "arm"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["resnet18", "bert"])
def test_half_precision(name: str, dtype: torch.dtype, target: str) -> None:
    """A convolutional network and an encoder in 16 bits, weights, inputs and outputs, on every processor."""
    model, inputs = TINY[name]()
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    with graphopt.compile(model.to(dtype), example_inputs=inputs, target=target) as bundle:
        check(bundle, HALVES[dtype])
        assert all(spec.dtype == str(dtype).removeprefix("torch.") for spec in bundle.manifest.outputs)


@pytest.mark.parametrize("target", ["cpu", "wasm"])
def test_sentence_embeddings(target: str, tmp_path: Path) -> None:
    """The pretrained encoder gives each real sentence PyTorch's embedding, and tells sentences apart as it does."""
    from tests import hf_models

    model, batches = hf_models.minilm(tmp_path)

    def embedded(hidden: torch.Tensor, batch: dict[str, torch.Tensor]) -> np.ndarray:
        return hf_models.embedding(hidden, batch["attention_mask"])[0].numpy()

    with torch.inference_mode():
        wanted = np.stack([embedded(model(**batch).last_hidden_state, batch) for batch in batches])
    with graphopt.compile(model, example_inputs=batches[0], target=target) as bundle:
        check(bundle)
        found = []
        for batch in batches:
            found.append(embedded(torch.from_numpy(bundle.run(batch)), batch))
    assert ((np.stack(found) * wanted).sum(1) >= 1 - 1e-4).all()
    np.testing.assert_allclose(np.stack(found) @ np.stack(found).T, wanted @ wanted.T, atol=1e-4)


def test_a_dynamic_batch_is_fixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model exported for any batch compiles for one: the example's, or the one asked for, and the log says which."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5)).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), tmp_path / "any.pt2")
    with caplog.at_level(logging.WARNING, "graphopt"), graphopt.compile(tmp_path / "any.pt2") as bundle:
        check(bundle)
        assert bundle.manifest.inputs[0].shape == (2, 3, 8, 8)
    assert "dynamic sizes are fixed to input=2x3x8x8; choose others with --input-shape" in caplog.text
    many = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with graphopt.compile(tmp_path / "any.pt2", input_shapes={"input": (7, 3, 8, 8)}) as bundle:
        check(bundle)
        y = bundle(many)
    with torch.inference_mode():
        np.testing.assert_allclose(y, model(many).numpy(), rtol=1e-4, atol=1e-5)
