"""How far a program's inner values bend, all the way to its end, when an item goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphopt.axes import Axes, Axis, atoms
from graphopt.errors import BadOption, Decline
from graphopt.passes.criteria.base import Criterion, Tally, data_of, stand_in
from graphopt.passes.criteria.trajectory import Suffix, everything, features_of

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class Optin(Criterion):
    """The trajectory criterion: remove one item, run what follows, and measure how far features and output moved.

        D(F, F') = || M - M' ||_F^2        M: Gram matrix of the rows of F, each of length 1
        T(u)     = sum over features F behind u  D(F, F without u)
        KL(u)    = temperature^2 sum KL(softmax(output) || softmax(output without u))
        score_u  = share (T + 10^int(log10 T - log10 KL - log10 balance) KL)

    Features are the values that everything passes through (the residual stream after each addition, a layer's output in
    a chain), or the inputs of layers in a program without such. Their rows are batch and positions, their columns the
    channels. An item goes by being zero wherever it is computed. Where the power of ten is undefined (T or KL is zero)
    its mean over all items serves. The cost is that of running what follows once for each item and sample; values in
    front are computed once, and several items run at a time.

    Source: Khaki and Plataniotis, "The Need for Speed: Pruning Transformers with One Recipe", ICLR 2024,
    arXiv:2403.17921. Differs: any axis of any program; Gram matrices of each batch, not across batches; norms take
    statistics with the item's zeros; for outputs of one number the squared relative change in the place of KL; fewer
    samples and rows, as each costs time. The factor by an item's index that the published code has is left out.

    Attributes:
        samples: of the calibration data, at most (128 in the paper).
        rows: of a feature in a Gram matrix, at most, drawn from batch and positions (768 in the paper).
        balance: T to KL.
        temperature: its square multiplies KL.
        head_share: of heads and what is in them, against neurons and channels.
        last_share: of items with but one feature behind them.
        memory_mib: what the values of the items that run at a time may take, about.
        seed: of the rows.
    """

    name: ClassVar[str] = "optin"
    needs_calibration: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    samples: int = 8
    rows: int = 256
    balance: float = 10.0
    temperature: float = 4.0
    head_share: float = 0.5
    last_share: float = 0.5
    memory_mib: int = 256
    seed: int = 0

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        if self.balance <= 0 or self.samples < 1 or self.rows < 1:
            raise BadOption(
                what="optin: balance, samples and rows must be positive", way_out="leave them out for defaults"
            )
        tally = Tally(wanted)
        features = features_of(axes)
        suffixes = {atom: suffix for atom in tally.wanted if (suffix := Suffix.of(axes, atom, features)) is not None}
        bend, output = tally.zeros(), tally.zeros()
        seen = 0
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused ones run one item at a time
            for batch in data_of(axes, calibration):
                values = everything(axes.program, batch)
                generator = torch.Generator().manual_seed(self.seed + seen)
                rows = {node: self._rows(axes, node, values[node], generator) for node in features}
                for atom, suffix in suffixes.items():
                    moved, apart = suffix.distances(values, rows, self.memory_mib << 20)
                    bend[atom] += moved
                    output[atom] += self.temperature**2 * apart
                seen += max((len(value) for value in batch.values() if value.dim()), default=1)
                if seen >= self.samples:
                    break
        found = self._balanced({atom: (bend[atom], output[atom]) for atom in suffixes})
        for atom, suffix in suffixes.items():
            if axes.role(atom) in ("head", "head_dim", "query_group"):
                found[atom] *= self.head_share
            if len(suffix.features) <= 1:
                found[atom] *= self.last_share
        return {**found, **stand_in(axes, [atom for atom in tally.wanted if atom not in found], found)}

    def fallbacks(self, axes: Axes, wanted: Sequence[Axis]) -> list[Decline]:
        """See Criterion."""
        features = features_of(axes)
        reason = f"{self.name}: no computed value has this axis; scored by the norm of its weights"
        without = [atom for atom in Tally(wanted).wanted if Suffix.of(axes, atom, features) is None]
        return [Decline(axes.where(atom), reason) for atom in without]

    def _rows(self, axes: Axes, node: Node, value: Tensor, generator: torch.Generator) -> tuple[int, Tensor]:
        """Which dimension has a feature's columns, and the rows of it that count."""
        named = [
            place
            for place, dim in enumerate(axes.dims[node])
            if any(axes.role(atom) in ("channel", "embedding", "neuron") for atom in atoms(dim))
        ]
        place = named[-1] if named else 1 if value.dim() > 3 else value.dim() - 1
        count = value.numel() // max(value.shape[place], 1)
        return place, torch.randperm(count, generator=generator)[: self.rows].sort().values

    def _balanced(self, parts: dict[Axis, tuple[Tensor, Tensor]]) -> dict[Axis, Tensor]:
        """T + scale KL, the scale a power of ten for each item."""
        if not parts:
            return {}
        bend = torch.cat([moved for moved, _ in parts.values()])
        apart = torch.cat([apart for _, apart in parts.values()])
        defined = (bend > 0) & (apart > 0)
        powers = (bend.clamp_min(1e-300).log10() - apart.clamp_min(1e-300).log10() - math.log10(self.balance)).trunc()
        scales = torch.pow(10.0, powers)
        usual = float(scales[defined].mean()) if bool(defined.any()) else 1.0
        total = bend + torch.where(defined, scales, usual) * apart
        return dict(zip(parts, total.split([len(moved) for moved, _ in parts.values()]), strict=True))
