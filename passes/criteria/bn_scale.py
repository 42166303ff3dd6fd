"""How much a batch norm scales a channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes, Axis, find
from graphopt.errors import Decline
from graphopt.exported import op_name
from graphopt.passes.criteria.base import Criterion, Tally, stand_in

if TYPE_CHECKING:
    from graphopt.calibration import Calibration

_BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_with_update")
_NORMS = (*_BATCH_NORMS, "instance_norm", "group_norm", "layer_norm", "native_layer_norm", "rms_norm")


@dataclass(frozen=True)
class BnScale(Criterion):
    """The scale that batch norms give a channel, summed over all batch norms that have it.

        score_j = sum over batch norms |gamma_j|            (+ |beta_j| with `shift`)

    Batch norms must not be folded yet: it is what `prepare` leaves in the program. Axes without one get the norm of
    their weights, scaled to the same mean; `fallbacks` names them. Scales of different layers say little about each
    other unless they were trained to be sparse.

    Source: channel pruning of YOLOv8, arXiv:2509.12918, after Liu et al., "Learning Efficient Convolutional Networks
    through Network Slimming", ICCV 2017, arXiv:1708.06519. Differs: residual partners, which share their channels, add
    up.

    Attributes:
        shift: count |beta|, too: a channel with gamma = 0 still sends act(beta).
        every_norm: count the scales of group, instance, layer and RMS norms as well.
    """

    name: ClassVar[str] = "bn-scale"
    shift: bool = False
    every_norm: bool = False

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        own = self._scales(axes, wanted)
        others = [atom for atom in map(find, wanted) if atom not in own]
        return {**own, **stand_in(axes, others, own)}

    def fallbacks(self, axes: Axes, wanted: Sequence[Axis]) -> list[Decline]:
        """See Criterion."""
        own = self._scales(axes, wanted)
        reason = f"{self.name}: no batch norm has this axis; scored by the norm of its weights"
        return [Decline(axes.where(atom), reason) for atom in map(find, wanted) if atom not in own]

    def _scales(self, axes: Axes, wanted: Sequence[Axis]) -> dict[Axis, Tensor]:
        tally, tensors = Tally(wanted), axes.program.tensors
        found: dict[Axis, Tensor] = {}
        seen: set[str] = set()
        for node in axes.dims:
            for parameter in self._parameters(node):
                if parameter.name in seen or parameter.name not in tensors:
                    continue
                seen.add(parameter.name)
                values = tensors[parameter.name].detach().abs()
                for atom, sums in tally.sums(axes.dims[parameter], values).items():
                    found[atom] = found[atom] + sums if atom in found else sums
        return found

    def _parameters(self, node: Node) -> list[Node]:
        """gamma, and beta where that counts, of a norm; of any other node nothing."""
        if node.op != "call_function":
            return []
        name = op_name(node).removeprefix("aten.").partition(".")[0]
        if name not in (_NORMS if self.every_norm else _BATCH_NORMS):
            return []
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        wanted = ("weight", "bias") if self.shift else ("weight",)
        return [value for key in wanted if isinstance(value := given.get(key), Node)]
