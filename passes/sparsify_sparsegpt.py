"""Set weights to zero, and let those that stay make up for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.errors import BadOption
from graphopt.passes.layer_by_layer import LayerByLayer
from graphopt.passes.sparse_grid import Grid, best_of_each, prefix
from graphopt.passes.sparsify import Plan
from graphopt.passes.sparsify_wanda import by_norms
from graphopt.sparsity import Format

# How often the damping is made ten times stronger where the second moments cannot be inverted.
_TRIES = 6


@dataclass(frozen=True)
class SparsifySparsegpt(LayerByLayer):
    """Zero weights column by column, each time adding what is lost to the columns behind (optimal brain surgeon).

        before  linear (o=1 i=2) [[1, 2]]     two inputs that are always equal      keep=0.5
        after   linear (o=1 i=2) [[0, 3]]     the same outputs

    With H the second moments of what the layer reads, H^-1 = U^T U and U upper triangular, a weight is worth
    (w / U_jj)^2. What stays is chosen for `block` columns at once, with the weights as they are when it is their turn;
    N:M for each M columns. Layer after layer, on the inputs that are left when those in front are sparse. All layers
    keep the same share by default. Options are those of `Sparsify`, and

    damp: this share of the mean of H's diagonal is added to it.
    block: columns among which weights are compared, rounded up to whole groups and blocks.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
    arXiv:2301.00774. Differs: convolutions, groups included, and blocks of several outputs or inputs; exactly as many
    weights go as asked; layers of very many inputs are pruned by norms (Wanda), without an update.
    """

    name: ClassVar[str] = "sparsify-sparsegpt"
    whole_moments: ClassVar[bool] = True

    damp: float = 0.01
    block: int = 128

    def checked(self) -> Format:
        """See Sparsify."""
        if not 0 <= self.damp < float("inf") or self.block < 1:
            raise BadOption(
                what=f"{self.name}: damp={self.damp}, block={self.block}", way_out="damp is from 0, block from 1"
            )
        return super().checked()

    def pruned(self, plan: Plan, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor | None]:
        """See LayerByLayer."""
        if moments.dim() == 2:
            sums = plan.grid.sums(by_norms(weight, moments))
            return plan.grid.elements(plan.grid.pick(sums, plan.target)), None
        kept, new, _ = surgeon(plan.grid, weight, 2 * moments, plan.target, self.damp, self.block)
        return kept, new


def surgeon(
    grid: Grid, weight: Tensor, hessian: Tensor, target: float, damp: float = 0.01, block: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """SparseGPT for one layer.

    Args:
        grid: units of its matrix; not of whole kernels.
        weight: (outs, ins), float64.
        hessian: (groups, ins, ins), float64; inputs that are always zero have no say.
        target: elements that stay; N:M formats say themselves.
        damp, block: see `SparsifySparsegpt`.

    Returns:
        Which elements stay and their new values, (outs, ins), and the errors e = (w - q) / U_jj, (outs, ins): the sum
        of their squares is tr((W - W') H (W - W')^T) with the damped H, exactly.
    """
    form = grid.form
    groups, ins, _ = hessian.shape
    weight = weight.reshape(groups, -1, ins).clone()
    dead = hessian.diagonal(dim1=1, dim2=2) == 0
    weight.masked_fill_(dead[:, None], 0.0)
    upper = inverse_factor(hessian, damp)
    diagonal = upper.diagonal(dim1=1, dim2=2)
    kept = torch.zeros(grid.outs, ins, dtype=torch.bool)
    errors = torch.zeros_like(weight)
    step = math.lcm(form.cols, form.m)
    width = -(-block // step) * step
    stays = 0

    def worth(first: int, last: int) -> Tensor:
        """The scores of some columns, with the weights as they are now."""
        return (weight[..., first:last] / diagonal[:, None, first:last]).square().reshape(grid.outs, -1)

    for first in range(0, ins, width):
        last = min(first + width, ins)
        part = Grid(grid.outs, 1, last - first, form)
        if form.m == 1:
            sums = part.sums(worth(first, last))
            order = part.density(sums).flatten().sort(descending=True, stable=True).indices
            sizes = part.sizes.flatten()[order].cumsum(0)
            count = prefix(sizes, target * last / ins - stays)
            stays += int(sizes[count - 1]) if count else 0
            units = torch.zeros(len(order), dtype=torch.bool)
            units[order[:count]] = True
            kept[:, first:last] = part.elements(units.reshape(part.shape))
        for j in range(first, last):
            if form.m > 1 and j % form.m == 0:
                end = min(j + form.m, ins)
                group = Grid(grid.outs, 1, end - j, form)
                kept[:, j:end] = group.elements(best_of_each(group.sums(worth(j, end)), form.n, form.m))
            own = weight[..., j].clone()
            gone = own.masked_fill(kept[:, j].reshape(groups, -1), 0.0)
            errors[..., j] = gone / diagonal[:, None, j]
            weight[..., j:last] -= errors[..., j, None] * upper[:, j, None, j:last]
            weight[..., j] = own - gone
        weight[..., last:] -= errors[..., first:last] @ upper[:, first:last, last:]
    return kept, weight.reshape(grid.outs, ins), errors.reshape(grid.outs, ins)


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """U, upper triangular, with (H + damp mean(diag H) I)^-1 = U^T U, by group; inputs without products count as 1."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal[diagonal == 0] = 1.0
    mean = diagonal.mean(1, keepdim=True)
    for _ in range(_TRIES):
        damped = hessian + torch.diag_embed((damp * mean).expand(-1, hessian.shape[1]))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                return upper
        damp = max(10 * damp, 1e-6)
    # Nothing is known of how inputs go together: then none makes up for another.
    return torch.diag_embed(hessian.diagonal(dim1=1, dim2=2).clamp_min(1e-30).rsqrt())
