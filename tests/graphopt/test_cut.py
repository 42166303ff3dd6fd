"""A cut at run time: the calls behind it compute what they would if the dropped tokens were not there, and no more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.cut import Kept, cut, fold, unfold
from graphopt.edit import Edit
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.program import Program
from graphopt.region import Span, region_of

N, C, H = 12, 16, 2


class Net(nn.Module):
    """Two blocks of rotary attention with a mask, a skip around the second, a head for every token and a mean."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.ModuleList([nn.Linear(C, 3 * C) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(C, C) for _ in range(2)])
        self.head = nn.Linear(C, 5)
        angles = torch.arange(N)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))
        self.register_buffer("mask", torch.full((N, N), -torch.inf).triu(1))
        self.register_buffer("bias", torch.randn(H, N, N))

    def attend(self, x: Tensor, block: int, keep: Tensor | None) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv[block](x).view(b, n, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
        if keep is None:
            cos, sin, mask, bias = self.cos, self.sin, self.mask, self.bias
        else:
            cos, sin = self.cos[keep][:, None], self.sin[keep][:, None]
            mask = self.mask[keep[:, :, None], keep[:, None, :]][:, None]
            bias = torch.stack([self.bias[:, i][:, :, i] for i in keep])
        q, k = ((t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin) for t in (q, k))
        if self.kind == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.kind == "mask":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = (q @ k.transpose(-1, -2) * 0.3 + bias).softmax(-1) @ v
        return self.out[block](y.transpose(1, 2).reshape(b, n, C))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        early = x * 0.5
        x = x + self.attend(x, 0, None)
        before = x
        if keep is not None:
            x, early = (torch.stack([t[i] for t, i in zip(each, keep, strict=True)]) for each in (x, early))
        x = x + self.attend(x, 1, keep) + early
        if keep is not None:  # all of them again, the dropped ones as they were
            x = torch.stack([old.index_copy(0, i, new) for old, i, new in zip(before, keep, x, strict=True)])
        return self.head(x), x


def cut_at(program: Program, at: str, keep: Tensor, start: int, stop: int) -> Program:
    """The program cut at the first sum of the stream, to stored indices."""
    edit = Edit(program)
    node = next(each for each in edit.graph.nodes if each.name == at)
    region = region_of(edit, node, Span(1, start, stop), ordered=True, at_stream=True)
    index = edit.add_tensor("index", keep - start, parameter=False)
    cut(edit, region, Kept(index))
    edit.graph.eliminate_dead_code()
    return program.replace(exported=edit.finish())


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(["causal", "mask", "written"]),
    batch=st.sampled_from([1, 3]),
    start=st.integers(0, 3),
    behind=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_tokens_that_stay_see_what_they_would_with_the_others_masked_out(
    kind: str, batch: int, start: int, behind: int, seed: int
) -> None:
    """Rotary tables, masks, biases of positions and skips are looked up at the kept tokens, for each sample apart."""
    torch.manual_seed(seed)
    net, x = Net(kind).eval(), torch.randn(batch, N, C)
    stop = N - behind
    count = int(torch.randint(1, stop - start + 1, ()))
    rows = [torch.randperm(stop - start)[:count].sort().values + start for _ in range(batch)]
    keep = torch.stack([torch.cat([torch.arange(start), row, torch.arange(stop, N)]) for row in rows])
    with torch.no_grad():
        wanted = net(x, keep)
    program = run_passes(graphopt.capture(net, (x,)), PREPARE)
    sums = [node.name for node in program.graph.nodes if node.name.startswith("add")]
    stream = next(
        name
        for name in sums
        for node in program.graph.nodes
        if node.name == name and node.meta["val"].shape == (batch, N, C) and "x" in {n.name for n in node.args[:2]}
    )
    small = cut_at(program, stream, torch.stack(rows), start, stop)
    got = list(small.run({"x": x}).values())
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_unfold_brings_every_token_back_to_its_place(dim: int) -> None:
    """Whatever the order of what was kept: dropped tokens as they were, merged ones as their mean."""
    shape = (7, 4) if dim == 0 else (2, 7, 4) if dim == 1 else (2, 3, 7, 4)
    x = torch.randn(shape)
    batch = 1 if dim == 0 else 2
    index = torch.stack([torch.randperm(5)[:3] for _ in range(batch)])
    where = Span(dim, 1, 6)
    few = fold(x, Kept(index), where)
    assert few.shape[dim] == 5
    torch.testing.assert_close(unfold(few, Kept(index), where, x), x)
    rest = torch.stack([torch.tensor(sorted(set(range(5)) - set(row.tolist()))) for row in index])
    slots = torch.randint(0, 3, rest.shape)
    kept = Kept(index, rest, slots)
    again = unfold(fold(x, kept, where), kept, where)
    moved, back = (t[None] if dim == 0 else t.movedim(dim, 1) for t in (x, again))
    for sample in range(batch):
        for slot in range(3):
            members = [int(index[sample, slot]), *rest[sample][slots[sample] == slot].tolist()]
            mean = torch.stack([moved[sample, 1 + m] for m in members]).mean(0)
            for member in members:
                torch.testing.assert_close(back[sample, 1 + member], mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(back[sample, [0, 6]], moved[sample, [0, 6]])


def test_what_a_weighted_merge_keeps() -> None:
    """Sizes add up to the number of tokens, and the sum of tokens times sizes stays what it was."""
    x = torch.randn(2, 8, 3)
    weight = torch.randint(1, 5, (2, 8)).float()
    index, sources = torch.arange(5).expand(2, -1), torch.arange(5, 8).expand(2, -1)
    slots = torch.tensor([[0, 0, 3], [4, 1, 1]])
    size = weight[:, :5].scatter_add(1, slots, weight[:, 5:])
    few = fold(x, Kept(index, sources, slots, weight=weight, size=size), Span(1, 0, 8))
    torch.testing.assert_close((few * size[..., None]).sum(1), (x * weight[..., None]).sum(1))
    assert torch.equal(size.sum(1), weight.sum(1))


class Grid(nn.Module):
    """Tokens, two layers for each, then an image of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(C, C), nn.Linear(C, C), nn.Conv2d(C, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x).relu()
        x = x + self.two(x).relu()
        return self.three(x.transpose(1, 2).unflatten(2, (3, 4)))


def test_tokens_come_back_in_front_of_what_needs_them_all() -> None:
    """A grid is made of all tokens again; what is in front of it runs on few; why is said with its place."""
    net, x = Grid().eval(), torch.randn(2, N, C)
    program = graphopt.capture(net, (x,))
    edit = Edit(program)
    at = next(node for node in edit.graph.nodes if node.name == "add")
    region = region_of(edit, at, Span(1, 0, N), at_stream=True)
    assert any("grid of the tokens" in each.reason for each in region.blocked)
    assert {node.name for node in region.nodes} >= {"linear_1", "relu_1", "add_1"}
    keep = torch.stack([torch.randperm(N)[:5].sort().values for _ in range(2)])
    cut(edit, region, Kept(edit.add_tensor("index", keep, parameter=False)))
    small = program.replace(exported=edit.finish())
    with torch.no_grad():
        y = x + net.one(x).relu()
        few = torch.stack([own[i] for own, i in zip(y, keep, strict=True)])
        few = few + net.two(few).relu()
        whole = torch.stack([own.index_copy(0, i, new) for own, i, new in zip(y, keep, few, strict=True)])
        wanted = net.three(whole.transpose(1, 2).unflatten(2, (3, 4)))
    torch.testing.assert_close(small.run({"x": x})["output"], wanted, atol=1e-5, rtol=1e-5)


class Scans(nn.Module):
    """A sum from the left and one from the right, with positions, around which tokens skip."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(C, C), nn.Linear(C, C)
        self.table = nn.Parameter(torch.randn(1, N, C))

    def behind(self, x: Tensor, table: Tensor) -> Tensor:
        return self.one(x).cumsum(1) + self.two(x + table).flip(1).cumsum(1).flip(1) + x

    def forward(self, x: Tensor) -> Tensor:
        return self.behind((x - 1).relu(), self.table)[:, -1]


@pytest.mark.parametrize("batch", [1, 3])
def test_scans_run_over_the_tokens_that_stay_in_both_directions(batch: int) -> None:
    """What is turned round and back has fewer tokens in their order; positions are those of each sample's tokens."""
    net, x = Scans().eval(), torch.randn(batch, N, C)
    edit = Edit(program := run_passes(graphopt.capture(net, (x,)), PREPARE))
    at = next(node for node in edit.graph.nodes if node.name == "relu")
    region = region_of(edit, at, Span(1, 0, N - 1), ordered=True)
    assert not region.blocked
    keep = torch.stack([torch.randperm(N - 1)[:5].sort().values for _ in range(batch)])
    cut(edit, region, Kept(edit.add_tensor("index", keep, parameter=False)))
    small = program.replace(exported=edit.finish())
    rows = torch.cat([keep, torch.full((batch, 1), N - 1)], 1)
    few, table = (
        torch.stack([own[i] for own, i in zip(each.expand(batch, -1, -1), rows, strict=True)])
        for each in ((x - 1).relu(), net.table)
    )
    with torch.no_grad():
        wanted = net.behind(few, table)[:, -1]
    torch.testing.assert_close(small.run({"x": x})["output"], wanted, atol=1e-5, rtol=1e-5)
