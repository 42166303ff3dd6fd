"""What `benchmarks.sparse` compares is what it says: zeros of the format, the same ones each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.sparse.__main__ import cases
from benchmarks.sparse.layer import break_even
from benchmarks.sparse.models import chain, mask_of, sparsify
from benchmarks.sparse.report import fastest_dense_peer, ratios
from graphopt.sparsity import as_matrix, parse_format, recognise


@pytest.mark.parametrize(
    ("text", "zeros"), [("unstructured", 0.9), ("2x1", 0.7), ("4x1", 0.9), ("8x1", 0.5), ("16x1", 0.95), ("2:4", 0.5)]
)
def test_zeros_have_the_format_that_was_asked_for(text, zeros):
    """A layer with zeros is recognised as what it was made to be, and has as many as were asked for."""
    module, _ = chain(64, 49, 2)
    changed = sparsify("chain", module, text, zeros)
    assert list(changed) == ["0", "2"]
    for weight in changed.values():
        assert str(recognise(as_matrix(weight))) == text
        assert abs(np.mean(weight == 0) - zeros) < 0.01


def test_zeros_are_the_same_each_time():
    """Two processes that make the same case make the same weights."""
    weights = []
    for _ in range(2):
        module, _ = chain(32, 49, 1)
        sparsify("chain", module, "4x1", 0.8)
        weights.append(module[0].weight.detach())
    assert torch.equal(*weights)


def test_blocks_of_a_convolution_hold_at_each_tap():
    """Outputs of a 3x3 convolution are zero in fours, tap by tap."""
    conv = nn.Sequential(nn.Conv2d(8, 16, 3))
    sparsify("chain", conv, "4x1", 0.5)
    kept = (conv[0].weight.detach() != 0).reshape(4, 4, 8, 3, 3)
    assert (kept.all(1) == kept.any(1)).all()


def test_blocks_at_the_end_may_be_smaller():
    """Ten outputs in blocks of four are three blocks."""
    mask = mask_of(10, 5, parse_format("4x1"), 0.5, np.random.default_rng(0))
    assert mask.shape == (10, 5)
    assert (mask[8:] == mask[8]).all()


def test_patterns_say_their_zeros_themselves():
    """2:4 is half zeros, whatever shares are asked for."""
    assert cases(["4x1", "2:4"], [0, 90]) == [("dense", 0), ("2:4", 50), ("4x1", 90)]


def engine(name: str, weights: str, time: float) -> dict[str, object]:
    return {"engine": name, "weights": weights, "min_ms": time, "median_ms": time, "runs": 1, "difference": 0.0}


def test_ratios_name_whom_they_compare_with():
    """Against its dense self, the fastest peer without zeros, and the peer that runs zeros."""
    engines = [
        engine("graphopt", "dense", 8.0),
        engine("openvino", "dense", 9.0),
        engine("deepsparse", "dense", 10.0),
        engine("graphopt", "4x1", 2.0),
        engine("deepsparse", "4x1", 5.0),
        engine("deepsparse", "unstructured", 4.0),
    ]
    row = {"zeros": 90, "format": "4x1", "engines": engines}
    assert fastest_dense_peer(row)["engine"] == "openvino"
    assert ratios(row) == {
        "graphopt / its own dense": 4.0,
        "graphopt / openvino dense": 4.5,
        "graphopt / deepsparse 4x1": 2.5,
        "graphopt / deepsparse unstructured": 2.0,
    }


def test_break_even_lies_between_the_last_slow_and_the_first_fast_point():
    """The line that joins two points is followed; where nothing is faster there is none."""
    gains = {"4x1": (0.98, 1.0, 1.04, 2.0), "unstructured": (1.0, 1.0, 1.0, 1.0)}
    rows = [
        {"target": "cpu", "format": form, "zeros": zeros, "speed_up": gain}
        for form, all_gains in gains.items()
        for zeros, gain in zip((10, 20, 30, 90), all_gains, strict=True)
    ]
    assert break_even(rows) == {"cpu 4x1": 25.0, "cpu unstructured": None}
