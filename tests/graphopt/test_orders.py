"""Tokens in other orders: what stays of them is visited as in the whole sequence, through one cut and the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.cut import Kept, cut
from graphopt.edit import Edit
from graphopt.orders import Orders
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.region import Span, region_of

N, C = 9, 4


class Ways(nn.Module):
    """Sums along one order, with a table of its places, then along another reached from there, then back."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        seeded = torch.Generator().manual_seed(seed)
        first, second = (torch.randperm(N, generator=seeded) for _ in range(2))
        self.register_buffer("first", first)
        self.register_buffer("step", first.argsort()[second])  # from the first order to the second
        self.register_buffer("back", second.argsort())
        self.register_buffer("second", second)
        self.layer = nn.Linear(C, C)
        self.table, self.other = (nn.Parameter(torch.randn(1, N, C, generator=seeded)) for _ in range(2))

    def block(self, x: Tensor) -> Tensor:
        y = (self.layer(x)[:, self.first] + self.table).cumsum(1)
        return x + (y[:, self.step] * self.other).cumsum(1)[:, self.back].tanh()

    def few(self, x: Tensor, index: Tensor) -> Tensor:
        """The block on the tokens `index` of the whole, one sample."""
        at, to = self.first.argsort()[index], self.second.argsort()[index]
        y = self.layer(x)[:, at.argsort()] + self.table[:, at.sort().values]
        y = y.cumsum(1)[:, at.argsort().argsort()]
        y = y[:, to.argsort()] * self.other[:, to.sort().values]
        return x + y.cumsum(1)[:, to.argsort().argsort()].tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block((x - 1).relu()).sigmoid()).sum(1)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.sampled_from([1, 3]), start=st.integers(0, 2))
def test_every_order_is_that_of_the_whole_behind_one_cut_and_the_next(seed: int, batch: int, start: int) -> None:
    """Tables of an order's places are looked up at the tokens' places in it; the second cut counts from the first."""
    torch.manual_seed(seed)
    net, x = Ways(seed).eval(), torch.randn(batch, N, C)
    program = run_passes(graphopt.capture(net, (x,)), PREPARE)
    edit, orders = Edit(program), Orders()
    protected = torch.arange(start).expand(batch, -1)
    kept, now = [], N - start
    for name, count in (("relu", 5), ("sigmoid", 3)):
        at = next(node for node in edit.graph.nodes if node.name == name)
        region = region_of(edit, at, Span(1, start, start + now), ordered=True)
        assert not region.blocked
        assert len(region.turns) == (6 if name == "relu" else 3)
        rows = torch.stack([torch.randperm(now)[:count].sort().values for _ in range(batch)])
        cut(edit, region, Kept(edit.add_tensor("index", rows, parameter=False)), orders=orders)
        kept.append(torch.cat([protected, rows + start], 1))
        now = count
    small = program.replace(exported=edit.finish())
    wanted = []
    for sample in range(batch):
        index = kept[0][sample]
        y = net.few((x[sample : sample + 1] - 1).relu()[:, index], index).sigmoid()
        again = kept[1][sample]
        wanted.append(net.few(y[:, again], index[again]).sum(1))
    with torch.no_grad():
        torch.testing.assert_close(small.run({"x": x})["output"], torch.cat(wanted), atol=1e-5, rtol=1e-5)


class Behind(nn.Module):
    """What `function` makes of tokens."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("order", torch.tensor([3, 1, 4, 0, 5, 8, 2, 6, 7]))
        self.register_buffer("twice", torch.tensor([3, 1, 4, 1, 5, 8, 2, 6, 5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, (x - 1).relu()).tanh()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, x: x[:, self.order].cumsum(1)[:, self.order.argsort()] + x, None),
        (lambda self, x: x[:, self.order][:, self.order].cumsum(1).sum(1), None),
        (lambda self, x: x[:, self.order].flip(1).cumsum(1).flip(1).sum(1), None),
        (lambda self, x: x[:, self.order] + x, "tokens in one order meet tokens in another"),
        (lambda self, x: torch.stack([x[:, self.order], x], 1), "tokens in one order meet tokens in another"),
        (lambda self, x: x[:, self.order][:, 2], "it takes some tokens apart"),
        (lambda self, x: x[:, self.order][:, 0], "tokens in another order are taken apart"),
        (lambda self, x: x.flip(1)[:, self.order], "tokens in reverse order"),
        (lambda self, x: x.flip(1)[:, 0], "tokens in reverse order are taken apart"),
        (lambda self, x: x[:, self.twice], "looked up by index"),
    ],
)
def test_what_cannot_be_followed_says_why(function: Any, reason: str | None) -> None:
    """Orders may not be mixed, nor taken apart by place; a lookup must have every token once."""
    program = run_passes(graphopt.capture(Behind(function).eval(), (torch.randn(2, N, C),)), PREPARE)
    edit = Edit(program)
    at = next(node for node in edit.graph.nodes if node.name == "relu")
    region = region_of(edit, at, Span(1, 1, N), ordered=True)
    assert ("tanh" in [node.name for node in region.nodes]) is (reason is None)
    if reason is not None:
        assert any(reason in str(each.reason) for each in region.blocked)
