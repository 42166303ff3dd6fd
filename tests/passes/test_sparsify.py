"""What all sparsifying passes share: which layers, how much, in which format, and that nothing else changes."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.budget import Budget
from graphopt.cost import summary
from graphopt.edit import Edit
from graphopt.errors import BadOption, BudgetUnreachable, NothingToCut
from graphopt.optimize import plan, reduce
from graphopt.passes import PASSES, load, make
from graphopt.passes.base import max_abs_errors
from graphopt.passes.sparsify import Sparsify
from graphopt.recipe import passes_of
from graphopt.sparsity import conforms, parse_format, stored
from tests.passes.reducing import prepared
from tests.passes.sparsifying import convnet, details, given, matrices, mlp, nonzeros, weights
from tests.programs import assert_same, program_of

SPARSIFYING = [name for name in PASSES if issubclass(load(name), Sparsify)]
SHARED = [name for name in SPARSIFYING if name != "sparsify-nm"]  # which says itself how much stays


def reasons(program):
    return {decline.where: decline.reason for decline in program.records[-1].declined}


@pytest.mark.parametrize("name", SHARED)
def test_keeping_everything_changes_no_bit(name):
    """keep=1 leaves every tensor the very same."""
    for before in (mlp(), convnet()):
        after = make(name, keep=1.0)(before)
        assert all(torch.equal(tensor, weights(after)[key]) for key, tensor in weights(before).items())
        assert not after.records[-1].changed
        assert not after.annotations


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_shares_are_exact(name, keep):
    """What is not zero is what was asked for, within a block for each layer (a row, where all rows keep as many)."""
    before = mlp(ins=23, hidden=50, outs=21)
    after = make(name, keep=keep)(before)
    form = parse_format(make(name).format)
    for key, count in nonzeros(after).items():
        outs, ins = matrices(before)[key].shape
        slack = outs if make(name).by_row else form.rows * form.cols
        row = details(after)[key.removesuffix(".weight")]
        assert count == round(row["keep"] * outs * ins) == row["macs"] / 50
        if make(name).allocation == "uniform":
            assert keep * outs * ins - 1e-6 <= count < keep * outs * ins + slack
    total = sum(matrix.size for matrix in matrices(before).values())
    assert abs(sum(nonzeros(after).values()) / total - keep) < 0.05


@pytest.mark.parametrize("name", SPARSIFYING)
@pytest.mark.parametrize("model", ["mobilenet_v2", "resnet18", "deit_s", "gpt2", "swin", "crnn"])
def test_formats_are_kept_and_known(name, model):
    """Weights keep to the format exactly, the program says so, and all else is as it was."""
    before = prepared(model)
    options = {} if name == "sparsify-nm" else {"keep": 0.4}
    after = make(name, rearrange=False, **options)(before)
    sparse = {f"{layer}.weight" for layer, row in details(after).items() if row["format"] != "dense"}
    form = parse_format(make(name).format)
    assert sparse
    assert set(after.annotations) == sparse
    assert {annotation.format for annotation in after.annotations.values()} == {form}
    old, new = weights(before), weights(after)
    for key, matrix in matrices(after, outputs_last=False).items():
        if key not in sparse:
            assert torch.equal(old[key], new[key])
        elif new[key].dim() > 2 or model != "gpt2":
            assert conforms(matrix, form)
    assert all(torch.equal(old[key], new[key]) for key in old.keys() - sparse)
    assert [str(spec) for spec in after.outputs] == [str(spec) for spec in before.outputs]


@pytest.mark.parametrize("name", [name for name in SPARSIFYING if make(name).rearrange])
@pytest.mark.parametrize("model", ["mobilenet_v1", "resnet50", "deit_s", "llama", "convnext", "unet"])
def test_rearranging_alone_loses_nothing(name, model):
    """The permutations that are applied first leave the outputs the same, up to the order of sums."""
    before = prepared(model)
    options = {"format": "4:2:4"} if name == "sparsify-nm" else {"keep": 0.4}
    with patch.object(Sparsify, "prune", lambda *_: None):
        after = make(name, **options)(before)
    assert after.records[-1].changed["axis rearranged"] > 0
    errors = max_abs_errors(before.run(before.example_inputs), after.run(before.example_inputs))
    assert max(errors.values()) < 1e-3


@pytest.mark.parametrize("name", [name for name in SPARSIFYING if make(name).rearrange])
@pytest.mark.parametrize("model", ["resnet18", "deit_s"])
def test_rearranged_layers_hold_more(name, model):
    """The kept magnitude of all layers together is higher with the rearrangement than without."""
    before = prepared(model)
    options = {"format": "2:4"} if name == "sparsify-nm" else {"keep": 0.4}

    def held(program):
        return sum(float(tensor.abs().double().sum()) for tensor in weights(program).values() if tensor.dim() > 1)

    plain, moved = (make(name, rearrange=rearrange, **options)(before) for rearrange in (False, True))
    assert held(moved) > held(plain)


def test_what_stays_dense_by_default():
    """The stem and depthwise convolutions stay dense with a reason, and what is named is sparse all the same."""
    before = convnet()
    after = make("sparsify-magnitude", keep=0.5)(before)
    assert set(details(after)) == {"one", "two", "groups", "head"}
    assert reasons(after) == {
        "stem": "the stem reads 3 channels, all of the signal; include names it",
        "depthwise": "a depthwise convolution has 9 weights a channel, none to spare; include names it",
    }
    named = make("sparsify-magnitude", keep=0.5, include=("stem", "depth*"), allocation="uniform")(before)
    assert set(details(named)) == {"stem", "depthwise"}
    assert nonzeros(named)["depthwise.weight"] == 72


def test_patterns_name_layers():
    """exclude keeps layers dense; patterns that fit nothing are refused or noted; without any layer that is said."""
    before = mlp()
    after = make("sparsify-magnitude", keep=0.5, exclude=("b", "c"))(before)
    assert set(details(after)) == {"a"}
    assert reasons(after)["b"] == "excluded"
    assert "c" in after.records[-1].notes[0]
    with pytest.raises(BadOption, match="matches no layer"):
        make("sparsify-magnitude", keep=0.5, include=("c*",))(before)
    nothing = make("sparsify-magnitude", keep=0.5, exclude=("*",))(before)
    assert reasons(nothing)[before.name] == "there is no layer to be made sparse"
    with pytest.raises(NothingToCut, match="no layer to be made sparse"):
        make("sparsify-magnitude", budget=Budget("flops", 0.5), exclude=("*",))(before)


def test_weights_that_are_used_twice_are_left_alone():
    """A weight of two calls, or tied to an embedding, stays dense with a reason."""
    shared, word = nn.Linear(12, 12), nn.Embedding(12, 12)

    def forward(s, x):
        return s.shared(s.shared(x)) + torch.nn.functional.linear(x, s.word.weight) + s.word.weight.sum()

    before = program_of(forward, torch.randn(3, 12), shared=shared, word=word)
    after = make("sparsify-magnitude", keep=0.5)(before)
    assert not after.records[-1].changed
    assert "its weight is used more than once" in reasons(after).values()
    assert_same(before, after)


def test_products_with_a_stored_matrix():
    """matmul and addmm with the outputs last are the same layers as a transposed linear one."""
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(16, 12))
    bias = nn.Parameter(torch.randn(12))
    x = torch.randn(5, 16)
    plain = program_of(lambda s, x: torch.nn.functional.linear(x, s.a.weight, s.a.bias), x, a=_linear(table, bias))
    for function in (lambda s, x: torch.addmm(s.p[1], x, s.p[0]), lambda s, x: x @ s.p[0] + s.p[1]):
        before = program_of(function, x, p=nn.ParameterList([table, bias]))
        for options in ({"format": "2x1", "keep": 0.3}, {"format": "2:4"}, {"format": "1x4", "keep": 0.5}):
            one, two = (make("sparsify-magnitude", **options)(program) for program in (before, plain))
            torch.testing.assert_close(one(x), two(x), rtol=1e-5, atol=1e-5)
            (annotation,) = one.annotations.values()
            assert annotation.word == options["format"]


def _linear(table, bias):
    layer = nn.Linear(*table.shape)
    layer.weight, layer.bias = nn.Parameter(table.detach().T.contiguous()), bias
    return layer


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_all_ranks(rank):
    """Blocks and N:M run along the channels of each tap, in one, two and three dimensions, groups included."""
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    layers = {"plain": conv(8, 12, 3), "groups": conv(12, 8, 2, groups=2)}
    before = program_of(lambda s, x: s.groups(s.plain(x)), torch.randn(2, 8, *[6] * rank), **layers)
    for name in ("sparsify-magnitude", "sparsify-wanda", "sparsify-sparsegpt"):
        for options in ({"format": "2x2", "keep": 0.4}, {"format": "2:4"}, {"format": "2:1:2"}):
            after = make(name, **options)(before)
            assert {annotation.word for annotation in after.annotations.values()} == {options["format"]}
            assert len(after.annotations) == 2


def test_blocks_do_not_reach_over_groups():
    """Where a group's outputs are no multiple of the block, the layer stays dense, with the sizes."""
    conv = nn.Conv2d(8, 12, 3, groups=2)
    before = program_of(lambda s, x: s.conv(x), torch.randn(1, 8, 5, 5), conv=conv)
    after = make("sparsify-blocks", keep=0.5)(before)
    assert reasons(after)["conv"] == "blocks of 4 outputs would reach over two groups, which have 6 each"


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
@pytest.mark.parametrize("kind", ["flops", "macs", "params"])
def test_budgets_are_met(allocation, kind):
    """What is left of FLOPs, multiply-adds or parameters when zeros do not count is the budget, hardly less."""
    before = convnet()
    after = make("sparsify-magnitude", budget=Budget(kind, 0.5), allocation=allocation)(before)
    if kind == "params":
        total = summary(before).total.params
        left = total - sum(matrices(before)[key].size - count for key, count in nonzeros(after).items())
    else:
        factor = 2 if kind == "flops" else 1
        total = getattr(summary(before).total, kind)
        rows = after.records[-1].details
        left = total - factor * sum(row["macs_before"] - row["macs"] for row in rows)
    assert 0.49 < left / total <= 0.5
    if kind == "flops":
        assert summary(after).sparse_flops == pytest.approx(left, rel=1e-3)


def test_unreachable():
    """Less than what is no layer of the pass's, or than the minimum of all layers, is refused with what can be."""
    with pytest.raises(BudgetUnreachable, match=r"the least reachable is 0\.\d+"):
        make("sparsify-magnitude", budget=Budget("flops", 0.01))(convnet())
    with pytest.raises(BudgetUnreachable, match=r"the least reachable is 0\.4"):
        make("sparsify-magnitude", keep=0.3, minimum=0.2)(mlp(outs=48))


def test_bad_options():
    """No share, two shares, shares beyond one, unknown formats, budgets and criteria are refused with a way out."""
    for options, word in [
        ({}, "not told how much"),
        ({"keep": 0.5, "budget": Budget("flops", 0.5)}, "a budget and keep"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": 0.5, "format": "4y1"}, "4y1"),
        ({"keep": 0.3, "format": "2:4"}, "keeps 0.5"),
        ({"budget": Budget("bytes", 0.5)}, "no budget of bytes"),
        ({"budget": Budget("latency", 0.5)}, "a latency budget and no target"),
        ({"keep": 0.5, "criterion": "geometric-median"}, "not for weights"),
        ({"keep": 0.5, "criterion": "no-such"}, "no criterion no-such"),
        ({"keep": 0.5, "minimum": 2.0}, "minimum=2.0"),
    ]:
        with pytest.raises(BadOption, match=word):
            make("sparsify-magnitude", **options)(mlp())


def test_with_a_shrink_in_one_recipe():
    """`--pass prune-neurons:keep=0.5 --pass sparsify-blocks:format=4x1,keep=0.25`: shorter, then sparse."""
    before = mlp(hidden=64)
    recipe = plan(["prune-neurons:keep=0.5", "sparsify-blocks:format=4x1,keep=0.25"], None, {})
    done = reduce(before, recipe)
    assert matrices(done.after)["a.weight"].shape == (32, 24)
    assert sum(nonzeros(done.after).values()) == pytest.approx(0.25 * 32 * (24 + 20), abs=4)
    assert {annotation.word for annotation in done.after.annotations.values()} == {"4x1"}


def test_options_from_text():
    """Options come from `--pass` texts and shared flags as those of any pass."""
    (made,) = passes_of(plan(["sparsify-magnitude:format=2x1,allocation=erk,include=a;b"], None, {"flops": "0.3"}))
    assert made == make(
        "sparsify-magnitude", format="2x1", allocation="erk", include=("a", "b"), budget=Budget("flops", 0.3)
    )


def test_a_second_time_changes_nothing():
    """Weights that are zero are the first to go again."""
    once = make("sparsify-magnitude", keep=0.3)(mlp())
    assert_same(once, make("sparsify-magnitude", keep=0.3)(once))


def test_half_precision():
    """Weights of other dtypes keep theirs, and their values."""
    layer = nn.Linear(16, 8).to(torch.bfloat16)
    before = program_of(lambda s, x: s.a(x), torch.randn(3, 16, dtype=torch.bfloat16), a=layer)
    for name in SPARSIFYING:
        options = {} if name == "sparsify-nm" else {"keep": 0.5}
        after = make(name, **options)(before)
        assert weights(after)["a.weight"].dtype is torch.bfloat16
        assert int(torch.count_nonzero(weights(after)["a.weight"])) <= 72


@pytest.mark.parametrize("name", SPARSIFYING)
@pytest.mark.parametrize("model", ["cnn", "linear"])
def test_compensation_keeps_zeros_and_brings_outputs_nearer(name, model):
    """With calibration data what stays is fitted anew: the outputs come nearer on other data, formats stay."""
    before = convnet() if model == "cnn" else mlp(tokens=200)
    (x,) = before.example_inputs.values()
    torch.manual_seed(5)
    data = [{before.inputs[0].name: torch.randn_like(x)} for _ in range(8)]
    options = {"calibration": data} if name == "sparsify-nm" else {"keep": 0.3, "calibration": data}
    plain, fitted = (make(name, compensate=compensate, **options)(before) for compensate in (False, None))
    wanted = before(x)
    assert (fitted(x) - wanted).square().sum() < 0.9 * (plain(x) - wanted).square().sum()
    assert fitted.records[-1].changed["weight fitted"] > 0
    assert {key: str(item.word) for key, item in fitted.annotations.items()} == {
        key: str(item.word) for key, item in plain.annotations.items()
    }
    if name != "sparsify-sparsegpt":  # which sees batches in the same order, but chooses by what it has updated
        zeros = {key: tensor == 0 for key, tensor in weights(plain).items()}
        assert all(torch.equal(zeros[key], tensor == 0) for key, tensor in weights(fitted).items() if tensor.dim() > 1)


def test_a_cut_behind_leaves_zeros():
    """Channels that go after weights were set to zero: compensation of the cut keeps the zeros and the format."""
    before = mlp(tokens=200, hidden=64)
    data = [{before.inputs[0].name: torch.randn(200, 24)} for _ in range(4)]
    sparse = make("sparsify-magnitude", keep=0.3)(before)
    after = make("prune-neurons", keep=0.5, calibration=data)(sparse)
    assert after.records[-1].changed["weight fitted"] > 0
    assert {name: item.word for name, item in after.annotations.items()} == dict.fromkeys(
        ("a.weight", "b.weight"), "unstructured"
    )
    assert sum(nonzeros(after).values()) < 0.5 * 32 * (24 + 20)


def test_compensation_without_data_is_an_option():
    """The example inputs serve where it is asked for; without data and unasked nothing is fitted."""
    before = mlp(tokens=200)
    assert "weight fitted" not in make("sparsify-magnitude", keep=0.3)(before).records[-1].changed
    assert "weight fitted" in make("sparsify-magnitude", keep=0.3, compensate=True)(before).records[-1].changed


def test_unused_inputs_are_counted():
    """The record says how many input channels no output reads any more."""
    row = details(make("sparsify-magnitude", keep=0.5)(given([5.0, 0.1], [4.0, 0.2])))["a"]
    assert (row["unused_inputs"], row["keep"], row["outs_x_ins"]) == (1, 0.5, "2 x 2")
    assert row["magnitude_kept"] == pytest.approx(9 / 9.3)


@pytest.mark.parametrize(
    "criterion", ["l1", "l2", "random", "wanda", "taylor", "hessian:fisher=true", "l1:normalise=lamp"]
)
def test_criteria_of_single_weights(criterion):
    """Any criterion that has values for weights serves, and keeps as many."""
    after = make("sparsify-magnitude", keep=0.3, criterion=criterion)(mlp())
    assert sum(nonzeros(after).values()) == int(np.ceil(0.3 * (48 * 24 + 20 * 48) - 1e-6))


def test_options_are_documented():
    """Each option of the passes has its line in the docstring of `Sparsify` or of the pass."""
    for name in SPARSIFYING:
        for field in dataclasses.fields(load(name)):
            text = (Sparsify.__doc__ or "") + (load(name).__doc__ or "")
            assert f"{field.name}:" in text or f"{field.name} " in text, (name, field.name)


@pytest.mark.parametrize("name", SPARSIFYING)
def test_weights_that_are_not_finite_stay(name):
    """A layer with NaN in its weight is left alone, and so is one that would be pruned by NaN that it reads."""
    before = mlp()
    edit = Edit(before)
    stored = [node for node in edit.graph.nodes if node.name in before.tensors]
    node = next(node for node in stored if edit.target(node) == "a.weight")
    broken = before.tensors[node.name].clone()
    broken[0, 0] = torch.nan
    edit.set_tensor(node, broken)
    before = before.replace(exported=edit.finish())
    after = make(name, rearrange=False, **({} if name == "sparsify-nm" else {"keep": 0.4}))(before)
    assert torch.equal(weights(after)["a.weight"].nan_to_num(7.0), broken.nan_to_num(7.0))
    assert reasons(after)["a"] == "its weight has NaN or infinite values"
    assert all(bool(tensor.isfinite().all()) for key, tensor in weights(after).items() if key != "a.weight")


@pytest.mark.parametrize("name", SPARSIFYING)
@pytest.mark.parametrize("before", [mlp(), convnet()], ids=["mlp", "convnet"])
def test_zeros_that_are_there_already_suffice(name, before):
    """Asked to keep more than is not zero, any pass leaves every bit, and says what there is."""
    options = {} if name == "sparsify-nm" else {"keep": 0.2}
    sparse = make(name, **options)(before)
    for more in [{}] if name == "sparsify-nm" else [{"keep": 0.3}, {"budget": Budget("macs", 0.9)}]:
        after = make(name, **more)(sparse)
        assert not after.records[-1].changed
        assert after.annotations == sparse.annotations
        assert all(torch.equal(tensor, weights(after)[key]) for key, tensor in weights(sparse).items())
        assert "of the weights are not zero as it is" in " ".join(after.records[-1].remarks)
        assert {row["format"] for row in details(after).values()} == {"as it was"}
        assert all(row["magnitude_kept"] == 1 for row in details(after).values())


@pytest.mark.parametrize("criterion", ["l1", "taylor", "random"])
def test_a_layer_that_has_its_zeros_stays_as_it_is(criterion):
    """Of two layers one is sparse enough: the other is cut, whatever the criterion thinks of the first."""
    sparse = make("sparsify-magnitude", keep=0.1, include=("a",))(mlp())
    after = make("sparsify-magnitude", keep=0.4, allocation="uniform", criterion=criterion)(sparse)
    assert torch.equal(weights(after)["a.weight"], weights(sparse)["a.weight"])
    assert nonzeros(after)["b.weight"] == 384  # of 48 x 20
    assert details(after)["a"]["format"] == "as it was"


def test_other_blocks_than_asked_for_are_cut():
    """Zeros here and there are none in blocks: a format that is not there yet is made."""
    sparse = make("sparsify-magnitude", keep=0.2, allocation="uniform")(mlp())
    after = make("sparsify-blocks", format="4x1", keep=0.25, allocation="uniform")(sparse)
    assert after.records[-1].changed["linear"] == 2
    for matrix in matrices(after).values():
        assert stored(matrix, parse_format("4x1")) == matrix.size / 4


def test_rearranging_leaves_blocks_that_are_there():
    """An axis of a layer with its zeros in place keeps its order, though another layer would gain from one."""
    sparse = make("sparsify-blocks", format="4x1", keep=0.3, include=("a",), rearrange=False)(mlp())
    after = make("sparsify-blocks", format="4x1", keep=0.4, allocation="uniform")(sparse)
    assert torch.equal(weights(after)["a.weight"], weights(sparse)["a.weight"])
    assert after.annotations["a.weight"] == sparse.annotations["a.weight"]
