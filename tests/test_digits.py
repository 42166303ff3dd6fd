"""The trained checkpoints: they are what they are said to be."""

from __future__ import annotations

import pytest
import torch

import graphopt
from tests import digits

LOADERS = {"cnn": digits.load_cnn, "vit": digits.load_vit}


@pytest.mark.parametrize(("name", "least"), [("cnn", 0.98), ("vit", 0.95)])
def test_held_out_accuracy(name: str, least: float) -> None:
    """On images that training never saw, each is as good as stated; rounding on another processor may turn one."""
    stated = digits.RIGHT[name]
    assert stated >= least * digits.HELD_OUT
    assert abs(round(digits.accuracy(LOADERS[name]()) * digits.HELD_OUT) - stated) <= 1
    assert (digits.DATA / f"digits_{name}.pt").stat().st_size < 300_000


@pytest.mark.parametrize("name", LOADERS)
def test_accuracy_of_a_program(name: str) -> None:
    """A program captured for any number of images, the last batch not full, has its module's accuracy."""
    model = LOADERS[name]()
    program = graphopt.capture(model, (digits.data()[0][:100],))
    assert digits.accuracy(program) == pytest.approx(digits.accuracy(model), abs=1.5 / digits.HELD_OUT)


def test_the_split_is_fixed() -> None:
    """Training and held-out images, the same ones on every machine, and nearly as many of each digit."""
    images, labels, held_out, answers = digits.data()
    assert images.shape == (1437, 1, 8, 8)
    assert held_out.shape == (360, 1, 8, 8)
    assert int(images.max()) == 1
    assert answers[:12].tolist() == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1, 3, 7]
    assert labels.bincount(minlength=10).min() >= 130
    assert torch.bincount(answers).min() >= 25
