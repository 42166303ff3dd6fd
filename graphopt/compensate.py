"""Make up for what a shrink lost, without training: layers behind the cut are fitted anew on calibration data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import Axes, Axis, Choice, atoms, find, index, results_of, touched
from graphopt.axes.axes import operator_of
from graphopt.calibration import Source
from graphopt.calibration import calibration as read_calibration
from graphopt.cost import summary
from graphopt.edit import Edit
from graphopt.errors import Decline
from graphopt.exported import user_output_places
from graphopt.hold_out import Split
from graphopt.least_squares import Moments, Supports, supports_of, work_of
from graphopt.program import Program
from graphopt.record import Record
from graphopt.refit import BATCH_NORMS, Layer, layer_of
from graphopt.shrink import Indices, Key, checked
from graphopt.side_by_side import Batch, Side, dense_side, edited_side, peak_bytes, together

# The strengths that are tried, as shares of the mean variance of the inputs; at infinity only the bias moves.
RIDGES = (1e-9, 1e-4, 1e-2, 1e-1, 1.0, math.inf)
# More inputs than this are not solved for: the sums of products alone would take 300 MB.
MOST_INPUTS = 6144
# Nor are sparse rows, each with equations of its own, where that takes more multiply-adds: some ten seconds.
MOST_WORK = 4e11
# Values of all batches that are alive at once; with more, fewer batches are used.
MEMORY_BYTES = 1 << 30
# Rows that a layer is fitted to, at most, are so many, or four for each input.
ROWS = 8192
# What differs by less, relative to what is there, is rounding.
_ROUNDING = 1e-12


def compensate(
    axes: Axes, keep: Mapping[Key, Indices], after: Program, calibration: Source, *, merge: Collection[Axis | str] = ()
) -> Program:
    """Fit the layers of a shrunk program anew, so that they give what they gave before.

        small = shrink(axes, keep)
        small = compensate(axes, keep, small, "calib.npz")

    In graph order, on what the shrunk program really computes, so that errors from further up are made up for, too:

    * Layers behind the cut (linear, products with a stored matrix, convolutions) get the W' and b' that make
      |W' x' + b' - y|^2 + lam |W' - W|^2 least: x' is what they read now, y what they gave in the dense program, of the
      items that stay, W their sliced weight. Where the result is added to a residual, y is what makes the sum right.
      The bias moves where there is one, or a batch norm behind. The strength lam is that of RIDGES that does best on
      rows that are held out, a quarter of the data; at its last only the bias moves. Zeros of annotated weights stay.
    * Batch norms behind the cut get the statistics of what they meet now.

    Each is done only if it brings the result nearer to the dense one on the held-out rows, and all is taken back if the
    program's outputs are not nearer to the dense ones there. The record says what was done.

    Args:
        axes: of the dense program.
        keep: what stayed, as `shrink` took it.
        after: what `shrink` made.
        calibration: data, as `graphopt.calibration.calibration` takes it.
        merge: the axes whose items were merged: layers that produce such have nothing to be compared with.

    Sources: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, arXiv:1707.06168, and
    Luo et al., ThiNet, arXiv:1707.06342 (layers); Nagel et al., "Data-Free Quantization", arXiv:1906.04721 (biases);
    Li et al., EagleEye, ECCV 2020, arXiv:2007.02491 (batch norms). Differs: all layers behind the cut, not only those
    that lost inputs; what is compared follows from the axes; ridge and hold-out.
    """
    edit = Edit(after)
    compensate_in(edit, axes, keep, read_calibration(calibration, after), merge=merge)
    cost = summary(after)
    size: dict[str, Any] = {"flops": cost.total.flops, "params": cost.total.params, "bytes": cost.stored_bytes}
    record = Record(
        name="compensate",
        changed=dict(edit.changed),
        declined=tuple(edit.declined),
        details=tuple(edit.details),
        **{f"{key}_{side}": value for key, value in size.items() for side in ("before", "after")},
    )
    return after.replace(exported=edit.finish(), records=(*after.records, record))


def compensate_in(
    edit: Edit,
    axes: Axes,
    keep: Mapping[Key, Indices],
    batches: Sequence[Batch],
    *,
    merge: Collection[Axis | str] = (),
) -> None:
    """As `compensate`, in an edit of a program that was shrunk or made sparse; what was done goes into its record."""
    merged = frozenset(find(axes[key]) if isinstance(key, str) else find(key) for key in merge)
    with torch.inference_mode(False), torch.no_grad():
        _Compensation(edit, axes, checked(axes, keep), merged, batches).run()


class _Compensation:
    def __init__(
        self,
        edit: Edit,
        axes: Axes,
        keep: Mapping[Axis, Tensor | Choice],
        merged: frozenset[Axis],
        batches: Sequence[Batch],
    ) -> None:
        self.edit, self.axes, self.keep, self.merged = edit, axes, keep, merged
        fit = max(1, MEMORY_BYTES // max(1, peak_bytes(axes.program.graph) + peak_bytes(edit.graph)))
        if fit < len(batches):
            reason = f"compensation takes {fit} of {len(batches)} batches: more do not fit into memory"
            edit.declined.append(Decline(edit.program.name, reason))
        self.batches = batches[:fit]
        self.split = Split(len(self.batches))
        self.old: dict[Node, Tensor] = {}
        self.dense: Side = dense_side(axes.program, self.batches)
        self.small: Side = edited_side(edit, self.batches)
        addresses = [_address(edit, node) for node in edit.graph.nodes if edit.is_stored(node)]
        self.shared = Counter(filter(None, addresses))
        self.rows: list[dict[str, Any]] = []

    def run(self) -> None:
        """Fit what can be fitted, in order, and take all of it back if that does not help."""
        plain = self._outputs()
        outputs = 0.0, 0.0, 0.0
        for twin, node in together(self.dense, self.small):
            if twin is None:
                continue
            if node.op == "output":
                outputs = self._compare(twin, node, plain)
            elif operator_of(node) in BATCH_NORMS:
                self._statistics(twin, node)
            else:
                layer = layer_of(self.edit, node, self.shared)
                if isinstance(layer, Layer):
                    self._refit(twin, layer)
                elif layer is not None and self._is_consumer(twin, node):
                    self.edit.decline(node, f"not fitted anew: {layer}")
        before, after, size = outputs
        if not self.rows:
            return
        if after >= before:
            for node, tensor in self.old.items():
                self.edit.set_tensor(node, tensor)
            self.edit.decline(self.edit.graph.output_node(), "fitted layers bring the outputs no nearer: taken back")
            return
        self.edit.details += self.rows
        for row in self.rows:
            self.edit.count(f"{row['fitted']} fitted")
        self.edit.details.append(_row("outputs", "", before, after, size))

    # Layers -----------------------------------------------------------------------------------------------------------

    def _refit(self, twin: Node, layer: Layer) -> None:
        groups, outs, ins = layer.shape
        full = ins <= MOST_INPUTS
        if not full and layer.bias is None:
            return
        fit, held = (Moments(groups, ins if full else 0, outs) for _ in range(2))
        size = 0.0
        for batch in range(len(self.batches)):
            out = self.small.value(layer.node, batch)
            wanted = self._wanted(twin, layer.node, batch)
            if wanted is None:
                return
            target, dense = wanted
            drawn = self.split.drawn(batch, layer.rows_in(out), max(ROWS, 4 * ins))
            for moments, rows in zip((fit, held), drawn, strict=True):
                e = layer.outputs(target - out, rows)
                x = layer.inputs(self.small.value(layer.source, batch), out, rows) if full else e[..., :0]
                moments.add(x, e)
            size += float(layer.outputs(dense, drawn[1]).double().square().sum())
        before = held.ee
        if before <= _ROUNDING * size or not fit.count:
            return
        best, chosen = before, None
        supports = self._supports(layer)
        if supports is not None and work_of(supports) > MOST_WORK:
            self.edit.decline(layer.node, "only its bias is fitted anew: so many rows of so many weights take too long")
            full = False
        for ridge in RIDGES if full else (math.inf,):
            if math.isinf(ridge) and layer.bias is None:
                continue
            solved = fit.solve(ridge, shift=layer.bias is not None, supports=supports)
            error = held.error(*solved) if solved is not None else math.inf
            if solved is not None and error < best:
                best, chosen = error, (ridge, *solved)
        if chosen is None:
            self.edit.decline(layer.node, "not fitted anew: held-out rows come no nearer")
            return
        ridge, correction, shift = chosen
        self._keep_old(layer.weight, layer.bias)
        if math.isinf(ridge):
            correction = correction.new_zeros(groups, outs, ins)
        layer.add(self.edit, correction, shift)
        self.small.run(layer.node)
        what = "bias" if math.isinf(ridge) else "weight"
        self.rows.append(_row(self.axes.name_of(layer.weight), what, before, best, size))

    def _supports(self, layer: Layer) -> Supports | None:
        """Where a sparse weight has values; None for one that is not annotated."""
        name = self.edit.target(layer.weight)
        old = self.edit.program.annotations.get(name)
        form = self.edit.formats.get(name, None if old is None else old.format)
        weight = self.edit.tensor(layer.weight)
        return supports_of(layer.matrices(weight != 0)) if form is not None and weight is not None else None

    def _is_consumer(self, twin: Node, node: Node) -> bool:
        """Whether a call sums over a shrunk axis with a stored weight."""
        return any(
            self.axes.is_stored(operand) and touched(self.axes.dims[operand][dim], self.keep)
            for operand, dim in self.axes.sums.get(twin, ())
        )

    def _wanted(self, twin: Node, node: Node, batch: int) -> tuple[Tensor, Tensor] | None:
        """What the result should be, and what it was in the dense program: for the items that stay."""
        dense = self._kept(twin, batch)
        if dense is None or dense.shape != self.small.value(node, batch).shape:
            return None
        other = self._added(node)
        if other is None:
            return dense, dense
        twins = next((each for user in twin.users for each in user.all_input_nodes if each.name == other.name), None)
        residual = self._kept(twins, batch) if twins is not None else None
        now = self.small.value(other, batch)
        if residual is None or residual.shape != now.shape:
            return dense, dense
        return dense + (residual - now), dense

    def _added(self, node: Node) -> Node | None:
        """What a result is added to, where it is used for nothing else and that is known already."""
        users = list(node.users)
        if len(users) != 1 or operator_of(users[0]) != "add" or users[0].kwargs or len(users[0].args) != 2:
            return None
        others = [source for source in users[0].args if source is not node and isinstance(source, Node)]
        if len(others) != 1 or others[0] not in self.small.values:
            return None
        return others[0] if others[0].meta["val"].shape == node.meta["val"].shape else None

    def _kept(self, node: Node, batch: int) -> Tensor | None:
        """A value of the dense program, of the items that stay; None where they cannot be told apart."""
        value, dims = _first(self.dense.value(node, batch)), results_of(self.axes.dims[node])[0]
        if not isinstance(value, Tensor):
            return None
        for place, axis in enumerate(dims):
            if not touched(axis, self.keep):
                continue
            for atom in atoms(axis):
                choice = self.keep.get(atom)
                if atom in self.merged or (isinstance(choice, Choice) and find(choice.outer) not in atoms(axis)):
                    return None
            value = value.index_select(place, index(axis, self.keep))
        return value

    # Batch norms ------------------------------------------------------------------------------------------------------

    def _statistics(self, twin: Node, node: Node) -> None:
        source, mean, var = node.args[0], node.args[3], node.args[4]
        if not all(isinstance(each, Node) and self.edit.tensor(each) is not None for each in (mean, var)):
            return
        assert isinstance(source, Node)
        assert isinstance(mean, Node)
        assert isinstance(var, Node)
        before, size = self._apart(twin, node)
        if before <= _ROUNDING * size:
            return
        values = [self.small.value(source, batch) for batch in range(len(self.batches))]
        fitted = [self.split.fitted(batch, len(value)) for batch, value in enumerate(values)]
        new = batch_statistics([value[: len(own)] for value, own in zip(values, fitted, strict=True) if len(own)])
        self._keep_old(mean, var)
        last = self.edit.tensor(mean), self.edit.tensor(var)
        for each, value in zip((mean, var), new, strict=True):
            self.edit.set_tensor(each, value.to(self.old[each].dtype))
        self.small.run(node)
        after, _ = self._apart(twin, node)
        if after < before:
            self.rows.append(_row(self.axes.name_of(mean), "statistics", before, after, size))
            return
        for each, former in zip((mean, var), last, strict=True):
            assert former is not None
            self.edit.set_tensor(each, former)
        self.small.run(node)
        self.edit.decline(node, "statistics stay: held-out rows come no nearer with new ones")

    def _apart(self, twin: Node, node: Node) -> tuple[float, float]:
        """The squared difference to the dense program on held-out samples, and the square of what is there."""
        apart = size = 0.0
        for batch in range(len(self.batches)):
            now, wanted = _first(self.small.value(node, batch)), self._kept(twin, batch)
            if wanted is None or wanted.shape != now.shape:
                return 0.0, 0.0
            more = _squares(wanted, now, self.split.held(batch, len(now)))
            apart, size = apart + more[0], size + more[1]
        return apart, size

    # The whole --------------------------------------------------------------------------------------------------------

    def _outputs(self) -> list[list[Tensor]]:
        """What the program gives for each batch with held-out samples before anything is fitted."""
        results: list[list[Tensor]] = []
        for batch in self.batches:
            if not self.split.held(len(results), 1 << 30):
                results.append([])
                continue
            side = edited_side(self.edit, [batch])
            for node in side.steps():
                if node.op == "output":
                    results.append([side.value(each, 0) for each in self._results(node)])
        return results

    def _compare(self, twin: Node, node: Node, plain: list[list[Tensor]]) -> tuple[float, float, float]:
        """Of the outputs on held-out samples: squared difference to the dense ones before and now, and their square."""
        before = after = size = 0.0
        for batch, olds in enumerate(plain):
            for wanted, now, old in zip(self._results(twin), self._results(node), olds, strict=False):
                right, new = self.dense.value(wanted, batch), self.small.value(now, batch)
                if not isinstance(right, Tensor) or not right.is_floating_point() or right.shape != new.shape:
                    continue
                own = self.split.held(batch, len(new)) if new.dim() else range(1)
                scale = float(right.double().square().mean()) or 1.0  # outputs of several sizes count alike
                for at, value in enumerate((old, new)):
                    apart, square = _squares(right, value, own)
                    before += apart / scale * (at == 0)
                    after += apart / scale * (at == 1)
                size += square / scale
        return before, after, size

    def _results(self, output: Node) -> list[Node]:
        results = output.args[0]
        assert isinstance(results, (list, tuple))
        places = user_output_places(self.axes.program.exported)
        return [result for place in places if isinstance(result := results[place], Node)]

    def _keep_old(self, *nodes: Node | None) -> None:
        for node in nodes:
            if node is not None and node not in self.old:
                tensor = self.edit.tensor(node)
                assert tensor is not None
                self.old[node] = tensor


def batch_statistics(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel, (c,) float64, over batches (n, c, ...): those of all at once."""
    channels = values[0].shape[1]
    count, total, square = 0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for value in values:
        flat = value.double().transpose(0, 1).flatten(1)
        count, total, square = count + flat.shape[1], total + flat.sum(1), square + flat.square().sum(1)
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0) * count / max(count - 1, 1)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) else value


def _squares(wanted: Tensor, got: Tensor, rows: range) -> tuple[float, float]:
    if wanted.dim():
        wanted, got = wanted[rows.start : rows.stop], got[rows.start : rows.stop]
    wanted, got = wanted.double(), got.double()
    return float((wanted - got).square().sum()), float(wanted.square().sum())


def _address(edit: Edit, node: Node) -> int | None:
    tensor = edit.tensor(node)
    return None if tensor is None else tensor.untyped_storage().data_ptr()


def _row(where: str, what: str, before: float, after: float, size: float) -> dict[str, Any]:
    """A line of the record: root of the squared error relative to what the dense program gives, held-out rows."""
    errors = [math.sqrt(error / size) if size else 0.0 for error in (before, after)]
    return {"where": where, "fitted": what, "error_before": round(errors[0], 6), "error_after": round(errors[1], 6)}
