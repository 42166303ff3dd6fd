"""What a program costs, in the quantity of a budget, by how many elements of each layer's weight stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.axes import infer
from graphopt.budget import Budget, Floats
from graphopt.cost import latency_model
from graphopt.cost.sparse_product import sparse_seconds
from graphopt.edit import Edit
from graphopt.passes.sizes import amount
from graphopt.passes.sparse_layers import SparseLayer
from graphopt.sparsity import Format

# Of these quantities zeros save something.
BUDGETS = ("flops", "macs", "params", "latency")


@dataclass(frozen=True)
class Bill:
    """`whole` is what the program costs without zeros, `of` what it does where so many elements of each layer stay."""

    whole: float
    of: Callable[[Floats], float]


def bill(edit: Edit, budget: Budget, layers: Sequence[SparseLayer], form: Format, target: Any = None) -> Bill:
    """The costs of a program in one of BUDGETS; of latency, in seconds, an estimate for the target."""
    if budget.kind == "latency":
        return _latency(edit, layers, form, target)
    each = {"flops": 2, "macs": 1}.get(budget.kind, 0)
    costs = [each * layer.times or 1 for layer in layers]
    whole = amount(edit.program, budget.kind)
    rest = whole - sum(cost * layer.size for cost, layer in zip(costs, layers, strict=True))
    return Bill(whole, lambda kept: rest + sum(cost * own for cost, own in zip(costs, kept, strict=True)))


def _latency(edit: Edit, layers: Sequence[SparseLayer], form: Format, target: Any) -> Bill:
    if isinstance(target, str):
        from graphopt import targets

        target = targets.resolve(target)
    seconds = {work.node.name: taken for work, taken in latency_model(infer(edit.program), target).rows()}
    own = [seconds.get(layer.node.name, 0.0) for layer in layers]
    rest = sum(seconds.values()) - sum(own)

    def of(kept: Floats) -> float:
        shares = (count / layer.size for count, layer in zip(kept, layers, strict=True))
        return rest + sum(sparse_seconds(each, share, form.rows) for each, share in zip(own, shares, strict=True))

    return Bill(rest + sum(own), of)
