"""Sparsification that looks at what each layer reads once those in front of it are sparse."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graphopt.edit import Edit
from graphopt.errors import Decline
from graphopt.passes.sparse_layers import SparseLayer
from graphopt.passes.sparsify import Plan, Scores, Sparsify
from graphopt.side_by_side import Side, edited_side, peak_bytes

# Values of all batches that are alive at once; with more, fewer batches are used.
MEMORY_BYTES = 1 << 30
# Rows that second moments are summed over, at most, are so many, or four for each input; drawn by chance, always alike.
ROWS = 8192
# Rows that are taken out of a value at once.
_CHUNK = 2048
# With more inputs than this their second moments alone would take half a gigabyte.
MOST_INPUTS = 8192


@dataclass(frozen=True)
class LayerByLayer(Sparsify):
    """Walk through the program, all calibration data at once, and prune each layer on what it reads then.

    The criterion only serves a global allocation and the rearrangement.
    """

    by_scores: ClassVar[bool] = False
    whole_moments: ClassVar[bool]  # whether `pruned` takes the whole matrix of second moments, not only its diagonal

    allocation: Literal["global", "uniform", "erk"] = "uniform"

    @abstractmethod
    def pruned(self, plan: Plan, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which elements stay, and new values.

        Args:
            plan: of the layer.
            weight: (outs, ins), float64.
            moments: (groups, ins, ins) or, without `whole_moments` or with too many inputs, (groups, ins): mean
                products of what the layer reads, float64.

        Returns:
            (outs, ins) bool, and (outs, ins) values, or None where kept weights stay as they are.
        """

    def prune(self, edit: Edit, plans: Sequence[Plan], scores: Scores) -> None:
        """See Sparsify."""
        data = self.read_calibration(edit)
        fit = max(1, MEMORY_BYTES // max(1, peak_bytes(edit.graph)))
        if fit < len(data):
            reason = f"{self.name} takes {fit} of {len(data)} batches: more do not fit into memory"
            edit.declined.append(Decline(edit.program.name, reason))
        count = min(fit, len(data))
        side = edited_side(edit, data[:count])
        by_node = {plan.layer.node: plan for plan in plans}
        last = max((n for n, node in enumerate(side.nodes) if node in by_node), default=0)
        known: tuple[object, Tensor] = None, torch.empty(0)
        for place, node in enumerate(side.steps()):
            if (plan := by_node.get(node)) is not None:
                key = _reads(plan.layer)
                if known[0] != key or key is None:
                    known = key, self._moments(edit, side, plan.layer, count)
                self._prune(edit, plan, known[1])
                side.run(node)
            if place == last:
                break

    def _prune(self, edit: Edit, plan: Plan, moments: Tensor) -> None:
        layer = plan.layer
        finite = bool(moments.isfinite().all())
        if not finite:
            edit.declined.append(Decline(layer.name, "what it reads on the calibration data is not finite"))
        if plan.is_whole or not finite:
            self.put(edit, plan, torch.ones(layer.outs, layer.ins, dtype=torch.bool))
            return
        weight = edit.tensor(layer.weight)
        assert weight is not None
        self.put(edit, plan, *self.pruned(plan, layer.matrix(weight).double(), moments))

    def _moments(self, edit: Edit, side: Side, layer: SparseLayer, batches: int) -> Tensor:
        """Mean products of a layer's inputs, of rows that are drawn from all batches."""
        groups = layer.layer.groups
        whole = self.whole_moments and layer.ins <= MOST_INPUTS
        if self.whole_moments and not whole:
            reason = f"{layer.ins} inputs are too many for {self.name}: pruned by their norms, weights stay as they are"
            edit.declined.append(Decline(layer.name, reason))
        total = torch.zeros(groups, layer.ins, *([layer.ins] if whole else []), dtype=torch.float64)
        most, seen = max(ROWS, 4 * layer.ins), 0
        for batch in range(batches):
            value, out = side.value(layer.layer.source, batch), side.value(layer.node, batch)
            rows = layer.layer.rows_in(out)
            chosen, share = torch.arange(rows), -(-most // batches)
            if rows > share:
                chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(batch))[:share]
            seen += len(chosen)
            for part in chosen.split(_CHUNK):
                x = layer.rows(value, out, part).double()
                if whole:
                    total.baddbmm_(x.mT, x)
                else:
                    total += x.square().sum(1)
        return total / max(seen, 1)


def _reads(layer: SparseLayer) -> object:
    """Equal for layers that read the same rows, as queries, keys and values do."""
    own = layer.layer
    options = tuple((name, str(value)) for name, value in own.options.items())
    return (own.source.name, own.kernel, own.groups, own.flipped, options)
