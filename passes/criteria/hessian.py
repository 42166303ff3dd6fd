"""What the loss changes by to second order when an item goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis, atoms, find
from graphopt.observe import Gradients, gradients
from graphopt.passes.criteria.base import Elementwise, Member, Tally, checked_choice, data_of, members
from graphopt.passes.criteria.taylor import names_of, products, signed_sums
from graphopt.passes.criteria.uses import op

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class Hessian(Elementwise):
    """Second-order saliency of a whole item, with the Hessian as the outer product of gradients (NViT).

        score_j = mean over batches ( sum g_w w / n )^2       w over all parameters of item j, with their signs
        fisher    score_j = mean over samples  sum 1/2 (g_w w)^2   (optimal brain damage)

    n makes items that span several tensors comparable with those that span one. With "tensors" it is in how many
    weights the item has a slice of its own, where q, k and v in one tensor count as three; "nvit" has the paper's table
    by role: the embedding width the number of blocks, heads 6, head sizes of queries and keys 2, all others 1. With
    "none", the default, n = 1, the second-order term itself: on the digits network of the tests that agrees best with
    what removing single items really does, across axes.

    Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023, arXiv:2110.04869;
    `fisher` is LeCun et al., "Optimal Brain Damage", NIPS 1989. Differs: all parameters of an item count, where the
    published code leaves out some (of heads the output projection, of query and key sizes the keys); the mean over all
    batches, no moving average over steps of pruning. The term for latency belongs to the allocation.

    Attributes:
        fisher: the sum of squares of each sample's gradients instead; as many backward passes as samples.
        normalise: "tensors", "nvit" or "none". Not with `fisher`.
        loss: "auto", "labels", "distill" or "fisher".
        per_sample: square the sum of each sample's gradients, not of a batch's mean; a backward pass for each.
        draws: with "distill" and "fisher" go through the data again, with other noise, until so many sums were squared:
            the mean of a few squares is mostly chance.
    """

    name: ClassVar[str] = "hessian"
    needs_calibration: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    fisher: bool = False
    normalise: str = "none"
    loss: str = "auto"
    per_sample: bool = False
    draws: int = 32

    def elements(self, axes: Axes, calibration: Calibration | None) -> Iterator[tuple[Member, Tensor]]:
        """See Elementwise: half the mean over samples of (g w)^2."""
        found = members(axes)
        totals = [torch.zeros_like(member.tensor, dtype=torch.float64) for member in found]
        count = 0
        data = data_of(axes, calibration)
        for sample in gradients(axes.program, data, self.loss, wanted=names_of(found), per_sample=True):
            count += 1
            for member, total in zip(found, totals, strict=True):
                total += products(member, sample).square() / 2
        for member, total in zip(found, totals, strict=True):
            yield member, total / max(count, 1)

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        checked_choice(self.name, "normalise", self.normalise, ("tensors", "nvit", "none"))
        if self.fisher:
            return super().scores(axes, wanted, calibration)
        tally = Tally(wanted)
        sizes = self._sizes(axes, tally)
        total, count = tally.zeros(), 0
        for sums in signed_sums(axes, tally, self._batches(axes, data_of(axes, calibration))):
            count += 1
            for atom, values in sums.items():
                total[atom] += (values / sizes[atom]).square()
        return {atom: score / max(count, 1) for atom, score in total.items()}

    def _batches(self, axes: Axes, data: Calibration) -> Iterator[Gradients]:
        """Gradients of each batch or sample; where the loss has noise of its own, of as many draws as are wanted."""
        names = names_of(members(axes))
        fixed = self.loss == "labels" or (self.loss == "auto" and data.labels is not None)
        draws = 1 if fixed or self.per_sample else -(-self.draws // max(len(data), 1))
        for draw in range(draws):
            seed = draw * len(data)  # that of a batch is this plus its place
            yield from gradients(axes.program, data, self.loss, wanted=names, per_sample=self.per_sample, seed=seed)

    def _sizes(self, axes: Axes, tally: Tally) -> dict[Axis, float]:
        """n for each wanted atom."""
        if self.normalise == "none":
            return dict.fromkeys(tally.wanted, 1.0)
        found = dict.fromkeys(tally.wanted, 0.0)
        consumed: set[Axis] = set()
        for member in members(axes):
            if member.tensor.dim() > 1:
                for atom, places in tally.atoms_of(member.dims).items():
                    found[atom] += sum(copies(axes, member.dims[place], atom, member.summed[place]) for place in places)
                    if any(member.summed[place] for place in places):
                        consumed.add(atom)
        if self.normalise == "tensors":
            return {atom: max(count, 1.0) for atom, count in found.items()}
        blocks = sum(op(node) in ("scaled_dot_product_attention", *_SOFTMAX) for node in axes.dims)
        table = {"embedding": max(blocks, 1), "head": 6, "query_group": 6}
        for atom in found:
            queries = axes.role(atom) == "head_dim" and atom not in consumed
            found[atom] = float(2 if queries else table.get(axes.role(atom), 1))
        return found


_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")


def copies(axes: Axes, dim: Axis, atom: Axis, summed: bool) -> int:
    """How many slices of its own an item of `atom` has in a dimension of a weight: 3 for a head in (qkv heads dim).

    What a layer gives side by side are such slices; what it sums over together (channel height width) is one.
    """
    dim, atom = find(dim), find(atom)
    if dim is atom:
        return 1
    if dim.kind is None:
        return 0
    if dim.kind == "sum":
        return sum(copies(axes, part, atom, summed) for part in dim.parts)
    own = next((n for part in dim.parts if (n := copies(axes, part, atom, summed))), 0)
    for part in dim.parts:
        inner = atoms(part)
        beside = all(other.pinned and axes.role(other) in ("", "neuron") for other in inner)
        if beside and not summed and atom not in inner:
            own *= part.extent
    return own
