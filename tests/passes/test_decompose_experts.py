"""decompose-experts: full rank is the stack itself, kept neurons are exact, and fewer elements where it pays."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.axes import infer
from graphopt.edit import Edit
from graphopt.errors import BadOption
from graphopt.passes.decompose_experts import DecomposeExperts, decomposed
from graphopt.passes.experts import mixtures
from graphopt.passes.merge_experts import MergeExperts
from tests.passes.test_merge_experts import DIM, EXPERTS, FORMS, HIDDEN, mixture_of, transformer, weights_of
from tests.programs import assert_same


def with_low_rank(program, rank: int):
    """The program with stacks of that rank."""
    edit = Edit(program)
    nodes = {node.name: node for node in edit.graph.nodes}
    found, _ = mixtures(infer(program))
    for stack in (stack for mixture in found for stack in mixture.stacks):
        value = program.tensors[stack.name]
        u, s, vh = torch.linalg.svd(value, full_matrices=False)
        edit.set_tensor(nodes[stack.name], (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank])
    return program.replace(exported=edit.finish())


def test_full_rank_is_the_weight_itself():
    """(v) With full rank and no residual, and with any residual at full rank, the product is W."""
    weight = torch.randn(3, 8, 6, dtype=torch.float64)
    for exact in (0, 2, 6):
        front, back = decomposed(weight, 6, exact)
        torch.testing.assert_close(front @ back, weight)


def test_kept_neurons_are_exact_and_the_rest_is_nearest():
    """Outputs that low rank renders worst come out as they are; the error is that of the others' dropped values."""
    weight = torch.randn(2, 12, 10, dtype=torch.float64) * torch.linspace(0.1, 3, 10)
    front, back = decomposed(weight, 5, 2)
    lost = (front @ back - weight).square().sum(1)
    assert (lost < 1e-20).sum(1).tolist() == [2, 2]
    for expert in range(2):
        rest = weight[expert][:, lost[expert] > 1e-20]
        expected = torch.linalg.svdvals(rest)[3:].square().sum()
        torch.testing.assert_close(lost[expert].sum(), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [0.0, 0.15])
def test_stacks_of_low_rank_are_kept(form, rows):
    """The rewritten products are the same products, however stacks are picked."""
    before = with_low_rank(mixture_of(form), 3)
    after = DecomposeExperts(rank=3 + int(rows * 2 * HIDDEN), rows=rows, exclude=("none",))(before)
    assert after.records[-1].total >= 1
    assert_same(before, after, tolerance=1e-4)
    if rows == 0:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights_of(after).items()}
        assert shapes["up.front"] == (EXPERTS, DIM, 3)
        assert shapes["up.back"] == (EXPERTS, 3, 2 * HIDDEN)
        assert after.records[-1].changed == {"stack": 2}
        assert after.records[-1].params_after < after.records[-1].params_before


def test_the_librarys_grouped_products():
    """Two grouped products in the place of one, with the same groups; after merging, too."""
    before = with_low_rank(transformer("Mixtral"), 4)
    after = DecomposeExperts(rank=4)(before)
    assert after.records[-1].changed == {"stack": 4}
    assert_same(before, after, tolerance=1e-4)
    both = DecomposeExperts(rank=4)(MergeExperts(groups=2)(before))
    assert both.records[-1].changed == {"stack": 4}
    assert both.parameters_bytes < after.parameters_bytes


@pytest.mark.parametrize("form", ["dense", "gather"])
def test_compiled_after_merging(form):
    """Merged, taken apart, compiled, and in agreement with PyTorch."""
    after = DecomposeExperts(keep=0.7, rows=0.1)(MergeExperts(keep=0.5)(mixture_of(form)))
    assert after.records[-1].changed == {"stack": 2}
    with graphopt.compile(after) as bundle:
        assert bundle.manifest.verification.passed


def test_left_alone():
    """A rank that does not pay is declined; options contradict each other."""
    after = DecomposeExperts(rank=9)(mixture_of("dense"))
    assert {item.reason for item in after.records[-1].declined} == {
        "rank 9 is no smaller than 12 x 20",
        "rank 9 is no smaller than 10 x 12",
    }
    with pytest.raises(BadOption, match="one of rank and keep"):
        DecomposeExperts()(mixture_of("dense"))
