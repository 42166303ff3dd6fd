"""Annotations: what is taken, what is refused and why, that they stay true, that they travel."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.annotate import annotate, by_fingerprint, fingerprint
from graphopt.axes import infer
from graphopt.capture import capture
from graphopt.cost import summary
from graphopt.edit import Edit
from graphopt.errors import BadOption, CorruptModel, FormatNotKept, NotAWeight, UnknownTensor
from graphopt.passes import CANONICALISE
from graphopt.passes.base import run_passes
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.passes.fold_constants import FoldConstants
from graphopt.program import Program
from graphopt.shrink import shrink
from graphopt.sparsity import Annotation, Format, conforms
from graphopt.weights import weights
from tests.programs import assert_same, ops, program_of

FOUR = Format(4, 1)


def sparse_(module: nn.Module, form: Format = FOUR, keep: float = 0.25) -> nn.Module:
    """Set blocks of a module's weight to zero, of a matrix (outputs, inputs * taps) as it lies in memory."""
    with torch.no_grad():
        flat = module.weight.flatten(1)
        kept = torch.rand(-(-flat.shape[0] // form.rows), flat.shape[1], generator=torch.Generator().manual_seed(5))
        flat *= (kept < keep).repeat_interleave(form.rows, 0)[: len(flat)]
    return module


def linear(*, sparse: bool = True) -> Program:
    """16 -> 32 -> 8, the first in 4x1 blocks and annotated, the second dense."""
    torch.manual_seed(0)
    first, second = nn.Linear(16, 32), nn.Linear(32, 8)
    x = torch.randn(3, 16)
    made = sparse_(first) if sparse else first
    return program_of(lambda net, x: net.second(torch.relu(net.first(x))), x, first=made, second=second)


def true_of(program: Program) -> bool:
    """Whether every annotation holds, with the shares that its tensor has."""
    known = weights(program.exported)
    return all(
        annotation == known[name].annotation(annotation.format)
        and (annotation.format is None or known[name].offence(annotation.format) is None)
        for name, annotation in program.annotations.items()
    )


# The picture ----------------------------------------------------------------------------------------------------------


def test_capture_annotates_what_is_sparse():
    """A model that was pruned elsewhere comes with its formats; the listing has them; nothing else is annotated."""
    program = linear()
    share = program.annotations["first.weight"].density
    assert dict(program.annotations) == {"first.weight": Annotation(FOUR, share, share)}
    assert f"  sparse  first.weight: 4x1, {share:.1%} kept\n" in str(program)
    assert "sparse" not in str(linear(sparse=False))


def test_what_the_user_says_counts():
    """Another format that holds, "dense", and None to remove it; the program that was given stays as it is."""
    program = linear()
    half = graphopt.annotate(program, {"first.weight": "2x1"})
    assert half.annotations["first.weight"].format == Format(2, 1)
    dense = graphopt.annotate(program, {"first.weight": "dense"}).annotations["first.weight"]
    assert (dense.format, dense.stored, dense.word) == (None, 1.0, "dense")
    assert not graphopt.annotate(program, {"first.weight": None}).annotations
    assert program.annotations["first.weight"].format == FOUR
    assert_same(program, half)
    with pytest.raises(TypeError):
        program.annotations["second.weight"] = dense


def test_patterns_stand_for_weights():
    """`*` is all weights and no biases; later entries override earlier ones."""
    program = annotate(linear(), {"*": "unstructured", "sec*.weight": "dense"})
    assert {name: item.word for name, item in program.annotations.items()} == {
        "first.weight": "unstructured",
        "second.weight": "dense",
    }


def test_matrix_products_and_convolutions_have_weights():
    """Outputs last in a product, first where the matrix comes first, turned round by a transposition; groups too."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.turned, self.added = (nn.Parameter(torch.randn(8, 8)) for _ in range(4))
            self.conv = nn.Conv2d(4, 8, 3, groups=2)
            self.bias = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, ...]:
            y = torch.addmm(self.bias, x @ self.last, self.added) @ self.turned.t()
            return self.first @ y.T, self.conv(image)

    program = capture(Net(), (torch.randn(3, 8), torch.randn(1, 4, 6, 6)))
    known = weights(program.exported)
    assert {name: item.uses[0].view.outputs_last for name, item in known.items()} == {
        "last": True,
        "first": False,
        "turned": False,
        "added": True,
        "conv.weight": False,
    }
    assert known["conv.weight"].uses[0].view.outputs == 4
    assert list(annotate(program, {"*": "unstructured", "conv.*": "dense"}).annotations) == list(known)
    canonical = run_passes(program, CANONICALISE)
    (use,) = weights(canonical.exported)["t_folded"].uses  # the transposed one was stored anew
    assert use.view.outputs_last


def test_tied_weights_have_one_annotation():
    """It may be named by either name, and stays when the two become one."""
    torch.manual_seed(0)
    table, head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    head.weight = sparse_(table).weight
    ids = torch.arange(3)
    program = program_of(lambda net, ids: net.head(net.table(ids)), ids, table=table, head=head)
    named = annotate(annotate(program, {"*": None}), {"table.weight": "2x1"})
    assert {item.word for item in named.annotations.values()} == {"2x1"}
    after = run_passes(named, ["eliminate-common-subexpressions", "eliminate-dead-code"])
    assert {item.word for item in after.annotations.values()} == {"2x1"}
    assert len(after.annotations) == 1


# They stay true -------------------------------------------------------------------------------------------------------


def test_untouched_weights_are_not_looked_at_again(monkeypatch):
    """A pass that changes no annotated weight reads none; one that changes it reads that one."""
    torch.manual_seed(0)
    conv, norm = sparse_(nn.Conv2d(3, 8, 3, bias=False)), nn.BatchNorm2d(8).eval()
    head = sparse_(nn.Linear(8, 12))
    x = torch.randn(1, 3, 8, 8)
    program = program_of(
        lambda net, x: net.head(net.norm(net.conv(x)).mean((2, 3))), x, conv=conv, norm=norm, head=head
    )
    read = []
    matrices = type(next(iter(weights(program.exported).values()))).matrices
    monkeypatch.setattr("graphopt.weights.Weight.matrices", lambda self: read.append(self.name) or matrices(self))
    run_passes(program, ["remove-noops", "fold-constants", "eliminate-common-subexpressions"])
    assert read == []
    after = run_passes(program, ["fold-batch-norm"])
    assert set(read) == {"conv.weight"}
    assert after.annotations == program.annotations


def test_shrinking_keeps_whole_blocks_and_finds_broken_ones():
    """Whole blocks of outputs may go; where blocks are cut through, smaller ones are found; dense stays dense."""
    program = linear()
    axes = infer(program)
    (neuron,) = axes.free()
    whole = shrink(axes, {neuron: list(range(8, 24))})
    assert whole.annotations["first.weight"].format == FOUR
    pairs = shrink(axes, {neuron: [n for n in range(32) if n % 4 < 2]})
    assert pairs.annotations["first.weight"].format == Format(2, 1)
    broken = shrink(axes, {neuron: [n for n in range(32) if n % 4]})
    assert broken.annotations["first.weight"].format != FOUR
    for after in (whole, pairs, broken):
        assert true_of(after)
    dense = annotate(program, {"first.weight": "dense"})
    axes = infer(dense)
    after = shrink(axes, {axes.free()[0]: [0, 1, 2]})
    assert after.annotations["first.weight"].word == "dense"
    assert true_of(after)


def test_shrinking_the_other_way():
    """Inputs may go without harm to blocks of outputs, and break N of M."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 16), nn.Linear(16, 8)
    with torch.no_grad():
        second.weight *= torch.tensor([1, 0, 1, 0] * 4)
    x = torch.randn(2, 6)
    program = program_of(lambda net, x: net.second(torch.relu(net.first(x))), x, first=first, second=second)
    assert program.annotations["second.weight"].word == "16:1:2"  # whole columns are zero
    program = annotate(program, {"second.weight": "2:4"})
    axes = infer(program)
    after = shrink(axes, {axes.free()[0]: [0, 2, 4, 6, 8, 10, 12, 14]})
    assert not after.annotations  # only columns without zeros are left
    half = shrink(axes, {axes.free()[0]: [0, 1, 2, 4, 5, 6, 8, 9]})
    assert true_of(half)
    assert half.annotations["second.weight"].format != Format(1, 1, 2, 4)


def test_folded_batch_norms_keep_the_format():
    """Scaling rows leaves zeros where they are, under the same name."""
    torch.manual_seed(0)
    conv, norm = sparse_(nn.Conv2d(4, 8, 3, bias=False)), nn.BatchNorm2d(8)
    norm.weight.data.uniform_(1, 2)
    x = torch.randn(2, 4, 6, 6)
    program = program_of(lambda net, x: net.norm(net.conv(x)), x, conv=conv, norm=norm.eval())
    after = FoldBatchNorm()(program)
    assert ops(after) == ["conv2d"]
    assert after.annotations == program.annotations
    assert true_of(after)


def test_a_transposed_copy_keeps_what_the_user_said():
    """Constant folding stores another tensor, under another name, of the same values."""
    torch.manual_seed(0)
    table = sparse_(nn.Linear(8, 16, bias=False))
    program = program_of(lambda net, x: torch.relu(x @ net.table.weight.t()), torch.randn(2, 8), table=table)
    for word in ("dense", "2x1"):
        after = FoldConstants()(annotate(program, {"table.weight": word}))
        assert {name: item.word for name, item in after.annotations.items()} == {"t_folded": word}
        assert weights(after.exported)["t_folded"].uses[0].view.outputs_last
        assert true_of(after)


def test_another_use_of_the_same_tensor_is_another_matrix():
    """A pass that multiplies by the transposed weight instead has blocks of inputs; it is looked at again."""
    program = linear()
    edit = Edit(program)
    call = next(node for node in edit.graph.nodes if "linear" in str(node.target))
    weight = call.args[1]
    (relu,) = call.users
    square = edit.call(torch.ops.aten.matmul.default, (call, weight), like=relu)
    relu.replace_input_with(call, edit.call(torch.ops.aten.linear.default, (square, weight), like=relu))
    after = program.replace(exported=edit.finish())
    assert {use.view.outputs_last for use in weights(after.exported)["first.weight"].uses} == {True, False}
    assert after.annotations["first.weight"].word == "unstructured"


def test_what_a_pass_says_is_checked():
    """`Edit.annotate` is believed where it is true; else the format that is found counts, or none."""
    program = annotate(linear(), {"*": None})
    said = {"first.weight": Format(2, 1), "second.weight": FOUR, "gone.weight": FOUR}
    after = program.replace(formats=said)
    assert {name: item.word for name, item in after.annotations.items()} == {"first.weight": "2x1"}
    wrong = program.replace(formats={"first.weight": Format(1, 1, 1, 16)})
    assert wrong.annotations["first.weight"].format == FOUR


def test_gone_with_its_tensor():
    """Dead code takes its annotations with it."""
    program = linear()
    edit = Edit(program)
    second = [node for node in edit.graph.nodes if "linear" in str(node.target)][1]
    relu = second.args[0]
    assert isinstance(relu, torch.fx.Node)
    relu.replace_input_with(
        relu.args[0], next(n for n in edit.graph.nodes if n.op == "placeholder" and n.name == "p_first_weight")
    )
    after = program.replace(exported=edit.finish())
    assert "linear" in str(after)
    assert "first.weight" in after.annotations  # the first layer is still there, unused
    after = run_passes(after, ["eliminate-dead-code"], check=False)
    assert "first.weight" not in after.annotations


# They travel ----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    """Written and read back, with what the user said; shares are worked out from the values."""
    program = annotate(linear(), {"first.weight": "2x1", "second.weight": "dense"})
    program.save(tmp_path / "m.pt2")
    again = capture(tmp_path / "m.pt2")
    assert dict(again.annotations) == dict(program.annotations)
    assert str(again) == str(program)
    assert dict(program.copy().annotations) == dict(program.annotations)


def test_round_trip_of_a_reduced_and_trained_program(tmp_path):
    """Folded, shrunk, trained with its zeros kept, written and read: annotated as before, and true."""
    torch.manual_seed(0)
    conv, norm, head = sparse_(nn.Conv2d(3, 16, 3, bias=False)), nn.BatchNorm2d(16).eval(), nn.Linear(16, 4)

    def net(own, x):
        return own.head(torch.relu(own.norm(own.conv(x))).mean((2, 3)))

    program = run_passes(program_of(net, torch.randn(1, 3, 8, 8), conv=conv, norm=norm, head=head), CANONICALISE)
    axes = infer(program)
    channel = next(axis for axis in axes.free() if axis.extent == 16)
    program = shrink(axes, {channel: list(range(4, 12))})
    module = program.to_module(keep_zeros=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1
    trained = Program.from_module(module)
    assert {name: item.word for name, item in trained.annotations.items()} == {"conv.weight": "4x1"}
    assert true_of(trained)
    trained.save(tmp_path / "m.pt2")
    assert dict(capture(tmp_path / "m.pt2").annotations) == dict(trained.annotations)
    loose = program.to_module()
    with torch.no_grad():
        for parameter in loose.parameters():
            parameter += 0.1
    assert not Program.from_module(loose).annotations


def test_a_file_is_believed_as_far_as_it_is_true(tmp_path):
    """Annotations of other weights than those in the file are looked at; broken ones are refused."""
    program = linear()
    wanted = {"first.weight": "2:4", "second.weight": "4x1", "other": "4x1"}
    for words, says in ((wanted, {"first.weight": "4x1"}), ({"first.weight": "dense"}, {"first.weight": "dense"})):
        extra = {"graphopt.json": json.dumps({"annotations": words})}
        torch.export.save(program.copy().exported, tmp_path / "m.pt2", extra_files=extra)
        again = capture(tmp_path / "m.pt2")
        assert {name: item.word for name, item in again.annotations.items()} == says
    for broken in ({"first.weight": "9:4"}, {"first.weight": 4}, ["first.weight"], "4x1"):
        extra = {"graphopt.json": json.dumps({"annotations": broken})}
        torch.export.save(program.copy().exported, tmp_path / "m.pt2", extra_files=extra)
        with pytest.raises(CorruptModel, match="annotations"):
            capture(tmp_path / "m.pt2")


def test_inspect_shows_them(tmp_path, cli):
    """A row for each annotated weight, and the FLOPs that are left beside the dense ones; all of it in --json."""
    program = linear()
    program.save(tmp_path / "m.pt2")
    share = program.annotations["first.weight"].density
    code, out, err = cli("inspect", tmp_path / "m.pt2")
    assert code == 0, err
    row = next(line for line in out.splitlines() if line.startswith("first.weight"))
    assert row.split()[1:5] == ["32x16", "4x1", f"{share:.1%}", f"{share:.1%}"]
    assert "with sparse kernels" in out
    data = json.loads(cli("inspect", tmp_path / "m.pt2", "--json")[1])
    (annotation,) = data["annotations"]
    assert annotation["tensor"] == "first.weight"
    assert annotation["flops"] - annotation["sparse_flops"] == data["total"]["flops"] - data["total"]["sparse_flops"]


def test_budgets_are_on_dense_flops():
    """The totals are as without annotations; what sparse kernels leave out are multiply-adds of zeros."""
    program, cost = linear(), summary(linear())
    assert cost.total == summary(annotate(program, {"*": None})).total
    zeros = int((program.tensors["p_first_weight"] == 0).sum())
    assert cost.total.flops - cost.sparse_flops == 2 * 3 * zeros
    assert summary(annotate(program, {"*": "dense"})).sparse_flops == cost.total.flops


def test_kernels_find_their_annotation():
    """By the values of a constant, however it is arranged; dense weights without annotation are not hashed."""
    program = linear()
    found = by_fingerprint(program)
    packed = program.tensors["p_first_weight"].detach().t().contiguous().reshape(4, -1).numpy()
    assert found == {fingerprint(packed): ("first.weight", program.annotations["first.weight"])}


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form", "error", "words"),
    [
        ("frist.weight", "4x1", UnknownTensor, r"no tensor of that name; did you mean first\.weight\?"),
        ("layers.*", "4x1", UnknownTensor, "no weight of that name"),
        ("first.bias", "4x1", NotAWeight, r"is the argument bias of aten\.linear in first"),
        ("*.bias", "4x1", NotAWeight, r"first\.bias: is the argument bias"),
        ("second.weight", "4:2", BadOption, "there is no sparse format"),
        ("second.weight", "8", BadOption, "there is no sparse format 8"),
        ("second.weight", "2:4", FormatNotKept, r"row 0, column 2 of 8x32 .*: 4 of columns 0 to 3 are kept"),
        (
            "first.weight",
            Format(2, 2),
            FormatNotKept,
            r"row \d+, column \d+ of 32x16 .*: a zero in a block that is kept",
        ),
    ],
)
def test_what_cannot_be_is_refused(name, form, error, words):
    """One clear error, with the place and what it is."""
    with pytest.raises(error, match=words) as caught:
        annotate(linear(), {name: form})
    assert caught.value.way_out


def test_what_other_tensors_are():
    """Inputs, tables, scales, buffers that the program updates, and weights whose groups are too small."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.conv = nn.Embedding(5, 8), nn.LayerNorm(8), nn.Conv1d(8, 8, 3, groups=4)
            self.register_buffer("seen", torch.zeros(8, 8))

        def forward(self, ids: Tensor) -> Tensor:
            self.seen += 1
            return self.conv(self.norm(self.table(ids)).mT) @ self.seen[:3]

    program = capture(Net(), (torch.arange(5)[None],))
    for name, words in (
        ("ids", "an input of the program"),
        ("table.weight", r"the argument weight of aten\.embedding in table"),
        ("norm.weight", r"the argument weight of aten\.layer_norm in norm"),
        ("seen", "a buffer that the program updates"),
    ):
        with pytest.raises(NotAWeight, match=words):
            annotate(program, {name: "unstructured"})
    with pytest.raises(FormatNotKept, match="blocks of 4 outputs would reach over two groups, which have 2 each"):
        annotate(program, {"conv.weight": "4x1"})


def test_all_zeros_keep_to_any_format():
    """Nothing is recognised in a weight of zeros only, and whatever the user says of it is true."""
    layer = nn.Linear(8, 8)
    nn.init.zeros_(layer.weight)
    program = program_of(lambda net, x: net.layer(x), torch.randn(1, 8), layer=layer)
    assert not program.annotations
    for word in ("unstructured", "4x1", "2:4", "8:2:4"):
        assert annotate(program, {"layer.weight": word}).annotations["layer.weight"].stored == 0
    assert conforms(layer.weight.detach().numpy(), FOUR)
