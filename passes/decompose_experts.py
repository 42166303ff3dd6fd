"""Take the weights of experts apart into two thin factors each, with some outputs kept exact."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import infer
from graphopt.edit import Edit
from graphopt.errors import BadOption, Decline
from graphopt.exported import op_name
from graphopt.passes.base import Pass
from graphopt.passes.checks import check_count, check_share
from graphopt.passes.experts import Mixture, mixtures

_aten = torch.ops.aten
_BATCHED = {"bmm", "matmul"}


@dataclass(frozen=True)
class DecomposeExperts(Pass):
    """Replace the stack W (experts, in, out) by U V + S: low rank, and a residual with whole output neurons.

        before  einsum(t c, e c f -> t e f)                                   e c f elements
        after   einsum(t c, e c r -> t e r) -> einsum(t e r, e r f -> t e f)  e r (c + f)

    For each expert a share `rows` of its output neurons, those that low rank renders worst, is kept as it is, and
    the others get a truncated singular value decomposition. The kept ones travel in the same two factors, as columns of
    the first and unit rows of the second. Stacks that would not get smaller stay. What may be given is one of

    rank: of each expert's factors, kept neurons included; or
    keep: the share of each stack's elements that stays;
    and
    rows: the share of output neurons that is kept exact, at most as many as the rank.
    exclude: patterns of mixtures' names that stay as they are.

    Source: Li et al., "Merge, Then Compress" (MC-SMoE), ICLR 2024, arXiv:2310.01334, after Li et al., LoSparse,
    arXiv:2306.11222. Differs: neurons are picked by what low rank loses of them, once, where they train with a schedule
    and pick by |weight x gradient|; the residual needs no sparse kernel, but its unit rows are stored.
    """

    name: ClassVar[str] = "decompose-experts"
    lossless: ClassVar[bool] = False

    rank: int | None = None
    keep: float | None = None
    rows: float = 0.0
    exclude: tuple[str, ...] = ()

    def apply(self, edit: Edit) -> None:
        if (self.rank is None) == (self.keep is None):
            raise BadOption(what=f"{self.name} takes one of rank and keep", way_out="give rank=32 or keep=0.3")
        check_count(self.name, "rank", self.rank)
        check_share(self.name, "keep", self.keep)
        if not 0 <= self.rows <= 1:
            raise BadOption(what=f"{self.name}: rows={self.rows:g}", way_out="give a share of outputs, from 0 to 1")
        found, declined = mixtures(infer(edit.program))
        for node, reason in declined:
            edit.decline(node, reason)
        if not found:
            edit.declined.append(Decline(edit.program.name, "there is no mixture of experts with stacked weights"))
        nodes = {node.name: node for node in edit.graph.nodes}
        for mixture in found:
            if any(fnmatchcase(mixture.name, each) for each in self.exclude):
                continue
            for stack in mixture.stacks:
                if stack.meta["val"].dim() == 3:
                    self._stack(edit, mixture, nodes[stack.name])

    def _stack(self, edit: Edit, mixture: Mixture, stack: Node) -> None:
        value = edit.tensor(stack)
        assert value is not None
        uses = _uses(stack)
        if isinstance(uses, str):
            edit.declined.append(Decline(edit.target(stack), uses))
            return
        turned = uses[0].turned
        weight = value.detach().double()
        weight = weight.mT if turned else weight
        _, ins, outs = weight.shape
        rank = self.rank or int((self.keep or 0) * ins * outs / (ins + outs))
        if rank < 1 or rank * (ins + outs) >= ins * outs:
            reason = f"rank {rank} is no smaller than {ins} x {outs}"
            edit.declined.append(Decline(edit.target(stack), reason))
            return
        front, back = decomposed(weight, rank, min(rank, int(self.rows * outs)))
        base, dtype = edit.target(stack), value.dtype
        v = edit.add_tensor(f"{base}.front", (front.mT if turned else front).to(dtype), parameter=True)
        u = edit.add_tensor(f"{base}.back", (back.mT if turned else back).to(dtype), parameter=True)
        for use in uses:
            use.replace(edit, v, u)
        edit.graph.erase_node(stack)
        edit.details.append({"mixture": mixture.name, "stack": base, "rank": rank})
        edit.count("stack")


def decomposed(weight: Tensor, rank: int, exact: int) -> tuple[Tensor, Tensor]:
    """Factors (experts, in, rank) and (experts, rank, out) of a stack (experts, in, out), float64.

    `exact` outputs of each expert, at most `rank`, come out as they are.
    """
    experts, ins, outs = weight.shape
    low = rank - exact
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    lost = weight - (u[..., :low] * s[:, None, :low]) @ vh[:, :low]
    chosen = lost.square().sum(1).topk(exact, dim=1).indices.sort(1).values  # experts, exact
    units = torch.nn.functional.one_hot(chosen, outs).to(weight.dtype)  # experts, exact, outs
    rest = weight * (1 - units.sum(1, keepdim=True))
    u, s, vh = torch.linalg.svd(rest, full_matrices=False)
    root = s.sqrt()
    kept = weight.gather(2, chosen[:, None, :].expand(experts, ins, exact))
    front = torch.cat([u[..., :low] * root[:, None, :low], kept], 2)
    back = torch.cat([root[:, :low, None] * vh[:, :low], units], 1)
    return front, back


# Where stacks are used ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Use:
    """A product with a stack, perhaps looked up by expert's number first. `turned`: the stack is (experts, out, in)."""

    product: Node
    look: Node | None
    operand: Node
    turned: bool

    def replace(self, edit: Edit, v: Node, u: Node) -> None:
        """Multiply with `v`, then with `u`, in the stack's place."""
        first, second = (self.looked(edit, each) for each in (v, u))
        node = self.product
        if op_name(node) == "aten.einsum":
            equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
            terms, _, out = equation.partition("->")
            subs = terms.split(",")
            place = operands.index(self.operand)
            other, summed, made = _letters(subs, out, place)
            new = next(letter for letter in "zyxwvuts" if letter not in equation)
            own = subs[place]
            thin = "".join(letter for letter in subs[other] if letter != summed)
            thin += "".join(letter for letter in own if letter not in thin + summed + made) + new
            spelled = f"{subs[other]},{own.replace(made, new)}->{thin}"
            between = edit.call(node.target, (spelled, [operands[other], first]), like=node)
            subs[other], subs[place] = thin, own.replace(summed, new)
            operands[other], operands[place] = between, second
            result = edit.call(node.target, (f"{','.join(subs)}->{out}", operands), like=node)
        else:
            rest = node.args[2:]
            between = edit.call(node.target, (node.args[0], first, *rest), node.kwargs, like=node)
            result = edit.call(node.target, (between, second, *rest), node.kwargs, like=node)
        edit.replace(node, result)
        if self.look is not None and not self.look.users:
            edit.graph.erase_node(self.look)

    def looked(self, edit: Edit, stack: Node) -> Node:
        """The stack, or its items that the lookup takes."""
        if self.look is None:
            return stack
        return edit.call(self.look.target, (stack, *self.look.args[1:]), self.look.kwargs, like=self.look)


def _uses(stack: Node) -> list[_Use] | str:
    """Every product with a stack; why that cannot be told."""
    found: list[_Use] = []
    for user in stack.users:
        name = op_name(user).removeprefix("aten.").partition(".")[0]
        looks = name in ("index", "index_select")
        for product in list(user.users) if looks else [user]:
            use = _use(product, user if looks else None, user if looks else stack)
            if use is None:
                return f"{product.name} is no product that can be taken apart"
            found.append(use)
    if len({use.turned for use in found}) != 1:
        return "its products sum over different dimensions"
    return found


def _use(product: Node, look: Node | None, operand: Node) -> _Use | None:
    name = op_name(product).removeprefix("aten.").partition(".")[0]
    if name in _BATCHED or "grouped_mm" in op_name(product):
        return _Use(product, look, operand, False) if product.args[1] is operand else None
    if name != "einsum":
        return None
    equation, operands = str(product.args[0]).replace(" ", ""), list(product.args[1])  # type: ignore[arg-type]
    terms, _, out = equation.partition("->")
    subs = terms.split(",")
    place = operands.index(operand)
    letters = _letters(subs, out, place)
    if "." in equation or letters is None:
        return None
    _, summed, made = letters
    own = subs[place]
    if {summed, made} != set(own[-2:]):
        return None
    return _Use(product, look, operand, own[-1] == summed)


def _letters(subs: list[str], out: str, place: int) -> Any:
    """The operand that a stack is multiplied with, the letter that is summed over and the one that comes of it."""
    for other, term in enumerate(subs):
        rest = "".join(sub for n, sub in enumerate(subs) if n not in (other, place))
        summed = [letter for letter in subs[place] if letter in term and letter not in out + rest]
        made = [letter for letter in subs[place][-2:] if letter not in term]
        if other != place and len(summed) == len(made) == 1:
            return other, summed[0], made[0]
    return None
