"""merge-experts: permuting is lossless, merging copies is lossless, and only what picks stacks is rewritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.axes import infer
from graphopt.capture import capture
from graphopt.edit import Edit
from graphopt.errors import BadOption
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.passes.experts import mixtures
from graphopt.passes.merge_experts import MergeExperts, Usage, aligned, assign, average_of, dominant, rewrite
from tests.programs import assert_same

FORMS = ("dense", "scaled", "soft", "gather", "grouped")
EXPERTS, DIM, HIDDEN = 6, 12, 10


class Experts(nn.Module):
    """Gated experts in stacked weights; `form` says how those of a token are picked."""

    def __init__(self, form: str, copies: bool = False) -> None:
        super().__init__()
        self.form = form
        self.router = nn.Linear(DIM, EXPERTS, bias=False)
        up, down = torch.randn(EXPERTS, DIM, 2 * HIDDEN), torch.randn(EXPERTS, HIDDEN, DIM)
        if copies:  # experts 1, 3, 5 are 0, 2, 4 with their neurons in another order, and routed to alike
            for expert in range(1, EXPERTS, 2):
                order = torch.randperm(HIDDEN)
                up[expert] = up[expert - 1][:, torch.cat([order, order + HIDDEN])]
                down[expert] = down[expert - 1][order]
                self.router.weight.data[expert] = self.router.weight.data[expert - 1] * 1.01
        self.up, self.down = nn.Parameter(up), nn.Parameter(down / 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "scaled":  # all experts run on all tokens, and their results are multiplied with a gate
            scores = self.router(x).softmax(-1)
            weights, places = scores.topk(2, -1)
            full = torch.zeros_like(scores).scatter(-1, places, weights / weights.sum(-1, keepdim=True))
            gate, up = torch.einsum("btd,edf->btef", x, self.up).chunk(2, -1)
            each = torch.einsum("btef,efd->bted", F.silu(gate) * up, self.down)
            return x + (each * full.unsqueeze(-1)).sum(2)
        y = x.flatten(0, 1)
        scores = self.router(y).softmax(-1)
        weights, places = scores.topk(2, -1)
        if self.form == "gather":
            gate, up = torch.einsum("td,tkdf->tkf", y, self.up[places]).chunk(2, -1)
            each = torch.einsum("tkf,tkfd->tkd", F.silu(gate) * up, self.down[places])
            y = (each * weights[..., None]).sum(1)
        elif self.form == "grouped":
            order = places.flatten().argsort()
            chosen = self.up[places.flatten()[order]]
            gate, up = torch.einsum("td,tdf->tf", y[order // 2], chosen).chunk(2, -1)
            each = torch.einsum("tf,tfd->td", F.silu(gate) * up, self.down[places.flatten()[order]])
            y = (each[order.argsort()].view(-1, 2, DIM) * weights[..., None]).sum(1)
        else:
            full = torch.zeros_like(scores).scatter(1, places, weights) if self.form == "dense" else scores
            gate, up = torch.einsum("td,edf->tef", y, self.up).chunk(2, -1)
            y = torch.einsum("tef,efd,te->td", F.silu(gate) * up, self.down, full)
        return x + y.view_as(x)


def mixture_of(form: str, copies: bool = False):
    torch.manual_seed(0)
    return run_passes(capture(Experts(form, copies).eval(), (torch.randn(3, 8, DIM),)), PREPARE)


def weights_of(program) -> dict[str, Tensor]:
    specs = program.exported.graph_signature.input_specs
    return {spec.target: program.tensors[spec.arg.name] for spec in specs if spec.arg.name in program.tensors}


def transformer(name: str):
    """A mixture as the library has it: sorted tokens and grouped products."""
    import transformers

    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "intermediate_size": 24, "num_experts_per_tok": 2}  # fmt: skip
    own = {"Mixtral": {"num_local_experts": 4}, "Olmoe": {"num_experts": 4}}[name]
    config = getattr(transformers, f"{name}Config")(**sizes, **own)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.config.use_cache = False
    return run_passes(capture(model, {"input_ids": torch.randint(0, 60, (1, 12))}), PREPARE)


@pytest.mark.parametrize("form", FORMS)
def test_permuting_neurons_is_lossless(form):
    """(i) Experts whose hidden neurons were re-ordered compute the same; aligning a copy finds the order."""
    before = mixture_of(form)
    (found,), _ = mixtures(infer(before))
    tensors = {stack.name: before.tensors[stack.name] for stack in found.stacks}
    other = aligned(tensors, found.hidden, [0] * EXPERTS)
    assert any(not torch.equal(other[name], tensors[name]) for name in tensors)
    edit = Edit(before)
    rewrite(edit, found, other, torch.arange(EXPERTS))
    assert_same(before, before.replace(exported=edit.finish()), tolerance=1e-5)
    again = aligned(other, found.hidden, [0] * EXPERTS)
    assert all(torch.equal(again[name], other[name]) for name in other)


@pytest.mark.parametrize("form", FORMS)
def test_as_many_groups_as_experts_is_the_program_itself(form):
    """(ii) Nothing is rewritten, and that is said."""
    before = mixture_of(form)
    after = MergeExperts(groups=EXPERTS)(before)
    assert str(after) == str(before)
    assert "all experts stay" in after.records[-1].declined[-1].reason


@pytest.mark.parametrize("form", FORMS)
def test_merging_permuted_copies_is_lossless(form):
    """(iii) Pairs that are the same network, in another order of neurons, become one each."""
    before = mixture_of(form, copies=True)
    (found,), _ = mixtures(infer(before))
    group = torch.arange(EXPERTS) // 2
    tensors = {stack.name: before.tensors[stack.name] for stack in found.stacks}
    tensors = aligned(tensors, found.hidden, [0, 0, 2, 2, 4, 4])
    merged = {name: average_of(tensor, group, torch.rand(EXPERTS)) for name, tensor in tensors.items()}
    edit = Edit(before)
    rewrite(edit, found, merged, group)
    after = before.replace(exported=edit.finish())
    assert_same(before, after, tolerance=1e-4)
    assert weights_of(after)["up"].shape == (3, DIM, 2 * HIDDEN)
    assert weights_of(after)["router.weight"].shape == (EXPERTS, DIM)


def test_means_are_weighted_by_use():
    """(iv) With all the use on one expert the mean is that one; unused experts are equals."""
    stack = torch.randn(4, 3, 5)
    group = torch.tensor([0, 0, 1, 1])
    merged = average_of(stack, group, torch.tensor([0.0, 7.0, 0.0, 0.0]))
    torch.testing.assert_close(merged[0], stack[1])
    torch.testing.assert_close(merged[1], stack[2:].mean(0))


def test_the_cut_is_global():
    """The most used expert of each mixture stays; the rest of the places go to the highest shares anywhere."""
    even, steep = torch.tensor([4.0, 3, 3]), torch.tensor([1.0, 98, 1])
    kept = dominant([even, steep], 2)
    assert [each.tolist() for each in kept] == [[0, 1, 2], [1]]
    assert [len(each) for each in dominant([even, steep], 1)] == [1, 1]
    assert [len(each) for each in dominant([even, steep], 0.1)] == [1, 1]


def test_experts_go_to_those_routed_to_alike():
    """Cosine of logits, the most used first, and a group takes no more than its capacity."""
    base = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    logits = torch.stack([base[:, 0], base[:, 1], base[:, 0] * 2, base[:, 0] + 0.1 * base[:, 1], base[:, 1] * 3], 1)
    seen = Usage(torch.tensor([9.0, 8, 1, 2, 3]), logits)
    kept = torch.tensor([0, 1])
    assert assign(seen, kept).tolist() == [0, 1, 0, 0, 1]
    four = Usage(seen.counts[:4], logits[:, :4])
    assert assign(four, kept).tolist() == [0, 1, 0, 0]
    assert assign(four, kept, capacity=2).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("form", FORMS)
def test_merged_programs(form):
    """Fewer parameters, the router's outputs kept, and a compiled program that agrees."""
    before = mixture_of(form)
    after = MergeExperts(keep=0.5)(before)
    assert after.records[-1].changed == {"mixture": 1}
    assert weights_of(after)["up"].shape[0] == 3
    assert weights_of(after)["router.weight"].shape == (EXPERTS, DIM)
    assert bool(after(torch.randn(3, 8, DIM)).isfinite().all())
    if form != "soft":
        with graphopt.compile(after) as bundle:
            assert bundle.manifest.verification.passed


@pytest.mark.parametrize("form", ["dense", "gather"])
def test_merged_again(form):
    """What was merged is still a mixture, and merges further."""
    once = MergeExperts(groups=4)(mixture_of(form))
    twice = MergeExperts(groups=2)(once)
    assert weights_of(twice)["up"].shape[0] == 2
    assert weights_of(twice)["router.weight"].shape == (EXPERTS, DIM)
    assert bool(twice(torch.randn(3, 8, DIM)).isfinite().all())


def test_copies_are_found_by_routing():
    """Experts that are routed to alike are merged with each other, so the program hardly changes."""
    before = mixture_of("gather", copies=True)
    x = torch.randn(3, 8, DIM, generator=torch.Generator().manual_seed(3))
    name = before.inputs[0].name
    (found,), _ = mixtures(infer(before))
    after = MergeExperts(groups=3, calibration=[{name: torch.randn(3, 8, DIM)} for _ in range(4)])(before)
    group = weights_of(after)[next(key for key in weights_of(after) if "groups" in key)]
    same = [int(group[n]) == int(group[n + 1]) for n in range(0, EXPERTS, 2)]
    if all(same):
        torch.testing.assert_close(after(x), before(x), rtol=1e-3, atol=1e-3)
    assert any(same)
    assert found.experts == EXPERTS


@pytest.mark.parametrize("name", ["Mixtral", "Olmoe"])
def test_mixtures_of_the_transformers_library(name):
    """Sorted tokens and grouped products: copies merge without loss, and halves of experts merge at all."""
    before = transformer(name)
    found, _ = mixtures(infer(before))
    assert [mixture.experts for mixture in found] == [4, 4]
    assert all(len(mixture.hidden) == 2 for mixture in found)
    edit = Edit(before)
    for mixture in found:  # expert 3 becomes a copy of 1, with its neurons in another order
        nodes = {node.name: node for node in edit.graph.nodes}
        order = torch.randperm(24)
        for hidden in mixture.hidden:
            value = before.tensors[hidden.stack.name].clone()
            index = torch.cat([order + start for start in range(0, value.shape[hidden.dim], 24)])
            value[3] = value[1].index_select(hidden.dim - 1, index)
            edit.set_tensor(nodes[hidden.stack.name], value)
    copied = before.replace(exported=edit.finish())
    edit = Edit(copied)
    found, _ = mixtures(infer(copied))
    for mixture in found:
        tensors = {stack.name: copied.tensors[stack.name] for stack in mixture.stacks}
        group = torch.tensor([0, 1, 2, 1])
        tensors = aligned(tensors, mixture.hidden, [0, 1, 2, 1])
        rewrite(edit, mixture, {n: average_of(t, group, torch.ones(4)) for n, t in tensors.items()}, group)
    merged = copied.replace(exported=edit.finish())
    assert_same(copied, merged, tolerance=1e-5)
    after = MergeExperts(groups=2)(before)
    assert after.records[-1].changed == {"mixture": 2}
    assert sum(row["to"] for row in after.records[-1].details) == 4


def test_bad_options_and_nothing_to_do():
    """One of groups and keep; a program without experts says so."""
    with pytest.raises(BadOption, match="one of groups and keep"):
        MergeExperts()(mixture_of("dense"))
    plain = capture(nn.Linear(3, 3).eval(), (torch.randn(2, 3),))
    assert "no mixture of experts" in MergeExperts(groups=2)(plain).records[-1].declined[-1].reason
