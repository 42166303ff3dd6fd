"""What can do with fewer tokens, what cannot and why, and where all of them are wanted again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

import graphopt
from graphopt.edit import Edit
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.region import Region, Span, region_of

N, C = 12, 8


class Tokens(nn.Module):
    """(b, 12, 8): something in front, something behind."""

    def __init__(self, behind: Any) -> None:
        super().__init__()
        self.behind = behind
        self.layer = nn.Linear(C, C)
        self.table = nn.Parameter(torch.randn(1, N, C))
        self.conv = nn.Conv1d(C, C, 3, padding=1)
        self.image = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        early = x * 2
        x = (x - 1).relu()
        return self.behind(self, x, early)


def found(behind: Any, where: Span | None = None, batch: int = 2, **options: Any) -> tuple[Edit, Region]:
    """The region behind the first relu of a model."""
    program = run_passes(graphopt.capture(Tokens(behind).eval(), (torch.randn(batch, N, C),)), PREPARE)
    edit = Edit(program)
    at = next(node for node in edit.graph.nodes if "relu" in node.name)
    return edit, region_of(edit, at, where or Span(1, 0, N), **options)


def names(nodes: Any) -> list[str]:
    return [node.name for node in nodes]


def attend(x: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=causal)[:, 0]


def test_whatever_treats_tokens_alike_is_inside() -> None:
    """Layers, sums, norms over channels, attention; nothing is blocked and no token is wanted outside of it."""

    def behind(self: Tokens, x: Tensor, early: Tensor) -> Tensor:
        x = x + attend(self.layer(x), causal=False)
        return F.layer_norm(x, (C,))[:, 0]

    _, region = found(behind, Span(1, 1, N))
    assert not region.blocked
    assert not region.ends
    assert {"linear", "layer_norm"} <= set(names(region.nodes))
    assert "scaled_dot_product_attention" in names(region.nodes)
    assert region.spans[0].extent == N - 1
    assert region.tokens.extent == N
    assert region.batch is not None
    assert region.batch.extent == 2


def test_what_skips_ahead_and_tables_of_positions_cross() -> None:
    """A value computed in front of the point, and a stored table, have the tokens; the value alone is of the stream."""

    def behind(self: Tokens, x: Tensor, early: Tensor) -> Tensor:
        return (x + self.table + early)[:, 0]

    _, region = found(behind, Span(1, 1, N))
    crossing = {source.name: region.is_stream(source) for source, _ in region.crossings}
    assert len(crossing) == 2
    table = next(name for name in crossing if name.startswith("p_"))
    value = next(name for name in crossing if name != table)
    assert crossing[value]
    assert value == "mul"
    assert region.dims[next(s for s, _ in region.crossings if s.name == table)][0].extent == 1


@pytest.mark.parametrize(
    ("behind", "reason"),
    [
        (lambda self, x, early: self.conv(x.transpose(1, 2)), "spatial"),
        (lambda self, x, early: self.image(x.transpose(1, 2).unflatten(2, (3, 4))), "it makes a grid of the tokens"),
        (lambda self, x, early: x.view(-1, 3, 4, C).roll(1, 1), "it makes a grid of the tokens"),
        (lambda self, x, early: x.flip(1), "its order matters"),
        (lambda self, x, early: x.roll(1, 1), "its order matters"),
        (lambda self, x, early: x[:, 2:7] * 2, "it takes some tokens apart"),
        (lambda self, x, early: x.cumsum(1), "its order matters"),
        (lambda self, x, early: x.sort(1).values, "sorted"),
    ],
)
def test_what_needs_all_tokens_is_outside_and_says_why(behind: Any, reason: str) -> None:
    """Convolutions, grids, shuffles, pieces: they read all tokens, and so does what is computed from them."""

    def whole(self: Tokens, x: Tensor, early: Tensor) -> Tensor:
        x = self.layer(x).sigmoid()
        return behind(self, x, early).tanh()

    _, region = found(whole)
    assert set(names(region.nodes)) & {"linear", "sigmoid"} == {"linear", "sigmoid"}
    assert "tanh" not in names(region.nodes)
    assert any(reason in each.reason for each in region.blocked)
    assert all(each.reason for each in region.blocked)
    assert region.ends
    assert all(node in region.nodes and user not in region.nodes for node, user in region.ends)


@pytest.mark.parametrize("ordered", [True, False])
def test_causal_attention_wants_order_only(ordered: bool) -> None:
    """Tokens that stay in their order may be fewer in front of causal attention; those that do not, may not."""

    def behind(self: Tokens, x: Tensor, early: Tensor) -> Tensor:
        return attend(x, causal=True).sigmoid()

    _, region = found(behind, ordered=ordered)
    assert ("sigmoid" in names(region.nodes)) is ordered
    assert bool(region.blocked) is not ordered


@pytest.mark.parametrize(
    ("behind", "reason"),
    [
        (lambda self, x, early: self.layer(x.flip(1)).cumsum(1).flip(1) + x + self.table, None),
        (lambda self, x, early: torch.cat([x, x.flip(1)]).cumsum(1).chunk(2)[1].flip(1) + x, None),
        (lambda self, x, early: x.flip(2) + self.table, None),
        (lambda self, x, early: x.flip(1) + self.table, "reverse order"),
        (lambda self, x, early: x.flip(1) + x, "reverse order"),
        (lambda self, x, early: x.flip(1).flip(1).flip(1) * early, "reverse order"),
        (lambda self, x, early: x.roll(1, 1), "other places"),
        (lambda self, x, early: x.roll(1, 2), None),
    ],
)
def test_backward_scans_want_order_only(behind: Any, reason: str | None) -> None:
    """Tokens may be turned round and back; but nothing that belongs to places meets them while they are backwards."""

    def whole(self: Tokens, x: Tensor, early: Tensor) -> Tensor:
        return behind(self, x, early).sigmoid()

    _, region = found(whole, ordered=True)
    assert ("sigmoid" in names(region.nodes)) is (reason is None)
    assert [reason for each in region.blocked if reason and reason in each.reason] == ([reason] if reason else [])


def test_tokens_come_back_in_a_sum_of_the_stream() -> None:
    """`at_stream`: where an output wants all tokens, they come back in the sum; what reads that is copied for all of
    them, and the copy that nobody reads is gone."""

    def behind(self: Tokens, x: Tensor, early: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.layer(x).sigmoid()
        last = F.layer_norm(x, (C,))
        return last, last[:, 0]

    edit, plain = found(behind, Span(1, 1, N))
    assert [node.name for node, _ in plain.ends] == ["layer_norm"]
    edit, region = found(behind, Span(1, 1, N), at_stream=True)
    assert {node.name for node, _ in region.ends} == {"add"}
    assert sum("layer_norm" in node.name for node in edit.graph.nodes) == 2  # one of few tokens, one of all
    assert all(region.is_stream(node) for node, _ in region.ends)


def test_outputs_may_leave_with_fewer() -> None:
    """`shrinks`: an output that may have fewer tokens is no end."""

    def behind(self: Tokens, x: Tensor, early: Tensor) -> Tensor:
        return self.layer(x)

    assert found(behind)[1].ends
    _, region = found(behind, shrinks=lambda _: True)
    assert not region.ends
    assert "linear" in names(region.nodes)


def test_until_is_the_last_inside() -> None:
    """What reads the value named reads all tokens."""
    until: list[Node] = []

    def behind(self: Tokens, x: Tensor, early: Tensor) -> Tensor:
        return self.layer(x).sigmoid().tanh()[:, 0]

    edit, _ = found(behind, Span(1, 1, N))
    until = [node for node in edit.graph.nodes if node.name == "sigmoid"]
    at = next(node for node in edit.graph.nodes if "relu" in node.name)
    region = region_of(edit, at, Span(1, 1, N), until=until[0])
    assert [node.name for node in region.nodes] == ["linear", "sigmoid"]
    assert [(node.name, user.name) for node, user in region.ends] == [("sigmoid", "tanh")]


def test_one_sample_for_all_has_no_batch() -> None:
    """Tokens along the first dimension: there is one choice."""

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu().sigmoid()

    edit = Edit(graphopt.capture(Flat(), (torch.randn(N, C),)))
    at = next(node for node in edit.graph.nodes if node.name == "relu")
    assert region_of(edit, at, Span(0, 0, N)).batch is None
