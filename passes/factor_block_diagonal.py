"""Take linear layers apart into a block-diagonal factor and a second one, block-diagonal (Monarch) or dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Edit
from graphopt.exported import op_name
from graphopt.passes.checks import check_count
from graphopt.passes.factoring import Factoring, Factors, Seen
from graphopt.passes.layers import LINEAR, Layer, layer_of

_aten = torch.ops.aten


@dataclass(frozen=True)
class FactorBlockDiagonal(Factoring):
    """Replace y = W x by a product of two factors of which the first, or both, are block-diagonal.

        before  linear (o=768 i=768)
        after   reshape (t b=4 i=192) -> bmm (b=4 t (l=4 q)) -> shuffle (l=4 t (b=4 q)) -> bmm (l=4 t o=192) -> shuffle
        after   reshape (t b=4 i=192) -> bmm (b=4 t q) -> reshape (t (b=4 q)) -> linear (o=768 (b=4 q))

    The first form is "shuffle" (BlockShuffle, a Monarch matrix): each of b blocks of inputs gives q values to each of b
    blocks of outputs; outputs of a block lie b apart, as the second shuffle leaves them. The second is "dense"
    (BlockDense): each block of inputs gives q values, which all outputs read. Seen so, W is a grid of b x b (or 1 x b)
    blocks of rank q each, and the truncated singular value decomposition of each block is the nearest such W. Of
    calibration data the first factor knows nothing; the second is then fitted to it by least squares.

    Multiply-adds for each row: b q (i + o), and q (i + b o). Layers that would not get smaller, and sizes that are no
    multiples of b, stay. The new axis q can be shrunk like any other. Options are those of `Factoring` (`rank` is q),
    and

    form: "shuffle" or "dense".
    blocks: b.

    Source: Wei et al., "Building on Efficient Foundations", NeurIPS 2024, arXiv:2406.16450; projection: Dao et al.,
    Monarch, ICML 2022, arXiv:2204.00595. Differs: q is free, where BlockShuffle has min(i, o) / b^2.
    """

    name: ClassVar[str] = "factor-block-diagonal"

    form: Literal["shuffle", "dense"] = "shuffle"
    blocks: int = 4

    def check(self) -> None:
        """See Factoring."""
        super().check()
        check_count(self.name, "blocks", self.blocks)

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks of outputs and of inputs W is seen as."""
        return (self.blocks if self.form == "shuffle" else 1), self.blocks

    def layer(self, edit: Edit, node: Node) -> Layer | str | None:
        """See Factoring."""
        if node.op != "call_function" or op_name(node) != LINEAR:
            return None
        layer = layer_of(edit, node)
        rows, columns = self.grid
        if isinstance(layer, Layer) and (layer.outs % rows or layer.ins % columns):
            return f"{layer.outs} x {layer.ins} is no grid of {rows} x {columns} blocks"
        return layer

    def per_rank(self, layer: Layer) -> tuple[int, int]:
        """See Factoring."""
        rows, columns = self.grid
        elements = rows * layer.ins + columns * layer.outs
        return elements, layer.second * elements

    def factors(self, layer: Layer, weight: Tensor, bias: Tensor | None, seen: Seen | None) -> Factors:
        """See Factoring."""
        rows, columns = self.grid
        # Output o = i rows + l is the i-th of block l: (i l) (k j) -> l k i j
        grid = weight.detach().double().reshape(layer.outs // rows, rows, columns, layer.ins // columns)
        u, s, vh = torch.linalg.svd(grid.permute(1, 2, 0, 3), full_matrices=False)
        root = s.sqrt()
        moments = None if seen is None else seen[0]
        return _Grid(u * root[..., None, :], root[..., None] * vh, s.square().sum((0, 1)), weight, moments)


@dataclass(frozen=True)
class _Grid(Factors):
    """U (l, k, o, q) and V (l, k, q, i) of full rank, most important first, and what a fit of U takes."""

    left: Tensor
    right: Tensor
    energy: Tensor
    weight: Tensor
    moments: Tensor | None

    def put(self, edit: Edit, layer: Layer, rank: int) -> None:
        """See Factors."""
        u, v = self.left[..., :rank], self.right[..., :rank, :]
        rows, columns, outs, _ = u.shape
        back = u.permute(0, 2, 1, 3).reshape(rows, outs, columns * rank)
        if self.moments is not None:
            back = self._fitted(v, self.moments)
        front = v.permute(1, 3, 0, 2).reshape(columns, -1, rows * rank)  # k i (l q)
        _put(edit, layer, front, back, rank)

    def _fitted(self, v: Tensor, moments: Tensor) -> Tensor:
        """The second factor (l, o, (k q)) that is nearest to W in what comes out, for the first factor as it is."""
        fitted = []
        for block in range(len(v)):
            thin = torch.block_diag(*v[block])  # ((k q), in)
            own = self.weight.detach().double()[block :: len(v)]
            gram = thin @ moments @ thin.T
            fitted.append(own @ moments @ thin.T @ torch.linalg.pinv(gram, hermitian=True, rtol=1e-10))
        return torch.stack(fitted)


def _put(edit: Edit, layer: Layer, front: Tensor, back: Tensor, rank: int) -> None:
    """Replace a linear layer by its factors: front (k, i, (l q)), back (l, o, (k q))."""
    node, old, bias = layer.node, layer.node.args[1], layer.bias
    assert isinstance(old, Node)
    rows, columns, times = len(back), len(front), layer.second
    batch = list(node.meta["val"].shape[:-1])
    dtype = node.meta["val"].dtype

    def call(target: Any, *args: Any) -> Node:
        return edit.call(target, args, like=node)

    v = edit.add_tensor(f"{layer.name}.front.weight", front.to(dtype), parameter=True)
    x = call(_aten.reshape.default, layer.source, [times, columns, layer.ins // columns])
    z = call(_aten.bmm.default, call(_aten.permute.default, x, [1, 0, 2]), v)  # k t (l q)
    if rows == 1:
        u = edit.add_tensor(f"{layer.name}.back.weight", back[0].to(dtype), parameter=True)
        z = call(_aten.permute.default, z, [1, 0, 2])
        z = call(_aten.reshape.default, z, [*batch, columns * rank])
        y = call(_aten.linear.default, z, u, *([bias] if bias is not None else []))
    else:
        u = edit.add_tensor(f"{layer.name}.back.weight", back.mT.to(dtype), parameter=True)
        z = call(_aten.reshape.default, z, [columns, times, rows, rank])
        z = call(_aten.permute.default, z, [2, 1, 0, 3])
        z = call(_aten.reshape.default, z, [rows, times, columns * rank])
        y = call(_aten.permute.default, call(_aten.bmm.default, z, u), [1, 2, 0])  # t o l
        y = call(_aten.reshape.default, y, [*batch, layer.outs])
        y = y if bias is None else call(_aten.add.Tensor, y, bias)
    edit.replace(node, y)
    edit.graph.erase_node(old)
