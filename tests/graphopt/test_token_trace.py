"""Which token each becomes a part of: equal to what the methods do, through files, several places and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.arrays import to_numpy
from graphopt.cut import Kept
from graphopt.passes import make
from graphopt.program import Program
from graphopt.token_trace import MARK, chain, is_traced, part_of, traced
from tests.transformer_nets import VisionTransformer

SAMPLES, SPAN = 2, 16


@pytest.fixture(scope="module")
def vit() -> Program:
    """Two images of 16 patches, two blocks."""
    torch.manual_seed(0)
    module = VisionTransformer(dim=16, heads=2, layers=2, image=16, patch=4, classes=3).eval()
    return graphopt.capture(module, (torch.rand(SAMPLES, 3, 16, 16),), name="vit")


def chained(program: Program) -> list[np.ndarray]:
    """The chain of a traced program on its example inputs."""
    found = traced(program).run(program.example_inputs or {})
    return chain({name: to_numpy(value) for name, value in found.items()})


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        (Kept(torch.tensor([[1, 3]])), [-1, 0, -1, 1]),
        (Kept(torch.tensor([[3, 1]]), torch.tensor([[0]]), torch.tensor([[1]])), [1, 1, -1, 0]),
        (Kept(torch.tensor([[0, 1]]), matrix=torch.tensor([[[0.9, 0.1, 0, 0.0], [0, 0.3, 0, 0.7]]])), [0, 1, -1, 1]),
    ],
    ids=["dropped", "merged", "shared out"],
)
def test_part_of(kept: Kept, wanted: list[int]) -> None:
    """Each token by the new one that it is, was merged into, or went to for the most part; -1 where it is gone."""
    assert part_of(kept, 4).tolist() == [wanted]


@pytest.mark.parametrize("name", ["prune-tokens", "merge-tokens", "diffrate", "transform-tokens"])
def test_every_new_token_has_parts(vit: Program, name: str, tmp_path: Path) -> None:
    """At each place, in each sample, exactly the tokens that stay have parts; the same from a file, and by trace."""
    options = {"counts": (11, 8), "sites": (0, 1)}
    small = make(name, **options)(vit)
    found = chained(small)
    assert [part.shape for part in found] == [(SAMPLES, SPAN)] * 2
    for part, count in zip(found, (11, 8), strict=True):
        assert all(set(row[row >= 0]) == set(range(count)) for row in part)
        assert (name == "merge-tokens") <= (part >= 0).all()
    small.save(tmp_path / "small.pt2")
    again = [chained(graphopt.capture(tmp_path / "small.pt2")), chained(make(name, trace=True, **options)(vit))]
    for other in again:
        assert all(np.array_equal(a, b) for a, b in zip(found, other, strict=True))


def test_parts_are_those_that_the_program_merges(vit: Program) -> None:
    """Where all tokens come back, those of one part are equal, and others are not."""

    class Features(torch.nn.Module):
        """The tokens that a transformer's blocks leave."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = VisionTransformer(dim=16, heads=2, layers=2, image=16, patch=4, classes=3)

        def forward(self, x: Tensor) -> Tensor:
            patches = self.net.patch(x).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.net.cls.expand(x.shape[0], -1, -1), patches], 1)
            return self.net.blocks(tokens + self.net.position)

    program = graphopt.capture(Features().eval(), tuple((vit.example_inputs or {}).values()), name="features")
    small = make("merge-tokens", counts=(11, 9), sites=(0, 1))(program)
    last = chained(small)[-1]
    tokens = small(*(program.example_inputs or {}).values())[:, 1:]
    for row, part in zip(tokens, last, strict=True):
        alike = (row[:, None] - row[None]).abs().amax(-1) < 1e-6
        assert torch.equal(alike, torch.from_numpy(part[:, None] == part[None]))


def test_outputs_keep_their_names_and_values(vit: Program) -> None:
    """What the program gave before is given under the same name; the new ones come behind."""
    small = make("prune-tokens", keep=0.5)(vit)
    more = traced(small)
    assert [spec.name for spec in more.outputs] == ["output", "tokens_0", "tokens_1"][: len(more.outputs)]
    inputs = small.example_inputs or {}
    assert torch.equal(more.run(inputs)["output"], small.run(inputs)["output"])
    assert traced(more) is more


def test_nothing_is_marked(vit: Program) -> None:
    """A program whose tokens all stay gives what it gave."""
    assert not is_traced([spec.name for spec in traced(vit).outputs])


@pytest.mark.parametrize("marks", ["x", [[0]], [["a", "index", 1, None]], [[0, "weight", 4, None]], {"a": 1}])
def test_marks_that_make_no_sense_are_ignored(vit: Program, marks: object) -> None:
    """They may come from a file."""
    copy = vit.copy()
    node = next(node for node in copy.graph.nodes if node.op == "call_function")
    node.meta["custom"] = {MARK: marks}
    assert not is_traced([spec.name for spec in traced(copy).outputs])


def test_another_stream_starts_anew() -> None:
    """Places are chained where the second chooses among what the first left, and only there."""
    first, second = np.array([[0, -1, 1, 1]]), np.array([[-1, 0]])
    other = np.array([[0, 1, -1]])
    found = chain({"tokens_1": second, "tokens_0": first, "output": np.zeros(1), "tokens_2": other})
    assert [part.tolist() for part in found] == [[[0, -1, 1, 1]], [[-1, -1, 0, 0]], [[0, 1, -1]]]
