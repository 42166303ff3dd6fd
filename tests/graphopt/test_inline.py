"""What a function computes, written into a graph: the same values, in the same structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

import graphopt
from graphopt.edit import Edit
from graphopt.inline import inline


class Layers(nn.Module):
    """Two layers and an output of both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


@pytest.fixture
def edit() -> Edit:
    return Edit(graphopt.capture(Layers().eval(), (torch.randn(3, 4),)))


def node_of(edit: Edit, name: str) -> Node:
    return next(node for node in edit.graph.nodes if node.name == name)


def run_with(edit: Edit, output: Node, x: Tensor) -> Tensor:
    """What a node is, as the output of the program."""
    edit.graph.output_node().args = ((output,),)
    return edit.program.replace(exported=edit.finish()).run({"x": x})["output"]


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t * 2 + 1,
        lambda t: t.topk(3, -1).values.cumsum(-1),
        lambda t: t @ t.transpose(0, 1) + torch.arange(3.0),
        lambda t: t[:, torch.tensor([5, 0, 0])],
        lambda t: torch.where(t > 0, t, -torch.inf).amax(-1, keepdim=True).softmax(0),
        lambda t: torch.nn.functional.normalize(t, dim=-1).detach(),
        lambda t: torch.scatter_add(torch.zeros(3, 2), 1, torch.zeros(3, 6, dtype=torch.int64), t),
        lambda t: torch.nn.functional.scaled_dot_product_attention(t[None], t[None], t[None])[0],
    ],
)
def test_values_are_those_of_the_function(edit: Edit, function: Any) -> None:
    """Run in the program, on other data than the example: what PyTorch gives for the function itself."""
    x = torch.randn(3, 4)
    inside = edit.program.run({"x": x})  # the original still runs
    assert inside["output"].shape == (3, 5)
    module = edit.program.to_module().eval()
    with torch.no_grad():
        wanted = function(module.one.bias + x @ module.one.weight.T)
    made = inline(edit, function, node_of(edit, "linear"), like=node_of(edit, "relu"))
    torch.testing.assert_close(run_with(edit, made, x), wanted)


@dataclass(frozen=True)
class Pair:
    """A structure of one's own."""

    few: Any
    rest: Any = None


pytree.register_dataclass(Pair)


def test_structures_pass_in_and_out(edit: Edit) -> None:
    """Nodes stand for tensors in dicts, dataclasses and tuples, as arguments and as results; the rest is as it was."""
    node, other = node_of(edit, "linear"), node_of(edit, "relu")

    def function(pair: Pair, many: dict[str, Any], count: int) -> Any:
        assert pair.rest is None
        assert many["plain"] == "text"
        return {"sum": pair.few + many["x"]}, Pair(many["x"][:, :count]), count

    first, pair, count = inline(
        edit, function, Pair(node), {"x": other, "plain": "text"}, 2, like=node_of(edit, "linear_1")
    )
    assert isinstance(first["sum"], Node)
    assert tuple(first["sum"].meta["val"].shape) == (3, 6)
    assert tuple(pair.few.meta["val"].shape) == (3, 2)
    assert pair.rest is None
    assert count == 2


def test_what_is_given_back_unchanged_is_the_node_itself(edit: Edit) -> None:
    """A function that returns its argument, or a detached one, inserts nothing."""
    node = node_of(edit, "linear")
    before = len(list(edit.graph.nodes))
    assert inline(edit, lambda t: t, node, like=node_of(edit, "relu")) is node
    assert inline(edit, lambda t: t.detach(), node, like=node_of(edit, "relu")) is node
    assert len(list(edit.graph.nodes)) == before


def test_calls_stand_in_front_of_the_one_named_and_are_its(edit: Edit) -> None:
    """New calls are right in front of `like`, are remembered as inserted, and belong to its place in the source."""
    like = node_of(edit, "linear_1")
    made = inline(edit, lambda t: t.exp().log(), node_of(edit, "relu"), like=like)
    order = list(edit.graph.nodes)
    assert order.index(made) == order.index(like) - 1
    assert [node.name for node in edit.inserted] == [order[order.index(made) - 1].name, made.name]
    assert made.meta.get("nn_module_stack") == like.meta.get("nn_module_stack")


def test_values_may_not_decide_what_is_computed(edit: Edit) -> None:
    """A function that looks at values is an error, not a wrong program."""
    with pytest.raises(Exception, match=r"data-dependent|Could not|unbacked|item"):
        inline(edit, lambda t: t if float(t.sum()) > 0 else -t, node_of(edit, "linear"), like=node_of(edit, "relu"))
