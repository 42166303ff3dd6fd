"""Shrinking: what is refused and why, choices per group, merging, reordering."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from graphopt.axes import Axes, Axis, atoms, find, infer, owner
from graphopt.axes.choice import why_not_choose
from graphopt.edit import Edit
from graphopt.errors import CannotShrink
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.passes.prune import Prune
from graphopt.shrink import shrink
from tests.graphopt.axes import single
from tests.graphopt.axes.operators import BY_EXPERT
from tests.graphopt.axes.single import assert_equal
from tests.masking import masked_run
from tests.programs import hard, program_of

X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mlp() -> Axes:
    """5 -> 8 -> 4, with an activation."""
    torch.manual_seed(0)
    first, second = nn.Linear(5, 8).double(), nn.Linear(8, 4).double()
    return infer(program_of(lambda net, x: net.second(torch.tanh(net.first(x))), X, first=first, second=second))


def prepared(name: str) -> Axes:
    """The axes of a model of HARD, in float32."""
    return infer(run_passes(hard(name), PREPARE, check=False))


def dims_of(axes: Axes, name: str) -> list[Axis]:
    """The axes of a stored tensor's dimensions."""
    return next([find(axis) for axis in dims] for node, dims in axes.dims.items() if node.name == name)


# The picture ----------------------------------------------------------------------------------------------------------


def test_neurons_go_from_both_layers() -> None:
    """Rows of the first weight and its bias, columns of the second."""
    axes = mlp()
    (neuron,) = axes.free()
    after = shrink(axes, {neuron: [6, 1, 3]})
    before = axes.program.tensors
    assert torch.equal(after.tensors["p_first_weight"], before["p_first_weight"][[6, 1, 3]])
    assert torch.equal(after.tensors["p_first_bias"], before["p_first_bias"][[6, 1, 3]])
    assert torch.equal(after.tensors["p_second_weight"], before["p_second_weight"][:, [6, 1, 3]])
    assert before["p_first_weight"].shape == (8, 5)  # the old program is as it was
    examples = axes.program.example_inputs
    assert_equal(after.run(examples), masked_run(axes, {neuron: [6, 1, 3]}, examples), 1e-12, "neurons")


def test_a_shrunk_program_can_be_shrunk_again() -> None:
    """Its axes are inferred anew; indices are those of what is left."""
    axes = mlp()
    again = infer(shrink(axes, {axes.free()[0]: [0, 2, 4, 6]}))
    after = shrink(again, {again.free()[0]: [1, 3]})
    wanted = shrink(axes, {axes.free()[0]: [2, 6]})
    examples = axes.program.example_inputs
    assert_equal(after.run(examples), wanted.run(examples), 0.0, "again")


def test_masks_and_labels() -> None:
    """A boolean mask says the same as indices, a label the same as the axis."""
    axes = mlp()
    (neuron,) = axes.free()
    mask = torch.tensor([True, False] * 4)
    one, other = shrink(axes, {neuron.label: mask}), shrink(axes, {neuron: [0, 2, 4, 6]})
    assert str(one) == str(other)
    assert all(torch.equal(one.tensors[name], value) for name, value in other.tensors.items())


def test_tied_weights_stay_tied() -> None:
    """Two names of one tensor go on being one."""
    axes = prepared("mqa")
    keep = {atom: range(0, atom.extent, 2) for atom in axes.free()}
    after = shrink(axes, keep)

    def places(program):
        return {tensor.data_ptr() for tensor in program.tensors.values()}

    assert len(places(after)) == len(places(axes.program))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "reason"),
    [
        ([], "nothing of it would be left"),
        ([0, 8], "indices must be from 0 to 7"),
        ([-1], "indices must be from 0 to 7"),
        ([2, 2], "an index is given twice"),
        ([0.5], "indices must be integers"),
        (torch.tensor([True, False]), r"a mask of shape \(2,\) for 8 items"),
        (torch.zeros(8, dtype=torch.bool), "nothing of it would be left"),
    ],
)
def test_bad_indices(indices, reason: str) -> None:
    """Refused with the axis in the user's names and the reason."""
    axes = mlp()
    with pytest.raises(CannotShrink, match=rf"n\d \(first\.weight\[0\]\).*{reason}"):
        shrink(axes, {axes.free()[0]: indices})


def test_pinned_and_unknown_axes() -> None:
    """Inputs and outputs are pinned, and say so; a label that there is not is no axis."""
    axes = mlp()
    pinned = next(atom for atom in axes.atoms if atom.extent == 4)
    with pytest.raises(CannotShrink, match="it is pinned: program output"):
        shrink(axes, {pinned: [0]})
    with pytest.raises(CannotShrink, match="no axis of that name"):
        shrink(axes, {"c99": [0]})


def test_composites_are_refused_with_their_atoms() -> None:
    """Only atoms shrink; the error names those."""
    axes = prepared("gqa_sdpa")
    composite = next(axis for name in axes.program.tensors for axis in dims_of(axes, name) if axis.kind == "product")
    with pytest.raises(CannotShrink, match=r"it consists of .*name these"):
        shrink(axes, {composite: [0]})


# Choices per group ----------------------------------------------------------------------------------------------------

GROUPED = ["gqa_sdpa", "gqa_repeat", "gqa_expand", "gqa_einsum", "gqa_matmul", "gqa_fused"]


def pairs(axes: Axes) -> list[tuple[Axis, Axis]]:
    """(groups, query heads that share one) of each attention: two factors of a weight's rows, the second in no keys."""
    found = {}
    for name in axes.program.tensors:
        for axis in dims_of(axes, name):
            for outer, inner in pairwise(atoms(axis)):
                if axes.role(inner) != "head_dim" and why_not_choose(axes, outer, inner) is None:
                    found[outer, inner] = None
    return list(found)


@pytest.mark.parametrize("name", GROUPED)
def test_query_heads_chosen_per_group(name: str) -> None:
    """Other query heads in each KV group: what the program gives with these masked, however attention is written."""
    axes = prepared(name)
    found = pairs(axes)
    assert found
    generator = torch.Generator().manual_seed(3)
    examples = axes.program.example_inputs
    keep = {}
    for groups, share in found:
        kept = max(1, share.extent - 1)
        rows = [torch.randperm(share.extent, generator=generator)[:kept] for _ in range(groups.extent)]
        keep[groups, share] = torch.stack(rows)
    assert any(len({tuple(sorted(row.tolist())) for row in rows}) > 1 for rows in keep.values()), "all alike"
    after = shrink(axes, keep)
    assert_equal(after.run(examples), masked_run(axes, keep, examples), 2e-4, keep)
    # Together with a group less: what its row said does not matter.
    keep |= {groups: range(1, groups.extent) for groups, _ in found}
    assert_equal(shrink(axes, keep).run(examples), masked_run(axes, keep, examples), 2e-4, keep)


def test_the_same_choice_everywhere_is_a_plain_keep() -> None:
    """Rows that are equal give the very program that one keep set gives."""
    axes = prepared("gqa_fused")
    groups, share = pairs(axes)[0]
    ragged = shrink(axes, {(groups, share): [[1, 0]] * groups.extent})
    plain = shrink(axes, {share: [1, 0]})
    assert str(ragged) == str(plain)
    assert all(torch.equal(ragged.tensors[name], value) for name, value in plain.tensors.items())


def test_uneven_choices_name_the_group() -> None:
    """Every group must keep as many."""
    axes = prepared("gqa_sdpa")
    groups, share = pairs(axes)[0]
    rows = [[0, 1]] + [[0]] * (groups.extent - 1)
    with pytest.raises(CannotShrink, match=rf"{groups.label} item 1 .* would keep 1 of its .*all must keep as many"):
        shrink(axes, {(groups, share): rows})
    with pytest.raises(CannotShrink, match=rf"1 rows for the {groups.extent} items of {groups.label}"):
        shrink(axes, {(groups, share): [[0]]})


def test_choices_that_would_mix_groups_are_refused() -> None:
    """An atom that also stands without its group, as a neuron without the head, has one keep set for all."""
    axes = prepared("gqa_sdpa")
    groups, _ = pairs(axes)[0]
    neuron = axes.free("neuron")[0]
    with pytest.raises(CannotShrink, match=f"no choice of its own for every item of {groups.label}: .*without"):
        shrink(axes, {(groups, neuron): [[0]] * groups.extent})
    share = pairs(axes)[0][1]
    with pytest.raises(CannotShrink, match="said twice"):
        shrink(axes, {(groups, share): [[0]] * groups.extent, share: [0]})


# Merging --------------------------------------------------------------------------------------------------------------


def test_merging_equal_neurons_changes_nothing() -> None:
    """Rows are averaged, columns added."""
    torch.manual_seed(0)
    first, second = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()
    with torch.no_grad():
        for row in (3, 5):
            first.weight[row], first.bias[row] = first.weight[1], first.bias[1]
    axes = infer(program_of(lambda net, x: net.second(torch.relu(net.first(x))), X, first=first, second=second))
    (neuron,) = axes.free()
    matrix = torch.zeros(4, 6, dtype=torch.float64)
    matrix[0, 0] = matrix[2, 2] = matrix[3, 4] = 1
    matrix[1, [1, 3, 5]] = 1 / 3
    after = shrink(axes, {neuron: [0, 1, 2, 4]}, merge={neuron: matrix})
    assert_equal(after.run(axes.program.example_inputs), axes.program.run(axes.program.example_inputs), 1e-12, "merge")
    dropped = shrink(axes, {neuron: [0, 1, 2, 4]})
    wanted = axes.program.run(axes.program.example_inputs)
    with pytest.raises(AssertionError, match="off by"):
        assert_equal(dropped.run(axes.program.example_inputs), wanted, 1e-12, "drop")


def test_merging_equal_channels_changes_nothing() -> None:
    """Through depthwise convolution, batch norm and concatenation."""
    torch.manual_seed(0)
    enter, each, norm, out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(6, 2, 1)
    for module in (enter, each, norm):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dim():
                tensor.data[2] = tensor.data[0]
    image = torch.randn(1, 3, 5, 5)

    def net(self, x: Tensor) -> Tensor:
        y = self.norm(self.each(self.enter(x)))
        return self.out(torch.cat([y, x[:, :2, 1:4, 1:4]], 1))

    modules = {"enter": enter.eval(), "each": each.eval(), "norm": norm.eval(), "out": out.eval()}
    axes = infer(program_of(net, image, **modules))
    channel = next(atom for atom in axes.free() if atom.extent == 4)
    matrix = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    after = shrink(axes, {channel: [0, 1, 3]}, merge={channel: matrix})
    assert_equal(after.run(axes.program.example_inputs), axes.program.run(axes.program.example_inputs), 1e-6, "merge")


def heads_equal(axes: Axes, head) -> Axes:
    """The same program, the last two items of `head` equal wherever they occur."""
    edit = Edit(axes.program)
    nodes = {node.name: node for node in edit.graph.nodes}
    for name, dim, summed in axes.stored_in(head):
        own = owner(dims_of(axes, name)[dim], head)
        value = axes.program.tensors[name].detach().clone().movedim(dim, 0)
        if not summed:
            value[own == head.extent - 1] = value[own == head.extent - 2]
        edit.set_tensor(nodes[name], value.movedim(0, dim))
    return infer(axes.program.replace(exported=edit.finish()))


@pytest.mark.parametrize("name", ["gqa_sdpa", "gqa_fused", "mha_bmm"])
def test_merging_equal_heads_changes_nothing(name: str) -> None:
    """KV heads with all their queries, that are equal: the output projection's columns are added."""
    axes = prepared(name)
    label = axes.free("head")[0].label
    axes = heads_equal(axes, axes[label])
    head = axes[label]
    matrix = torch.eye(head.extent)[:-1]
    matrix[-1, -2:] = 0.5
    after = shrink(axes, {head: range(head.extent - 1)}, merge={head: matrix})
    examples = axes.program.example_inputs
    assert_equal(after.run(examples), axes.program.run(examples), 1e-4, "merge")


def test_merging_where_nothing_could_make_up_for_it_is_refused() -> None:
    """Sums without a weight (queries times keys), statistics, and tensors that are used both ways."""
    axes = prepared("gqa_sdpa")
    found = []
    for atom in axes.free("head_dim"):
        try:
            shrink(axes, {atom: range(atom.extent - 1)}, merge={atom: torch.eye(atom.extent)[:-1]})
        except CannotShrink as error:
            found.append(str(error))
    assert any("sums over it with no tensor of the program's" in text for text in found), found
    axes = mlp()
    (neuron,) = axes.free()
    for matrix, reason in (
        (torch.eye(8), r"is \(8, 8\), not \(2, 8\)"),
        (torch.ones(2, 8), "merged into two"),
        (torch.zeros(2, 8), "must draw from some item"),
    ):
        with pytest.raises(CannotShrink, match=reason):
            shrink(axes, {neuron: [0, 1]}, merge={neuron: matrix})
    with pytest.raises(CannotShrink, match="keep does not say"):
        shrink(axes, {}, merge={neuron: torch.eye(8)})


def test_only_multiples_that_operators_take_may_stay() -> None:
    """A product of runs of rows wants 16 bytes at a time: eight halves, which shrink and every reduction keep to."""
    program = single.program_of(BY_EXPERT[1], torch.bfloat16)
    axes = infer(program)
    assert {axes.multiple(axis) for axis in axes.free()} == {8}
    label = axes.free()[0].label
    with pytest.raises(CannotShrink, match="12 is no multiple of 8"):
        shrink(axes, {label: range(12)})
    small = Prune(keep=0.6, axes=("neuron",), step=1)(program)
    kept = {axis.extent for axis in infer(small).free()}
    assert kept == {8, 16}
